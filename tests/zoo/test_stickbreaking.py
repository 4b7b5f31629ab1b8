"""Stick-breaking attention: the formula by products, its parts of the stick, packed sequences, and flash-linear-attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad.zoo.dense.stickbreaking import StickBreakingAttention, stick_breaking
from tests import oracle

FEATURES, HEADS, LENGTH = 16, 4, 11


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def build(**options):
    return StickBreakingAttention(HEADS, FEATURES, **options, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("current", [False, True])
def test_the_formula(current):
    """Key after key into the past; two heads of keys; what is left goes to a vector of the head."""
    layer, x = build(num_kv_heads=2, attend_current=current, remainder=True), 2 * normal(2, LENGTH, FEATURES)
    layer.rest[...] = jnp.asarray(normal(HEADS, FEATURES // HEADS, seed=1))
    query, key, value = (np.einsum("btd,dnh->btnh", x, m.kernel[...]) for m in (layer.query, layer.key, layer.value))
    heads = np.zeros_like(query)
    for b, t, n in np.ndindex(2, LENGTH, HEADS):
        stick = 1.0
        for s in reversed(range(t + current)):
            part = stick / (1 + np.exp(-query[b, t, n] @ key[b, s, n // 2] / 2))
            heads[b, t, n] += part * value[b, s, n // 2]
            stick -= part
        heads[b, t, n] += stick * np.asarray(layer.rest[...])[n]
    np.testing.assert_allclose(layer(x), np.einsum("btnh,nhd->btd", heads, layer.out.kernel[...]), atol=1e-5)


def test_blocks_of_queries_are_no_matter():
    """Three blocks against all at once, with their gradients; and logits so large that parts are all or nothing."""
    q, k, v = (jnp.asarray(normal(2, 50, HEADS, 4, seed=i)) for i in range(3))
    start = jnp.zeros(2, jnp.int32)

    def run(size, scale):
        def loss(query, *others):
            return sum(jnp.sum(jnp.sin(y)) for y in stick_breaking(size, False, scale * query, *others, start))

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(q, k, v)

    for scale in (1.0, 1e4):
        found = run(20, scale), run(50, scale)
        assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(found))
        for ours, theirs in zip(*map(jax.tree.leaves, found), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * scale)


def test_the_newest_of_equal_keys_counts_most():
    """With logits of 0 every key takes half of what is left: 1/2, 1/4, ..."""
    zeros, value = jnp.zeros((1, 6, 1, 2)), jnp.eye(6)[None, :, None]
    weights, left = stick_breaking(6, False, zeros, zeros, value, jnp.zeros(1, jnp.int32))
    expected = np.tril(0.5 ** np.maximum(np.arange(6)[:, None] - np.arange(6), 1), -1)
    np.testing.assert_allclose(weights[0, :, 0], expected, atol=1e-6)
    np.testing.assert_allclose(left[0, :, 0], 0.5 ** np.arange(6), atol=1e-6)


def test_packed_sequences_are_as_alone():
    """Also where an id comes again: its first sequence is another."""
    layer, x = build(), normal(2, 17, FEATURES)
    run = jax.jit(lambda x, ids=None: layer(x, segment_ids=ids))
    alone = jnp.concatenate([run(x[:, :6]), run(x[:, 6:10]), run(x[:, 10:])], axis=1)
    np.testing.assert_allclose(run(x, jnp.asarray([3] * 6 + [1] * 4 + [3] * 7)), alone, atol=1e-5)


def test_oracle():
    peer = oracle.load("stickbreaking")

    def attend(inputs, _):
        heads, left = stick_breaking(16, False, *(inputs[x] for x in "qkv"), jnp.zeros(2, jnp.int32))
        return {"o": heads, "rem": left}

    oracle.compare("stickbreaking", peer, attend, of="mechanism")
