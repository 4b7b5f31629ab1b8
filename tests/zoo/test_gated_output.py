"""The norm and gate of heads against Flax's norms."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from subquad.zoo.gated.output import GatedNorm

HEADS, FEATURES = 3, 8


def normal(seed: int):
    return jnp.asarray(np.random.default_rng(seed).normal(1, 2, (2, 5, HEADS, FEATURES)), jnp.float32)


def with_random_parameters(norm):
    graph, params = nnx.split(norm)
    rngs = iter(range(9))
    return nnx.merge(graph, jax.tree.map(lambda p: normal(next(rngs)).reshape(-1)[: p.size].reshape(p.shape), params))


def test_a_root_mean_square_of_each_head_before_or_behind_the_gate():
    norm = with_random_parameters(GatedNorm((FEATURES,), epsilon=1e-3))
    flax = nnx.RMSNorm(FEATURES, epsilon=1e-3, rngs=nnx.Rngs(0))
    flax.scale[...] = norm.scale[...]
    x, gate = normal(4), normal(5)
    np.testing.assert_allclose(norm(x), flax(x), atol=1e-5)
    np.testing.assert_allclose(norm(x, gate), flax(x) * nnx.silu(gate), atol=1e-5)
    norm.gate_first, norm.activation = True, "sigmoid"
    np.testing.assert_allclose(norm(x, gate), flax(x * nnx.sigmoid(gate)), atol=1e-5)


def test_all_heads_may_be_one_group():
    norm = with_random_parameters(GatedNorm((HEADS, FEATURES), together=True))
    flax = nnx.RMSNorm(HEADS * FEATURES, epsilon=1e-5, rngs=nnx.Rngs(0))
    flax.scale[...] = norm.scale[...].reshape(-1)
    x = normal(4)
    np.testing.assert_allclose(norm(x), flax(x.reshape(2, 5, -1)).reshape(x.shape), atol=1e-5)


def test_centred_it_is_a_group_norm_of_heads():
    norm = with_random_parameters(GatedNorm((HEADS, FEATURES), is_centred=True))
    flax = nnx.GroupNorm(HEADS * FEATURES, num_groups=HEADS, epsilon=1e-5, rngs=nnx.Rngs(0))
    flax.scale[...], flax.bias[...] = norm.scale[...].reshape(-1), norm.bias[...].reshape(-1)
    x = normal(4)
    each = flax(x.reshape(-1, HEADS * FEATURES)).reshape(x.shape)  # a token by itself
    np.testing.assert_allclose(norm(x), each, atol=2e-5)


def test_half_precision_is_normalised_in_float32():
    x, gate = (normal(seed).astype(jnp.bfloat16) for seed in (4, 5))
    norm = GatedNorm((FEATURES,))
    exact = norm(*(a.astype(jnp.float32) for a in (x, gate)))
    np.testing.assert_array_equal(norm(x, gate), exact.astype(jnp.bfloat16))
