"""Native sparse attention: its definition query by query, its limits, and flash-linear-attention's plain version."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad import zoo
from subquad.zoo.buckets.blocks import attend_to_blocks, chosen
from subquad.zoo.buckets.nsa import NSAAttention
from tests import oracle

FEATURES, HEADS, LENGTH = 16, 4, 31
SIZES = dict(block_size=4, num_blocks=4, num_local=2, compression_size=6, compression_stride=2, window_size=5)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def build(**options):
    return NSAAttention(HEADS, FEATURES, **{**SIZES, "num_kv_heads": 2, **options}, rngs=nnx.Rngs(0))


def open_gates(layer, *gates):
    """Gates of the branches (selected, compressed, window) that do not depend on the input."""
    layer.branch_gate.kernel[...] = jnp.zeros_like(layer.branch_gate.kernel[...])
    layer.branch_gate.bias[...] = jnp.broadcast_to(jnp.asarray([[30.0 if gate else -60.0 for gate in gates]]), (HEADS, 3))


def test_the_definition():
    """Importance piece by piece: of all compressed blocks that hold it."""
    layer, x, size = build(), normal(2, LENGTH, FEATURES), 4
    query, keys, values, gates = (np.asarray(head, np.float64) for head in layer.project(x))
    blocks = [range(j, j + 6) for j in range(0, LENGTH - 5, 2)]
    compress = lambda one, tokens: np.asarray(one(jnp.asarray(tokens[None, None], jnp.float32)))[0, 0]
    heads = np.zeros_like(query)

    def attention(q, k, v):
        weights = np.exp(np.asarray(k) @ q / 2)
        return weights @ np.asarray(v) / weights.sum(), weights / weights.sum()

    for b in range(2):
        for group in range(2):
            (k_sel, k_cmp, k_win), (v_sel, v_cmp, v_win) = ([x[b, :, i + group] for i in (0, 2, 4)] for x in (keys, values))
            small_k = [compress(layer.compress_key, k_cmp[list(block)]) for block in blocks]
            small_v = [compress(layer.compress_value, v_cmp[list(block)]) for block in blocks]
            for t in range(LENGTH):
                own, seen = t // size, [j for j, block in enumerate(blocks) if block[-1] <= t]
                members, found, importance = (2 * group, 2 * group + 1), {}, np.zeros(own + 1)
                for n in members:
                    found[n] = np.zeros(4)
                    if seen:
                        found[n], p = attention(query[b, t, n], [small_k[j] for j in seen], [small_v[j] for j in seen])
                        for j, weight in zip(seen, p, strict=True):
                            for piece in range(j, j + 3):
                                if 2 * piece // size < own:
                                    importance[2 * piece // size] += weight
                always = {i for i in (0, own - 1, own) if i >= 0}
                rest = [i for i in np.argsort(-importance[:own], kind="stable") if i not in always]
                taken = always | set(rest[: 4 - len(always)] if own > 1 else rest)
                places = [s for s in range(t + 1) if s // size in taken]
                window = range(max(t - 4, 0), t + 1)
                for n in members:
                    parts = (
                        attention(query[b, t, n], k_sel[places], v_sel[places])[0], found[n],
                        attention(query[b, t, n], k_win[list(window)], v_win[list(window)])[0],
                    )
                    heads[b, t, n] = sum(gate * part for gate, part in zip(gates[b, t, n], parts, strict=True))
    np.testing.assert_allclose(layer(x), layer.out(jnp.asarray(heads, jnp.float32)), atol=2e-5)


@pytest.mark.parametrize("gates", [(1, 0, 0), (0, 0, 1)], ids=["all-blocks", "long-window"])
def test_limits_are_softmax(gates):
    layer, x = build(num_blocks=8, window_size=40), normal(2, LENGTH, FEATURES)
    open_gates(layer, *gates)
    softmax = zoo.SoftmaxAttention(HEADS, FEATURES, num_kv_heads=2, is_causal=True, rngs=nnx.Rngs(1))
    if gates[2]:
        layer.key, layer.value = layer.window_key, layer.window_value
    for name in ("query", "key", "value", "out"):
        setattr(softmax, name, getattr(layer, name))
    np.testing.assert_allclose(layer(x), softmax(x), atol=1e-5)


def test_what_cannot_be_selected_is_refused():
    with pytest.raises(ValueError, match="num_blocks must be at least num_initial \\+ num_local = 4, got 3"):
        build(num_blocks=3, num_local=3)
    with pytest.raises(ValueError, match="compression_stride must divide block_size = 4, got 3"):
        build(compression_stride=3)


def test_oracle():
    """Blocks of one size for all, compressed by their means, without a window; all of its three blocks are forced."""
    peer = oracle.load("nsa")
    size = peer.meta["cfg"]["block_size"]
    layer = NSAAttention(
        16, 64, num_kv_heads=1, block_size=size, num_blocks=peer.meta["cfg"]["block_counts"], compression_size=size,
        compression_stride=size, compression="mean", rngs=nnx.Rngs(0),
    )  # fmt: skip

    def attend(inputs, _):
        query, key, value = (inputs[x] for x in "qkv")
        at = np.arange(layer._number(query.shape[1]))[None]
        compressed = [layer.compress_key(layer.pieces(x, at)) for x in (key, value)]
        blocks = chosen(lambda *of_chunk: layer.choose(*of_chunk, compressed[0]), query, size)
        sparse = attend_to_blocks(query, key, value, blocks, size, None)
        near = layer.attend_to_compressed(query, *compressed)
        gates = [inputs[x][..., None] for x in ("g_cmp", "g_slc")]
        return {"o_cmp": near, "o_slc": sparse, "o": gates[0] * near + gates[1] * sparse}

    oracle.compare("nsa", peer, attend, of="mechanism")
