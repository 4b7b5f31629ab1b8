"""H-Transformer-1D: every pair of tokens by hand, softmax in its limits, groups, the cache, and a package that departs from it.

The package, h-transformer-1d, is no test of the paper's sums: each of its levels subtracts the largest logit of its own rows
and never puts it back, so that levels are added at weights that mean nothing; and it does not connect the sequence, whose
halves never see each other, nor in its causal form a block and its neighbour. What it shares with the paper is the pyramid:
means of queries and keys, sums of values, and attention of groups to a block. So what the package computes is spelt out here,
and agrees with it in all outputs and gradients; the layer does not.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad.zoo.hierarchical.h_transformer import HTransformerAttention, coarse_levels, far, in_pairs, listed, near
from tests import oracle

FEATURES, HEADS = 16, 2


def build(is_causal=False, block_size=2, **options):
    return HTransformerAttention(HEADS, FEATURES, block_size=block_size, is_causal=is_causal, rngs=nnx.Rngs(0), **options)


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def attend(layer, *heads):
    """Compiled: operation by operation it would take longer."""
    return jax.jit(lambda *heads: layer.attend(*heads, None))(*heads)


def level_of(query, key, size):
    """The first level at which the blocks of two tokens are the same or neighbours."""
    level = 0
    while abs(query // (size << level) - key // (size << level)) > 1:
        level += 1
    return level


def pair_by_pair(query, key, value, size, is_causal):
    """[B, T, N, H]: the logit of every query and key from the means of their groups, in float64."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    length = query.shape[1]

    def mean(x, at, level):
        group = at >> level
        return x[:, group << level : (group + 1) << level].mean(1)

    outputs = np.zeros(query.shape)
    for t in range(length):
        weights, seen = [], range(t + 1 if is_causal else length)
        for s in seen:
            level = level_of(t, s, size)
            one = query[:, t] if is_causal else mean(query, t, level)
            weights.append(np.exp((one * mean(key, s, level)).sum(-1) / np.sqrt(query.shape[-1])))
        weights = np.stack(weights, 1)
        outputs[:, t] = np.einsum("bsn,bsnh->bnh", weights / weights.sum(1, keepdims=True), value[:, list(seen)])
    return jnp.asarray(outputs, jnp.float32)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("length,size", [(23, 2), (37, 4)])
def test_the_formula(is_causal, length, size):
    layer, x = build(is_causal, size), normal(2, length, FEATURES)
    heads = pair_by_pair(*layer.project(x), size, is_causal)
    np.testing.assert_allclose(layer(x), layer.out(heads), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("length", [1, 5, 33, 70])
def test_levels_see_every_pair_once(is_causal, length, size=4):
    """By lists of places, at the level that the definition says."""
    layer, at = build(is_causal, size), np.arange(length)
    levels = np.array([[level_of(t, s, size) for s in at] for t in at])
    past = at <= at[:, None] if is_causal else np.ones((length, length), bool)
    for level in [0, *(coarse_levels(length, layer.block_size) if is_causal else range(1, 1 + levels.max()))]:
        groups = length >> level if is_causal else -(-length // (1 << level))
        halves = jnp.asarray(at // (size // 2 << level))
        seen = near(halves, is_causal) if level == 0 else far(halves, is_causal)
        times = (np.asarray(listed(seen, size // 2, groups))[:, None] == (at >> level)[:, None]).sum(-1)
        np.testing.assert_array_equal(times[past], (levels == level)[past])
    assert level >= levels[past].max()


@pytest.mark.parametrize("is_causal", [False, True])
def test_two_blocks_are_softmax_attention(is_causal):
    layer, x = build(is_causal, 16), normal(2, 32, FEATURES)
    query, key, value = layer.project(x)
    wanted = jax.nn.dot_product_attention(query, key, value, is_causal=is_causal)
    np.testing.assert_allclose(attend(layer, query, key, value), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("is_causal", [False, True])
def test_what_is_constant_within_groups_is_softmax_attention(is_causal):
    """Means lose nothing then, whatever the values. The largest groups of 64 tokens in blocks of 4 have 8."""
    layer, value = build(is_causal, 4), normal(2, 64, HEADS, 8, seed=2)
    query, key = (jnp.repeat(normal(2, 8, HEADS, 8, seed=seed), 8, axis=1) for seed in range(2))
    wanted = jax.nn.dot_product_attention(query, key, value, is_causal=is_causal)
    np.testing.assert_allclose(attend(layer, query, key, value), wanted, rtol=1e-4, atol=1e-5)


def test_a_group_at_the_end_is_the_mean_of_its_real_tokens():
    layer, x = build(), normal(2, 23, FEATURES)
    longer = jnp.concatenate([x, 30 * normal(2, 18, FEATURES, seed=1)], 1)
    mask = (jnp.arange(41) < 23)[None, None, None]
    np.testing.assert_allclose(layer(longer, mask=mask)[:, :23], layer(x), rtol=1e-4, atol=1e-5)


def test_the_cache_holds_the_means_of_complete_groups():
    layer, x = build(True), normal(2, 22, FEATURES)
    cache = layer.init_cache(2, 30)
    for piece in (x[:, :5], x[:, 5:6], x[:, 6:]):
        _, cache = layer.extend(piece, cache)
    _, key, value = layer.project(x)
    start = 0
    for level in coarse_levels(30, layer.block_size):
        count = 22 >> level
        means = [y[:, : count << level].reshape(2, count, 1 << level, HEADS, 8).mean(2) for y in (key, value)]
        found = cache.coarse_key[:, start : start + count], cache.coarse_value[:, start : start + count]
        np.testing.assert_allclose(found[0][..., :-2], means[0], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found[0][..., -2:].sum(-1), level * np.log(2), rtol=1e-5)
        np.testing.assert_allclose(found[1], means[1], rtol=1e-4, atol=1e-6)
        start += 30 >> level
    assert start == cache.coarse_key.shape[1] and list(coarse_levels(30, layer.block_size)) == [1, 2, 3]


def test_long_values_in_half_precision():
    """Weights of many tokens are exact: a mean of ones stays 1, and a group counts as often as it has tokens."""
    for is_causal in (False, True):
        layer = build(is_causal, 4, dtype=jnp.bfloat16)
        query = jnp.zeros((1, 1000, HEADS, 8), jnp.bfloat16)
        value = jnp.broadcast_to((jnp.arange(1000) < 200)[None, :, None, None], query.shape).astype(jnp.bfloat16)
        heads = attend(layer, query, query, value).astype(jnp.float32)
        np.testing.assert_allclose(heads[0, -1], 0.2, rtol=1e-2)


def test_odd_blocks_are_refused():
    with pytest.raises(ValueError, match="HTransformerAttention: block_size must be even, got 3"):
        build(block_size=3)
    with pytest.raises(ValueError, match="HTransformerAttention: block_size must be a positive integer"):
        build(block_size=0)


# The package.


def blocks(x, size):
    return x.reshape(x.shape[0], -1, size, *x.shape[2:])


def weigh(query, key, value, seen):
    """Sums of weighted values and of weights, of blocks [B, I, C, ...], each row relative to its own largest logit."""
    logits = jnp.einsum("bitnh,bisnh->bints", query, key)
    logits = jnp.where(seen, logits, -jnp.finfo(logits.dtype).max)
    weights = jnp.exp(logits - logits.max(-1, keepdims=True))  # never put back, so that it has a gradient
    return jnp.einsum("bints,bisnh->bitnh", weights, value), jnp.moveaxis(weights.sum(-1), 2, 3)


def spread(x, length):
    """[B, I, C, ...] of groups, to their tokens [B, T, ...]."""
    x = x.reshape(x.shape[0], -1, *x.shape[3:])
    return jnp.repeat(x, length // x.shape[1], 1)


def package_bidirectional(query, key, value, keep, size):
    """Blocks to themselves, and at every level but the last two to the block beside them."""
    length, parts, counts = query.shape[1], [], keep.astype(query.dtype)
    sums = [x * counts[..., None, None] if level else x for level, x in ((0, query), (0, key), (0, value))]
    means, real = sums, keep
    for level in range(int(np.log2(length // size)) - 1):
        query, key, value = (blocks(x, size) for x in means)
        kept = blocks(real, size)
        for flip in (False, True)[level > 0 :]:
            turn = (lambda x: x[:, np.arange(x.shape[1]) ^ 1]) if flip else (lambda x: x)
            seen = kept[:, :, None, :, None] & turn(kept)[:, :, None, None, :]
            parts.append(weigh(query, turn(key), turn(value), seen))
        # Means over what is real of a pair, and sums of values.
        both = real.astype(sums[0].dtype)[..., None, None]
        number = jnp.maximum(in_pairs(both), 1)
        means = [in_pairs(x * both) / (number if i < 2 else 1) for i, x in enumerate(means)]
        real = in_pairs(real.astype(int)) > 0
    return (sum(spread(x, length) for x in one) for one in zip(*parts, strict=True))


def package_causal(query, key, value, size):
    """Tokens of their own block, and at each level, for the last token of a group, the block before that of an odd one."""
    length = query.shape[1]
    parts = [weigh(*(blocks(x, size) for x in (query, key, value)), jnp.tri(size, dtype=bool))]
    outputs = [spread(x, length) for x in parts[0]]
    for level in range(1, int(np.log2(length // size))):
        query, key, value = in_pairs(query) / 2, in_pairs(key) / 2, in_pairs(value)
        of, to = blocks(query, size)[:, 1::2], [blocks(x, size)[:, ::2] for x in (key, value)]
        found = weigh(of, *to, jnp.ones((size, size), bool))
        is_last = jnp.arange(length) % (1 << level) == (1 << level) - 1
        for i, x in enumerate(found):
            x = spread(jnp.stack([jnp.zeros_like(x), x], 2).reshape(x.shape[0], -1, *x.shape[2:]), length)
            outputs[i] += jnp.where(is_last.reshape(length, *(1,) * (x.ndim - 2)), x, 0)
    return outputs


@pytest.mark.parametrize("name", ["h_transformer_bidir", "h_transformer_mask", "h_transformer_causal"])
def test_the_package_is_another_function(name):
    peer = oracle.load(name)
    size, width = peer.meta["cfg"]["block_size"], peer.meta["cfg"]["dim_head"]
    layer = HTransformerAttention(2, 8, block_size=size, use_bias=False, is_causal=name.endswith("causal"), rngs=nnx.Rngs(0))

    def heads_of(inputs, weights):
        split = jnp.split(inputs["x"] @ weights["to_qkv.weight"].T, 3, -1)
        return (x.reshape(*x.shape[:2], -1, width) for x in split)

    def finish(heads, weights):
        return heads.reshape(*heads.shape[:2], -1) @ weights["to_out.weight"].T + weights["to_out.bias"]

    def run(inputs, weights):
        query, key, value = heads_of(inputs, weights)
        query *= width**-0.5
        if layer.is_causal:
            numerator, denominator = package_causal(query, key, value, size)
        else:
            keep = inputs.get("keep", jnp.ones(query.shape[:2], bool))
            numerator, denominator = package_bidirectional(query, key, value, keep, size)
        return finish(numerator / (denominator + peer.meta["cfg"]["eps"])[..., None], weights)

    oracle.compare(None, peer, run)
    arrays = [{key: jnp.asarray(x) for key, x in group.items()} for group in (peer.inputs, peer.weights)]
    mask = arrays[0].get("keep")
    ours = finish(layer.attend(*heads_of(*arrays), None if mask is None else mask[:, None, None]), arrays[1])
    assert jnp.abs(ours - peer.outputs["y"]).max() > 0.05
