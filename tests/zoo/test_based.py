"""Based: its weights one by one, where they are softmax's, and a peer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad.kernels import softmax
from subquad.zoo.kernelized.based import BasedAttention, taylor_features
from tests import oracle

FEATURES, HEADS = 16, 2


def build(is_causal=False, **options):
    return BasedAttention(HEADS, FEATURES, **{**dict(is_causal=is_causal, rngs=nnx.Rngs(0)), **options})


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("is_causal", [False, True])
def test_the_formula(is_causal):
    layer, x = build(is_causal, qkv_features=10), normal(2, 11, FEATURES)
    query, key, value = (np.asarray(heads, np.float64) for heads in layer.project(x))
    logits = np.einsum("btnh,bsnh->bnts", query, key) / 5**0.5
    weights = (1 + logits + logits**2 / 2) * (np.tri(11) if is_causal else 1)
    weights /= weights.sum(-1, keepdims=True)
    heads = np.einsum("bnts,bsnv->btnv", weights, value)
    np.testing.assert_allclose(layer(x), layer.out(jnp.asarray(heads, jnp.float32)), atol=1e-5)


def test_features_are_as_few_as_the_polynomial_has_terms():
    x, y = normal(4, 16), normal(4, 16, seed=1)
    u = np.sum(np.float64(x) * y, -1) / 4
    np.testing.assert_allclose(np.sum(taylor_features(x) * taylor_features(y), -1), 1 + u + u**2 / 2, rtol=1e-5)
    assert taylor_features(x).shape == (4, 153) and taylor_features(x[:, :1]).shape == (4, 3)
    assert build(True).init_cache(1, 1).numerator.shape == (1, HEADS, 153, 8)


def test_near_zero_it_is_softmax_to_the_second_order():
    """The rest of the series is a sixth of the logits' cube, 1e-6 at 0.02."""
    query, key, value = (normal(1, 9, HEADS, 8, seed=seed) for seed in range(3))
    query, key = (0.1 * x / jnp.linalg.norm(x, axis=-1, keepdims=True) * 8**0.25 for x in (query, key))
    heads = build(True).attend(query, key, value, None)
    np.testing.assert_allclose(heads, softmax.attention(query, key, value, is_causal=True), atol=2e-6)


def test_refusals():
    with pytest.raises(ValueError, match="BasedAttention: value_features must be a multiple of num_heads = 2"):
        build(value_features=9)


def test_oracle():
    """fla adds 1e-6 to a denominator that is at least 1/2 of a weight."""
    oracle.compare("based", oracle.load("based"), lambda inputs, _: {
        "o": build(True).attend(*(inputs[x].swapaxes(1, 2) for x in "qkv"), None).swapaxes(1, 2)
    }, of="mechanism")  # fmt: skip
