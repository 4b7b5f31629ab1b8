"""Block-sparse attention in Triton: blocks of any size in tiles of another, in the interpreter."""

import jax.numpy as jnp
import numpy as np
import pytest

from subquad.kernels import block_sparse, tuning
from subquad.kernels.block_sparse.specs import bigbird
from subquad.kernels.flash import tiles
from subquad.kernels.patterns import Blocks
from tests.kernels import dense
from tests.kernels.dense import draw
from tests.kernels.test_block_sparse import lists, spelled_out


@pytest.fixture
def flash(monkeypatch):
    """The kernels' module, with tiles so small that short inputs take many steps."""
    pytest.importorskip("triton")
    from subquad.kernels.softmax import triton

    monkeypatch.setattr(triton, "tile_sizes", lambda *sizes: tuning.Config({"BLOCK_Q": 32, "BLOCK_K": 16}))
    return triton


CASES = [
    ("tiles of the blocks' size", 75, 75, 16, 4, {}),
    ("blocks of several tiles", 130, 100, 64, 1, {"is_causal": True}),
    ("blocks smaller than a tile", 60, 60, 5, 4, {"is_causal": True}),
    ("tiles across blocks", 40, 100, 24, 4, {"mask": True}),
    ("one block", 40, 40, 1000, 1, {}),
    ("single elements", 40, 40, 1, 4, {}),
]


@pytest.mark.interpret
@pytest.mark.parametrize(("queries", "keys", "block_size", "heads", "options"), [case[1:] for case in CASES])
def test_values_and_gradients(flash, queries, keys, block_size, heads, options):
    rng = np.random.default_rng(0)
    mask = jnp.asarray(rng.random((2, 1, 1, keys)) < 0.7) if "mask" in options else None
    options = {**options, "mask": mask}
    blocks = lists(queries, keys, block_size, heads)
    arrays, cotangents = draw(queries, keys, kv_heads=2, values=5)

    def attend(*arrays):
        return block_sparse.attention(
            *arrays, blocks, block_size=block_size, return_lse=True, implementation="interpret", **options
        )

    seen = spelled_out(blocks, block_size, queries, keys, options.get("is_causal", False))[None]
    seen = seen if mask is None else seen & np.asarray(mask)
    dense.compare(dense.run(attend, arrays, cotangents), dense.formula(arrays, cotangents, mask=seen))


@pytest.mark.interpret
def test_empty_lists_give_zero(flash):
    arrays, cotangents = draw(40, batch=1)
    attend = lambda *x: block_sparse.attention(
        *x, np.full((1, 3, 2), -1), block_size=16, return_lse=True, implementation="interpret"
    )
    (out, lse), grads = dense.run(attend, arrays, cotangents)
    assert np.isneginf(lse).all() and all((np.asarray(x) == 0).all() for x in (out, *grads))


@pytest.mark.interpret
def test_blocks_of_no_list_are_not_read(flash):
    (query, key, value), _ = draw(96, batch=1)
    blocks = np.array([[[0, -1], [0, 1], [0, 2]]])
    attend = lambda key, value: block_sparse.attention(query, key, value, blocks, block_size=32, implementation="interpret")
    broken = attend(*(x.at[:, 32:64].set(jnp.nan) for x in (key, value)))
    for rows in (slice(0, 32), slice(64, 96)):
        np.testing.assert_array_equal(broken[:, rows], attend(key, value)[:, rows])
    assert np.isnan(broken[:, 32:64]).all()


@pytest.mark.parametrize("transposed", [False, True])
def test_tiles_that_divide_the_blocks_need_no_test(transposed):
    """Of 64 blocks each row sees six or so, and so do the tiles: nothing is looked up."""
    pattern = Blocks.of(bigbird(4096, 64, 2), 64, 64)
    todo = tiles.work(tiles.Geometry(4096, 4096, 0, 0, pattern, False), 64, 64, transposed)
    first, end, second, second_end, full, full_end = np.moveaxis(todo.rows[:, :, 1:], 2, 0)
    assert (first == end).all() and (second == second_end).all()
    assert (full_end - full).sum() == pattern.table(64, 64).sum() == len(todo.tiles)
