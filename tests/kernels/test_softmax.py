"""Softmax attention: the tiled form and its gradients against the formula in float64."""

import functools
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subquad.kernels import dispatch, gpu, softmax
from subquad.kernels.softmax import plan, sets, xla
from subquad.lra.bench import measure
from tests.kernels import dense
from tests.kernels.dense import TOLERANCES, draw
from tests.oracle import relative_error


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so small that short inputs take many steps, with a ragged last tile."""
    monkeypatch.setattr(plan, "tile_sizes", lambda rows, queries, keys, reach: (min(queries, 32), min(keys, 16)))


def run(arrays, cotangents, implementation, bias=None, **options):
    """(out, lse) and the gradients of query, key, value (and bias)."""

    def attend(query, key, value, bias=None):
        return softmax.attention(query, key, value, bias=bias, return_lse=True, implementation=implementation, **options)

    return dense.run(attend, arrays if bias is None else [*arrays, bias], cotangents)


def check(arrays, cotangents, dtype="float32", bias=None, implementation="xla", slack=1, **options):
    """Compares an implementation with the formula: out, lse and every gradient."""
    result = run(arrays, cotangents, implementation, bias, **options)
    dense.compare(result, dense.formula(arrays, cotangents, bias, **options), dtype, slack)
    (out, lse), grads = result
    return out, lse, grads


@pytest.mark.parametrize("is_causal", [False, True])
def test_reference_is_the_formula(is_causal):
    check(*draw(63), is_causal=is_causal, implementation="reference")


# Lengths and dtypes of one tile: test_suite.py.
@pytest.mark.parametrize(("length", "is_causal"), [(7, True), (100, False), (129, True), (300, False)])
def test_odd_lengths_in_many_tiles(small_tiles, length, is_causal):
    check(*draw(length, batch=1), is_causal=is_causal)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_dtypes(small_tiles, dtype):
    check(*draw(129, batch=1, dtype=dtype), dtype)


@pytest.mark.parametrize(
    ("queries", "keys", "is_causal"), [(1, 300, True), (300, 1, True), (63, 129, True), (129, 63, True), (129, 63, False)]
)
def test_queries_and_keys_of_different_lengths(small_tiles, queries, keys, is_causal):
    check(*draw(queries, keys), is_causal=is_causal)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_heads_and_other_value_features(small_tiles, kv_heads):
    arrays, cotangents = draw(100, 70, kv_heads=kv_heads, values=5)
    out, *_ = check(arrays, cotangents)
    query, key, value = arrays
    spread = (jnp.repeat(x, 4 // kv_heads, axis=2) for x in (key, value))
    np.testing.assert_allclose(out, softmax.attention(query, *spread), atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "parts"),
    [
        ((1, 1, 1, 1), (2, 2)),
        ((2, 1, 1, 70), (1, 2)),
        ((1, 4, 50, 1), (2, 1)),
        ((1, 1, 50, 70), (2, 2)),
        ((2, 4, 1, 1), (2, 2)),
        ((2, 4, 50, 70), (1, 1)),
        ((2, 4, 50, 70), (2, 2)),
    ],
)
def test_masks_and_biases_of_every_broadcast_shape(small_tiles, monkeypatch, shape, parts):
    monkeypatch.setattr(plan, "parts_of", lambda *sizes: (parts[0], 1, parts[1]))
    rng = np.random.default_rng(1)
    mask, bias = rng.random(shape) < 0.7, rng.normal(size=shape).astype(np.float32)
    arrays, cotangents = draw(50, 70, kv_heads=2)
    *_, grads = check(arrays, cotangents, mask=jnp.asarray(mask), bias=jnp.asarray(bias))
    assert grads[3].shape == shape


def test_bias_of_minus_infinity_hides_a_key(small_tiles):
    arrays, cotangents = draw(50)
    mask = np.random.default_rng(2).random((1, 4, 50, 50)) < 0.6
    mask[:, :, 7] = False
    bias = jnp.where(mask, 0.0, -jnp.inf)
    (out, _), grads = run(arrays, cotangents, "xla", bias)
    (want, _), want_grads = run(arrays, cotangents, "xla", mask=jnp.asarray(mask))
    np.testing.assert_array_equal(out, want)
    assert np.isfinite(np.asarray(grads[3])).all()
    for grad, expected in zip(grads, want_grads, strict=False):
        np.testing.assert_allclose(grad, expected, atol=1e-6)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_rows_that_see_nothing(small_tiles, implementation):
    (query, key, value), cotangents = draw(50)
    mask = np.ones((2, 1, 50, 50), bool)
    mask[:, :, [0, 13, 49]] = False  # three rows that see nothing
    mask[1, :, :, 20:] = False
    arrays = [query * 40, key, value]
    (out, lse), grads = run(arrays, cotangents, implementation, mask=jnp.asarray(mask))
    assert (np.asarray(out)[:, [0, 13, 49]] == 0).all() and np.isneginf(lse)[:, [0, 13, 49]].all()
    assert (np.asarray(grads[0])[:, [0, 13, 49]] == 0).all()
    assert (np.asarray(grads[1])[1, 20:] == 0).all() and (np.asarray(grads[2])[1, 20:] == 0).all()
    assert all(np.isfinite(np.asarray(x)).all() for x in (out, *grads))
    nothing = run(arrays, cotangents, implementation, mask=jnp.zeros((1, 1, 1, 50), bool))
    assert all((np.asarray(x) == 0).all() for x in (nothing[0][0], *nothing[1]))
    # A caller that passes an infinite or undefined gradient into an lse of -inf gets no NaN back.
    (_, _), grads = run(
        arrays, (cotangents[0], jnp.full((2, 50, 4), jnp.nan)), implementation, mask=jnp.zeros((1, 1, 1, 50), bool)
    )
    if implementation == "xla":
        assert all((np.asarray(x) == 0).all() for x in grads)


@pytest.mark.parametrize(
    ("window", "is_causal"),
    [(0, False), (20, True), (20, False), ((17, 0), False), ((5, 40), True), ((None, 4), False), ((4, None), True)],
)
def test_windows(small_tiles, window, is_causal):
    check(*draw(100, batch=1, heads=2), window_size=window, is_causal=is_causal)


def test_window_over_everything_is_full_attention():
    arrays, _ = draw(100)
    np.testing.assert_allclose(softmax.attention(*arrays, window_size=99), softmax.attention(*arrays), atol=1e-6)


NO_LIMIT = [2**31 - 10, 2**31 - 1, 2**31, sys.maxsize]


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("size", NO_LIMIT)
def test_a_window_that_stands_for_no_limit(small_tiles, size, implementation):
    """A position plus such a number is no int32."""
    arrays, _ = draw(40, batch=1, heads=2)
    attend = functools.partial(softmax.attention, *arrays, implementation=implementation)
    at = np.random.default_rng(0).permutation(40)[None] - 7
    for options in ({}, {"is_causal": True}, {"query_positions": at, "key_positions": at + 3, "is_causal": True}):
        for window in (size, (size, None), (size, size)):
            np.testing.assert_array_equal(attend(window_size=window, **options), attend(**options))
        narrow, limited = attend(window_size=(2, size), **options), attend(window_size=(2, None), **options)
        np.testing.assert_array_equal(narrow, limited)


@pytest.mark.parametrize("size", NO_LIMIT)
def test_such_a_window_around_positions_that_are_not_known_is_refused(size):
    arrays, _ = draw(9)
    refused = pytest.raises(ValueError, match=r"softmax.attention: window_size must be below 2\^30 .*Pass None for no limit")
    with refused:
        softmax.attention(*arrays, window_size=size, query_positions=jnp.arange(9)[None])
    with refused:
        jax.eval_shape(lambda at: softmax.attention(*arrays, window_size=(0, size), key_positions=at), jnp.arange(9)[None])


def test_positions_far_apart_are_tiled_without_overflow(small_tiles):
    arrays, _ = draw(40, batch=1, heads=2)
    at = np.arange(40)[None] + 2**31 - 41
    attend = functools.partial(softmax.attention, *arrays, window_size=(4, 4))
    np.testing.assert_array_equal(attend(query_positions=at, key_positions=at), attend())


@pytest.mark.parametrize("known", [False, True])
def test_positions_of_a_cached_prefix(small_tiles, known):
    (query, key, value), cotangents = draw(129)
    tail = slice(90, 129)
    arrays, cotangents = [query[:, tail], key, value], tuple(x[:, tail] for x in cotangents)
    at = np.arange(129)[None] if known else jnp.arange(129)[None]
    options = dict(is_causal=True, window_size=50, query_positions=at[:, tail], key_positions=at)
    out, lse, _ = check(arrays, cotangents, **options)
    full, full_lse = softmax.attention(query, key, value, is_causal=True, window_size=50, return_lse=True)
    np.testing.assert_allclose(out, full[:, tail], atol=2e-6)
    np.testing.assert_allclose(lse, full_lse[:, tail], atol=2e-6)


def test_positions_in_any_order_and_per_sample(small_tiles, monkeypatch):
    monkeypatch.setattr(plan, "parts_of", lambda *sizes: (2, 1, 2))
    rng = np.random.default_rng(3)
    arrays, cotangents = draw(60, 80)
    for convert in (np.asarray, jnp.asarray):
        queries = convert(np.stack([rng.permutation(90)[:60] for _ in range(2)]))
        keys = convert(np.stack([rng.permutation(90)[:80] for _ in range(2)]))
        check(arrays, cotangents, is_causal=True, window_size=30, query_positions=queries, key_positions=keys)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_a_numpy_mask_is_only_read(implementation):
    arrays, mask = jnp.ones((3, 1, 6, 2, 4)), np.ones((1, 2, 6, 6), bool)
    softmax.attention(*arrays, mask=mask, is_causal=True, implementation=implementation)
    assert mask.all()


def test_segments_of_more_than_32_bits_are_refused():
    ids = np.array([[0, 1 << 32]])
    with pytest.raises(ValueError, match="query_segment_ids must fit int32, got 4294967296"):
        softmax.attention(*jnp.ones((3, 1, 2, 1, 4)), query_segment_ids=ids, key_segment_ids=ids)


def test_segments(small_tiles):
    rng = np.random.default_rng(4)
    arrays, cotangents = draw(60, 80)
    queries, keys = (jnp.asarray(np.sort(rng.integers(0, 4, (2, n)))) for n in (60, 80))
    out, *_ = check(arrays, cotangents, query_segment_ids=queries, key_segment_ids=keys, is_causal=True)
    (query, key, value), one = arrays, 1
    inside, of = np.asarray(queries[0]) == one, np.asarray(keys[0]) == one
    alone = softmax.attention(
        query[:1, inside],
        key[:1, of],
        value[:1, of],
        is_causal=True,
        query_positions=np.arange(60)[None, inside],
        key_positions=np.arange(80)[None, of],
    )
    np.testing.assert_allclose(out[:1, inside], alone, atol=2e-6)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_everything_at_once(small_tiles, implementation):
    rng = np.random.default_rng(5)
    arrays, cotangents = draw(75, 110, kv_heads=2, values=3)
    check(
        arrays,
        cotangents,
        bias=jnp.asarray(rng.normal(size=(2, 4, 75, 110)), jnp.float32),
        is_causal=True,
        window_size=(40, 3),
        mask=jnp.asarray(rng.random((2, 1, 1, 110)) < 0.8),
        scale=0.7,
        query_segment_ids=jnp.asarray(rng.integers(0, 2, (1, 75))),
        key_segment_ids=jnp.asarray(rng.integers(0, 2, (2, 110))),
        query_positions=jnp.arange(75)[None] + 20,
        key_positions=jnp.arange(110)[None],
        implementation=implementation,
    )


def test_a_future_token_changes_no_past_output(small_tiles):
    (query, key, value), _ = draw(100)
    out = softmax.attention(query, key, value, is_causal=True)
    later = softmax.attention(query, key.at[:, 70].mul(1e4), value.at[:, 70].mul(1e4), is_causal=True)
    np.testing.assert_array_equal(out[:, :70], later[:, :70])
    assert not np.allclose(out[:, 70:], later[:, 70:])


def test_large_logits_do_not_overflow(small_tiles):
    (query, key, value), cotangents = draw(100)
    check([query * 10, key * 10, value], cotangents, slack=50)  # logits of several hundred


@pytest.mark.parametrize("sizes", [(3, 97), (50, 50)])
def test_merge_of_disjoint_keys(sizes):
    (query, key, value), (grad_out, grad_lse) = draw(40, 100)
    mask = np.random.default_rng(6).random((2, 1, 40, 100)) < 0.5
    mask[:, :, 5] = False  # sees nothing
    mask[:, :, 6, : sizes[0]] = False  # sees the second part only
    mask = jnp.asarray(mask)

    def parts(query, key, value):
        ends = (slice(None, sizes[0]), slice(sizes[0], None))
        pieces = [softmax.attention(query, key[:, e], value[:, e], mask=mask[..., e], return_lse=True) for e in ends]
        return softmax.merge(*zip(*pieces, strict=True))

    @jax.jit
    def outputs_and_gradients(*arrays):
        (out, lse), pull = jax.vjp(parts, *arrays)
        return out, lse, pull((grad_out, jnp.where(jnp.isneginf(lse), 0.0, grad_lse)))

    out, lse, grads = outputs_and_gradients(query, key, value)
    (want, want_lse), want_grads = run([query, key, value], (grad_out, grad_lse), "reference", mask=mask)
    np.testing.assert_allclose(out, want, atol=2e-6)
    np.testing.assert_allclose(lse, want_lse, atol=2e-6)
    for grad, expected in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(grad, expected, atol=1e-5)


def test_vmap_and_remat_and_second_derivative(small_tiles):
    arrays, _ = draw(40)
    stacked = [jnp.stack([x, -x]) for x in arrays]
    f = lambda q, k, v: softmax.attention(q, k, v, is_causal=True)
    np.testing.assert_allclose(jax.vmap(f)(*stacked)[1], f(*(-x for x in arrays)), atol=2e-6)
    gradient = lambda g: jax.jit(jax.grad(lambda q: g(q, *arrays[1:]).sum()))(arrays[0])
    np.testing.assert_allclose(gradient(jax.checkpoint(f)), gradient(f), atol=1e-6)

    def curvature(implementation):
        def loss(q):
            return (softmax.attention(q, *arrays[1:], is_causal=True, implementation=implementation) ** 2).sum()

        return jax.jit(jax.grad(lambda q: (jax.grad(loss)(q) ** 2).sum()))(arrays[0])

    assert relative_error(curvature("xla"), curvature("reference")) < 2e-5


def test_vmap_where_each_sample_has_positions_of_its_own(small_tiles):
    arrays, _ = draw(40)
    known = np.stack([np.random.default_rng(i).permutation(40) for i in range(2)])
    f = lambda *x: softmax.attention(*x, is_causal=True, query_positions=known, key_positions=known)
    mapped = jax.vmap(jax.grad(lambda *x: (f(*x) ** 2).sum()))(*(jnp.stack([x, -x]) for x in arrays))
    np.testing.assert_allclose(mapped[0], jax.grad(lambda *x: (f(*x) ** 2).sum())(*arrays), atol=2e-5)


def test_an_eager_call_compiles_once():
    arrays, _ = draw(20)
    softmax.attention(*arrays, window_size=7)
    before = xla.flash("b n", 1, 1)._cache_size()
    softmax.attention(*arrays, window_size=7)
    assert xla.flash("b n", 1, 1)._cache_size() == before


def loss(**options):
    return lambda *arrays: softmax.attention(*arrays, **options).astype(jnp.float32).sum()


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"is_causal": True, "window_size": 64}])
def test_memory_grows_linearly(options):
    function = jax.grad(loss(**options), (0, 1, 2))
    used = [measure.memory(function, *draw(t, batch=1, features=32, values=32)[0]).temporary for t in (2048, 4096)]
    assert used[1] <= 2.1 * used[0]
    assert used[1] < 4096**2 * 4  # one square of float32 for one head


def test_work_is_that_of_the_visible_tiles():
    def flops(length, **options):
        arrays, _ = draw(length, batch=1, heads=2, features=16, values=16)
        return measure.flops(loss(**options), *arrays)

    length = 4096
    full = flops(length)
    assert full >= 4 * 2 * length**2 * 16
    assert flops(length, is_causal=True) < 0.6 * full
    # A window costs the same per token at any length: 129 keys, and at most a tile more on each side.
    window = {"is_causal": True, "window_size": 128}
    assert flops(2 * length, **window) < 2.05 * flops(length, **window)
    assert flops(length, **window) < 1.1 * full * (128 + 2 * 64 + 1) / length
    traced = jnp.arange(length)[None]
    assert flops(length, query_positions=traced, key_positions=traced, **window) >= full


@pytest.mark.parametrize("batch", [1, 7, 32, 4096])
@pytest.mark.parametrize("queries", [1, 60, 512, 8192])
def test_a_tile_of_logits_stays_below_the_memory_cliff(batch, queries):
    for keys in (queries, 8192):
        parts = plan.parts_of(batch, 1, 8, 2, queries, keys, 64, plan.most_of(None))
        assert batch % parts[0] == 0 and parts[1] == 1 and 8 % parts[2] == 0
        rows = batch * 16 // math.prod(parts)
        query_tile, key_tile = plan.tile_sizes(rows, queries, keys, None)
        assert 4 * rows * query_tile * key_tile <= 8 << 20
        assert 4 * rows * max(queries, keys) * 64 <= 32 << 20
        assert query_tile >= min(queries, 100) and key_tile >= min(keys, 50)


def test_a_short_input_is_one_step_without_a_loop():
    arrays, _ = draw(100, batch=1, heads=2)
    assert "while" not in str(jax.make_jaxpr(jax.grad(loss(is_causal=True)))(*arrays))
    assert "scan" not in str(jax.make_jaxpr(jax.grad(loss(is_causal=True)))(*arrays))


REFUSALS = [
    (TypeError, "mask must be boolean", {"mask": np.ones((1, 1, 5, 6))}),
    (ValueError, "mask must have four axes", {"mask": np.ones((5, 6), bool)}),
    (ValueError, "mask must have four axes", {"mask": np.ones((1, 3, 5, 6), bool)}),
    (TypeError, "bias must be floating-point", {"bias": np.ones((1, 1, 5, 6), bool)}),
    (ValueError, "bias must have four axes", {"bias": np.ones((1, 1, 5, 5), np.float32)}),
    (ValueError, "window_size must be None", {"window_size": -1}),
    (ValueError, "window_size must be None", {"window_size": (1, 2, 3)}),
    (ValueError, "window_size must be None", {"window_size": 1.5}),
    (TypeError, "query_positions must be integers", {"query_positions": np.ones((1, 5)), "is_causal": True}),
    (ValueError, "key_positions must have shape", {"key_positions": np.ones((1, 5), int), "is_causal": True}),
    (ValueError, "must be given together", {"query_segment_ids": np.ones((1, 5), int)}),
    (TypeError, "scale must be a number", {"scale": jnp.ones(())}),
    (ValueError, "implementation must be None or a known name", {"implementation": "tritn"}),
]


@pytest.mark.parametrize(("error", "message", "options"), REFUSALS)
def test_refusals(error, message, options):
    arrays, _ = draw(5, 6, heads=2)
    with pytest.raises(error, match=f"softmax.attention: .*{message}"):
        softmax.attention(*arrays, **options)


def test_refused_shapes():
    (query, key, value), _ = draw(5, 6)
    for arrays, name in (
        ((query[0], key, value), "query"),
        ((query, key[:, :, :3], value[:, :, :3]), "key"),
        ((query, key[..., :4], value), "key"),
        ((query, key, value[:, :5]), "value"),
    ):
        with pytest.raises(ValueError, match=f"softmax.attention: {name} must"):
            softmax.attention(*arrays)
    with pytest.raises(TypeError, match="softmax.attention: query must be floating-point"):
        softmax.attention(query.astype(int), key, value)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU here")
@pytest.mark.parametrize("implementation", ["triton", "cudnn"])
def test_implementations_decline_with_a_reason(implementation):
    arrays, _ = draw(5)
    with pytest.raises(
        NotImplementedError, match=f"softmax.attention: implementation='{implementation}' declines .*GPU|interpreter"
    ):
        softmax.attention(*arrays, implementation=implementation)


CUDNN_REFUSALS = [
    ("float32, and cuDNN takes", {"dtype": np.float32}, {}),
    ("features and keys", {"values": 16}, {}),
    ("multiples of 8", {"features": 12, "values": 12}, {}),
    ("multiples of 8 up to 256", {"features": 264, "values": 264}, {}),
    ("a bias", {}, {"bias": jnp.zeros((1, 1, 1, 9))}),
    ("log-sum-exp", {}, {"return_lse": True}),
    ("a mask", {}, {"mask": jnp.ones((1, 1, 1, 9), bool)}),
    ("segments", {}, {"query_segment_ids": jnp.ones((1, 9), int), "key_segment_ids": jnp.ones((1, 9), int)}),
    ("window", {}, {"window_size": 3}),
    ("positions", {}, {"is_causal": True, "key_positions": jnp.arange(9)[None]}),
    ("positions", {}, {"is_causal": True, "query_positions": np.arange(9)[None] + 1}),
    ("positions", {"keys": 11}, {"is_causal": True}),
    ("no cuDNN", {}, {}),
    ("no cuDNN", {"kv_heads": 2}, {"is_causal": True}),
]


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU here")
@pytest.mark.parametrize(("reason", "shapes", "options"), CUDNN_REFUSALS)
def test_cudnn_declines_what_it_cannot_do(reason, shapes, options):
    arrays, _ = draw(9, **{"dtype": jnp.bfloat16, **shapes})
    with gpu.lowering_for(90), pytest.raises(dispatch.Declined, match=f"declines this call: .*{reason}"):
        softmax.attention(*arrays, implementation="cudnn", **options)


def test_cudnn_wants_a_recent_gpu():
    arrays, _ = draw(9, dtype=jnp.bfloat16)
    with gpu.lowering_for(75), pytest.raises(dispatch.Declined, match="starts at 8.0"):
        softmax.attention(*arrays, implementation="cudnn")


@pytest.fixture
def gpu_that_is_not_there(monkeypatch):
    """What `softmax.attention` asks of JAX answers as on a GPU; returns what was asked of JAX's attention."""
    asked = []

    def decline(*args):
        raise dispatch.Declined("no Triton here.")

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(softmax, "IMPLEMENTATIONS", {**softmax.IMPLEMENTATIONS, "triton": decline})
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda query, *args, **options: asked.append(options) or query)
    return asked


@pytest.mark.parametrize(("capability", "implementation", "taken"), [(90, None, 1), (80, None, 0), (80, "cudnn", 1)])
def test_cudnn_is_taken_where_it_was_measured(gpu_that_is_not_there, capability, implementation, taken):
    arrays, _ = draw(9, dtype=jnp.bfloat16)
    with gpu.lowering_for(capability):
        jax.eval_shape(functools.partial(softmax.attention, implementation=implementation), *arrays)
    assert len(gpu_that_is_not_there) == taken


REFUSED_BY_JAX = [RuntimeError("cuDNN is not there."), NotImplementedError("requires cuDNN\nand more")]


@pytest.mark.parametrize("error", REFUSED_BY_JAX, ids=lambda error: type(error).__name__)
def test_what_jax_refuses_cudnn_declines(gpu_that_is_not_there, monkeypatch, error):
    """And so something else runs, unless cuDNN was asked for."""

    def refuse(*args, **options):
        raise error

    monkeypatch.setattr(jax.nn, "dot_product_attention", refuse)
    arrays, _ = draw(9, dtype=jnp.bfloat16)
    with gpu.lowering_for(90):
        assert jax.eval_shape(softmax.attention, *arrays).shape == arrays[0].shape
        with pytest.raises(dispatch.Declined, match="'cudnn' declines this call: JAX refuses it: (cuDNN|requires)"):
            jax.eval_shape(functools.partial(softmax.attention, implementation="cudnn"), *arrays)


def test_several_sets_of_keys_are_rounded_once():
    """A sum of two parts, of which each is halfway between two numbers of 16 bits."""
    step = 2.0**-7  # of bfloat16 from 1 on
    column = lambda *numbers: jnp.asarray(numbers, jnp.bfloat16).reshape(1, 4, 1, 1)
    seen = lambda *indices: sets.Visible(None, None, None, None, jnp.zeros((1, 1, 4, 4), bool).at[(0, 0, *indices)].set(True))

    def run(value, *visible):
        both = tuple(sets.KeySet(None, one) for one in visible)
        return xla.attention(column(0, 0, 0, 0), (column(0, 0, 0, 0),), (value,), None, both, 1.0)[0]

    keys = seen(slice(None), slice(2)), seen(slice(None), slice(2, 4))
    assert (run(column(1, 1 + step, 1 + step, 1 + step), *keys) == 1 + step).all()
    queries = seen(slice(2)), seen(slice(2, 4))
    _, pull = jax.vjp(lambda value: run(value, *queries), column(0, 0, 0, 0))
    assert (pull(column(4, 2 * step, 2 * step, 0))[0] == 1 + step).all()
