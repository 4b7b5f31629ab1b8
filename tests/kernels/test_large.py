"""Logits of any finite size: outputs are means of values, and gradients are numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subquad.kernels import block_sparse, entmax, gather, linear, lsh, relative, softmax, strided

IMPLEMENTATIONS = [
    "reference",
    "xla",
    pytest.param("interpret", marks=pytest.mark.interpret),
    pytest.param("triton", marks=pytest.mark.gpu),
]
T, N, H = 11, 2, 24  # 1 / sqrt(H) is no power of 2, so that scaled logits are rounded
BUCKETS = jnp.zeros((1, 2, T, N), jnp.int32)
LISTS = jnp.broadcast_to(jnp.arange(T), (1, 1, T, T))
BIAS = jnp.asarray(np.random.default_rng(3).normal(size=(1, N, T, T)), jnp.float32)


def distances(x):
    return jnp.concatenate([x[0, :, :], x[0, :1]])


CALLS = {
    "softmax": lambda q, k, v, i: softmax.attention(q, k, v, implementation=i),
    "softmax-causal": lambda q, k, v, i: softmax.attention(q, k, v, is_causal=True, scale=0.3, implementation=i),
    "softmax-negative": lambda q, k, v, i: softmax.attention(q, k, v, scale=-0.3, implementation=i),
    "softmax-bias": lambda q, k, v, i: softmax.attention(q, k, v, bias=1e10 * BIAS, implementation=i),
    "block_sparse": lambda q, k, v, i: block_sparse.attention(
        q, k, v, np.array([[[0, 1], [1, -1]]]), block_size=6, implementation=i
    ),
    "strided": lambda q, k, v, i: strided.attention(q, k, v, stride=3, window_size=2, is_causal=True, implementation=i),
    "relative": lambda q, k, v, i: relative.attention(q, k, v, distances(k), k[0, 0], k[0, 1], implementation=i),
    "entmax": lambda q, k, v, i: entmax.attention(q, k, v, implementation=i),
    "entmax-alpha": lambda q, k, v, i: entmax.attention(q, k, v, jnp.full(N, 1.2), is_causal=True, implementation=i),
    "gather": lambda q, k, v, i: gather.attention(q, k, v, LISTS, implementation=i),
    "lsh": lambda q, k, v, i: lsh.attention(
        q, v, BUCKETS, num_buckets=1, chunk_size=4, scale=jnp.float32(3e4), implementation=i
    ),
    "lsh-extend": lambda q, k, v, i: lsh.extend(q, k, v, BUCKETS, BUCKETS, start=0, implementation=i),
    "softmax-features": lambda q, k, v, i: linear.random_feature_attention(
        q, k, v, k[0, :, 0], is_causal=True, implementation=i
    ),
    "relu-features": lambda q, k, v, i: linear.random_feature_attention(q, k, v, k[0, :, 0], kernel="relu", implementation=i),
}

XLA_ONLY = ("entmax", "entmax-alpha", "gather")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", CALLS)
def test_outputs_are_means_and_gradients_are_numbers(name, implementation):
    if implementation in ("interpret", "triton") and name in XLA_ONLY:
        pytest.skip("there is no Triton kernel")
    rng = np.random.default_rng(0)
    q, k, v, cotangent = (jnp.asarray(rng.normal(size=(1, T, N, H)), jnp.float32) for _ in range(4))

    @jax.jit
    def run(q, k, v):
        out, pull = jax.vjp(lambda *x: CALLS[name](*x, implementation), q, k, v)
        return out, pull(cotangent)

    for size in (1e4, 1e5, 1e6, 1e8):  # logits of 1e8 to 1e16
        out, gradients = run(size * q, size * k, v)
        assert (abs(out) <= abs(v).max() * (1 + 1e-5)).all(), size
        assert abs(out).max() > 0.1, size
        assert all(np.isfinite(x).all() for x in gradients), size


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("name", ["softmax", "block_sparse", "strided", "relative", "gather"])
def test_gradients_where_the_log_sum_is_lost_beside_the_maximum(name, implementation):
    """Equal logits of 1e10: float32 has no log(T) there, and the weights are 1 / T all the same."""
    q = jnp.zeros((1, T, N, H)).at[..., 0].set(1e5)
    v, cotangent = (jnp.asarray(np.random.default_rng(i).normal(size=q.shape), jnp.float32) for i in range(2))
    run = lambda v, i: jax.vjp(lambda v: CALLS[name](q, q, v, i), v)[1](cotangent)[0]
    want = jax.vjp(lambda v: CALLS[name](0 * q, 0 * q, v, "reference"), v)[1](cotangent)[0]
    np.testing.assert_allclose(jax.jit(run, static_argnums=1)(v, implementation), want, rtol=1e-4, atol=1e-5)
