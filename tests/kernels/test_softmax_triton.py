"""Dense attention in Triton: many small tiles in the interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subquad.kernels import dispatch, softmax, specs, tuning
from tests.kernels import dense
from tests.kernels.dense import draw

interpret = pytest.mark.interpret


@pytest.fixture
def flash():
    """The kernels' module, in whatever form Triton has in this process."""
    pytest.importorskip("triton")
    from subquad.kernels.softmax import triton

    return triton


@pytest.fixture
def small_tiles(flash, monkeypatch):
    """Tiles so small that short inputs take many steps, with ragged last tiles; queries' and keys' differ."""
    monkeypatch.setattr(flash, "tile_sizes", lambda *sizes: tuning.Config({"BLOCK_Q": 32, "BLOCK_K": 16}))


def check(arrays, cotangents, dtype="float32", bias=None, slack=1, **options):
    """Compares with the formula: out, lse and every gradient."""

    def attend(query, key, value, bias=None):
        return softmax.attention(query, key, value, bias=bias, return_lse=True, implementation="interpret", **options)

    result = dense.run(attend, arrays if bias is None else [*arrays, bias], cotangents)
    dense.compare(result, dense.formula(arrays, cotangents, bias, **options), dtype, slack)
    return result


@interpret
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window_size": (20, 7)}, {"window_size": 0}])
def test_many_tiles(small_tiles, options):
    check(*draw(75, batch=1, heads=2), **options)


@interpret
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(small_tiles, dtype):
    check(*draw(50, batch=1, heads=2, dtype=dtype), dtype, is_causal=True)


@interpret
@pytest.mark.parametrize(("features", "values"), [(16, 16), (20, 5), (128, 33), (1, 128)])
def test_grouped_heads_and_head_sizes(small_tiles, features, values):
    check(*draw(30, 40, batch=1, heads=6, kv_heads=2, features=features, values=values), is_causal=True)


@interpret
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 1, 1, 40), (1, 4, 35, 1), (1, 1, 35, 40), (2, 4, 1, 1), (2, 4, 35, 40)])
def test_masks_and_biases_of_every_broadcast_shape(small_tiles, shape):
    rng = np.random.default_rng(1)
    mask, bias = rng.random(shape) < 0.7, rng.normal(size=shape).astype(np.float32)
    arrays, cotangents = draw(35, 40, kv_heads=2)
    _, grads = check(arrays, cotangents, mask=jnp.asarray(mask), bias=jnp.asarray(bias))
    assert grads[3].shape == shape


@interpret
def test_bias_of_minus_infinity_hides_a_key(small_tiles):
    (query, key, value), cotangents = draw(40, batch=1, heads=2)
    mask = np.random.default_rng(2).random((1, 2, 40, 40)) < 0.6
    mask[:, :, 7] = False  # sees nothing, in no tile
    mask[:, :, 3, :32] = False  # sees nothing in the first tiles
    (out, lse), grads = check([query, key, value], cotangents, bias=jnp.where(mask, 0.0, -jnp.inf))
    assert np.isneginf(lse[:, 7]).all() and (out[:, 7] == 0).all() and np.isfinite(grads[3]).all()


@interpret
@pytest.mark.parametrize("least", [float(jnp.finfo(jnp.float32).min), -1e9])
def test_finite_biases_hide_nothing(small_tiles, least):
    """The mean of all values where all biases are the least number that there is; gradients are XLA's where biases are not.

    One log-sum-exp a row has no room for log(normaliser) beside 1e9: of such a row the weights are 1, and gradients finite.
    """
    (query, key, value), _ = draw(40, batch=1, heads=2)
    bias = jnp.zeros((1, 2, 40, 40)).at[:, :, 3].set(least).at[:, :, 5, :10].set(least)

    def run(implementation):
        attend = lambda *x: softmax.attention(*x[:3], bias=x[3], return_lse=True, implementation=implementation)
        (out, lse), pull = jax.vjp(attend, query, key, value, bias)
        return out, [pull((jnp.ones_like(out).at[:, 3].set(row), jnp.zeros_like(lse))) for row in (0.0, 1.0)]

    (out, gradients), (want, others) = run("interpret"), run("xla")
    np.testing.assert_allclose(out[:, 3], value.mean(1), atol=1e-5)
    np.testing.assert_allclose(out, want, atol=1e-5)
    for ours, theirs, with_row in zip(gradients[0], others[0], gradients[1], strict=True):
        assert specs.error(ours, theirs) < 1e-5 and jnp.isfinite(with_row).all()


@interpret
def test_rows_that_see_nothing(small_tiles):
    (query, key, value), (grad_out, grad_lse) = draw(40)
    mask = np.ones((2, 1, 40, 40), bool)
    mask[:, :, [0, 13, 39]] = False
    mask[1, :, :, 20:] = False
    # Whatever the caller passes into an lse of -inf stays there.
    grad_lse = grad_lse.at[:, [0, 13, 39]].set(jnp.nan)
    attend = lambda *x: softmax.attention(*x, mask=jnp.asarray(mask), return_lse=True, implementation="interpret")
    (out, lse), grads = dense.run(attend, [query * 40, key, value], (grad_out, grad_lse))
    assert (np.asarray(out)[:, [0, 13, 39]] == 0).all() and np.isneginf(lse)[:, [0, 13, 39]].all()
    assert (np.asarray(grads[0])[:, [0, 13, 39]] == 0).all()
    assert (np.asarray(grads[1])[1, 20:] == 0).all() and (np.asarray(grads[2])[1, 20:] == 0).all()
    assert all(np.isfinite(np.asarray(x)).all() for x in (out, *grads))


@interpret
@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray])
def test_positions_in_any_order_and_per_sample(small_tiles, convert):
    rng = np.random.default_rng(3)
    queries = convert(np.stack([rng.permutation(60)[:40] for _ in range(2)]))
    keys = convert(np.stack([rng.permutation(60)[:50] for _ in range(2)]))
    arrays, cotangents = draw(40, 50, heads=2)
    check(arrays, cotangents, is_causal=True, window_size=20, query_positions=queries, key_positions=keys)


@interpret
def test_a_cache_at_positions_known_at_run_time(small_tiles):
    arrays, cotangents = draw(5, 70, batch=1, heads=2)
    at, of = 31 + jnp.arange(5)[None], np.arange(70)[None]
    check(arrays, cotangents, is_causal=True, query_positions=at, key_positions=of)


@interpret
def test_everything_at_once(small_tiles):
    rng = np.random.default_rng(5)
    check(
        *draw(45, 60, kv_heads=2, values=3),
        bias=jnp.asarray(rng.normal(size=(2, 4, 45, 60)), jnp.float32),
        is_causal=True,
        window_size=(40, 3),
        mask=jnp.asarray(rng.random((2, 1, 1, 60)) < 0.8),
        scale=0.7,
        query_segment_ids=jnp.asarray(rng.integers(0, 2, (1, 45))),
        key_segment_ids=jnp.asarray(rng.integers(0, 2, (2, 60))),
        query_positions=jnp.arange(45)[None] + 20,
        key_positions=jnp.arange(60)[None],
    )


@interpret
def test_a_negative_scale(small_tiles):
    """The maximum of the scaled logits is not the scaled maximum."""
    check(*draw(40, batch=1, heads=2), scale=-0.7)


@interpret
def test_a_scale_of_zero_is_the_mean(small_tiles):
    arrays, _ = draw(40, batch=1, heads=2)
    out = softmax.attention(*arrays, scale=0, implementation="interpret")
    np.testing.assert_allclose(out, np.broadcast_to(arrays[2].mean(1, keepdims=True), out.shape), atol=1e-6)


@interpret
def test_large_logits_do_not_overflow(small_tiles):
    (query, key, value), cotangents = draw(40, batch=1, heads=2)
    check([query * 10, key * 10, value], cotangents, slack=50)  # logits of several hundred


@interpret
def test_tiles_without_a_visible_pair_are_not_read(small_tiles):
    """What lies there may be anything: NaN would spread through a tile that is merely masked."""
    (query, key, value), _ = draw(96, batch=1, heads=2)
    attend = lambda key, value, **options: softmax.attention(query, key, value, implementation="interpret", **options)
    hole = slice(48, 64)
    broken = (x.at[:, hole].set(jnp.nan) for x in (key, value))
    out, whole = attend(*broken, window_size=(10, 0)), attend(key, value, window_size=(10, 0))
    np.testing.assert_array_equal(out[:, :32], whole[:, :32])
    assert np.isnan(out[:, 48:64]).all()
    # Padding and segments are known at run time only; there the bounds of each row of tiles say so.
    real = jnp.arange(96)[None, None, None] < 45
    tail = [x.at[:, 64:].set(jnp.nan) for x in (key, value)]
    np.testing.assert_array_equal(attend(*tail, mask=real), attend(key, value, mask=real))
    segments = jnp.arange(96)[None] // 64
    options = dict(query_segment_ids=segments, key_segment_ids=segments)
    np.testing.assert_array_equal(attend(*tail, **options)[:, :64], attend(key, value, **options)[:, :64])


@interpret
def test_vmap_over_some_arguments(small_tiles):
    """Operands that are not mapped are shared, and their gradients are sums."""
    (query, key, value), _ = draw(20, batch=2, heads=2)
    bias = jnp.asarray(np.random.default_rng(7).normal(size=(1, 2, 20, 20)), jnp.float32)
    mask = jnp.asarray(np.random.default_rng(8).random((3, 2, 1, 1, 20)) < 0.7)
    scales = jnp.array([1.0, -0.5, 2.0])

    def loss(query, key, value, bias, implementation):
        def one(scale, mask, query):
            out = softmax.attention(query * scale, key, value, bias=bias * scale, mask=mask, implementation=implementation)
            return (out * jnp.arange(8.0)).sum()

        return (jax.vmap(one, (0, 0, None))(scales, mask, query) ** 2).sum()

    results = [
        jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)), static_argnums=4)(query, key, value, bias, implementation)
        for implementation in ("interpret", "xla")
    ]
    for got, want in zip(*map(jax.tree.leaves, results), strict=True):
        assert specs.error(got, want) < 2e-5


@interpret
@pytest.mark.parametrize(("reason", "arrays"), [("float64", draw(4)[0]), ("129 features", draw(4, features=129)[0])])
def test_declines(reason, arrays):
    with jax.enable_x64(True):
        arrays = [x.astype(np.float64) for x in arrays] if reason == "float64" else arrays
        with pytest.raises(dispatch.Declined, match=reason):
            softmax.attention(*arrays, implementation="interpret")


def test_the_tiles_of_some_calls(flash):
    size = lambda *words: tuple(flash.tile_sizes(*words, "triton").blocks.values())
    assert size("flash_forward", jnp.bfloat16, 64, False, False, False, None, None) == (128, 128)
    assert size("flash_forward", jnp.bfloat16, 64, False, True, False, None, None) == (128, 64)
    assert size("flash_forward", jnp.float32, 128, False, True, True, None, None) == (16, 32)
    assert size("flash_backward_key", jnp.bfloat16, 128, False, False, False, None, 128) == (32, 64)
