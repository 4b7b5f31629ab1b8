"""Operations whose reference shares code with the XLA path, against NumPy in float64: values, and slopes by differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subquad.kernels import lsh, matrix
from tests.kernels.test_lsh import by_sets

IMPLEMENTATIONS = ["reference", "xla", pytest.param("interpret", marks=pytest.mark.interpret)]
RNG = np.random.default_rng(0)
MATRIX = 2 * np.eye(4) + RNG.normal(size=(4, 4)) / 2
LOGITS = RNG.normal(size=(4, 4))
BUCKETS = RNG.integers(0, 3, (2, 11))
REAL = ~np.isin(np.arange(11), [0, 4, 10])
VALUE = RNG.normal(size=(11, 3))


def inverse(a, iterations=3):
    """Nystromformer, section 3.2 and eq. 11."""
    z = a.T / (max(sum(abs(a[:, j])) for j in range(len(a))) * max(sum(abs(a[i])) for i in range(len(a))))
    for _ in range(iterations):
        az = a @ z
        z = z @ (13 * np.eye(len(a)) - az @ (15 * np.eye(len(a)) - az @ (7 * np.eye(len(a)) - az))) / 4
    return z


def balanced(logits, is_causal, iterations=3):
    """exp(logits), rows and then columns divided by their sums."""
    x = np.exp(logits) * (np.tri(len(logits)) if is_causal else 1)
    for _ in range(iterations):
        for i in range(len(x)):
            x[i] = x[i] / x[i].sum()
        for j in range(len(x)):
            x[:, j] = x[:, j] / x[:, j].sum()
    return x


def hashed(query_key):
    return by_sets(query_key, VALUE, BUCKETS, 4, 1, 0, True, 0.7, real=REAL)


def extended(query_key):
    """All earlier tokens that share a bucket."""
    out = np.zeros_like(VALUE)
    for i in np.flatnonzero(REAL):
        seen = [j for j in range(i) if REAL[j] and (BUCKETS[:, j] == BUCKETS[:, i]).any()]
        logits = np.array([0.7 * query_key[i] @ query_key[j] / np.linalg.norm(query_key[j]) for j in seen])
        weights = np.exp(logits - max(logits, default=0))
        out[i] = weights @ VALUE[seen] / weights.sum() if seen else VALUE[i]
    return out


def by_lsh(x, implementation, extend):
    x, value = x[None, :, None], jnp.asarray(VALUE, x.dtype)[None, :, None]
    buckets, mask = jnp.asarray(BUCKETS, jnp.int32)[None, :, :, None], jnp.asarray(REAL)[None, None, None]
    options = dict(mask=mask, scale=0.7, implementation=implementation)
    if extend:
        out = lsh.extend(x, lsh.normalize(x)[0], value, buckets, buckets, start=0, **options)
    else:
        out = lsh.attention(x, value, buckets, num_buckets=3, chunk_size=4, is_causal=True, **options)
    return out[0, :, 0]


# By name: what is asked of the library, the same in NumPy, and where.
CALLS = {
    "pseudo_inverse": (
        lambda x, i: matrix.pseudo_inverse(x[None, None], iterations=3, implementation=i)[0, 0], inverse, MATRIX,
    ),
    "sinkhorn": (
        lambda x, i: matrix.sinkhorn(x[None, None], iterations=3, implementation=i)[0, 0],
        lambda x: balanced(x, False), LOGITS,
    ),
    "sinkhorn-causal": (
        lambda x, i: matrix.sinkhorn(x[None, None], iterations=3, is_causal=True, implementation=i)[0, 0],
        lambda x: balanced(x, True), LOGITS,
    ),
    "lsh": (lambda x, i: by_lsh(x, i, False), hashed, RNG.normal(size=(11, 5))),
    "lsh-extend": (lambda x, i: by_lsh(x, i, True), extended, RNG.normal(size=(11, 5))),
}  # fmt: skip


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", CALLS)
def test_values_and_slopes(name, implementation):
    function, wanted, at = CALLS[name]
    rng = np.random.default_rng(1)
    want = wanted(at)
    cotangent, way, step = rng.normal(size=want.shape), rng.normal(size=at.shape), 1e-6
    slope = np.sum(cotangent * (wanted(at + step * way) - wanted(at - step * way))) / (2 * step)

    @jax.jit
    def run(x):
        out, pull = jax.vjp(lambda x: function(x, implementation), x)
        return out, *pull(jnp.asarray(cotangent, jnp.float32))

    out, gradient = run(jnp.asarray(at, jnp.float32))
    np.testing.assert_allclose(out, want, atol=2e-5 * abs(want).max())
    np.testing.assert_allclose(np.sum(gradient * way), slope, atol=2e-4 * np.linalg.norm(gradient) * np.linalg.norm(way))
