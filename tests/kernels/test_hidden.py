"""What a mask hides reaches no output that is used and no gradient, whatever it holds, in every operation that takes a mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subquad.kernels import block_sparse, checks, entmax, gather, linear, lsh, relative, softmax, strided

B, T, N, H = 2, 9, 2, 4
KEPT = np.ones((B, T), bool)
KEPT[0, 6:] = KEPT[1, [0, 1, 5]] = False  # padding at the end; at the start, and a hole
MASK = jnp.asarray(KEPT)[:, None, None]
PAIRS = MASK & MASK.swapaxes(2, 3)  # padding sees nothing either
BUCKETS = jnp.zeros((B, 1, T, N), jnp.int32)
LISTS = jnp.asarray(np.random.default_rng(3).integers(-1, T, (B, N, T, 7)), jnp.int32)
SPREAD = jnp.asarray(np.random.default_rng(1).normal(size=(5, H)), jnp.float32)
DISTANCES = jnp.asarray(np.random.default_rng(2).normal(size=(T, N, H)), jnp.float32)

CALLS = {
    "softmax": lambda q, k, v, i: softmax.attention(q, k, v, mask=MASK, implementation=i),
    "softmax-causal": lambda q, k, v, i: softmax.attention(q, k, v, mask=MASK, is_causal=True, implementation=i),
    "softmax-pairs": lambda q, k, v, i: softmax.attention(q, k, v, mask=PAIRS, return_lse=True, implementation=i)[0],
    "block_sparse": lambda q, k, v, i: block_sparse.attention(
        q, k, v, np.array([[[0], [1]]]), block_size=5, mask=MASK, implementation=i
    ),
    "strided": lambda q, k, v, i: strided.attention(q, k, v, stride=3, window_size=2, mask=MASK, implementation=i),
    "fixed": lambda q, k, v, i: strided.fixed(
        q, k, v, block_size=3, columns=np.array([[1]]), mask=MASK, is_causal=True, implementation=i
    ),
    "relative": lambda q, k, v, i: relative.attention(
        q, k, v, DISTANCES, DISTANCES[0], DISTANCES[1], mask=MASK, implementation=i
    ),
    "linear": lambda q, k, v, i: linear.attention(abs(q), abs(k), v, mask=MASK, implementation=i),
    "linear-causal": lambda q, k, v, i: linear.attention(
        abs(q), abs(k), v, key_log_scale=k[..., 0], mask=MASK, is_causal=True, implementation=i
    ),
    "softmax-features": lambda q, k, v, i: linear.random_feature_attention(q, k, v, SPREAD, mask=MASK, implementation=i),
    "relu-features": lambda q, k, v, i: linear.random_feature_attention(
        q, k, v, SPREAD, kernel="relu", mask=MASK, is_causal=True, implementation=i
    ),
    "entmax": lambda q, k, v, i: entmax.attention(q, k, v, mask=MASK, is_causal=True, implementation=i),
    "entmax-alpha": lambda q, k, v, i: entmax.attention(q, k, v, jnp.full(N, 1.2), mask=MASK, implementation=i),
    "gather": lambda q, k, v, i: gather.attention(q, k, v, LISTS, mask=MASK, implementation=i),
    "gather-blocks": lambda q, k, v, i: gather.attention(
        q, k, v, LISTS[:, :, :3], block_size=4, mask=MASK, is_causal=True, implementation=i
    ),
    "lsh": lambda q, k, v, i: lsh.attention(q, v, BUCKETS, num_buckets=1, chunk_size=4, mask=MASK, implementation=i),
    "lsh-extend": lambda q, k, v, i: lsh.extend(q, k, v, BUCKETS, BUCKETS, start=0, mask=MASK, implementation=i),
    "lsh-extend-each": lambda q, k, v, i: lsh.extend(
        q, k, v, BUCKETS, BUCKETS, start=jnp.zeros(B, jnp.int32), mask=MASK, implementation=i
    ),
}
SHARED = ("lsh",)  # query and key are one array
XLA_ONLY = ("entmax", "entmax-alpha", "gather", "gather-blocks")
NUMBERS = (np.nan, np.inf, 1e12, 1e18, 3e38)
FEW = (np.nan, 3e38)  # by default in the interpreter, which takes a second for each
implementations = pytest.mark.parametrize(
    "implementation", ["reference", "xla", pytest.param("interpret", marks=pytest.mark.interpret)]
)


def cases():
    for name in CALLS:
        for implementation in ("reference", "xla"):
            yield pytest.param(name, implementation, NUMBERS, id=f"{name}-{implementation}")
        if name not in XLA_ONLY:
            marks, rest = (pytest.mark.interpret, pytest.mark.full), [number for number in NUMBERS if number not in FEW]
            yield pytest.param(name, "interpret", FEW, id=f"{name}-interpret", marks=marks[:1])
            yield pytest.param(name, "interpret", rest, id=f"{name}-interpret-others", marks=marks)


@pytest.mark.parametrize(("name", "implementation", "numbers"), list(cases()))
def test_padding_reaches_nothing(name, implementation, numbers):
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=(B, T, N, H)), jnp.float32) for _ in range(3)]
    cotangent = jnp.asarray(rng.normal(size=(B, T, N, H)), jnp.float32)
    kept = jnp.asarray(KEPT)[..., None, None]

    @jax.jit
    def run(*arrays):
        out, pull = jax.vjp(lambda *x: CALLS[name](*x, implementation), *arrays)
        return jnp.where(kept, out, 0), *pull(jnp.where(kept, cotangent, 0))

    def filled(number, queries):
        return [jnp.where(kept, x, number if queries or i else 0) for i, x in enumerate(arrays)]

    want = run(*filled(0, True))
    assert all(np.isfinite(x).all() for x in want) and abs(want[0]).max() > 0.1
    for number in numbers:
        # The reference says nothing of a query that is padding: it knows no cotangents.
        for queries in {name in SHARED, implementation != "reference"}:
            for got, expected in zip(run(*filled(number, queries)), want, strict=True):
                np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@implementations
def test_a_query_that_sees_nothing_gives_no_gradient(implementation):
    """Whatever it holds, and whatever is made of its output, which is 0."""
    rng = np.random.default_rng(0)
    q, k, v, cotangent = (jnp.asarray(rng.normal(size=(B, T, N, H)), jnp.float32) for _ in range(4))
    blind = ~jnp.asarray(KEPT)[..., None, None]

    @jax.jit
    def run(q):
        out, pull = jax.vjp(lambda *x: CALLS["softmax-pairs"](*x, implementation), q, k, v)
        return out, *pull(cotangent)

    for got, want in zip(run(jnp.where(blind, np.nan, q)), run(jnp.where(blind, 0, q)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@implementations
@pytest.mark.parametrize("name", ["softmax-causal", "fixed", "linear-causal", "relative", "entmax", "gather-blocks"])
def test_a_future_of_any_finite_size_changes_no_past(name, implementation):
    """A key that some queries see and others do not, in one tile: up to 1e30, and its value too."""
    if implementation == "interpret" and name in XLA_ONLY:
        pytest.skip("there is no Triton kernel")
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=(B, T, N, H)), jnp.float32) for _ in range(3)]
    late = jnp.arange(T)[:, None, None] >= 4
    run = jax.jit(lambda *x: CALLS[name](*x, implementation)[:, :4])
    want = run(*arrays)
    for size in (1e12, 1e30):
        np.testing.assert_allclose(run(*(jnp.where(late, size, x) for x in arrays)), want, rtol=1e-5, atol=1e-6)


def test_hide_is_exact_and_free_without_a_mask():
    key, value = jnp.full((B, T, N, H), np.nan), jnp.ones((B, T, N))
    assert checks.hide(None, key, value) == (key, value)
    hidden, other, nothing = checks.hide(jnp.zeros((1, N, T, 1), bool), key, value, None)
    assert not hidden.any() and not other.any() and nothing is None
    some = jnp.zeros((1, N, T, T), bool).at[0, 1, 3, 5].set(True)
    np.testing.assert_array_equal(checks.hide(some, value)[0][0, :, 0], np.arange(T) == 5)
