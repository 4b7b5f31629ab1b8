"""Gated linear attention against its formula, its limits, and a peer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad.zoo.gated.gla import GatedLinearAttention
from subquad.zoo.gated.retention import Retention
from tests import oracle

FEATURES, HEADS = 16, 2


def build(**options):
    return GatedLinearAttention(HEADS, FEATURES, rngs=nnx.Rngs(0), **options)


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def sigmoid(x):
    return 1 / (1 + np.exp(-np.float64(x)))


def test_the_formula_step_by_step():
    layer, x = build(decay_rank=3, temperature=2.0), normal(2, 11, FEATURES)
    layer.decay_up.bias[...], layer.norm.scale[...] = normal(HEADS, 4, seed=1), normal(8, seed=2)
    query, key, value, logits = (np.asarray(heads, np.float64) for heads in layer.project(x)[:4])
    alpha = sigmoid(np.einsum("btr,rnh->btnh", x @ layer.decay_down.kernel[...], layer.decay_up.kernel[...])
                    + layer.decay_up.bias[...]) ** 0.5
    np.testing.assert_allclose(sigmoid(logits) ** 0.5, alpha, atol=1e-6)
    heads, state = np.zeros((2, 11, HEADS, 8)), np.zeros((2, HEADS, 4, 8))
    for t in range(11):
        state = alpha[:, t, ..., None] * state + key[:, t, ..., None] * value[:, t, :, None]
        heads[:, t] = np.einsum("bnh,bnhv->bnv", query[:, t], state) / 4**0.5
    heads /= np.sqrt(np.mean(heads**2, -1, keepdims=True) + 1e-5)
    gate = np.float64(layer.gate(x))
    heads *= np.asarray(layer.norm.scale[...]) * gate * sigmoid(gate)
    np.testing.assert_allclose(layer(x), layer.out(jnp.asarray(heads, jnp.float32)), atol=1e-5)


def test_one_gate_everywhere_is_retention():
    """And an open one, at a logit of 30, the sum of all."""
    layer, x = build(temperature=1.0), normal(1, 9, FEATURES)
    other = Retention(HEADS, FEATURES, qkv_features=8, value_features=16, decay=(0.5, 1.0), rotary_base=None, rngs=nnx.Rngs(1))
    nnx.update(other, {name: nnx.state(getattr(layer, name)) for name in ("query", "key", "value", "gate", "out", "norm")})
    layer.decay_down.kernel[...] = jnp.zeros((FEATURES, 16))
    layer.decay_up.bias[...] = jnp.stack([jnp.zeros(4), jnp.full(4, 30.0)])
    np.testing.assert_allclose(layer(x), other(x), atol=1e-5)


@pytest.mark.parametrize(("options", "words"), [
    (dict(value_features=9), "value_features must be a multiple"),
    (dict(decay_rank=0), "decay_rank must be a positive integer"),
    (dict(value_features=9), "value_features must be a multiple"), (dict(decay_rank=0), "decay_rank must be a positive"),
    (dict(temperature=0.0), r"temperature must be a number in \(0, inf\]"),
    (dict(is_causal=False), "does not support is_causal=False"),
    (dict(rotary_base=10.0), "does not support rotary_base"),
])  # fmt: skip
def test_refusals(options, words):
    with pytest.raises(ValueError, match=f"GatedLinearAttention:? {words}"):
        build(**options)


def test_oracle():
    """From a state, to a state, with all gradients."""
    peer = oracle.load("gla")
    layer = GatedLinearAttention(2, 16, qkv_features=16, value_features=12, rngs=nnx.Rngs(0))

    def run(inputs, _):
        heads, state = layer.recur(*(inputs[name] for name in ("q", "k", "v", "gk")), None, inputs["h0"])
        return {"o": heads, "h": state}

    oracle.compare("gla", peer, run, of="mechanism")
