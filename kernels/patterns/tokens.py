"""Patterns of positions."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np

from subquad.kernels.patterns.base import ALL, NONE, SOME, Pattern, existing, looked_up


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


@dataclasses.dataclass(frozen=True)
class GlobalKeys(Pattern):
    """start <= k < stop: keys that all queries see."""

    start: int
    stop: int

    @property
    def reach(self):
        return self.stop - self.start

    def allowed(self, query, key, head):
        return (key >= self.start) & (key < self.stop)

    def coverage(self, queries, keys, head):
        return within(self.start, self.stop, keys, np.broadcast_shapes(*map(np.shape, (*queries, *keys, head))))

    def chunk(self, capacity):
        return capacity

    def key_positions(self, first, count, capacity, head):
        return existing(jnp.arange(self.start, self.stop) + 0 * first[..., None], capacity, head)


@dataclasses.dataclass(frozen=True)
class GlobalQueries(Pattern):
    """start <= q < stop: queries that see all keys."""

    start: int
    stop: int

    def allowed(self, query, key, head):
        return (query >= self.start) & (query < self.stop)

    def coverage(self, queries, keys, head):
        return within(self.start, self.stop, queries, np.broadcast_shapes(*map(np.shape, (*queries, *keys, head))))


def Globals(start: int, stop: int) -> Pattern:  # noqa: N802  # made like a pattern
    """Positions start <= p < stop that see all and are seen by all."""
    return GlobalKeys(start, stop) | GlobalQueries(start, stop)


def within(start: int, stop: int, positions, shape) -> np.ndarray:
    """int8: NONE, SOME or ALL of ranges (first, last) of positions lies in start .. stop."""
    first, last = positions
    states = np.where((first >= start) & (last < stop), ALL, np.where((last >= start) & (first < stop), SOME, NONE))
    return np.broadcast_to(states, shape).astype(np.int8)


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
class Dilated(Pattern):
    """k = q + j d for -left <= j <= right, with a dilation d for all heads or for each."""

    left: int
    right: int
    dilations: tuple[int, ...]

    @property
    def heads(self):
        return len(self.dilations)

    @property
    def reach(self):
        return self.left + self.right + 1

    def allowed(self, query, key, head):
        dilation, distance = looked_up(self.dilations, head % self.heads), key - query
        seen = (distance >= -self.left * dilation) & (distance <= self.right * dilation)
        return seen & (distance % dilation == 0)

    def coverage(self, queries, keys, head):
        dilation = looked_up(self.dilations, head % self.heads)
        # Every distance between these two occurs.
        least, most = keys[0] - queries[1], keys[1] - queries[0]
        first = np.maximum(-(-least // dilation), -self.left)
        last = np.minimum(most // dilation, self.right)
        every = (first * dilation == least) & (last * dilation == most) & ((dilation == 1) | (least == most))
        return np.where(first > last, NONE, np.where(every, ALL, SOME)).astype(np.int8)

    def chunk(self, capacity):
        return self.left * max(self.dilations) + 1

    def key_positions(self, first, count, capacity, head):
        """Of one query its own keys; of several all that lie between them."""
        if count > 1:
            return Band(self.left * max(self.dilations), 0).key_positions(first, count, capacity, head)
        dilation = jnp.asarray(looked_up(self.dilations, head % self.heads))[..., None]
        return existing(first[..., None] - dilation * jnp.arange(self.left + 1), capacity, head)


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
class Random(Pattern):
    """Each query sees some keys that were drawn for it, others in each head; positions are 0 .. length, and what is outside
    sees nothing and is not seen.

    What is drawn follows from the seed, the head and the query, and from what may be drawn: it is the same in every process
    and for every `length` to which that does not extend.
    """

    count: int  # keys for a query; fewer where fewer may be drawn
    length: int
    seed: int
    num_heads: int
    among: Pattern  # which keys may be drawn for a query

    @property
    def heads(self):
        return self.num_heads

    @property
    def reach(self):
        return self.count

    def allowed(self, query, key, head):
        inside = (0 <= query) & (query < self.length) & (0 <= key)
        drawn = looked_up(draws(self), head % self.heads, query % self.length)
        return inside & (drawn == key[..., None]).any(-1)


@functools.lru_cache(maxsize=8)
def draws(random: Random) -> np.ndarray:
    """int32 [heads, length, count]: the keys of each query, in rising order, -1 for none."""
    keys, drawn = np.arange(random.length), np.full((random.heads, random.length, random.count), -1, np.int32)
    for head, query in np.ndindex(random.heads, random.length):
        # The raw bits of a counter-based generator are the same in all versions of NumPy.
        numbers = np.random.Philox(key=[random.seed, head << 32 | query]).random_raw(random.length)
        possible = keys[np.broadcast_to(random.among.allowed(np.asarray(query), keys, np.asarray(head)), keys.shape)]
        chosen = np.sort(possible[np.argsort(numbers[possible], kind="stable")[: random.count]])
        drawn[head, query, : len(chosen)] = chosen
    return drawn
