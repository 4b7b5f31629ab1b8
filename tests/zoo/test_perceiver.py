"""Perceiver: latents, their blocks and their readers by hand, repeated blocks, sets without order, and transformers' code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad.zoo import masks
from subquad.zoo.lowrank.perceiver import PerceiverAttention
from tests import oracle

FEATURES, HEADS, LATENTS = 16, 2, 5


def build(**options):
    return PerceiverAttention(HEADS, FEATURES, rngs=nnx.Rngs(0), **{"num_latents": LATENTS, "latent_features": 12, **options})


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def multihead(query, key, value, out):
    """[B, T, N, H] to [B, S, N, H], all weights stored, and the map behind."""
    weights = jax.nn.softmax(jnp.einsum("btnh,bsnh->bnts", query, key) * query.shape[-1] ** -0.5, -1)
    return jnp.einsum("bnts,bsnh,nhd->btd", weights, value, out.kernel[...]) + out.bias[...]


def norm(x):
    x = x - x.mean(-1, keepdims=True)
    return x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)


def dense(layer, x, context, repeats=1):
    def network(z, block):
        hidden = jax.nn.gelu(norm(z) @ block.inner.kernel[...] + block.inner.bias[...])
        return z + hidden @ block.outer.kernel[...] + block.outer.bias[...]

    z = jnp.broadcast_to(layer.latents[...], (len(x), *layer.latents.shape))
    z = z + multihead(layer.encoder.query(norm(z)), layer.key(context), layer.value(context), layer.encoder.out)
    z = network(z, layer.encoder)
    for block in [*layer.layers] * repeats:
        hidden = norm(z)
        z = network(z + multihead(block.query(hidden), block.key(hidden), block.value(hidden), block.out), block)
    return multihead(layer.query(x), layer.latent_key(norm(z)), layer.latent_value(norm(z)), layer.out)


@pytest.mark.parametrize("options,repeats", [
    (dict(num_layers=2, num_repeats=3, latent_heads=3), 3), (dict(num_layers=0, latent_features=None), 1),
])
def test_the_formula(options, repeats):
    layer, x, context = build(**options), normal(2, 13, FEATURES), normal(2, 9, FEATURES, seed=1)
    np.testing.assert_allclose(layer(x), dense(layer, x, x, repeats), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(layer(x, context), dense(layer, x, context, repeats), rtol=1e-4, atol=1e-5)


def test_the_order_of_tokens_is_nothing_to_the_latents():
    layer, x = build(), normal(2, 13, FEATURES)
    order = jax.random.permutation(jax.random.key(1), 13)
    np.testing.assert_allclose(layer(x[:, order]), layer(x)[:, order], rtol=1e-4, atol=1e-5)


def test_rows_without_keys_are_the_projection_of_nothing():
    y = build()(normal(2, 7, FEATURES), normal(2, 9, FEATURES, seed=1), mask=masks.padding_mask(jnp.array([9, 0]), 9))
    np.testing.assert_array_equal(y[1], 0)


@pytest.mark.parametrize("change,argument", [
    (dict(num_latents=0), "num_latents"), (dict(latent_features=0), "latent_features"), (dict(latent_heads=0), "latent_heads"),
    (dict(latent_heads=5), "latent_heads"), (dict(num_layers=-1), "num_layers"), (dict(num_repeats=0), "num_repeats"),
    (dict(is_causal=True), "is_causal"),
])
def test_refusals(change, argument):
    with pytest.raises(ValueError, match=rf"PerceiverAttention(:| does not support) {argument}"):
        build(**change)


def test_oracle():
    """transformers' cross-attention: each sample has other latents, inputs are normalised first, epsilons are 1e-5, and heads
    of values are half as large as those of keys: here filled up with 0."""
    peer = oracle.load("perceiver_cross")
    empty = PerceiverAttention(2, 8, num_latents=5, latent_features=6, rngs=nnx.Rngs(0))
    names = {
        "self.layernorm1": "encoder.norm", "self.query": "encoder.query", "self.key": "key", "self.value": "value",
        "output.dense": "encoder.out",
    }  # fmt: skip
    empty.encoder.norm.epsilon = 1e-5
    inner = nnx.LayerNorm(8, epsilon=1e-5, rngs=nnx.Rngs(0))

    def run(inputs, weights):
        normalise = nnx.clone(inner)
        normalise.scale[...], normalise.bias[...] = (weights.pop(f"self.layernorm2.{name}") for name in ("weight", "bias"))
        filled = lambda x: jnp.pad(x.reshape(2, 2, -1), ((0, 0), (0, 2), (0, 0))).reshape(8, -1)
        weights |= {name: filled(weights[name]) for name in ("self.value.weight", "self.value.bias")}
        weights["self.value.bias"] = weights["self.value.bias"][:, 0]
        weights["output.dense.weight"] = filled(weights["output.dense.weight"].T).T
        layer, x = oracle.holding(empty, weights, names), normalise(inputs["x"])
        return layer.encoder.attend(inputs["latents"], layer.key(x), layer.value(x), inputs["keep"][:, None, None])

    oracle.compare("perceiver", peer, run, of="mechanism")
