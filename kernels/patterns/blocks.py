"""Patterns of blocks of positions."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from subquad.kernels.patterns.base import ALL, NONE, SOME, Pattern, existing, grid, looked_up, one_of_each


class BlockPattern(Pattern):
    """The same for all pairs of a block of queries and a block of keys. A subclass has a `block_size` and `table`."""

    block_size: int

    @property
    def tile(self):
        return self.block_size

    def table(self, rows: int, columns: int) -> np.ndarray:
        """bool [heads, rows, columns]: whether a block of queries sees a block of keys."""
        raise NotImplementedError(f"{type(self).__name__} has no table")

    def coverage(self, queries, keys, head):
        first_query, first_key = (first // self.block_size for first, _ in (queries, keys))
        end_query, end_key = (last // self.block_size + 1 for _, last in (queries, keys))
        below = (first_query < 0) | (first_key < 0)  # the table begins at 0
        first_query, first_key, end_query, end_key = (np.maximum(x, 0) for x in (first_query, first_key, end_query, end_key))
        table = self.table(int(np.max(end_query)), int(np.max(end_key)))
        total = np.pad(table, ((0, 0), (1, 0), (1, 0))).cumsum(1, np.int32).cumsum(2, np.int32)
        head = np.asarray(head) % self.heads
        count = total[head, end_query, end_key] - total[head, first_query, end_key]
        count = count - total[head, end_query, first_key] + total[head, first_query, first_key]
        every = (end_query - first_query) * (end_key - first_key)
        return np.where(below, SOME, np.where(count == every, ALL, np.where(count > 0, SOME, NONE))).astype(np.int8)

    def key_positions(self, first, count, capacity, head):
        """The key blocks of the first query's block and of the last one's."""
        rows = -(-capacity // self.block_size)
        lists = jnp.asarray(self.lists(rows, rows))
        ends = (jnp.minimum(query // self.block_size, rows - 1) for query in (first, first + count - 1))
        blocks = one_of_each(*(lists[head % self.heads, block] for block in ends))[..., None]
        positions = jnp.where(blocks < 0, -1, blocks * self.block_size + jnp.arange(self.block_size))
        return existing(positions.reshape(*positions.shape[:-2], -1), capacity)

    def chunk(self, capacity):
        return self.block_size

    def lists(self, rows: int, columns: int) -> np.ndarray:
        """int [heads, rows, L]: the blocks of keys that each block of queries sees, -1 for no entry."""
        table = self.table(rows, columns)
        longest = max(1, int(table.sum(2).max()))
        order = np.argsort(~table, axis=2, kind="stable")[..., :longest]
        return np.where(np.take_along_axis(table, order, 2), order, -1)


@dataclasses.dataclass(frozen=True)
class BlockPermutation(BlockPattern):
    """The queries of block i see the keys of block (i + shift) mod num_blocks, with a shift for each head."""

    block_size: int
    num_blocks: int
    shifts: tuple[int, ...]

    @property
    def heads(self):
        return len(self.shifts)

    def allowed(self, query, key, head):
        shift = looked_up(self.shifts, head % self.heads)
        return key // self.block_size == (query // self.block_size + shift) % self.num_blocks

    def table(self, rows, columns):
        blocks = (np.arange(rows) + np.array(self.shifts)[:, None]) % self.num_blocks
        return blocks[..., None] == np.arange(columns)


@dataclasses.dataclass(frozen=True)
class Blocks(BlockPattern):
    """The queries of block i see the keys of block j where it says so in a table; what is outside sees nothing."""

    block_size: int
    shape: tuple[int, int, int]  # heads or 1, blocks of queries, blocks of keys
    bits: bytes

    @classmethod
    def of(cls, lists: np.ndarray, block_size: int, columns: int) -> "Blocks":
        """From lists of key blocks, int [N|1, blocks of queries, L], -1 for no entry."""
        table = np.zeros((*lists.shape[:2], columns + 1), bool)
        np.put_along_axis(table, lists, True, axis=2)  # -1 is the last column, which is cut off
        return cls(block_size, (*lists.shape[:2], columns), table[..., :-1].tobytes())

    @property
    def heads(self):
        return self.shape[0]

    def allowed(self, query, key, head):
        (rows, columns), row, column = self.shape[1:], query // self.block_size, key // self.block_size
        inside = (0 <= row) & (row < rows) & (0 <= column) & (column < columns)
        return inside & looked_up(self.table(rows, columns), head % self.heads, row % rows, column % columns)

    def table(self, rows, columns):
        table = np.frombuffer(self.bits, bool).reshape(self.shape)[:, :rows, :columns]
        return np.pad(table, [(0, 0), *((0, size - own) for size, own in zip((rows, columns), table.shape[1:], strict=True))])


@dataclasses.dataclass(frozen=True)
class SameBlock(BlockPattern):
    """Keys in the block of the query."""

    block_size: int

    def allowed(self, query, key, head):
        return query // self.block_size == key // self.block_size

    def coverage(self, queries, keys, head):
        """Without the table, which is large where blocks are small."""
        first_query, last_query, first_key, last_key = (x // self.block_size for x in (*queries, *keys))
        is_one = (first_query == last_key) & (first_key == last_query)
        meets = (first_query <= last_key) & (first_key <= last_query)
        return np.where(is_one, ALL, np.where(meets, SOME, NONE)).astype(np.int8)

    def table(self, rows, columns):
        return np.eye(rows, columns, dtype=bool)[None]


@dataclasses.dataclass(frozen=True)
class InBlocks(BlockPattern):
    """Of blocks what another pattern says of positions: with Band(1, 1), the block of the query and its two neighbours."""

    block_size: int
    pattern: Pattern

    @property
    def heads(self):
        return self.pattern.heads

    def allowed(self, query, key, head):
        return self.pattern.allowed(query // self.block_size, key // self.block_size, head)

    def table(self, rows, columns):
        return grid(self.pattern, rows, columns)
