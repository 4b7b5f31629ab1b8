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
    Interleaved,
    SameBlock,
    Strided,
)  # fmt: skip

LISTS = np.array([[[0, -1], [2, 0], [1, 2], [3, -1]], [[3, 1], [0, -1], [-1, -1], [2, 3]]])
COLUMNS = ((1, 3), (0, 4))
# name: (pattern, what query t may see of key s in head n).
PATTERNS = {
    "band": (Band(3, 1), lambda t, s, n: t - 3 <= s <= t + 1),
    "causal": (CAUSAL, lambda t, s, n: s <= t),
    "before": (Band(None, -2), lambda t, s, n: s <= t - 2),
    "permutation": (BlockPermutation(5, 4, (0, 1, -2)), lambda t, s, n: s // 5 == (t // 5 + (0, 1, -2)[n]) % 4),
    "blocks": (Blocks.of(LISTS, 5, 4), lambda t, s, n: s // 5 in LISTS[n, t // 5]),
    "same block": (SameBlock(6), lambda t, s, n: t // 6 == s // 6),
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
        found = pattern.key_positions(jnp.asarray(first), count, LENGTH, np.arange(pattern.heads))
        assert found.shape[:-1] == (len(first), pattern.heads)
        for i, n in np.ndindex(found.shape[:-1]):
            keys = np.asarray(found[i, n])[np.asarray(found[i, n]) >= 0]
            assert len(set(keys.tolist())) == len(keys) and (keys < LENGTH).all()
            wanted = np.nonzero(seen[n, i : i + count, : i + count].any(0))[0]
            assert set(wanted.tolist()) <= set(keys.tolist())


def test_equal_numbers_are_equal_patterns():
    assert Blocks.of(LISTS, 5, 4) & CAUSAL == Blocks.of(LISTS.copy(), 5, 4) & Band(None, 0)
    assert hash(Strided(4, 3) | Band(1, 1)) == hash(Strided(4, 3) | Band(1, 1))
    assert Band(1, 1) & None == Band(1, 1)


def test_the_pictures_of_the_module():
    pictures = patterns.__doc__.split("CAUSAL      Band(1, 0)")[1].splitlines()[1:5]
    rows = np.array([[mark == "x" for mark in line.split()] for line in pictures]).reshape(4, 4, 4)
    for i, pattern in enumerate((CAUSAL, Band(1, 0), Band(0, 1), BlockPermutation(2, 2, (1,)))):
        np.testing.assert_array_equal(patterns.grid(pattern, 4, 4)[0], rows[:, i])
