"""Gated slot attention against its formula, its limits, and a peer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad.kernels import softmax
from subquad.zoo.gated.gsa import GatedSlotAttention
from tests import oracle

FEATURES, HEADS = 16, 2


def build(**options):
    return GatedSlotAttention(HEADS, FEATURES, **{**dict(num_slots=3), **options}, rngs=nnx.Rngs(0))


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def sigmoid(x):
    return 1 / (1 + np.exp(-np.float64(x)))


def silu(x):
    return x * sigmoid(x)


def test_the_formula_step_by_step():
    layer, x = build(temperature=2.0), normal(2, 11, FEATURES)
    layer.norm.scale[...] = normal(HEADS, 8, seed=1)
    query, key, value = (silu(np.float64(module(x))) for module in (layer.query, layer.key, layer.value))
    alpha = sigmoid(layer.forget(x)) ** 0.5
    heads, keys, values = np.zeros((2, 11, HEADS, 8)), np.zeros((2, HEADS, 3, 8)), np.zeros((2, HEADS, 3, 8))
    for t in range(11):
        decay = alpha[:, t, ..., None]
        keys = decay * keys + (1 - decay) * key[:, t, :, None]
        values = decay * values + (1 - decay) * value[:, t, :, None]
        shares = np.exp(np.einsum("bnmh,bnh->bnm", keys, query[:, t]))
        heads[:, t] = np.einsum("bnm,bnmv->bnv", shares / shares.sum(-1, keepdims=True), values)
    heads = silu(heads)
    heads /= np.sqrt(np.mean(heads**2, (-2, -1), keepdims=True) + 1e-5)
    np.testing.assert_allclose(layer(x), layer.out(jnp.asarray(heads * layer.norm.scale[...], jnp.float32)), atol=1e-5)


def test_a_slot_for_every_token_is_softmax_attention():
    """Token t takes slot t for itself: the last token of as many as there are slots sees each of them in its slot."""
    layer = build(num_slots=6)
    query, key, value = (normal(1, 6, HEADS, 8, seed=seed) for seed in range(3))
    own = jnp.broadcast_to(jnp.eye(6)[None, :, None], (1, 6, HEADS, 6))
    heads, keys, _ = layer.recur(query, key, value, own, jnp.where(own == 1, -jnp.inf, 0), None)
    np.testing.assert_allclose(keys, key.swapaxes(1, 2), atol=1e-6)
    want = softmax.attention(query * 8**0.5, key, value)
    np.testing.assert_allclose(heads[:, -1], want[:, -1], atol=1e-5)


@pytest.mark.parametrize(("options", "words"), [
    (dict(num_slots=0), "num_slots must be a positive integer"),
    (dict(temperature=0.0), r"temperature must be a number in \(0, inf\]"),
    (dict(is_causal=False), "does not support is_causal=False"), (dict(rotary_base=10.0), "does not support rotary_base"),
])  # fmt: skip
def test_refusals(options, words):
    with pytest.raises(ValueError, match=f"GatedSlotAttention:? {words}"):
        build(**options)


def test_oracle():
    """Of fla, which multiplies queries by K^-1/2 here, and takes weights that are not those of the gates."""
    layer = GatedSlotAttention(2, 16, num_slots=5, rngs=nnx.Rngs(0))

    def run(inputs, _):
        return {"o": layer.recur(inputs["q"] * 8**-0.5, *(inputs[name] for name in "kvsg"), None)[0]}

    oracle.compare("gsa", oracle.load("gsa"), run, of="mechanism")
