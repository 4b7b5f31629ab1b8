"""Block-sparse attention: the tiled form against dense attention under the mask that the lists spell out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subquad.kernels import block_sparse, softmax
from subquad.kernels.patterns import Blocks, grid
from subquad.kernels.softmax import plan
from subquad.lra.bench import measure
from tests import oracle
from tests.kernels import dense
from tests.kernels.dense import TOLERANCES, draw


def lists(queries, keys, block_size, heads, *, most=4, density=0.7, seed=1):
    """Random lists of unequal lengths, in any order, the empty entries anywhere."""
    rng = np.random.default_rng(seed)
    rows, blocks = -(-queries // block_size), -(-keys // block_size)
    chosen = np.stack([[rng.permutation(blocks)[:most] for _ in range(rows)] for _ in range(heads)])
    return np.where(rng.random(chosen.shape) < density, chosen, -1)


def spelled_out(blocks, block_size, queries, keys, is_causal=False):
    """bool [N, T, S]: is the key's block in the list of the query's block?"""
    query, key = np.arange(queries), np.arange(keys)
    seen = (blocks[:, query // block_size, :, None] == key // block_size).any(2)
    return seen & (key <= query[:, None]) if is_causal else seen


def check(arrays, cotangents, blocks, block_size, dtype="float32", *, mask=None, is_causal=False, scale=None):
    """Compares with dense attention in float64: out, lse and every gradient."""

    def attend(*arrays):
        return block_sparse.attention(
            *arrays,
            blocks,
            block_size=block_size,
            mask=mask,
            is_causal=is_causal,
            scale=scale,
            return_lse=True,
            implementation="xla",
        )

    seen = spelled_out(blocks, block_size, arrays[0].shape[1], arrays[1].shape[1], is_causal)[None]
    seen = seen if mask is None else seen & np.asarray(mask)
    result = dense.run(attend, arrays, cotangents)
    dense.compare(result, dense.formula(arrays, cotangents, mask=seen, scale=scale), dtype)


@pytest.mark.parametrize(
    ("length", "is_causal"), [(1, True), (7, False), (63, True), (100, False), (129, True), (300, False), (300, True)]
)
def test_odd_lengths(length, is_causal):
    check(*draw(length, batch=1), lists(length, length, 16, 4), 16, is_causal=is_causal)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_dtypes(dtype):
    check(*draw(129, dtype=dtype), lists(129, 129, 32, 4), 32, dtype)


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize(("queries", "keys"), [(40, 130), (130, 40)])
def test_other_lengths_grouped_heads_and_key_padding(heads, queries, keys):
    mask = jnp.asarray(np.random.default_rng(2).random((2, 1, 1, keys)) < 0.7)
    blocks = lists(queries, keys, 24, heads)
    check(*draw(queries, keys, kv_heads=2, values=5), blocks, 24, mask=mask, scale=0.6)


@pytest.mark.parametrize("block_size", [1, 50, 70, 1000])
def test_blocks_that_are_no_multiple_of_a_tile(monkeypatch, block_size):
    monkeypatch.setattr(plan, "most_of", lambda reach: 32)
    assert [plan.block_tile(size, 32) for size in (1, 24, 50, 64, 70, 1000)] == [16, 24, 25, 32, 24, 32]
    check(*draw(100), lists(100, 100, block_size, 4, most=2, density=0.9), block_size, is_causal=block_size == 70)


def test_rows_of_unequal_lengths_cost_their_own():
    some = np.eye(16, dtype=bool)[None].copy()
    some[:, 5] = True  # one row sees everything
    some[:, 6, :6] = True
    steps = plan.steps_of(some, 4)[0]
    assert len(steps) == 14 + 4 + 2 and (steps[steps[:, 0] == 6] == [[6, 0, 1, 2, 3], [6, 4, 5, 6, -1]]).all()
    blocks = np.where(some[0], np.arange(16), -1)[None]
    arrays, cotangents = draw(256, batch=1, heads=2)
    check(arrays, cotangents, blocks, 16)
    check(arrays, cotangents, blocks, 16, is_causal=True)


def test_each_head_has_its_own_steps():
    """Heads whose rows are others, and one of which sees nothing."""
    blocks = lists(260, 260, 32, 4, most=8, density=0.5)
    blocks[1] = -1
    blocks[2, 1:] = -1
    check(*draw(260), blocks, 32)
    check(*draw(260, kv_heads=2), blocks, 32)


def test_lists_of_all_blocks_are_full_attention():
    arrays, _ = draw(100)
    everything = np.broadcast_to(np.arange(7), (1, 7, 7))
    out = block_sparse.attention(*arrays, everything, block_size=16, is_causal=True)
    np.testing.assert_allclose(out, softmax.attention(*arrays, is_causal=True), atol=2e-6)


def test_empty_lists_give_zero():
    arrays, cotangents = draw(40)
    check(arrays, cotangents, np.full((1, 3, 2), -1), 16)
    check(arrays, cotangents, np.array([[[0], [-1], [0]]]), 16, mask=jnp.zeros((1, 1, 1, 40), bool))


def test_a_future_token_changes_no_past_output():
    (query, key, value), _ = draw(100)
    blocks = lists(100, 100, 16, 4, most=7, density=1.0)
    attend = lambda key, value: block_sparse.attention(query, key, value, blocks, block_size=16, is_causal=True)
    out, later = attend(key, value), attend(key.at[:, 70].mul(1e4), value.at[:, 70].mul(1e4))
    np.testing.assert_array_equal(out[:, :70], later[:, :70])
    assert not np.allclose(out[:, 70:], later[:, 70:])


def test_the_reference_is_the_mask_spelled_out():
    blocks = lists(50, 70, 8, 4)
    np.testing.assert_array_equal(grid(Blocks.of(blocks, 8, 9), 50, 70), spelled_out(blocks, 8, 50, 70))
    arrays, _ = draw(50, 70)
    out = block_sparse.attention(*arrays, blocks, block_size=8, implementation="reference")
    np.testing.assert_allclose(out, block_sparse.attention(*arrays, blocks, block_size=8), atol=2e-6)


def test_memory_and_work_grow_linearly():
    def cost(length, most=4):
        arrays, _ = draw(length, batch=1, features=32, values=32)
        blocks = lists(length, length, 64, 4, most=most, density=1.0)
        loss = lambda *arrays: block_sparse.attention(*arrays, blocks, block_size=64).sum()
        return measure.memory(jax.grad(loss, (0, 1, 2)), *arrays).temporary, measure.flops(loss, *arrays)

    (memory, flops), (twice_memory, twice_flops) = cost(2048), cost(4096)
    assert twice_memory <= 2.1 * memory and twice_flops <= 2.05 * flops
    assert flops >= 4 * 4 * 2048 * 64 * 4 * 32
    more_memory, more_flops = cost(2048, most=8)
    assert more_memory <= 1.1 * memory and 1.9 * flops <= more_flops <= 2.1 * flops


@pytest.mark.parametrize(("dtype", "copies"), [("float32", 3.2), ("bfloat16", 4.3)])
def test_few_copies_of_the_arguments(dtype, copies):
    """Temporary memory in arrays of float32: the output, its gradient, and the tiles of one head out of four."""
    array, own = jax.ShapeDtypeStruct((1, 16384, 4, 64), dtype), np.arange(256)[None, :, None]
    loss = lambda *arrays: block_sparse.attention(*arrays, own, block_size=64).astype(jnp.float32).sum()
    assert measure.memory(jax.grad(loss, (0, 1, 2)), *[array] * 3).temporary <= copies * 4 * array.size


def lucid_local(peer, inputs, weights):
    """Blocks that see some blocks before and after them, but whole ones: no exact window."""
    cfg = peer.meta["cfg"]
    size, back = cfg["window_size"], cfg.get("look_backward", 1)
    ahead = cfg.get("look_forward", 0 if cfg["causal"] else 1)
    rows = -(-inputs["q"].shape[2] // size)
    blocks = np.arange(rows)[:, None] + np.arange(-back, ahead + 1)
    blocks = np.where((blocks >= 0) & (blocks < rows), blocks, -1)[None]
    heads = block_sparse.attention(
        *(inputs[name].swapaxes(1, 2) for name in "qkv"), blocks, block_size=size, is_causal=cfg["causal"]
    )
    return heads.swapaxes(1, 2)


def projected(heads, x, weights, names=("query", "key", "value")):
    """Query, key and value [B, T, N, H] by a peer's linear maps."""
    outs = (x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0) for name in names)
    return [out.reshape(*out.shape[:2], heads, -1) for out in outs]


def reformer_local(peer, inputs, weights):
    """Blocks that see their neighbours around the end of the sequence: the first block sees the last."""
    cfg = peer.meta["cfg"]
    x, mask = inputs["hidden_states"], inputs.get("attention_mask")
    rows = x.shape[1] // cfg["chunk"]
    blocks = (np.arange(rows)[:, None] + np.arange(-cfg["before"], cfg["after"] + 1)) % rows
    mask = None if mask is None else mask.astype(bool)[:, None, None]
    heads = block_sparse.attention(
        *projected(cfg["H"], x, weights), blocks[None], block_size=cfg["chunk"], mask=mask
    )
    return heads.reshape(*heads.shape[:2], -1)


def bigbird(peer, inputs, weights):
    """First and last block see and are seen by all; the others see their neighbours and random blocks, by head."""
    cfg, random, x = peer.meta["cfg"], peer.constants["rand_attn"], inputs["x"]
    rows = x.shape[1] // cfg["block_size"]
    blocks = np.full((cfg["H"], rows, rows), -1)
    blocks[:, [0, -1]] = np.arange(rows)
    for n, i in np.ndindex(cfg["H"], rows - 2):
        seen = sorted({0, i, i + 1, i + 2, rows - 1} | set(random[n, i].tolist()))
        blocks[n, i + 1, : len(seen)] = seen
    heads = block_sparse.attention(*projected(cfg["H"], x, weights), blocks, block_size=cfg["block_size"])
    return heads.reshape(*heads.shape[:2], -1)


PEERS = {
    "local_lucid_bidir": lucid_local,
    "local_lucid_causal": lucid_local,
    "local_lucid_back2": lucid_local,
    "local_lucid_autopad": lucid_local,
    "reformer_local_bidir": reformer_local,
    "reformer_local_bidir_mask": reformer_local,
    "bigbird_train": bigbird,
}


@pytest.mark.parametrize("name", PEERS)
def test_peers(name):
    peer = oracle.load(name)
    oracle.compare(None, peer, functools.partial(PEERS[name], peer))


REFUSALS = [
    (TypeError, "blocks must be a NumPy array", {"blocks": jnp.zeros((1, 3, 1), jnp.int32)}),
    (TypeError, "blocks must be a NumPy array", {"blocks": np.zeros((1, 3, 1))}),
    (ValueError, "blocks must have shape", {"blocks": np.zeros((1, 2, 1), int)}),
    (ValueError, "blocks must have shape", {"blocks": np.zeros((3, 3, 1), int)}),
    (ValueError, "blocks must lie in -1 .. 2", {"blocks": np.full((1, 3, 1), 3)}),
    (ValueError, "blocks must list nothing twice", {"blocks": np.zeros((1, 3, 2), int)}),
    (ValueError, "block_size must be an integer of at least 1", {"block_size": 0}),
    (TypeError, "mask must be boolean", {"mask": np.ones((1, 1, 1, 5))}),
    (ValueError, "mask must be key padding", {"mask": np.ones((1, 1, 5, 5), bool)}),
    (NotImplementedError, "implementation='cudnn' does not exist", {"implementation": "cudnn"}),
]


@pytest.mark.parametrize(("error", "message", "options"), REFUSALS)
def test_refusals(error, message, options):
    arrays, _ = draw(5)
    options = {"blocks": np.zeros((1, 3, 1), int), "block_size": 2, **options}
    with pytest.raises(error, match=f"block_sparse.attention: .*{message}"):
        block_sparse.attention(*arrays, options.pop("blocks"), **options)
