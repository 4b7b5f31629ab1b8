"""The patterns of `subquad.kernels.patterns` inside a Triton kernel.

A pattern becomes a tree of constants: each node is a tuple of a `@triton.jit` rule and the numbers that it asks for, so that
equal patterns are one compilation. What grows with the length is data: all tables are one int8 array, and where each begins
and how large it is are run-time words. Each rule is the twin of its pattern's `allowed`; a test compares the two on a grid.
"""

import functools

import numpy as np
import triton
import triton.language as tl

from subquad.kernels import launch, patterns
from subquad.kernels.flash.triton import NUM_WORDS


@triton.jit
def allowed(query, key, head, tables, words, NODE: tl.constexpr):
    """Whether queries at some positions see keys at others, [t, 1] and [1, s] or the other way round, in one head."""
    return NODE[0](query, key, head, tables, words, NODE)


@triton.jit
def both(query, key, head, tables, words, NODE: tl.constexpr):
    one = allowed(query, key, head, tables, words, NODE[1])
    return one & allowed(query, key, head, tables, words, NODE[2])


@triton.jit
def either(query, key, head, tables, words, NODE: tl.constexpr):
    one = allowed(query, key, head, tables, words, NODE[1])
    return one | allowed(query, key, head, tables, words, NODE[2])


@triton.jit
def band(query, key, head, tables, words, NODE: tl.constexpr):
    LEFT: tl.constexpr = NODE[1]
    RIGHT: tl.constexpr = NODE[2]
    if LEFT is None and RIGHT is None:
        result = key == key
    elif RIGHT is None:
        result = key >= query - LEFT
    elif LEFT is None:
        result = key <= query + RIGHT
    else:
        result = (key >= query - LEFT) & (key <= query + RIGHT)
    return result


@triton.jit
def global_keys(query, key, head, tables, words, NODE: tl.constexpr):
    return (key >= NODE[1]) & (key < NODE[2])


@triton.jit
def global_queries(query, key, head, tables, words, NODE: tl.constexpr):
    return (query >= NODE[1]) & (query < NODE[2])


@triton.jit
def blocks(query, key, head, tables, words, NODE: tl.constexpr):
    """NODE: size of the blocks, number of heads, place of (start, rows, columns) of the table among the words."""
    start, rows, columns = tl.load(words + NODE[3]), tl.load(words + NODE[3] + 1), tl.load(words + NODE[3] + 2)
    i, j = query // NODE[1], key // NODE[1]
    row = tables + start + (head % NODE[2]) * rows * columns + i.to(tl.int64) * columns
    return tl.load(row + j, mask=(i < rows) & (j < columns), other=0) != 0


@triton.jit
def same_block(query, key, head, tables, words, NODE: tl.constexpr):
    return floor(query, NODE[1], NODE[2]) == floor(key, NODE[1], NODE[2])


@triton.jit
def columns(query, key, head, tables, words, NODE: tl.constexpr):
    """NODE: as in `blocks`, of a table [heads, 1, size of the blocks]; whether positions may be below 0."""
    table = tables + tl.load(words + NODE[3]) + (head % NODE[2]) * NODE[1]
    return tl.load(table + key - floor(key, NODE[1], NODE[4]) * NODE[1]) != 0


@triton.jit
def floor(position, SIZE: tl.constexpr, MAY_BE_NEGATIVE: tl.constexpr):
    """The number of the block of a position; // alone truncates."""
    if MAY_BE_NEGATIVE:
        position = tl.where(position < 0, position - (SIZE - 1), position)
    return position // SIZE


@triton.jit
def strided(query, key, head, tables, words, NODE: tl.constexpr):
    distance = tl.abs(query - key)
    result = distance % NODE[1] == 0
    if NODE[2] is not None:
        result = result | (distance <= NODE[2])
    return result


@triton.jit
def interleaved(query, key, head, tables, words, NODE: tl.constexpr):
    """NODE: number of patterns, the patterns."""
    result = allowed(query, key, head // NODE[1], tables, words, NODE[2][0]) & (head % NODE[1] == 0)
    for i in tl.static_range(1, NODE[1]):
        result = result | (allowed(query, key, head // NODE[1], tables, words, NODE[2][i]) & (head % NODE[1] == i))
    return result


class Tree:
    """The constants, tables and words of a pattern."""

    def __init__(self, pattern: patterns.Pattern | None, query_range, key_range):
        """`query_range`, `key_range`: the least and the largest position; None where they are not known while tracing."""
        self.ranges, self.words, self.tables, self.size = (query_range, key_range), [], [], 0
        self.may_be_negative = any(one is None or one[0] < 0 for one in self.ranges)
        self.node = None if pattern is None else node_of(pattern, self)

    @property
    def table(self) -> np.ndarray | None:
        """All tables, int8 [P]."""
        return np.concatenate([table.ravel() for table in self.tables]) if self.tables else None

    def add(self, table: np.ndarray) -> int:
        """Keeps a table [heads, rows, columns]; returns the place of its words."""
        place = NUM_WORDS + len(self.words)
        self.words += [self.size, *table.shape[1:]]
        self.size += table.size
        self.tables.append(table.astype(np.int8))
        return place


@functools.singledispatch
def node_of(pattern: patterns.Pattern, tree: Tree) -> tuple:
    """The constants of a pattern: (rule, *numbers)."""
    raise launch.Declined(f"the pattern is a {type(pattern).__name__}, which has no rule in Triton.")


@node_of.register
def _(pattern: patterns.Both, tree):
    return both, node_of(pattern.one, tree), node_of(pattern.other, tree)


@node_of.register
def _(pattern: patterns.Either, tree):
    return either, node_of(pattern.one, tree), node_of(pattern.other, tree)


@node_of.register
def _(pattern: patterns.Band, tree):
    return band, pattern.left, pattern.right


@node_of.register
def _(pattern: patterns.GlobalKeys, tree):
    return global_keys, pattern.start, pattern.stop


@node_of.register
def _(pattern: patterns.GlobalQueries, tree):
    return global_queries, pattern.start, pattern.stop


@node_of.register
def _(pattern: patterns.BlockPattern, tree):
    if None in tree.ranges:
        raise launch.Declined("positions are known at run time only, and a pattern of blocks is a table of those known before.")
    if tree.may_be_negative:
        raise launch.Declined("some positions are below 0, and a pattern of blocks is a table of those from 0 on.")
    rows, columns = (last // pattern.block_size + 1 for _, last in tree.ranges)
    table = pattern.table(rows, columns)
    return blocks, pattern.block_size, len(table), tree.add(table)


@node_of.register
def _(pattern: patterns.SameBlock, tree):
    return same_block, pattern.block_size, tree.may_be_negative


@node_of.register
def _(pattern: patterns.Columns, tree):
    return columns, pattern.block_size, pattern.heads, tree.add(pattern.table[:, None]), tree.may_be_negative


@node_of.register
def _(pattern: patterns.Strided, tree):
    return strided, pattern.stride, pattern.window


@node_of.register
def _(pattern: patterns.Interleaved, tree):
    return interleaved, len(pattern.patterns), tuple(node_of(one, tree) for one in pattern.patterns)
