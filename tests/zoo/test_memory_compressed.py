"""Memory-compressed attention: block by block by hand, what a token sees, caches of whole and open blocks, and a package."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad.zoo import masks
from subquad.zoo.lowrank.memory_compressed import MemoryCompressedAttention
from tests import oracle

FEATURES, HEADS, KV_HEADS, SIZE = 16, 4, 2, 3


def build(is_causal=False, **options):
    layer = MemoryCompressedAttention(
        HEADS, FEATURES, num_kv_heads=KV_HEADS, is_causal=is_causal, rngs=nnx.Rngs(0), **options)
    draw = nnx.Rngs(1).params.normal
    for module in (layer.key, layer.value, layer.compress_key, layer.compress_value):
        module.bias[...] = draw(module.bias.shape)
    if layer.null_key is not None:
        layer.null_key[...], layer.null_value[...] = draw((2, KV_HEADS, 4))
    return layer


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def dense(layer, x):
    """Outputs [T, D] of one sequence [T, D], a head, a query and a block at a time."""
    length, causal = len(x), layer.is_causal
    query, key, value = (np.asarray(heads[0]) for heads in layer.project(x[None]))
    rows = np.zeros((length, HEADS, 4))
    for n, t in np.ndindex(HEADS, length):
        k, keys, values = n // (HEADS // KV_HEADS), [], []
        if layer.null_key is not None:
            keys, values = [layer.null_key[k]], [layer.null_value[k]]
        for first in range(0, length, SIZE):
            end = first + SIZE
            sees = not causal or (end - 1 <= t if layer.null_key is not None else end <= t)
            if not sees:
                continue
            for heads, module, found in ((key, layer.compress_key, keys), (value, layer.compress_value, values)):
                kernel = np.asarray(module.kernel[...]).reshape(SIZE, 4, KV_HEADS, 4)
                parts = (heads[first + c, k] @ kernel[c, :, k] for c in range(SIZE) if first + c < length)
                found.append(sum(parts) + np.asarray(module.bias[k]))
        if causal and layer.null_key is None:
            own = range(t // SIZE * SIZE, t + 1)
            keys, values = keys + [key[s, k] for s in own], values + [value[s, k] for s in own]
        logits = np.array([query[t, n] @ key_ / 2 for key_ in keys])
        weights = np.exp(logits - logits.max())
        rows[t, n] = weights / weights.sum() @ np.array(values)
    return np.einsum("tnh,nhd->td", rows, layer.out.kernel[...]) + layer.out.bias[...]


VARIANTS = pytest.mark.parametrize("is_causal,null_key", [(False, False), (False, True), (True, False), (True, True)])


@VARIANTS
def test_the_formula(is_causal, null_key):
    layer, x = build(is_causal, null_key=null_key), normal(11, FEATURES)
    y = jax.jit(lambda x: layer(x))(x)
    np.testing.assert_allclose(y, dense(layer, x), rtol=1e-4, atol=1e-5)
    reached = np.asarray(jnp.abs(jax.jit(jax.jacrev(lambda x: layer(x).sum(-1)))(x)).sum(-1) > 1e-7)
    itself = np.eye(11, dtype=bool) & null_key  # by its query, where its key is not visible
    np.testing.assert_array_equal(reached | itself, layer.pattern(11)[0] | itself)


def test_what_a_token_sees():
    expected = {
        False: ["x......", "xx.....", "xxx....", "xxxx...", "xxxxx..", "xxxxxx.", "xxxxxxx"],
        True: [".......", ".......", "xxx....", "xxx....", "xxx....", "xxxxxx.", "xxxxxx."],
    }
    for null_key, rows in expected.items():
        pattern = build(True, null_key=null_key).pattern(7)
        np.testing.assert_array_equal(pattern, np.array([[[mark == "x" for mark in row] for row in rows]]))


def test_padding_is_no_part_of_the_last_block():
    layer, x = build(null_key=True), normal(2, 11, FEATURES)
    y = layer(x, mask=masks.padding_mask(jnp.array([11, 7]), 11))
    np.testing.assert_allclose(y[1, :7], dense(layer, x[1, :7]), rtol=1e-4, atol=1e-5)
    cross = layer(x, 1 * x, mask=masks.padding_mask(jnp.array([11, 7]), 11))
    np.testing.assert_allclose(cross[1, :7], y[1, :7], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("null_key", [False, True])
def test_extend_keeps_a_block_open_until_it_is_over(null_key):
    """Blocks of three, pieces that end anywhere in them, samples that stand at different places."""
    layer, x = build(True, null_key=null_key), normal(2, 14, FEATURES)
    real = jnp.ones((2, 14), bool).at[1, jnp.array([0, 3, 4, 9])].set(False)
    wanted = jnp.where(real[..., None], layer(x, mask=real[:, None, None]), 0)
    step = jax.jit(lambda x, cache, mask: layer.extend(x, cache, mask=mask))
    for width in (2, 7):
        cache, rows = layer.init_cache(2, 14), []
        for start in range(0, 14, width):
            at = slice(start, start + width)
            y, cache = step(x[:, at], cache, real[:, None, None, at])
            rows.append(y)
        found = jnp.where(real[..., None], jnp.concatenate(rows, 1), 0)
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    _, key, value = layer.project(x[:1])
    for kept, whole in zip(cache[:2], layer.compress(key, value), strict=True):
        assert kept.shape == (2, 5, KV_HEADS, 4)
        np.testing.assert_allclose(kept[0, :4], whole[0, :4], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(cache.open_key[0, :2], key[0, 12:], rtol=1e-5, atol=1e-6)


def test_a_cache_has_room_for_whole_blocks():
    layer = build(True)
    _, cache = layer.extend(normal(1, 4, FEATURES), layer.init_cache(1, 4))  # two blocks
    y, cache = layer.extend(normal(1, 2, FEATURES), cache)
    assert jnp.isfinite(y).all()
    with pytest.raises(ValueError, match="room for 6"):
        layer.extend(normal(1, 1, FEATURES), cache)
    assert jnp.isnan(jax.jit(layer.extend)(normal(1, 1, FEATURES), cache)[0]).all()


def test_refusals():
    with pytest.raises(ValueError, match="MemoryCompressedAttention: compression must"):
        build(compression=0)


def test_oracle():
    """lucidrains' package fills up the first block, on the left, where ours is the last: it is given a token of 0 in front, of
    which it projects no bias. It scales by the width of all heads, and has one convolution for keys and values."""
    peer = oracle.load("memory_compressed_causal")
    empty = MemoryCompressedAttention(2, 8, null_key=True, is_causal=True, rngs=nnx.Rngs(0))

    def run(inputs, weights):
        query, key, value = jnp.split(weights.pop("to_qkv.weight"), 3)
        taps = weights.pop("compress_fn.conv.weight").reshape(2, 4, 4, 3).transpose(3, 2, 0, 1)  # [head, out, in, tap]
        bias = weights.pop("compress_fn.conv.bias")
        names = {"to_out": "out", "null_k": "null_key", "null_v": "null_value"}
        weights |= {"query.weight": query * 2**-0.5, "key.weight": key, "value.weight": value}
        layer = oracle.holding(empty, weights, names)
        for module in (layer.compress_key, layer.compress_value):
            module.kernel[...], module.bias[...] = taps.reshape(12, 2, 4), bias.reshape(2, 4)
        return layer(jnp.pad(inputs["x"], ((0, 0), (1, 0), (0, 0))))[:, 1:]

    oracle.compare("memory_compressed", peer, run)
