"""Relative attention: the formula, its gradients, masks, precision, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from jax.extend.core import jaxprs_in_params

from subquad.kernels import gpu, launch, relative, specs
from subquad.kernels.relative import xla
from subquad.kernels.softmax import plan
from subquad.kernels.softmax.sets import Visible
from tests import oracle
from tests.kernels import test_aot

ARGUMENTS = ("query", "key", "value", "relative_key", "content_bias", "position_bias")


def interpret(value):
    return pytest.param(value, marks=pytest.mark.interpret)


def arrays(T, M, B=2, N=3, H=4, V=5, dtype=np.float64, seed=0):
    random = np.random.default_rng(seed)
    S = T + M
    shapes = [(B, T, N, H), (B, S, N, H), (B, S, N, V), (S + 2, N, H), (N, H), (N, H)]
    return [jnp.asarray(random.normal(size=shape), dtype) for shape in shapes]


def masks(T, M, B=2, N=3):
    random = np.random.default_rng(1)
    return {
        "none": None,
        "padding": random.random((B, 1, 1, T + M)) > 0.4,
        "shared": random.random((1, 1, 1, T + M)) > 0.4,
        "pairwise": random.random((1, N, T, T + M)) > 0.7,
        "queries": random.random((B, 1, T, 1)) > 0.5,
    }


def by_hand(query, key, value, relative_key, content_bias, position_bias, mask):
    """The formula of section 3.3, one score at a time."""
    B, T, N, H = query.shape
    S = key.shape[1]
    mask = np.broadcast_to(True if mask is None else mask, (B, N, T, S))
    out = np.zeros((B, T, N, value.shape[-1]))
    for b, t, n in np.ndindex(B, T, N):
        at = S - T + t
        seen = [s for s in range(at + 1) if mask[b, n, t, s]]
        if not seen:
            continue
        q = query[b, t, n]
        scores = np.array([
            (q + content_bias[n]) @ key[b, s, n] + (q + position_bias[n]) @ relative_key[at - s, n] for s in seen
        ]) / np.sqrt(H)  # fmt: skip
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights / weights.sum() @ value[b, seen, n]
    return out


def loss_of(implementation, mask, cotangent, **options):
    def loss(*args):
        out = relative.attention(*args, mask=mask, implementation=implementation, **options)
        return jnp.sum(out * cotangent), out

    return jax.jit(jax.value_and_grad(loss, argnums=range(6), has_aux=True))


@pytest.mark.parametrize("T,M,kind", [(1, 0, "none"), (7, 0, "padding"), (6, 5, "none"), (6, 5, "pairwise")])
def test_reference_is_the_formula(T, M, kind):
    mask = masks(T, M)[kind]
    with jax.enable_x64(True):
        args = arrays(T, M)
        out = relative.attention(*args, mask=None if mask is None else jnp.asarray(mask), implementation="reference")
        np.testing.assert_allclose(out, by_hand(*map(np.asarray, args), mask), atol=1e-12)


@pytest.mark.parametrize(
    "T,M,tiles,kind",
    [
        (1, 0, None, "none"),
        (1, 40, (1, 16), "padding"),
        (63, 0, (16, 16), "none"),
        (100, 33, None, "padding"),
        *((7, 5, (3, 5), kind) for kind in masks(1, 1)),
    ],
)
def test_values_and_gradients_in_float64(T, M, tiles, kind, monkeypatch):
    if tiles:
        monkeypatch.setattr(plan, "tile_sizes", lambda *_: tiles)
    mask = masks(T, M)[kind]
    with jax.enable_x64(True):
        args = arrays(T, M)
        cotangent = jax.random.normal(jax.random.key(2), (2, T, 3, 5))
        mask = None if mask is None else jnp.asarray(mask)
        expected = loss_of("reference", mask, cotangent)(*args)
        actual = loss_of("xla", mask, cotangent)(*args)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-11), actual, expected)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("implementation", ["reference", "xla", "parts", interpret("interpret"), interpret("strips")])
def test_segments_are_a_mask(implementation, batch, monkeypatch):
    """Of each sample, or one for all; with key padding or none, and with the samples or the queries part by part."""
    T, M = 23, 9
    if implementation == "parts":
        implementation = "xla"
        monkeypatch.setattr(plan, "tile_sizes", lambda *_: (8, 16))
        monkeypatch.setattr(plan, "parts_of", lambda *_: (2, 1, 3))
    elif implementation == "strips":
        implementation = few_rows(monkeypatch, 8)
    args, padding = arrays(T, M, dtype=np.float32), jnp.asarray(masks(T, M)["padding"])
    segments = jnp.asarray(np.sort(np.random.default_rng(0).integers(0, 3, (batch, T + M)), 1))
    same = segments[:, None, M:, None] == segments[:, None, None, :]
    cotangent = jax.random.normal(jax.random.key(2), (2, T, 3, 5))
    options = dict(query_segment_ids=segments[:, M:], key_segment_ids=segments)
    for mask, both in ((None, same), (padding, same & padding)):
        with gpu.separate_trace_cache():
            actual = loss_of(implementation, mask, cotangent, **options)(*args)
            expected = loss_of("reference", both, cotangent)(*args)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5), actual, expected)


def few_rows(monkeypatch, rows):
    """Makes Triton's strips so many queries, and names its implementation."""
    pytest.importorskip("triton")
    launch.require("interpret")
    from subquad.kernels.relative import triton

    monkeypatch.setattr(triton, "STRIP_BYTES", 1)
    monkeypatch.setattr(triton, "FEWEST_ROWS", rows)
    return "interpret"


@pytest.mark.interpret
@pytest.mark.parametrize("T,M,kind,dtype", [
    (1, 6, "none", "float32"), (37, 0, "none", "float32"), (29, 20, "padding", "float32"), (29, 20, "pairwise", "float32"),
    (29, 20, "shared", "bfloat16"), (16, 7, "queries", "float16"),
])  # fmt: skip
def test_strips_of_queries(T, M, kind, dtype, monkeypatch):
    """As many strips as eight queries each make, the last one ragged: as all queries at once."""
    few_rows(monkeypatch, 8)
    mask = masks(T, M)[kind]
    mask = None if mask is None else jnp.asarray(mask)
    args = arrays(T, M, dtype=jnp.dtype(dtype))
    cotangent = jax.random.normal(jax.random.key(2), (2, T, 3, 5))
    wide = [x.astype(jnp.float32) for x in args]
    (_, out), gradients = loss_of("interpret", mask, cotangent)(*args)
    (_, expected), wanted = loss_of("reference", mask, cotangent)(*wide)
    tolerance = {"float32": 1e-5, "bfloat16": 3e-2, "float16": 5e-3}[dtype]
    assert oracle.relative_error(out, expected) < tolerance
    for name, a, e in zip(ARGUMENTS, gradients, wanted, strict=True):
        assert a.dtype == dtype and oracle.relative_error(a, e) < tolerance, name


@pytest.mark.aot
@pytest.mark.parametrize(("name", "dtype"), [("mask-128", "bfloat16"), ("mask-96", "float32")])
def test_machine_code_of_several_strips(name, dtype, monkeypatch):
    """Their positions are known at run time only, which takes registers."""
    triton = pytest.importorskip("subquad.kernels.relative.triton")
    monkeypatch.setattr(triton, "STRIP_BYTES", 1)
    test_aot.check(specs.launches(specs.find(f"relative.attention/{name}"), dtype), dtype)


def test_strips_take_memory_that_is_linear_in_the_length():
    """No array of a forward and backward pass is larger than a strip of the scores, or than the keys in float32."""
    triton = pytest.importorskip("subquad.kernels.relative.triton")
    heads = jax.ShapeDtypeStruct((1, 16384, 4, 64), jnp.bfloat16)
    shapes = [heads] * 3 + [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((16384, 4, 64), (4, 64), (4, 64))]
    run = lambda *args: relative.attention(*args, implementation="triton").astype(jnp.float32).sum()
    with launch.recording():
        jaxpr = jax.make_jaxpr(jax.grad(run, range(6)))(*shapes)

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (x.aval.size * x.aval.dtype.itemsize for x in equation.outvars if hasattr(x.aval.dtype, "itemsize"))
            yield from (size for inner in jaxprs_in_params(equation.params) for size in sizes(inner))

    most = max(triton.STRIP_BYTES, 4 * 4 * 16384 * triton.FEWEST_ROWS)
    assert max(sizes(jaxpr.jaxpr)) <= 1.01 * most < 4 * 16384**2 / 8


@pytest.mark.interpret
def test_the_operands_that_are_not_mapped_are_shared(monkeypatch):
    """Their gradients are sums, that of relative keys, which have no batch, as well."""
    few_rows(monkeypatch, 4)
    args = arrays(9, 3, dtype=np.float32)

    def total(implementation):
        def one(scale, relative_key):
            out = relative.attention(*args[:3], relative_key * scale, *args[4:], implementation=implementation)
            return (out * jnp.arange(5.0)).sum()

        loss = lambda relative_key: (jax.vmap(one, (0, None))(jnp.array([1.0, -0.5, 2.0]), relative_key) ** 2).sum()
        return jax.jit(jax.value_and_grad(loss))(args[3])

    for got, want in zip(total("interpret"), total("reference"), strict=True):
        assert oracle.relative_error(got, want) < 2e-5


@pytest.mark.parametrize("T,M", [(300, 270), (500, 0)])
def test_several_tiles_in_float32(T, M):
    cotangent = jax.random.normal(jax.random.key(2), (1, T, 2, 4))
    args = arrays(T, M, B=1, N=2, V=4, dtype=np.float32)
    with jax.enable_x64(True):
        wide = [a.astype(jnp.float64) for a in args]
        (_, expected), gradients = loss_of("reference", None, cotangent)(*wide)
    (_, out), actual = loss_of("xla", None, cotangent)(*args)
    assert out.dtype == jnp.float32 and xla.planned(*args[:3], Visible(*[None] * 5))[0].counts > (1, 1)
    np.testing.assert_allclose(out, expected, atol=2e-6)
    for name, a, e in zip(ARGUMENTS, actual, gradients, strict=True):
        assert oracle.relative_error(a, e) < 1e-5, name


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_rows_that_see_nothing_are_zero(implementation):
    T, M = 9, 4
    args = arrays(T, M, dtype=np.float32)
    mask = jnp.ones((2, 1, T, T + M), bool).at[:, :, 3].set(False).at[1, :, :, :].set(False)
    cotangent = jnp.ones((2, T, 3, 5))
    (_, out), gradients = loss_of(implementation, mask, cotangent)(*args)
    assert (out[0, 3] == 0).all() and (out[1] == 0).all() and (out[0, 4] != 0).all()
    assert all(jnp.isfinite(g).all() for g in gradients)
    assert (gradients[0][0, 3] == 0).all() and (gradients[0][1] == 0).all()
    assert (gradients[1][1] == 0).all() and (gradients[2][1] == 0).all()


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_bfloat16(implementation):
    args = arrays(63, 20, dtype=np.float32)
    rounded = [a.astype(jnp.bfloat16) for a in args]
    cotangent = jax.random.normal(jax.random.key(2), (2, 63, 3, 5))
    (_, expected), gradients = loss_of("reference", None, cotangent)(*(a.astype(jnp.float32) for a in rounded))
    (_, out), actual = loss_of(implementation, None, cotangent)(*rounded)
    assert out.dtype == jnp.bfloat16
    assert oracle.relative_error(out, expected) < 2e-2
    for name, a, e in zip(ARGUMENTS, actual, gradients, strict=True):
        assert a.dtype == jnp.bfloat16 and oracle.relative_error(a, e) < 2e-2, name


@pytest.mark.parametrize("implementation", ["xla", interpret("interpret")])
def test_position_scores_are_float32(implementation):
    """Odd scores from 256 on, of which bfloat16 knows none."""
    T = 12
    ones = jnp.ones((1, T, 1, 16), jnp.bfloat16)
    value = jnp.asarray(np.eye(T)[None, :, None], jnp.bfloat16)
    far = jnp.zeros((T, 1, 16)).at[:, 0, 0].set(256).at[:, 0, 1].set(jnp.arange(T) % 4).astype(jnp.bfloat16)
    none = jnp.zeros((1, 16), jnp.bfloat16)
    run = lambda implementation: relative.attention(
        ones, 0 * ones, value, far, none, none, scale=1.0, implementation=implementation
    )
    np.testing.assert_allclose(*(x.astype(jnp.float32) for x in map(run, (implementation, "reference"))), atol=1e-2)


def test_a_loud_future_changes_no_past():
    query, key, *rest = arrays(40, 10, dtype=np.float32)
    at = 25
    out = relative.attention(query, key, *rest)
    loud = relative.attention(query, key.at[:, 10 + at].multiply(1e4), *rest)
    np.testing.assert_array_equal(loud[:, :at], out[:, :at])
    assert jnp.abs(loud[:, at:] - out[:, at:]).max() > 0.1


def test_without_relative_terms_it_is_softmax_attention():
    query, key, value, relative_key, *_ = arrays(31, 0, V=4, dtype=np.float32)
    nothing = jnp.zeros((3, 4))
    out = relative.attention(query, key, value, 0 * relative_key, nothing, nothing)
    np.testing.assert_allclose(out, jax.nn.dot_product_attention(query, key, value, is_causal=True), atol=2e-6)


def test_scale_and_vmap():
    args = arrays(7, 2, dtype=np.float32)
    whole = relative.attention(*args, scale=0.3)
    np.testing.assert_allclose(whole, relative.attention(*args, scale=0.3, implementation="reference"), atol=2e-6)
    assert jnp.abs(whole - relative.attention(*args)).max() > 1e-2
    one = lambda q, k, v: relative.attention(q[None], k[None], v[None], *args[3:], scale=0.3)[0]
    np.testing.assert_allclose(jax.vmap(one)(*args[:3]), whole, atol=2e-6)


def test_memory_grows_with_the_length_not_its_square():
    def temporary(T):
        shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in [(1, T, 4, 16), *[(1, 2 * T, 4, 16)] * 2,
                                                                 (2 * T, 4, 16), (4, 16), (4, 16)]]  # fmt: skip
        loss = lambda *args: jnp.sum(relative.attention(*args))
        return jax.jit(jax.grad(loss, argnums=range(6))).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    short, long = temporary(2048), temporary(4096)
    assert long < 2.2 * short
    assert long < 4 * 4096 * 8192 * 4 / 8, "an eighth of the scores of the four heads"


def test_parts_of_batch_and_heads(monkeypatch):
    """One head of one sample at a time gives what all give at once, with masks that they share or that are their own."""
    T, M = 20, 9
    args = arrays(T, M, dtype=np.float32)
    cotangent = jnp.ones((2, T, 3, 5))
    monkeypatch.setattr(plan, "tile_sizes", lambda *_: (8, 16))
    for kind, mask in masks(T, M).items():
        mask = None if mask is None else jnp.asarray(mask)
        results = []
        for parts in ((1, 1, 1), (2, 1, 3)):
            monkeypatch.setattr(plan, "parts_of", lambda *_, parts=parts: parts)
            with gpu.separate_trace_cache():
                results.append(loss_of("xla", mask, cotangent)(*args))
        for one, other in zip(*map(jax.tree.leaves, results), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5, err_msg=kind)


ORACLES = ["transfoxl_mem", "transfoxl_original_mem"]


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("name", ORACLES)
def test_against_peers(name, implementation):
    """Every gradient of the peers' attention, that of the memory too, which they do not stop here."""
    peer = oracle.load(name)
    heads, length = peer.meta["cfg"]["H"], peer.meta["cfg"]["T"]
    mask = jnp.asarray(peer.inputs["mask"][:, :, 0] == 0)[None, None]
    np.testing.assert_array_equal(mask[0, 0], np.tril(np.ones(mask.shape[2:], bool), mask.shape[3] - length))

    def run(inputs, weights):
        given = inputs | weights
        sequence = jnp.concatenate([given["mems"], given["w"]])  # time-major
        q, k, v = jnp.split(sequence @ given["qkv_net.weight"].T, 3, axis=-1)
        q, k, v = (rearrange(x, "s b (n h) -> b s n h", n=heads) for x in (q[-length:], k, v))
        r = rearrange(given["r"][::-1, 0] @ given["r_net.weight"].T, "r (n h) -> r n h", n=heads)
        out = relative.attention(
            q, k, v, r, given["r_w_bias"], given["r_r_bias"], mask=mask, implementation=implementation
        )
        x = given["w"] + rearrange(out, "b t n h -> t b (n h)") @ given["o_net.weight"].T
        x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * given["layer_norm.weight"] + given["layer_norm.bias"]

    oracle.compare(None, peer, run)


def test_bad_arguments_are_named():
    query, key, value, relative_key, u, v = arrays(6, 2, dtype=np.float32)
    wrong = {
        "query": (query[0], key, value, relative_key, u, v),
        "key": (query, key[:, :5], value[:, :5], relative_key, u, v),
        "value": (query, key, value[:, :7], relative_key, u, v),
        "relative_key": (query, key, value, relative_key[:7], u, v),
        "content_bias": (query, key, value, relative_key, u[0], v),
        "position_bias": (query, key, value, relative_key, u, v.T),
    }
    for name, args in wrong.items():
        with pytest.raises(ValueError, match=f"relative.attention: {name} must"):
            relative.attention(*args)
    good = (query, key, value, relative_key, u, v)
    with pytest.raises(ValueError, match="mask must have four axes, each full or 1"):
        relative.attention(*good, mask=jnp.ones((2, 8), bool))
    with pytest.raises(TypeError, match="mask must be boolean"):
        relative.attention(*good, mask=jnp.ones((2, 1, 1, 8)))
    with pytest.raises(ValueError, match="query_segment_ids and key_segment_ids must be given together"):
        relative.attention(*good, query_segment_ids=jnp.ones((2, 6), int))
    for ids, error, words in (((2, 8), ValueError, r"have shape \(2, 6\)"), ((2, 6), TypeError, "be integers")):
        with pytest.raises(error, match=f"relative.attention: query_segment_ids must {words}"):
            ids = jnp.ones(ids, int if error is ValueError else float)
            relative.attention(*good, query_segment_ids=ids, key_segment_ids=jnp.ones((2, 8), int))
    with pytest.raises(NotImplementedError, match="cudnn"):
        relative.attention(*good, implementation="cudnn")
    with pytest.raises(ValueError, match="implementation"):
        relative.attention(*good, implementation="referenc")
