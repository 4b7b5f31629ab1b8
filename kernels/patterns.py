"""What a query may see, as one value.

A pattern is a frozen dataclass of numbers, so that equal patterns are one compilation. It is asked by the reference, the tiled
paths, the layers that extend a sequence, their plots and the tests of cost. Patterns compose:

    Band(window, 0) | Blocks.of(lists, 64)      either shows the key
    BlockPermutation(64, 8, shifts) & CAUSAL    both show it

As a picture, queries down and keys across, `x` where a query sees a key:

    CAUSAL      Band(1, 0)    Band(0, 1)    BlockPermutation(2, 2, (1,))
    x . . .     x . . .       x x . .       . . x x
    x x . .     x x . .       . x x .       . . x x
    x x x .     . x x .       . . x x       x x . .
    x x x x     . . x x       . . . x       x x . .

Positions, and numbers of heads, are integers or integer arrays that broadcast, of NumPy or JAX.
"""

import dataclasses
import functools
import operator

import jax.numpy as jnp
import numpy as np

NONE, SOME, ALL = 0, 1, 2  # how much of a rectangle of pairs is allowed


class Pattern:
    """Which pairs of query and key are allowed. A subclass is a frozen dataclass that defines `allowed`."""

    @property
    def heads(self) -> int:
        """How many heads the pattern tells apart; 1 where all see the same."""
        return 1

    @property
    def reach(self) -> int | None:
        """How many keys a query sees at most; None where that depends on the length."""
        return None

    @property
    def tile(self) -> int | None:
        """A size of tiles, in positions, for which a tile is allowed as a whole or not at all; None where there is none."""
        return None

    def allowed(self, query, key, head):
        """The definition: bool, whether the query at one position sees the key at another, in a head."""
        raise NotImplementedError(f"{type(self).__name__} has no allowed")

    def coverage(self, queries, keys, head):
        """int8: NONE, SOME or ALL of the pairs of a range of queries and a range of keys; SOME is always right.

        Args:
            queries, keys: (first, last) positions, both included, as NumPy arrays that broadcast with `head`.
        """
        return np.full(np.broadcast_shapes(*map(np.shape, (*queries, *keys, head))), SOME, np.int8)

    def chunk(self, capacity: int) -> int | None:
        """How many queries in a row share most of the keys they may see; None where one may see most of `capacity` keys."""
        return None

    def key_positions(self, first, count: int, capacity: int, head):
        """Every key up to the last query that queries first .. first + count may see: int [..., L], each once, -1 for none.

        L is static, and much less than the capacity where the pattern is sparse: it is what an extended token costs.

        Args:
            first: int array, the position of the first query; the result has the axes of `first` and `head`, and L.
            count: at most `chunk`, where there is one.
            capacity: keys exist at 0 .. capacity.
        """
        shape = np.broadcast_shapes(np.shape(first), np.shape(head))
        return jnp.broadcast_to(jnp.arange(capacity), (*shape, capacity))

    def __and__(self, other: "Pattern | None") -> "Pattern":
        return self if other is None else Both(self, other)

    def __or__(self, other: "Pattern") -> "Pattern":
        return Either(self, other)


@dataclasses.dataclass(frozen=True)
class Band(Pattern):
    """q - left <= k <= q + right; None for no limit on a side."""

    left: int | None
    right: int | None

    @property
    def reach(self):
        return None if self.left is None or self.right is None else self.left + self.right + 1

    def allowed(self, query, key, head):
        distance = key - query
        seen = True if self.left is None else distance >= -self.left
        return seen if self.right is None else seen & (distance <= self.right)

    def coverage(self, queries, keys, head):
        (first_query, last_query), (first_key, last_key) = queries, keys
        left, right = self.left, self.right
        some = np.broadcast_to(True, np.broadcast_shapes(*map(np.shape, (*queries, *keys, head))))
        every = some
        if left is not None:
            some, every = some & (last_key >= first_query - left), every & (first_key >= last_query - left)
        if right is not None:
            some, every = some & (first_key <= last_query + right), every & (last_key <= first_query + right)
        return np.where(every, ALL, np.where(some, SOME, NONE)).astype(np.int8)

    def chunk(self, capacity):
        return None if self.left is None else self.left + 1

    def key_positions(self, first, count, capacity, head):
        if self.left is None:
            return super().key_positions(first, count, capacity, head)
        return existing(first[..., None] - self.left + jnp.arange(count + self.left), capacity, head)


CAUSAL = Band(None, 0)


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
        table = self.table(int(np.max(end_query)), int(np.max(end_key)))
        total = np.pad(table, ((0, 0), (1, 0), (1, 0))).astype(np.int64).cumsum(1).cumsum(2)
        head = np.asarray(head) % self.heads
        count = total[head, end_query, end_key] - total[head, first_query, end_key]
        count = count - total[head, end_query, first_key] + total[head, first_query, first_key]
        every = (end_query - first_query) * (end_key - first_key)
        return np.where(count == every, ALL, np.where(count > 0, SOME, NONE)).astype(np.int8)

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
        shift = looked_up(self.shifts, head)
        return key // self.block_size == (query // self.block_size + shift) % self.num_blocks

    def table(self, rows, columns):
        blocks = (np.arange(rows) + np.array(self.shifts)[:, None]) % self.num_blocks
        return blocks[..., None] == np.arange(columns)


@dataclasses.dataclass(frozen=True)
class Blocks(BlockPattern):
    """The queries of block i see the keys of block j where it says so in a table."""

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
        return looked_up(self.table(*self.shape[1:]), head % self.heads, query // self.block_size, key // self.block_size)

    def table(self, rows, columns):
        return np.frombuffer(self.bits, bool).reshape(self.shape)[:, :rows, :columns]


@dataclasses.dataclass(frozen=True)
class Strided(Pattern):
    """Keys within a window on each side, None for no window, and keys whose distance is a multiple of a stride."""

    stride: int
    window: int | None

    def allowed(self, query, key, head):
        far = (query - key) % self.stride == 0
        return far if self.window is None else far | (abs(query - key) <= self.window)

    def chunk(self, capacity):
        """So many that their far keys, of which they share none, are not many more than the near ones."""
        return max(1, min(self.stride, (self.window or 0) // -(-capacity // self.stride)))

    def key_positions(self, first, count, capacity, head):
        rows = jnp.arange(-(-capacity // self.stride)) * self.stride
        residues = (first[..., None] + jnp.arange(count)) % self.stride
        far = (residues[..., None] + rows).reshape(*first.shape, -1)
        if self.window is None:
            return existing(far, capacity, head)
        near = Band(self.window, 0).key_positions(first, count, capacity, head)
        far = jnp.where(far < first[..., None] - self.window, far, -1)
        return jnp.concatenate([near, existing(far, capacity, head)], -1)


@dataclasses.dataclass(frozen=True)
class Columns(Pattern):
    """Keys that stand in some columns of every block of positions, with columns for all heads or for each."""

    block_size: int
    columns: tuple[tuple[int, ...], ...]  # [N|1][c], in rising order

    @property
    def heads(self):
        return len(self.columns)

    def allowed(self, query, key, head):
        return looked_up(self.table, head % self.heads, key % self.block_size)

    @property
    def table(self) -> np.ndarray:
        """bool [heads, block_size]: which columns are seen."""
        return (np.arange(self.block_size) == np.array(self.columns)[..., None]).any(1)

    def chunk(self, capacity):
        return self.block_size

    def key_positions(self, first, count, capacity, head):
        blocks = np.arange(0, capacity, self.block_size)[:, None]
        positions = (np.array(self.columns)[:, None] + blocks).reshape(self.heads, -1)
        return existing(jnp.asarray(positions)[head % self.heads] + 0 * first[..., None], capacity)


@dataclasses.dataclass(frozen=True)
class SameBlock(BlockPattern):
    """Keys in the block of the query."""

    block_size: int

    def allowed(self, query, key, head):
        return query // self.block_size == key // self.block_size

    def table(self, rows, columns):
        return np.eye(rows, columns, dtype=bool)[None]


@dataclasses.dataclass(frozen=True)
class Pair(Pattern):
    """Two patterns; a subclass says how they go together."""

    one: Pattern
    other: Pattern

    @property
    def heads(self):
        return max(self.one.heads, self.other.heads)


class Both(Pair):
    """What two patterns allow together."""

    @property
    def reach(self):
        return min((x.reach for x in (self.one, self.other) if x.reach is not None), default=None)

    @property
    def tile(self):
        return self.other.tile if self.one.tile is None else self.one.tile

    def allowed(self, query, key, head):
        return self.one.allowed(query, key, head) & self.other.allowed(query, key, head)

    def coverage(self, queries, keys, head):
        return np.minimum(*(x.coverage(queries, keys, head) for x in (self.one, self.other)))

    def chunk(self, capacity):
        return min((x for x in (self.one.chunk(capacity), self.other.chunk(capacity)) if x is not None), default=None)

    def key_positions(self, first, count, capacity, head):
        sparse = [x for x in (self.one, self.other) if x.chunk(capacity) is not None] or [self.one]
        return min((x.key_positions(first, count, capacity, head) for x in sparse), key=lambda x: x.shape[-1])


class Either(Pair):
    """What at least one of two patterns allows."""

    def allowed(self, query, key, head):
        return self.one.allowed(query, key, head) | self.other.allowed(query, key, head)

    def coverage(self, queries, keys, head):
        return np.maximum(*(x.coverage(queries, keys, head) for x in (self.one, self.other)))

    def chunk(self, capacity):
        chunks = self.one.chunk(capacity), self.other.chunk(capacity)
        return None if None in chunks else min(chunks)

    def key_positions(self, first, count, capacity, head):
        return one_of_each(*(x.key_positions(first, count, capacity, head) for x in (self.one, self.other)))


@dataclasses.dataclass(frozen=True)
class Interleaved(Pattern):
    """Head h follows the pattern h mod n of n patterns, as the head h // n of that."""

    patterns: tuple[Pattern, ...]
    num_heads: int

    @property
    def heads(self):
        return self.num_heads

    def allowed(self, query, key, head):
        n = len(self.patterns)
        every = [one.allowed(query, key, head // n) & (head % n == i) for i, one in enumerate(self.patterns)]
        return functools.reduce(operator.or_, every)

    def chunk(self, capacity):
        chunks = [one.chunk(capacity) for one in self.patterns]
        return None if None in chunks else min(chunks)

    def key_positions(self, first, count, capacity, head):
        n = len(self.patterns)
        every = [one.key_positions(first, count, capacity, head // n) for one in self.patterns]
        longest = max(x.shape[-1] for x in every)
        pad = lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, longest - x.shape[-1])], constant_values=-1)
        return jnp.select([(head % n == i)[..., None] for i in range(n)], list(map(pad, every)), -1)


def looked_up(table, *index):
    """table[index], in NumPy where all of the index is known while tracing."""
    known = all(isinstance(x, int | np.ndarray | np.integer) for x in index)
    return (np if known else jnp).asarray(table)[index]


def undecided(pattern: Pattern | None, some: np.ndarray, queries, keys, head) -> Pattern | None:
    """What of a pattern must still be tested within rectangles: what does not allow all of each; None where nothing is left.

    Args:
        some: bool, the rectangles that count, of those that the ranges of queries and keys make, as in `coverage`.
    """
    coverage = np.broadcast_to(pattern.coverage(queries, keys, head), some.shape)
    if (coverage[some] == ALL).all():
        return None
    if not isinstance(pattern, Both):
        return pattern
    one, other = (undecided(x, some, queries, keys, head) for x in (pattern.one, pattern.other))
    return other if one is None else one & other


def grid(pattern: Pattern | None, queries: int, keys: int) -> np.ndarray:
    """bool [N|1, queries, keys]: the pattern spelled out, with positions from 0 on."""
    if pattern is None:
        return np.ones((1, queries, keys), bool)
    head = np.arange(pattern.heads)[:, None, None]
    return np.broadcast_to(pattern.allowed(np.arange(queries)[:, None], np.arange(keys), head), (pattern.heads, queries, keys))


def existing(positions, capacity: int, head=0):
    """Positions [..., L] for each of `head`, -1 for those outside of 0 .. capacity."""
    shape = (*np.broadcast_shapes(positions.shape[:-1], np.shape(head)), positions.shape[-1])
    return jnp.broadcast_to(jnp.where((positions >= 0) & (positions < capacity), positions, -1), shape)


def one_of_each(some, others):
    """Lists [..., L] and [..., M] after each other, with -1 in the place of those of the others that are among the first."""
    return jnp.concatenate([some, jnp.where((others[..., None] == some[..., None, :]).any(-1), -1, others)], -1)
