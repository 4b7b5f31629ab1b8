"""Block-sparse attention: the tiled form against dense attention under the mask that the lists spell out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subquad.kernels import block_sparse, softmax
from subquad.kernels.block_sparse import reference, xla
from subquad.kernels.softmax import xla as softmax_xla
from subquad.lra import measure
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
    monkeypatch.setattr(softmax_xla, "CPU_TILE_BYTES", 4 * 8 * 32 * 32)  # tiles of 32 positions, one per step
    assert xla.plan_of(lists(100, 100, 70, 4), 70, 8, 4, 100, 100, False, 1.0).parts == 3
    check(*draw(100), lists(100, 100, block_size, 4, most=2, density=0.9), block_size, is_causal=block_size == 70)


def test_rows_of_unequal_lengths_cost_their_own(monkeypatch):
    monkeypatch.setattr(softmax_xla, "CPU_TILE_BYTES", 4 * 2 * 32 * 32)
    blocks = np.full((1, 16, 16), -1)
    blocks[:, :, 0] = np.arange(16)
    blocks[:, 5] = np.arange(16)  # one row sees everything
    plan = xla.plan_of(blocks, 32, 2, 2, 512, 512, False, 1.0)
    assert len(np.frombuffer(plan.steps, np.int32)) == 15 + 16
    check(*draw(512, batch=1, heads=2), blocks, 32)


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
    np.testing.assert_array_equal(reference.visible(blocks, 8, 50, 70, True), spelled_out(blocks, 8, 50, 70, True))
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


REFUSALS = [
    (TypeError, "blocks must be a NumPy array", {"blocks": jnp.zeros((1, 3, 1), jnp.int32)}),
    (TypeError, "blocks must be a NumPy array", {"blocks": np.zeros((1, 3, 1))}),
    (ValueError, "blocks must have shape", {"blocks": np.zeros((1, 2, 1), int)}),
    (ValueError, "blocks must have shape", {"blocks": np.zeros((3, 3, 1), int)}),
    (ValueError, "blocks must lie in -1 .. 2", {"blocks": np.full((1, 3, 1), 3)}),
    (ValueError, "blocks must list a block at most once", {"blocks": np.zeros((1, 3, 2), int)}),
    (ValueError, "block_size must be a positive integer", {"block_size": 0}),
    (TypeError, "mask must be boolean", {"mask": np.ones((1, 1, 1, 5))}),
    (ValueError, "mask must be key padding", {"mask": np.ones((1, 1, 5, 5), bool)}),
    (NotImplementedError, "implementation='triton' does not exist", {"implementation": "triton"}),
]


@pytest.mark.parametrize(("error", "message", "options"), REFUSALS)
def test_refusals(error, message, options):
    arrays, _ = draw(5)
    options = {"blocks": np.zeros((1, 3, 1), int), "block_size": 2, **options}
    with pytest.raises(error, match=f"block_sparse.attention: .*{message}"):
        block_sparse.attention(*arrays, options.pop("blocks"), **options)
