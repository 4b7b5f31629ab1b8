"""The core of flash attention: which blocks are visited, what a pattern becomes in a kernel, how often it is compiled."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subquad.kernels import block_sparse, launch, softmax
from subquad.kernels.flash import tiles
from subquad.kernels.patterns import (
    CAUSAL,
    Band,
    BlockPermutation,
    Blocks,
    Both,
    Columns,
    GlobalKeys,
    Globals,
    InBlocks,
    Interleaved,
    Random,
    SameBlock,
    Strided,
    grid,
)
from subquad.kernels.softmax.xla import Visible

TABLE = np.random.default_rng(0).random((3, 7, 9)) < 0.4
TABLE[:, 2], TABLE[:, 4] = False, True
BLOCKS = Blocks(11, TABLE.shape, TABLE.tobytes())


# ----------------------------------------------------------------------------------------------- which blocks are visited


def geometry(queries, keys, pattern=None, at=0, of=0, tested=False):
    return tiles.Geometry(queries, keys, at, of, pattern, tested)


def visits(geometry, sizes, transposed):
    """int8 [N, I, J]: what the rows and lists visit, 1 with a test and 2 without."""
    todo = tiles.work(geometry, *sizes, transposed)
    result = np.zeros(tiles.states_of(geometry, *sizes).shape, np.int8)
    view = result.swapaxes(1, 2) if transposed else result
    for n, row in itertools.product(range(len(todo.rows)), range(todo.rows.shape[1])):
        own, *ranges = todo.rows[n, row]
        for first, end, kind in zip(ranges[::2], ranges[1::2], (1, 1, 2), strict=True):
            for j in range(first, end):
                j = j if todo.tiles is None else todo.tiles[j]
                assert view[n, own, j] == 0, "visited twice"
                view[n, own, j] = kind
    return result


def cases():
    rng = np.random.default_rng(0)
    mixed = np.stack([rng.permutation(100)[:75] for _ in range(2)]).astype(np.int32).tobytes()
    return [
        geometry(75, 96),
        geometry(75, 90),
        geometry(75, 75, CAUSAL),
        geometry(75, 96, Band(20, 7)),
        geometry(75, 96, Band(40, None), at=30),
        geometry(75, 75, Band(9, 9), at=mixed, of=mixed),
        geometry(75, 75, CAUSAL, at=0, of=500),
        geometry(75, 96, BLOCKS),
        geometry(75, 96, CAUSAL & BLOCKS),
        geometry(75, 96, BLOCKS, tested=True),
    ]


def pairs(geometry):
    """bool [2, N, T, S]: is the pair visible in sample 0 and 1?"""
    at, of = (
        np.arange(length)[None] + positions if isinstance(positions, int) else np.frombuffer(positions, np.int32).reshape(2, -1)
        for positions, length in ((geometry.query_positions, geometry.queries), (geometry.key_positions, geometry.keys))
    )
    pattern = geometry.pattern or Band(None, None)
    seen = pattern.allowed(at[:, None, :, None], of[:, None, None, :], np.arange(pattern.heads)[:, None, None])
    return np.broadcast_to(seen, (2, pattern.heads, geometry.queries, geometry.keys))


@pytest.mark.parametrize("case", range(10))
@pytest.mark.parametrize("transposed", [False, True])
def test_lists_name_every_visible_tile_once(case, transposed):
    known, (query_tile, key_tile) = cases()[case], (16, 32)
    got = visits(known, (query_tile, key_tile), transposed)
    seen = pairs(known)
    for n, i, j in np.ndindex(got.shape):
        tile = seen[:, n, i * query_tile : (i + 1) * query_tile, j * key_tile : (j + 1) * key_tile]
        ragged = (i + 1) * query_tile > known.queries if transposed else (j + 1) * key_tile > known.keys
        whole = not ragged and tile.all()
        want = 0 if not tile.any() else 2 if whole and not known.tested else 1
        if isinstance(known.query_positions, int) and not isinstance(known.pattern, Both):
            assert got[n, i, j] == want
        else:  # extremes of positions, or two conditions one by one, may call for a test where none is needed
            assert got[n, i, j] == want or got[n, i, j] == 1


def test_side_by_side_tiles_need_no_lists():
    for known in cases()[:5]:
        assert tiles.work(known, 16, 32, False).tiles is None
    table = np.eye(6, dtype=bool)[None] | (np.arange(6) == 4)
    spread = geometry(96, 96, Blocks(16, table.shape, table.tobytes()))
    assert tiles.work(spread, 16, 16, False).tiles is not None


def test_longest_rows_come_first():
    rows = tiles.work(geometry(96, 96, CAUSAL), 16, 16, False).rows[0]
    np.testing.assert_array_equal(rows[:, 0], np.arange(6)[::-1])


def test_work_is_that_of_the_window():
    """Tiles per row do not grow with the length."""
    for length in (4096, 65536):
        rows = tiles.work(geometry(length, length, Band(256, 0)), 64, 64, False).rows[0]
        assert (rows[:, 2] - rows[:, 1] + rows[:, 4] - rows[:, 3] + rows[:, 6] - rows[:, 5]).max() == 5


def test_bounds_of_what_is_known_at_run_time():
    known = geometry(64, 96, CAUSAL, at=None, tested=True)
    real = (jnp.arange(96)[None] >= 20) & (jnp.arange(96)[None] < jnp.array([[96], [40]]))
    visible = Visible(jnp.array([[0], [16]]) + jnp.arange(64)[None], None, None, None, real[:, None, None])
    bounds = tiles.bounds_of(known, visible, 32, 16, False)
    np.testing.assert_array_equal(bounds, [[[1, 2], [1, 4]], [[1, 3], [1, 3]]])
    transposed = tiles.bounds_of(known, visible, 32, 16, True)
    np.testing.assert_array_equal(transposed[0], [[0, 0], [0, 2], [1, 2], [1, 2], [0, 0], [0, 0]])
    assert tiles.bounds_of(geometry(64, 96), Visible(*[None] * 5), 32, 16, False) is None


# ------------------------------------------------------------------------------------------------- patterns inside a kernel


@pytest.mark.interpret
def test_rules_in_triton_are_the_patterns():
    """Each pattern's `allowed` and its twin in Triton, over a grid of positions and heads."""
    pytest.importorskip("triton")
    columns = Columns(5, ((1, 4), (0, 2), (2, 3)))
    permuted = BlockPermutation(16, 5, (1, 0, 3))
    for pattern in (
        Band(3, None), Band(None, 2), Band(2, 5), BLOCKS, permuted, SameBlock(7), Strided(6, 2), Strided(6, None), columns,
        CAUSAL & (SameBlock(8) | columns), (BLOCKS | permuted) & Band(40, 3), Interleaved((Band(4, 0), SameBlock(9)), 3),
        (Band(3, 0) | GlobalKeys(2, 6)) & CAUSAL, Globals(4, 7) | InBlocks(8, Band(1, 1) | Random(1, 10, 0, 3, ~Band(1, 1))),
    ):  # fmt: skip
        query, key = jnp.zeros((1, 77, 3, 1)), jnp.zeros((1, 70, 3, 1))
        # Equal logits, and unit vectors as values: the sum over what is visible names it.
        value = jnp.broadcast_to(jnp.eye(70)[None, :, None], (1, 70, 3, 70))
        weights = softmax.attention(query, key, value, pattern=pattern, implementation="interpret")[0]
        np.testing.assert_array_equal(weights.swapaxes(0, 1) > 0, np.broadcast_to(grid(pattern, 77, 70), (3, 77, 70)))


@pytest.mark.parametrize("implementation", ["reference", "xla", pytest.param("interpret", marks=pytest.mark.interpret)])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("pattern", [SameBlock(4), Columns(5, ((1, 4),)), SameBlock(3) & CAUSAL, Strided(4, 1)])
def test_positions_below_0(pattern, known, implementation):
    positions = np.arange(-7, 9, dtype=np.int32)[None]
    value = jnp.eye(16)[None, :, None]
    at = positions if known else jnp.asarray(positions)
    run = lambda at: softmax.attention(
        0 * value, 0 * value, value, pattern=pattern, query_positions=at, key_positions=at, implementation=implementation
    )
    weights = run(at) if known else jax.jit(run)(at)
    want = pattern.allowed(positions.T, positions, np.zeros((1, 1), int))
    np.testing.assert_array_equal(weights[0, :, 0] > 0, np.broadcast_to(want, (16, 16)))


def test_patterns_without_a_rule_are_declined():
    pytest.importorskip("triton")
    from subquad.kernels.flash import rules
    from subquad.kernels.patterns import Pattern

    with pytest.raises(launch.Declined, match="a Pattern, which has no rule"):
        rules.Tree(Pattern(), (0, 0), (0, 0))
    with pytest.raises(launch.Declined, match="below 0"):
        rules.Tree(BLOCKS, (-1, 3), (0, 0))
    with pytest.raises(launch.Declined, match="run time"):
        rules.Tree(BLOCKS, None, (0, 0))


# ------------------------------------------------------------------------------------------------------ lengths are data


def launched(attend, *shapes):
    with launch.recording() as launches:
        jax.eval_shape(jax.grad(lambda *x: attend(*x).sum(), tuple(range(len(shapes)))), *shapes)
    return {(one.name, one.constants, one.config) for one in launches}


@pytest.mark.parametrize("kind", ["causal", "mask and bias", "blocks"])
def test_a_new_length_compiles_nothing(kind):
    """Ten lengths and other batches launch the same kernels with the same constants: one compilation of each."""

    def attend(query, key, value, *bias):
        length, options = query.shape[1], dict(implementation="triton")
        if kind == "blocks":
            lists = np.stack([np.arange(-(-length // 32)), np.arange(-(-length // 32)) // 2], 1)[None]
            lists[:, 0, 1] = -1
            return block_sparse.attention(query, key, value, lists, block_size=32, is_causal=True, **options)
        if bias:
            mask = jnp.ones((1, 1, length, length), bool)
            return softmax.attention(query, key, value, bias=bias[0], mask=mask, **options)
        return softmax.attention(query, key, value, is_causal=True, **options)

    compiled = set()
    for batch, length in enumerate((300, 301, 384, 400, 500, 511, 512, 777, 1024, 1999), 2):
        array = jax.ShapeDtypeStruct((batch, length, 4, 64), jnp.bfloat16)
        bias = [jax.ShapeDtypeStruct((1, 4, length, length), jnp.bfloat16)] if "bias" in kind else []
        compiled |= launched(attend, array, array, array, *bias)
    assert len(compiled) == len({name for name, *_ in compiled}) == 3 + ("bias" in kind)
