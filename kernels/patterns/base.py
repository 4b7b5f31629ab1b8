"""What every pattern is asked, and how patterns go together."""

import dataclasses
import functools
import operator

import jax.numpy as jnp
import numpy as np

from subquad.kernels.padding import pad_to

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
        """The size, in positions, of the tiles that the pattern, or a part of it, allows as a whole or not at all."""
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

    def layout(self, length: int, tile: int) -> np.ndarray:
        """int8 [heads, I, I]: `coverage` of the tiles of `length` queries and keys."""
        first = np.arange(0, length, tile)
        last, head = np.minimum(first + tile, length) - 1, np.arange(self.heads)[:, None, None]
        states = self.coverage((first[:, None], last[:, None]), (first, last), head)
        return np.broadcast_to(states, (self.heads, len(first), len(first)))

    def density(self, length: int, tile: int = 64) -> float:
        """The part of the pairs of `length` queries and keys that is allowed, as a mean over the heads."""
        states, sizes = self.layout(length, tile), np.diff([*range(0, length, tile), length])
        count = int((sizes[:, None] * sizes * (states == ALL)).sum())
        for head, i, j in zip(*np.nonzero(states == SOME), strict=True):
            query, key = (np.arange(at * tile, at * tile + sizes[at]) for at in (i, j))
            allowed = self.allowed(query[:, None], key, np.asarray(head))
            count += int(np.broadcast_to(allowed, (len(query), len(key))).sum())
        return count / (self.heads * length**2)

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

    def __invert__(self) -> "Pattern":
        return Neither(self)


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

    @property
    def reach(self):
        return None if None in (self.one.reach, self.other.reach) else self.one.reach + self.other.reach

    @property
    def tile(self):
        """That of one, where it is also that of the other, or the other has none."""
        sizes = {self.one.tile, self.other.tile} - {None}
        return sizes.pop() if len(sizes) == 1 else None

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
class Neither(Pattern):
    """What a pattern does not allow."""

    pattern: Pattern

    @property
    def heads(self):
        return self.pattern.heads

    @property
    def tile(self):
        return self.pattern.tile

    def allowed(self, query, key, head):
        allowed = self.pattern.allowed(query, key, head)
        return allowed == False  # noqa: E712  # arrays, or True

    def coverage(self, queries, keys, head):
        return ALL - self.pattern.coverage(queries, keys, head)


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
        pad = lambda x: pad_to(x, -1, longest, constant_values=-1)
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
