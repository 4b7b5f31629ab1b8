"""Memorizing attention: its definition by brute force, its limits, and where no gradient goes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad.kernels import softmax
from subquad.kernels.patterns import Band
from subquad.zoo.recurrent.memorizing import MemorizingAttention

FEATURES, HEADS, LENGTH, SEGMENT = 16, 4, 23, 6


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def build(**options):
    layer = MemorizingAttention(
        HEADS, FEATURES, **{"segment_length": SEGMENT, "num_neighbors": 3, **options}, rngs=nnx.Rngs(0)
    )
    layer.gate[...] = normal(HEADS, seed=1)
    return layer


def spelt_out(layer, x):
    """The layer query by query, in NumPy."""
    query, key, value = (np.asarray(one(jnp.asarray(x)), np.float64) for one in (layer.query, layer.key, layer.value))
    query, key = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (query, key))
    gate, scale = 1 / (1 + np.exp(-np.asarray(layer.gate[...]))), np.asarray(layer.scale[...])
    heads, reach = np.zeros_like(query), layer.memory_length or LENGTH
    for b, t, n in np.ndindex(*query.shape[:3]):
        head = n * key.shape[2] // HEADS
        scores = key[b, :, head] @ query[b, t, n]

        def attention(places, scores=scores, values=value[b, :, head], scale=scale[n]):
            weights = np.exp(scale * scores[places])
            return weights @ values[places] / weights.sum()

        heads[b, t, n], first = attention(np.arange(max(t - SEGMENT, 0), t + 1)), t // SEGMENT * SEGMENT
        if first:
            memory = np.arange(max(first - reach, 0), first)
            nearest = memory[np.argsort(-scores[memory])[: layer.num_neighbors]]
            heads[b, t, n] += gate[n] * (attention(nearest) - heads[b, t, n])
    return layer.out(jnp.asarray(heads, jnp.float32))


@pytest.mark.parametrize("options", [dict(num_kv_heads=2), dict(memory_length=5)], ids=str)
def test_the_definition(options):
    layer, x = build(**options), normal(1, LENGTH, FEATURES)
    np.testing.assert_allclose(layer(x), spelt_out(layer, np.asarray(x)), atol=1e-5)


def test_no_gradient_reaches_the_memory():
    """Of outputs that see a token in their memory alone; the gate, the scale and the query learn from it."""
    layer, x = build(), normal(1, 3 * SEGMENT, FEATURES)
    pull = jax.grad(lambda x: jnp.sum(layer(x)[:, -1]))(x)
    assert (pull[0, : 2 * SEGMENT - 1] == 0).all() and (jnp.abs(pull[0, 2 * SEGMENT - 1 :]).max(-1) > 0).all()
    learned = nnx.grad(lambda layer: jnp.sum(layer(x)[:, -1]))(layer)
    assert all(jnp.abs(part[...]).min() > 0 for part in (learned.gate, learned.scale))


def test_limits():
    """A closed gate is a window; an open one with enough neighbours, attention to all earlier segments."""
    layer, x = build(num_neighbors=LENGTH), normal(2, LENGTH, FEATURES)
    query, key, value = layer.project(x)
    layer.gate[...] = jnp.full(HEADS, -60.0)
    np.testing.assert_allclose(layer(x), layer.out(softmax.attention(query, key, value, pattern=Band(SEGMENT, 0))), atol=1e-5)
    layer.gate[...] = jnp.full(HEADS, 60.0)
    before = np.arange(LENGTH)[:, None] // SEGMENT > np.arange(LENGTH) // SEGMENT
    far = softmax.attention(query, key, value, mask=jnp.asarray(before)[None, None])
    np.testing.assert_allclose(layer(x)[:, SEGMENT:], layer.out(far)[:, SEGMENT:], atol=1e-5)
