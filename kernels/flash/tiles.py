"""Which blocks of queries and keys a kernel visits: rows of numbers, made in NumPy while tracing.

For each block of queries (or, transposed, of keys) a row says which blocks of the other side need no test (full) and which
need one (partial): as ranges where they lie side by side, as lists where they do not. A block in which nothing is visible is
not visited.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from subquad.kernels.padding import pad_to
from subquad.kernels.patterns import ALL, NONE, SOME, Band, Both, Pattern


@dataclasses.dataclass(frozen=True)
class Geometry:
    """What is known of the visible pairs while tracing.

    Positions are a number (they count from it), the bytes of an int32 [B|1, length] array, or None: known at run time only.
    """

    queries: int
    keys: int
    query_positions: int | bytes | None
    key_positions: int | bytes | None
    pattern: Pattern | None
    tested: bool  # by a mask or segments, so that no block is full


@dataclasses.dataclass(frozen=True)
class Work:
    """The rows of one kernel, and the lists that their ranges count."""

    rows: np.ndarray  # int32 [N|1, I, 7]: the block, ranges of partial, partial and full blocks; the longest rows first
    tiles: np.ndarray | None  # int32 [P]; None: the ranges count the blocks themselves


@functools.lru_cache(maxsize=64)
def work(geometry: Geometry, query_tile: int, key_tile: int, transposed: bool) -> Work:
    """The rows for tiles of queries, or, transposed, for tiles of keys."""
    states = states_of(geometry, query_tile, key_tile, transposed)
    states = states.swapaxes(1, 2) if transposed else states
    seen, full = states != NONE, states == ALL
    (first, end), (first_full, end_full) = spans(seen), spans(full)
    none = ~full.any(2)
    first_full, end_full = np.where(none, end, first_full), np.where(none, end, end_full)
    lengths = seen.sum(2)
    if (lengths == end - first).all() and (full.sum(2) == end_full - first_full).all():
        tiles = None
        ranges = first, first_full, end_full, end, first_full, end_full
    else:
        partial = seen & ~full
        # Per row the partial tiles, then the full ones.
        tiles = np.concatenate([np.nonzero(partial)[2], np.nonzero(full)[2]]).astype(np.int32)
        ends = [array.sum(2).cumsum().reshape(lengths.shape) for array in (partial, full)]
        starts = [end - array.sum(2) for end, array in zip(ends, (partial, full), strict=True)]
        zero, offset = np.zeros_like(lengths), partial.sum()
        ranges = starts[0], ends[0], zero, zero, starts[1] + offset, ends[1] + offset
    # One order for all heads: those that share keys go through the rows together.
    order = np.argsort(-lengths.sum(0), kind="stable")
    rows = np.stack([np.broadcast_to(np.arange(lengths.shape[1]), lengths.shape), *ranges], axis=2)
    return Work(np.ascontiguousarray(rows[:, order].astype(np.int32)), tiles)


def spans(marks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first marked place along the last axis, and one after the last; 0 and 0 where there is none."""
    some = marks.any(2)
    return marks.argmax(2), np.where(some, marks.shape[2] - marks[..., ::-1].argmax(2), 0)


@functools.lru_cache(maxsize=64)
def states_of(geometry: Geometry, query_tile: int, key_tile: int, transposed: bool = False) -> np.ndarray:
    """int8 [N|1, I, J]: NONE, SOME or ALL of two blocks is visible; never ALL of one that sticks out of the inner axis."""
    counts = -(-geometry.queries // query_tile), -(-geometry.keys // key_tile)
    states = np.full((1, *counts), ALL, np.int8)
    if geometry.pattern is not None:
        states = np.full_like(states, SOME)
        if geometry.query_positions is not None and geometry.key_positions is not None:
            rows = (x[:, None] for x in extremes(array_of(geometry.query_positions, geometry.queries), query_tile))
            columns = extremes(array_of(geometry.key_positions, geometry.keys), key_tile)
            heads = np.arange(geometry.pattern.heads)[:, None, None]
            states = geometry.pattern.coverage(tuple(rows), columns, heads)
            states = np.array(np.broadcast_to(states, (len(heads), *counts)))
    ragged = np.zeros(counts, bool)
    ragged[-1, :] |= transposed and geometry.queries % query_tile != 0
    ragged[:, -1] |= not transposed and geometry.keys % key_tile != 0
    return np.where(geometry.tested | ragged, np.minimum(states, SOME), states)


def extremes(positions: np.ndarray, tile: int) -> tuple[np.ndarray, np.ndarray]:
    """The smallest and the largest of positions [B|1, T] in each block, over the batch; in int64: a limit is added to them."""
    positions, starts = positions.astype(np.int64), np.arange(0, positions.shape[1], tile)
    return np.minimum.reduceat(positions, starts, 1).min(0), np.maximum.reduceat(positions, starts, 1).max(0)


def array_of(positions: int | bytes, length: int) -> np.ndarray:
    """Positions [B|1, length] of a `Geometry`."""
    if isinstance(positions, int):
        return positions + np.arange(length)[None]
    return np.frombuffer(positions, np.int32).reshape(-1, length)


def range_of(positions: int | bytes | None, length: int) -> tuple[int, int] | None:
    """The least and the largest position; None where they are not known."""
    array = None if positions is None else array_of(positions, length)
    return None if array is None else (int(array.min()), int(array.max()))


def known(positions) -> tuple[int | bytes | None, jax.Array | None]:
    """(what a `Geometry` knows of these positions, the array that the kernel must read)."""
    if positions is None:
        return 0, None
    if not isinstance(positions, np.ndarray):
        return None, positions
    first = int(positions.flat[0])
    if (positions == first + np.arange(positions.shape[1])).all():
        return first, None
    return positions.astype(np.int32).tobytes(), jnp.asarray(positions)


def bounds_of(geometry: Geometry, visible, query_tile: int, key_tile: int, transposed: bool):
    """int32 [B|1, I, 2]: the range of tiles outside of which nothing is visible, as far as only arrays can tell.

    For key padding, segments, and positions that are known at run time; None where these say nothing.
    """
    queries, keys = geometry.queries, geometry.keys
    counts = -(-queries // query_tile), -(-keys // key_tile)
    possible = []

    def cut(array, tile, reduce):
        count = -(-array.shape[1] // tile)
        return reduce(pad_to(array, 1, count * tile, mode="edge").reshape(len(array), count, tile), axis=2)

    def sides(query_array, key_array):
        low_query, high_query = (cut(query_array, query_tile, f)[:, :, None] for f in (jnp.min, jnp.max))
        low_key, high_key = (cut(key_array, key_tile, f)[:, None] for f in (jnp.min, jnp.max))
        return low_query, high_query, low_key, high_key

    if visible.mask is not None and visible.mask.shape[1:3] == (1, 1) and visible.mask.shape[3] == keys:
        possible.append(cut(visible.mask[:, 0, 0], key_tile, jnp.any)[:, None])
    if visible.query_segment_ids is not None:
        low_query, high_query, low_key, high_key = sides(visible.query_segment_ids, visible.key_segment_ids)
        possible.append((low_key <= high_query) & (low_query <= high_key))
    if visible.query_positions is not None or visible.key_positions is not None:
        start = lambda start, length: start + jnp.arange(length, dtype=jnp.int32)[None]
        at, of = visible.query_positions, visible.key_positions
        at = start(geometry.query_positions, queries) if at is None else at
        of = start(geometry.key_positions, keys) if of is None else of
        low_query, high_query, low_key, high_key = sides(at, of)
        for band in bands(geometry.pattern):
            if band.left is not None:
                possible.append(high_key >= low_query - band.left)
            if band.right is not None:
                possible.append(low_key <= high_query + band.right)
    if not possible or counts[1 - transposed] == 1:
        return None
    seen = functools.reduce(jnp.logical_and, possible)
    seen = jnp.broadcast_to(seen, (len(seen), *counts))
    seen = seen.swapaxes(1, 2) if transposed else seen
    some, first = seen.any(2), jnp.argmax(seen, 2)
    end = jnp.where(some, seen.shape[2] - jnp.argmax(seen[..., ::-1], 2), 0)
    return jnp.stack([first, end], axis=2).astype(jnp.int32)


def bands(pattern: Pattern | None) -> list[Band]:
    """The bands outside of which a pattern shows nothing."""
    if isinstance(pattern, Both):
        return bands(pattern.one) + bands(pattern.other)
    return [pattern] if isinstance(pattern, Band) else []
