"""Infini-attention: its definition token by token, its limits, and infini-transformer-pytorch."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad import zoo
from subquad.zoo.recurrent.infini import InfiniAttention
from tests import oracle

FEATURES, HEADS, LENGTH, SEGMENT = 16, 4, 23, 6


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def build(**options):
    return InfiniAttention(HEADS, FEATURES, **{"segment_length": SEGMENT, **options}, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("update", ["linear", "delta"])
def test_the_definition(update):
    """Two heads of keys, each with a memory."""
    layer, x = build(num_kv_heads=2, update=update), normal(2, LENGTH, FEATURES)
    layer.beta[...] = normal(HEADS, seed=1)
    query, key, value = (np.asarray(head, np.float64) for head in layer.project(x)[:3])
    s = lambda x: np.where(x > 0, x + 1, np.exp(x))
    gate = 1 / (1 + np.exp(-np.asarray(layer.beta[...], np.float64)))
    heads = np.zeros_like(query)
    for b, group in np.ndindex(2, 2):
        memory, z = np.zeros((4, 4)), np.zeros(4)
        for start in range(0, LENGTH, SEGMENT):
            places = range(start, min(start + SEGMENT, LENGTH))
            for t, n in ((t, n) for t in places for n in (2 * group, 2 * group + 1)):
                k, v = (x[b, start : t + 1, group] for x in (key, value))
                weights = np.exp(k @ query[b, t, n] / 2)
                heads[b, t, n] = weights @ v / weights.sum()
                if start:
                    features = s(query[b, t, n])
                    heads[b, t, n] += gate[n] * (features @ memory / (features @ z) - heads[b, t, n])
            before, z_before = memory.copy(), z.copy()
            for t in places:
                features, v = s(key[b, t, group]), value[b, t, group]
                held = features @ before / (features @ z_before) if start and update == "delta" else 0
                memory, z = memory + np.outer(features, v - held), z + features
    np.testing.assert_allclose(layer(x), layer.out(jnp.asarray(heads, jnp.float32)), atol=1e-5)


def test_far_below_zero_features_keep_their_digits():
    """Where elu(x) + 1 is 6e-6, a difference of numbers of size 1 would be off by a hundredth."""
    keys, values = normal(1, SEGMENT, 1, 4) - 12, normal(1, SEGMENT, 1, 4, seed=1)
    layer = build()
    memory = layer.updated((jnp.zeros((1, 1, 4, 4)), jnp.zeros((1, 1, 4))), keys, values)
    np.testing.assert_allclose(memory[1][:, 0], np.exp(keys).sum(1)[:, 0], rtol=1e-5)


def test_limits():
    """One segment is softmax attention; a closed gate, attention within segments."""
    x, softmax = normal(2, LENGTH, FEATURES), zoo.SoftmaxAttention(HEADS, FEATURES, is_causal=True, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(build(segment_length=LENGTH)(x), softmax(x), atol=1e-5)
    layer = build()
    layer.beta[...] = jnp.full(HEADS, -60.0)
    np.testing.assert_allclose(layer(x)[:, SEGMENT : 2 * SEGMENT], softmax(x[:, SEGMENT : 2 * SEGMENT]), atol=1e-5)


class Rotating(InfiniAttention):
    """With angles of any frequencies: the peer learns them."""

    def rotate(self, query, key, *positions):
        def turned(x, at):
            angle = at[..., None, None] * jnp.asarray(self.frequencies)
            (first, second), cos, sin = jnp.split(x, 2, axis=-1), jnp.cos(angle), jnp.sin(angle)
            return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

        return tuple(map(turned, (query, key), positions))


@pytest.mark.parametrize("name", ["infini", "infini_delta"])
def test_oracle(name):
    """Its gate is on the segment, ours as the paper's on the memory; it rotates pairs of neighbours, we halves of a head."""
    peer = oracle.load(name)
    heads, size = peer.meta["cfg"]["heads"], peer.meta["cfg"]["dim_head"]
    update = "delta" if peer.meta["cfg"]["delta_rule"] else "linear"
    layer = Rotating(
        heads, heads * size, segment_length=10, update=update, rotary_base=1.0, use_bias=False, rngs=nnx.Rngs(0)
    )
    layer.frequencies = tuple(peer.constants["freqs"].tolist())
    halves = np.concatenate([np.arange(0, size, 2), np.arange(1, size, 2)])

    def run(inputs, weights):
        kernels = jnp.split(weights["to_qkv.weight"], 3)
        named = zip(("query", "key", "value"), kernels, strict=True)
        maps = {name: kernel.T.reshape(-1, heads, size) for name, kernel in named}
        maps |= {name: maps[name][..., halves] for name in ("query", "key")}
        named = {f"{name}.kernel": kernel for name, kernel in maps.items()}
        named |= {"beta": -weights["fastweight_mem.head_gates"], "out.weight": weights["to_out.weight"]}
        ours = oracle.holding(layer, named)
        cache, outputs, back = ours.init_cache(2, 20), {}, np.argsort(halves)
        for i, x in enumerate((inputs["x1"], inputs["x2"]), 1):
            x = x / jnp.linalg.norm(x, axis=-1, keepdims=True) * x.shape[-1] ** 0.5 * weights["norm.gamma"]
            outputs[f"y{i}"], cache = ours.extend(x, cache)
        return outputs | {"M": cache.memory[:, :, back], "z": cache.normaliser[:, :, back]}

    oracle.compare("infini", peer, run)
