"""DPFP attention: its features one by one, orthogonal keys, its weights, and HKUNLP's layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad.zoo.kernelized.dpfp import DPFPAttention, features
from tests import oracle

FEATURES, HEADS = 16, 2


def build(is_causal=False, **options):
    return DPFPAttention(HEADS, FEATURES, is_causal=is_causal, rngs=nnx.Rngs(0), **options)


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def spelt_out(x, nu):
    """phi, a feature after the other: r_i r_{i-j} with indices on a circle."""
    r = [max(number, 0) for number in (*x, *-x)]
    return np.array([r[i] * r[i - j] for j in range(1, nu + 1) for i in range(len(r))])


@pytest.mark.parametrize("is_causal", [False, True])
def test_the_formula(is_causal):
    layer, x = build(is_causal, nu=3), normal(2, 11, FEATURES)
    query, key, value = (np.asarray(heads, np.float64) for heads in layer.project(x))
    heads = np.zeros_like(value)
    for b, t, n in np.ndindex(2, 11, HEADS):
        seen = t + 1 if is_causal else 11
        weights = [spelt_out(query[b, t, n], 3) @ spelt_out(key[b, s, n], 3) for s in range(seen)]
        heads[b, t, n] = np.dot(weights, value[b, :seen, n]) / max(np.sum(weights), 1e-30)
    np.testing.assert_allclose(layer(x), layer.out(jnp.asarray(heads, jnp.float32)), rtol=1e-4, atol=1e-5)


def test_opposite_tokens_share_no_feature():
    """What the map is for: x and -x are orthogonal, and a token meets only keys of the same signs in neighbouring places."""
    x = normal(50, 8)
    phi, opposite = features(x, 3), features(-x, 3)
    assert phi.shape == (50, 48) and (phi >= 0).all()
    np.testing.assert_array_equal(jnp.sum(phi * opposite, -1), 0)


def test_a_query_that_meets_no_key_gives_0():
    layer, query = build(), normal(1, 3, HEADS, 8)
    np.testing.assert_array_equal(layer.attend(query, -query[:, :1], jnp.ones((1, 1, HEADS, 8)), None)[:, :1], 0)


@pytest.mark.parametrize("nu", [0, 16])
def test_refusals(nu):
    with pytest.raises(ValueError, match="DPFPAttention: nu must be"):
        build(nu=nu)


def test_oracle():
    """HKUNLP's layer, whose denominator is at least 0.01: of these tokens it is so anyway."""
    peer = oracle.load("dpfp")
    width, heads = peer.inputs["x"].shape[-1], peer.meta["cfg"]["H"]
    nu = peer.meta["cfg"]["approx_attn_dim"] // (2 * width // heads)
    layer = DPFPAttention(heads, width, nu=nu, rngs=nnx.Rngs(0))

    def run(inputs, weights):
        ours = nnx.clone(layer)
        for name, kernel, bias in zip(
            ("query", "key", "value"), jnp.split(weights["qkv.weight"], 3), jnp.split(weights["qkv.bias"], 3), strict=True
        ):
            module = getattr(ours, name)
            module.kernel[...], module.bias[...] = kernel.T.reshape(module.kernel.shape), bias.reshape(module.bias.shape)
        ours.out.kernel[...] = weights["proj.weight"].T.reshape(ours.out.kernel.shape)
        ours.out.bias[...] = weights["proj.bias"]
        return {"y": ours(inputs["x"])}

    oracle.compare("dpfp", peer, run)
