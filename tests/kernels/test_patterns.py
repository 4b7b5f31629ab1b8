"""Patterns: each against its definition by loops, and what is derived from it against the definition."""

import jax.numpy as jnp
import numpy as np
import pytest

from subquad.kernels import patterns
from subquad.kernels.patterns import (
    ALL,
    CAUSAL,
    NONE,
    Band,
    BlockPermutation,
    Blocks,
    Columns,
    Dilated,
    GlobalKeys,
    GlobalQueries,
    Globals,
    InBlocks,
    Interleaved,
    Random,
    SameBlock,
    Strided,
)  # fmt: skip
from subquad.kernels.patterns.base import grid
from subquad.kernels.patterns.tokens import draws

LISTS = np.array([[[0, -1], [2, 0], [1, 2], [3, -1]], [[3, 1], [0, -1], [-1, -1], [2, 3]]])
COLUMNS = ((1, 3), (0, 4))
DRAWN, PAST = Random(3, 19, 1, 3, ~Band(1, 1)), Random(1, 5, 0, 2, Band(None, -2))
# name: (pattern, what query t may see of key s in head n).
PATTERNS = {
    "band": (Band(3, 1), lambda t, s, n: t - 3 <= s <= t + 1),
    "causal": (CAUSAL, lambda t, s, n: s <= t),
    "before": (Band(None, -2), lambda t, s, n: s <= t - 2),
    "permutation": (BlockPermutation(5, 4, (0, 1, -2)), lambda t, s, n: s // 5 == (t // 5 + (0, 1, -2)[n]) % 4),
    "blocks": (Blocks.of(LISTS, 5, 4), lambda t, s, n: s // 5 in LISTS[n, t // 5]),
    "global keys": (GlobalKeys(2, 5), lambda t, s, n: 2 <= s < 5),
    "global queries": (GlobalQueries(2, 5), lambda t, s, n: 2 <= t < 5),
    "window and globals": (Band(2, 1) | Globals(0, 3), lambda t, s, n: t - 2 <= s <= t + 1 or t < 3 or s < 3),
    "causal window and globals": (
        (Band(2, 0) | GlobalKeys(0, 3)) & CAUSAL, lambda t, s, n: (t - 2 <= s or s < 3) and s <= t
    ),
    "not": (~Band(3, 1), lambda t, s, n: not t - 3 <= s <= t + 1),
    "not nothing": (~Band(None, None), lambda t, s, n: False),
    "in blocks": (
        InBlocks(4, Band(1, 1) | Globals(0, 1)), lambda t, s, n: abs(t // 4 - s // 4) <= 1 or t < 4 or s < 4
    ),
    "random": (DRAWN, lambda t, s, n: s in draws(DRAWN)[n, t]),
    "random blocks": (
        InBlocks(4, (Band(1, 0) | PAST) & CAUSAL) & CAUSAL,
        lambda t, s, n: s <= t and (t // 4 - s // 4 <= 1 or s // 4 in draws(PAST)[n, t // 4]),
    ),
    "globals beside blocks": (
        (GlobalKeys(0, 3) | InBlocks(4, Band(1, 0))) & CAUSAL, lambda t, s, n: s <= t and (t // 4 - s // 4 <= 1 or s < 3)
    ),
    "same block": (SameBlock(6), lambda t, s, n: t // 6 == s // 6),
    "dilated": (Dilated(2, 1, (1, 3, 4)), lambda t, s, n: s - t in [j * (1, 3, 4)[n] for j in (-2, -1, 0, 1)]),
    "dilated alike, causal": (Dilated(3, 0, (2,)), lambda t, s, n: t - s in (0, 2, 4, 6)),
    "strided": (Strided(4, 3), lambda t, s, n: abs(t - s) <= 3 or (t - s) % 4 == 0),
    "strided, far only": (Strided(4, None), lambda t, s, n: (t - s) % 4 == 0),
    "columns": (Columns(5, COLUMNS), lambda t, s, n: s % 5 in COLUMNS[n]),
    "both": (Blocks.of(LISTS, 5, 4) & CAUSAL, lambda t, s, n: s // 5 in LISTS[n, t // 5] and s <= t),
    "either": (
        (SameBlock(5) | Columns(5, COLUMNS)) & CAUSAL,
        lambda t, s, n: s <= t and (t // 5 == s // 5 or s % 5 in COLUMNS[n]),
    ),
    "by head": (
        Interleaved((SameBlock(5), Columns(5, COLUMNS)), 4) & CAUSAL,
        lambda t, s, n: s <= t and (s % 5 in COLUMNS[n // 2] if n % 2 else t // 5 == s // 5),
    ),
}  # fmt: skip
by_name = pytest.mark.parametrize("name", PATTERNS)
LENGTH = 19


def spelled_out(name):
    pattern, sees = PATTERNS[name]
    shape = pattern.heads, LENGTH, LENGTH
    return np.array([sees(t, s, n) for n, t, s in np.ndindex(shape)]).reshape(shape)


@by_name
def test_allowed_is_the_definition_for_numpy_and_for_jax(name):
    pattern, _ = PATTERNS[name]
    np.testing.assert_array_equal(patterns.grid(pattern, LENGTH, LENGTH), spelled_out(name))
    at, head = jnp.arange(LENGTH), jnp.arange(pattern.heads)[:, None, None]
    np.testing.assert_array_equal(
        np.broadcast_to(pattern.allowed(at[:, None], at, head), (pattern.heads, LENGTH, LENGTH)), spelled_out(name)
    )


@by_name
@pytest.mark.parametrize("sizes", [(1, 1), (4, 3), (5, 5), (10, 5), (7, 19)])
def test_coverage_says_none_and_all_only_where_it_is_so(name, sizes):
    pattern, seen = PATTERNS[name][0], spelled_out(name)
    firsts = [np.arange(0, LENGTH, size) for size in sizes]
    lasts = [np.minimum(first + size, LENGTH) - 1 for first, size in zip(firsts, sizes, strict=True)]
    ranges = (firsts[0][:, None], lasts[0][:, None]), (firsts[1], lasts[1])
    coverage = np.broadcast_to(
        pattern.coverage(*ranges, np.arange(pattern.heads)[:, None, None]), (pattern.heads, *map(len, firsts))
    )
    for n, i, j in np.ndindex(coverage.shape):
        tile = seen[n, firsts[0][i] : lasts[0][i] + 1, firsts[1][j] : lasts[1][j] + 1]
        assert not (coverage[n, i, j] == NONE and tile.any()) and not (coverage[n, i, j] == ALL and not tile.all())
        if isinstance(pattern, Band | patterns.BlockPattern):  # for these it is exact
            assert coverage[n, i, j] == (ALL if tile.all() else NONE if not tile.any() else coverage[n, i, j])


@by_name
def test_key_positions_hold_each_key_that_may_be_seen_once(name):
    pattern, seen = PATTERNS[name][0], spelled_out(name)
    chunk = pattern.chunk(LENGTH)
    for count in {1, min(chunk or 3, 3), chunk or LENGTH}:
        first = np.arange(LENGTH - count + 1)[:, None]
        found = np.asarray(pattern.key_positions(jnp.asarray(first), count, LENGTH, np.arange(pattern.heads)))
        assert found.shape[:-1] == (len(first), pattern.heads)
        for i, n in np.ndindex(found.shape[:-1]):
            keys = found[i, n][found[i, n] >= 0]
            assert len(set(keys.tolist())) == len(keys) and (keys < LENGTH).all()
            wanted = np.nonzero(seen[n, i : i + count, : i + count].any(0))[0]
            assert set(wanted.tolist()) <= set(keys.tolist())


@by_name
@pytest.mark.parametrize("tile", [1, 4, 64])
def test_density_and_layout(name, tile):
    pattern, seen = PATTERNS[name][0], spelled_out(name)
    np.testing.assert_allclose(pattern.density(LENGTH, tile), seen.mean())
    layout = pattern.layout(LENGTH, tile)
    assert layout.shape == (pattern.heads, *2 * (-(-LENGTH // tile),))


def test_density_of_a_long_pattern_makes_no_square():
    """65,536 tokens would be 4 GB."""
    pattern = InBlocks(512, Band(1, 1) | Globals(0, 1))
    assert 0 < pattern.density(1 << 16, 512) < 5 / 128


def test_draws():
    """As many as there are, none twice, of those that may be; the same for every length to which that does not extend."""
    drawn = draws(DRAWN)
    for (_, query), keys in zip(np.ndindex(3, 19), drawn.reshape(-1, 3), strict=True):
        assert len(set(keys.tolist())) == 3 and (abs(keys - query) > 1).all() and (keys >= 0).all()
    assert (drawn[0] != drawn[1]).any() and (drawn != draws(Random(3, 19, 2, 3, ~Band(1, 1)))).any()
    past = Band(None, -1)
    np.testing.assert_array_equal(
        draws(Random(2, 9, 7, 2, past)), draws(Random(2, 30, 7, 2, past))[:, :9]
    )
    assert (draws(Random(2, 9, 7, 2, past))[:, 1] == [0, -1]).all()
    # Stored once: another version of NumPy must not draw others.
    assert draws(Random(3, 100, 5, 1, Band(None, None)))[0, 7].tolist() == [23, 44, 76]


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray], ids=["known", "traced"])
def test_outside_of_what_was_drawn_nothing_is_seen(array):
    """As outside of the table of Blocks: neither an error nor the keys of another query."""
    head = np.arange(3)[:, None, None]
    positions = np.arange(-3, 25)
    allowed = DRAWN.allowed(array(positions[:, None]), array(positions), head)
    inside = (positions >= 0) & (positions < 19)
    np.testing.assert_array_equal(np.asarray(allowed)[:, inside][..., inside], grid(DRAWN, 19, 19))
    assert not allowed[:, ~inside].any() and not allowed[..., ~inside].any()
    assert not grid(InBlocks(4, PAST), 40, 40)[:, 20:].any()


def test_draws_are_uniform():
    drawn = draws(Random(4, 64, 0, 8, Band(None, None)))
    counts = np.bincount(drawn.ravel(), minlength=64)
    assert abs(counts - 8 * 4).max() < 5 * (8 * 4) ** 0.5


def test_equal_numbers_are_equal_patterns():
    assert Blocks.of(LISTS, 5, 4) & CAUSAL == Blocks.of(LISTS.copy(), 5, 4) & Band(None, 0)
    assert hash(Strided(4, 3) | Band(1, 1)) == hash(Strided(4, 3) | Band(1, 1))
    assert Band(1, 1) & None == Band(1, 1)


def test_the_pictures_of_the_module():
    pictures = patterns.__doc__.split("CAUSAL      Band(1, 0)")[1].splitlines()[1:5]
    rows = np.array([[mark == "x" for mark in line.split()] for line in pictures]).reshape(4, 5, 4)
    for i, pattern in enumerate((CAUSAL, Band(1, 0), Band(0, 1), BlockPermutation(2, 2, (1,)), GlobalKeys(0, 1) | Band(0, 0))):
        np.testing.assert_array_equal(patterns.grid(pattern, 4, 4)[0], rows[:, i])


@pytest.mark.parametrize("pattern", [SameBlock(4), InBlocks(3, Band(1, 0)), BlockPermutation(4, 3, (1, 0))])
def test_coverage_of_positions_below_0(pattern):
    """Between the pairs of blocks of two positions."""
    at, head = np.arange(-6, 6), np.arange(pattern.heads)[:, None, None]
    allowed = np.broadcast_to(pattern.allowed(at[:, None], at, head), (pattern.heads, 12, 12))
    ends = at[::2], at[1::2]
    states = pattern.coverage(tuple(x[:, None] for x in ends), ends, head)
    seen = allowed.reshape(-1, 6, 2, 6, 2)
    assert (seen.any((2, 4)) <= (states != NONE)).all() and (seen.all((2, 4)) >= (states == ALL)).all()


def test_draws_are_kept_in_32_bits():
    assert draws(DRAWN).dtype == np.int32


@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray])
def test_a_pattern_of_fewer_heads_counts_them_round(convert):
    at, head = convert(np.arange(8)), convert(np.arange(6))[:, None, None]
    pattern = BlockPermutation(2, 4, (0, 1, 3))
    seen = np.asarray(pattern.allowed(at[:, None], at, head))
    np.testing.assert_array_equal(seen[3:], seen[:3])
    np.testing.assert_array_equal(seen[:3], patterns.grid(pattern, 8, 8))


@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray])
def test_nothing_is_seen_outside_of_a_table(convert):
    at, pattern = convert(np.arange(12)), Blocks.of(np.array([[[0, -1], [0, 1]]]), 4, 2)
    seen = np.asarray(pattern.allowed(at[:, None], at, 0))
    assert seen[:8, :8].sum() == 3 * 16 == seen.sum()
    rows = np.arange(3) * 4, np.arange(3) * 4 + 3
    coverage = pattern.coverage(tuple(x[:, None] for x in rows), rows, 0)
    np.testing.assert_array_equal(coverage, np.where(seen[::4, ::4], ALL, NONE))
