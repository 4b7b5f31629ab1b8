"""Mixture of block attention: its definition block by block, its limit, what learns, and the authors' code."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from subquad import zoo
from subquad.zoo.buckets import blocks
from subquad.zoo.buckets.moba import MoBAAttention
from tests import oracle

FEATURES, HEADS, LENGTH = 16, 4, 23


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def build(**options):
    return MoBAAttention(HEADS, FEATURES, **{"block_size": 4, "num_blocks": 3, **options}, rngs=nnx.Rngs(0))


def test_the_definition():
    """Query by query, with two heads of keys; the last block is not whole."""
    layer, x = build(num_kv_heads=2), normal(2, LENGTH, FEATURES)
    query, key, value = (np.asarray(head, np.float64) for head in layer.project(x))
    heads = np.zeros_like(query)
    for b, t, n in np.ndindex(2, LENGTH, HEADS):
        own = t // 4
        scores = [query[b, t, n] @ key[b, 4 * i : 4 * i + 4, n // 2].mean(0) for i in range(own)]
        chosen = [*np.argsort(scores)[::-1][:2], own]
        seen = [s for s in range(t + 1) if s // 4 in chosen]
        weights = np.exp([query[b, t, n] @ key[b, s, n // 2] / 2 for s in seen])
        heads[b, t, n] = weights @ value[b, seen, n // 2] / weights.sum()
    np.testing.assert_allclose(layer(x), layer.out(jnp.asarray(heads, jnp.float32)), atol=1e-5)


def test_enough_blocks_are_softmax():
    """With all gradients."""
    layer, x = build(num_blocks=6, num_kv_heads=2), normal(2, LENGTH, FEATURES)
    softmax = zoo.SoftmaxAttention(HEADS, FEATURES, num_kv_heads=2, is_causal=True, rngs=nnx.Rngs(0))
    run = lambda layer: nnx.jit(nnx.value_and_grad(lambda layer, x: jnp.sum(jnp.sin(layer(x))), argnums=(0, 1)))(layer, x)
    leaves = [[leaf for leaf in jax.tree.leaves(run(layer))] for layer in (layer, softmax)]
    for ours, theirs in zip(*leaves, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-4)


def test_only_what_is_chosen_learns():
    layer, x = build(num_blocks=2), normal(1, 16, FEATURES)
    query, key, value = layer.project(x)
    chosen = np.asarray(layer.choose(query, jnp.arange(16)[None], key.reshape(1, 4, 4, HEADS, -1).sum(2)))
    pull = jax.grad(lambda value: layer.attend(query, key, value, None)[0, -1, 0].sum())(value)[0, :, 0]
    moved = np.abs(pull).max(-1) > 0
    np.testing.assert_array_equal(moved, np.isin(np.arange(16) // 4, [3, *chosen[0, 0, -1]]))


def test_tiles_hold_one_block_each():
    block = jnp.asarray([2, 0, -1, 2, 2, 2, 0, -1, 1])
    tile, at = blocks.tiles(block, 4, 3)
    places = np.asarray(at)[np.asarray(block) >= 0]
    assert len(set(places)) == 7 and (np.asarray(at)[[2, 7]] >= 3 * len(tile)).all()
    np.testing.assert_array_equal(np.asarray(tile)[places // 3], [2, 0, 2, 2, 2, 0, 1])


def test_equal_scores_take_the_earlier_block():
    assert blocks.best(jnp.zeros((1, 5)), jnp.asarray([3]), 2).tolist() == [[0, 1]]
    assert blocks.best(jnp.zeros((1, 5)), jnp.asarray([1]), 2).tolist() == [[0, -1]]


def test_oracle():
    """The authors' plain version; it packs two sequences."""
    peer = oracle.load("moba")
    layer = MoBAAttention(2, 8, block_size=peer.meta["cfg"]["chunk"], num_blocks=peer.meta["cfg"]["topk"], rngs=nnx.Rngs(0))
    ends = peer.constants["cu_seqlens"]

    def attend(inputs, _):
        each = [[inputs[x][None, a:b] for x in "qkv"] for a, b in zip(ends[:-1], ends[1:], strict=True)]
        return {"o": jnp.concatenate([layer.attend(*heads, None)[0] for heads in each])}

    oracle.compare("moba", peer, attend, of="mechanism")
