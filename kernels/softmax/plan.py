"""How tiled softmax attention is cut: sizes of parts and tiles, and the steps in which a pattern allows something."""

import dataclasses
import math
import os

import jax
import numpy as np

from subquad.kernels import patterns
from subquad.kernels.flash.tiles import extremes
from subquad.kernels.patterns import Pattern
from subquad.kernels.softmax import parts
from subquad.kernels.softmax.sets import KeySet

# Bytes of one tile of logits over all heads of a part. On a CPU, for each core: what a core works on should stay in its
# cache. On an accelerator every step is a kernel launch, so steps should be few.
CORE_TILE_BYTES, ACCELERATOR_TILE_BYTES = 1 << 18, 1 << 26
# Keys of a step whose tiles are the small blocks of a pattern: enough for fast products. And the most tiles side by side.
STEP_KEYS, MOST_TILES = 512, 8


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static about attention to one set of keys."""

    columns: int
    source: int  # of the keys and values
    rows: tuple[int, int]  # of queries and of keys, in a column
    parts: tuple[int, int, int]  # of the batch, of the columns and of the heads of keys
    tiles: tuple[int, int]  # rows per query tile and per key tile
    counts: tuple[int, int]  # query tiles and key tiles
    shape: tuple[int, int, int]  # of the steps
    steps: bytes  # int32 [parts of the heads or 1, P, 1 + width]: a query tile and `width` key tiles, -1 for none
    pattern: Pattern | None  # what must be tested within a tile; None: nothing

    @property
    def listed(self) -> np.ndarray:
        return np.frombuffer(self.steps, np.int32).reshape(self.shape)


def plan_of(query, key, value, one: KeySet) -> Plan:
    """Sizes of parts and tiles, and the steps in which the pattern allows something."""
    (batch, _, heads, features), kv_heads = query.shape, key.shape[2]
    columns, pattern = one.columns, one.pattern
    queries, keys = (x.shape[1] // columns for x in (query, key))
    groups, features = heads // kv_heads, max(features, value.shape[3])
    is_shared = pattern is None or pattern.heads == 1
    reach = None if pattern is None else pattern.reach
    split = parts_of(batch, columns, kv_heads if is_shared else 1, groups, queries, keys, features, most_of(reach))
    if not is_shared:  # each head of keys has steps of its own
        split = *split[:2], kv_heads
    tiles = tile_sizes(batch * columns * heads // math.prod(split), queries, keys, reach)
    block_size = None if pattern is None else pattern.tile
    if block_size is not None:
        tiles = tuple(min(length, block_tile(block_size, most_of(None))) for length in (queries, keys))
    counts = -(-queries // tiles[0]), -(-keys // tiles[1])
    allowed, undecided = allowed_tiles(pattern, one.visible, tiles, counts, kv_heads)
    width = 1 if block_size is None else max(1, min(MOST_TILES, STEP_KEYS // tiles[1], int(allowed.sum(2).max())))
    steps = steps_of(allowed, width)
    return Plan(columns, one.source, (queries, keys), split, tiles, counts, steps.shape, steps.tobytes(), undecided)


def allowed_tiles(pattern: Pattern | None, visible, tiles, counts, kv_heads: int) -> tuple[np.ndarray, Pattern | None]:
    """(the tiles that hold an allowed pair, bool [K|1, query tiles, key tiles]; what of the pattern must be tested in them).

    K where the pattern tells heads apart. All tiles where the positions are not known while tracing.
    """
    is_shared = pattern is None or pattern.heads == 1
    if pattern is None or not all(isinstance(positions, np.ndarray) for positions in visible[:2]):
        return np.ones((1 if is_shared else kv_heads, *counts), bool), pattern
    of_queries, of_keys = (extremes(x, tile) for x, tile in zip(visible[:2], tiles, strict=True))
    ranges = tuple(x[:, None] for x in of_queries), of_keys, np.arange(pattern.heads)[:, None, None]
    by_head = np.broadcast_to(pattern.coverage(*ranges) > patterns.NONE, (pattern.heads, *counts))
    if is_shared:
        return by_head, patterns.undecided(pattern, by_head, *ranges)
    # Query heads that share a head of keys share its steps: a tile that one of them needs is computed for all.
    groups = pattern.heads // kv_heads
    allowed = by_head.reshape(kv_heads, groups, *counts).any(1)
    return allowed, patterns.undecided(pattern, allowed.repeat(groups, 0), *ranges)


def steps_of(some: np.ndarray, width: int) -> np.ndarray:
    """int32 [heads, P, 1 + width] from bool [heads, query tiles, key tiles]: `width` key tiles at a time, -1 for none.

    Heads with fewer steps than others, or none, take steps that do nothing.
    """
    order = np.argsort(~some, axis=2, kind="stable")
    lists = np.where(np.take_along_axis(some, order, 2), order, -1)
    lists = np.pad(lists, ((0, 0), (0, 0), (0, -lists.shape[2] % width)), constant_values=-1)
    lists = lists.reshape(*lists.shape[:2], -1, width)
    steps = [np.column_stack([np.nonzero(kept)[0], rows[kept]]) for rows, kept in zip(lists, lists[..., 0] >= 0, strict=True)]
    if len(steps) == 1 and len(steps[0]):
        return steps[0][None].astype(np.int32)
    longest = max(1, *map(len, steps))
    nothing = np.array([[0, *[-1] * width]])
    return np.stack([np.concatenate([x, nothing.repeat(longest - len(x), 0)]) for x in steps]).astype(np.int32)


def block_tile(block_size: int, most: int) -> int:
    """The size of tiles for a pattern of blocks: so many small blocks, or such a part of a large one, that they fit."""
    if block_size <= most:
        return block_size * max(1, 16 // block_size)
    divisors = (size for size in range(most, 31, -1) if block_size % size == 0)
    return next(divisors, balance(block_size, most))


def parts_of(
    batch: int, columns: int, kv_heads: int, groups: int, queries: int, keys: int, features: int, most: int
) -> tuple[int, int, int]:
    """How many parts batch, columns and heads of keys are cut into, so that tiles and arrays of a part are of a good size.

    Args:
        features: of a query or of a value, whichever are more.
        most: positions that a tile may hold.
    """
    tiles = tile_bytes() // (4 * min(queries, most) * min(keys, most))  # samples times heads
    return parts.parts_of(batch, columns, kv_heads, groups, min(tiles, parts.most_sequences(max(queries, keys), features)))


def tile_bytes() -> int:
    if jax.default_backend() != "cpu":
        return ACCELERATOR_TILE_BYTES
    return CORE_TILE_BYTES * min(cores(), 16)


def cores() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def most_of(reach: int | None) -> int:
    """Positions that a tile may hold; `reach`: keys that one query can see at most, where that is known."""
    most = 256 if jax.default_backend() == "cpu" else 1024
    return most if reach is None else max(64, min(most, power(reach) // 2))


def tile_sizes(rows: int, queries: int, keys: int, reach: int | None) -> tuple[int, int]:
    """Positions per query tile and per key tile.

    Args:
        rows: samples in a part of the batch, times heads in a part of them.
        reach: as in `most_of`.
    """
    area, most = tile_bytes() // (4 * rows), most_of(reach)
    query_tile = balance(queries, max(32, min(most, power(int(area**0.5)))))
    # The fewer queries there are, the more keys fit into a tile: a decoding step takes its whole cache at once.
    limit = most if reach is not None else 2 * most if queries > query_tile else keys
    return query_tile, balance(keys, max(32, min(limit, area // query_tile)))


def power(size: int) -> int:
    """The largest power of two that is not above `size`."""
    return 1 << max(size, 1).bit_length() - 1


def balance(length: int, tile: int) -> int:
    """The size that cuts `length` into as many parts as `tile` would, with the least padding or overlap."""
    return -(-length // -(-length // max(1, tile)))
