"""Tiled softmax attention: memory O(T), a fixed number of steps, a backward pass that recomputes the weights.

Samples and heads are taken part by part, so that what is kept in tiles and in float32 is that of one part. In a part one
loop runs over steps: a tile of queries, and the few tiles of keys that it meets side by side. The steps are those in which
the pattern allows something. They are listed in NumPy where the positions are known while tracing, so that a causal, a
windowed or a block-sparse call visits only its own tiles and its number of steps is a constant of the program.
"""

import dataclasses
import functools
import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from subquad.kernels import patterns, precision
from subquad.kernels.memory import laid
from subquad.kernels.patterns import Pattern
from subquad.kernels.softmax import online, parts

# Bytes of one tile of logits over all heads of a part. On a CPU, for each core: what a core works on should stay in its
# cache. On an accelerator every step is a kernel launch, so steps should be few.
CORE_TILE_BYTES, ACCELERATOR_TILE_BYTES = 1 << 18, 1 << 26
# Keys of a step whose tiles are the small blocks of a pattern: enough for fast products. And the most tiles side by side.
STEP_KEYS, MOST_TILES = 512, 8


class Visible(NamedTuple):
    """What decides, beside the pattern, which key a query sees; None where nothing is said.

    The pattern asks for the positions: NumPy arrays where they are known while tracing.
    """

    query_positions: jax.Array | np.ndarray | None  # [B|1, T]
    key_positions: jax.Array | np.ndarray | None  # [B|1, S]
    query_segment_ids: jax.Array | None  # [B|1, T]
    key_segment_ids: jax.Array | None  # [B|1, S]
    mask: jax.Array | None  # [B|1, N|1, T|1, S|1]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static about a call."""

    parts: tuple[int, int]  # of the batch and of the heads of keys
    tiles: tuple[int, int]  # positions per query tile and per key tile
    counts: tuple[int, int]  # query tiles and key tiles
    shape: tuple[int, int, int]  # of the steps
    steps: bytes  # int32 [parts of the heads or 1, P, 1 + width]: a query tile and `width` key tiles, -1 for none
    pattern: Pattern | None  # what must be tested within a tile; None: nothing
    scale: float

    @property
    def listed(self) -> np.ndarray:
        return np.frombuffer(self.steps, np.int32).reshape(self.shape)


class Tiles(NamedTuple):
    """What makes the logits of one part, cut into tiles: i and j count query tiles and key tiles of t and s positions.

    An axis b of 1 stands for all samples.
    """

    query: jax.Array  # [i, b, K, G, t, H]
    key: jax.Array  # [j, b, K, H, s], see `cut_keys`
    bias: jax.Array | None  # [b|1, K|1, G|1, T|1, S|1]
    visible: Visible  # [i, b|1, t] and [j, b|1, s]; the mask as the bias
    real: jax.Array | None  # [j, 1, s]: False past the end of the keys
    head: jax.Array | int  # [K, G, 1, 1]: the number of each query head, where the pattern asks for it


def attention(query, key, value, bias, visible: Visible, pattern: Pattern | None, scale: float):
    """Arguments as checked by `subquad.kernels.softmax` -> (out [B, T, N, V], maximum, log(normaliser) [B, T, N])."""
    return compiled(plan_of(query, key, value, visible, pattern, scale), query, key, value, bias, visible)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
@precision.full
def flash(plan: Plan, query, key, value, bias, visible: Visible):
    """Attention over the tiles of `plan`; the maximum has no gradient, and the log(normaliser) that of the log-sum-exp."""
    return flash_forward(plan, query, key, value, bias, visible)[0]


@precision.full
def flash_forward(plan, query, key, value, bias, visible):
    precise = jnp.promote_types(query.dtype, jnp.float32)

    def attend(part):
        tiles, values = cut(plan, part, query, key, bias, visible), cut_keys(plan, part, value, "s h")

        def step(states, i, js):
            def weigh(weights):
                values_of_step = beside(values, js, -2)
                return jnp.einsum("bkgts,bksv->bkgtv", weights.astype(value.dtype), values_of_step, preferred_element_type=precise)

            state = online.update(jax.tree.map(lambda x: x[i], states), logits_of(plan, tiles, i, js), weigh)
            return jax.tree.map(lambda x, tile: put(x, tile, i), states, state)

        states = sweep(plan, part, step, online.start(tiles.query.shape[:-1], value.shape[-1], precise))
        out, *sums = online.finish(states)
        return tuple(join_queries(x, query.shape[1]) for x in (out.astype(query.dtype), *sums))

    rows = query.shape[:3]
    sums = jax.ShapeDtypeStruct(rows, precise)
    shapes = jax.ShapeDtypeStruct((*rows, value.shape[-1]), query.dtype), sums, sums
    out, maximum, log_normaliser = parts.part_by_part(plan.parts, attend, shapes, (2, 2, 2))
    return (out, maximum, log_normaliser), (query, key, value, bias, visible, out, maximum, log_normaliser)


@precision.full
def flash_backward(plan, residuals, gradients):
    *arguments, out, maximum, log_normaliser = residuals
    grad_out, _, grad_lse = gradients
    query, key, value, bias, visible = arguments
    groups, precise = query.shape[2] // key.shape[2], maximum.dtype
    is_masked = visible.mask is not None or visible.query_segment_ids is not None
    *rows, query = online.residue(out, (maximum, log_normaliser), grad_out, grad_lse, is_masked, query)
    dot = functools.partial(jnp.einsum, preferred_element_type=precise)

    def gradients_of(part):
        tiles, values = cut(plan, part, query, key, bias, visible), cut_keys(plan, part, value, "h s")
        *row_sums, row_delta, row_grad = (cut_queries(plan, part, x, groups) for x in (*rows, grad_out))

        def step(grads, i, js):
            grad_query, grad_key, grad_value, grad_bias = grads
            weights = online.weights_of(logits_of(plan, tiles, i, js), *(x[i][..., None] for x in row_sums))
            grad_weights = dot("bkgtv,bkvs->bkgts", row_grad[i], beside(values, js, -1))
            grad_logits = weights * (grad_weights - row_delta[i][..., None])
            scaled, weights = (grad_logits * plan.scale).astype(query.dtype), weights.astype(value.dtype)
            grad_query = add_at(grad_query, dot("bkgts,bkhs->bkgth", scaled, beside(tiles.key, js, -1)), i)
            grad_key = add_beside(grad_key, dot("bkgth,bkgts->bkhs", tiles.query[i], scaled), js)
            grad_value = add_beside(grad_value, dot("bkgtv,bkgts->bkvs", row_grad[i], weights), js)
            grad_bias = None if bias is None else add_to_bias(plan, grad_bias, grad_logits, i, js)
            return grad_query, grad_key, grad_value, grad_bias

        # Gradients of keys and values with the features before the positions: a product that transposes a tile of weights
        # takes twice the time of one that transposes a tile of queries.
        like = tiles.query, tiles.key, values, tiles.bias
        grads = sweep(plan, part, step, jax.tree.map(lambda x: jnp.zeros(x.shape, precise), like))
        by_key = lambda x: rearrange(x, "j b k h s -> b (j s) k h")[:, : key.shape[1]]
        grad_query, grad_key, grad_value = join_queries(grads[0], query.shape[1]), by_key(grads[1]), by_key(grads[2])
        if bias is None:
            return grad_query, grad_key, grad_value
        grad_bias = rearrange(grads[3], "b k g t s -> b (k g) t s")[:, :, : bias.shape[2], : bias.shape[3]]
        return grad_query, grad_key, grad_value, grad_bias

    # The gradient of a bias that parts share is a sum, in float32.
    shapes = query, key, value, *([] if bias is None else [jax.ShapeDtypeStruct(bias.shape, precise)])
    grads = parts.part_by_part(plan.parts, gradients_of, shapes, (2, 2, 2, 1)[: len(shapes)])
    grads = [x.astype(like.dtype) for x, like in zip(grads, arguments, strict=False)]
    return *grads, *([None] if bias is None else []), None


precision.define_passes(flash, flash_forward, flash_backward)

# Compiled once per plan and shape also for callers who compile nothing; inside their `jit` it is part of theirs.
compiled = jax.jit(flash, static_argnums=0)


def logits_of(plan: Plan, tiles: Tiles, i, js):
    """The logits of one step, [b, K, G, t, s] in float32, -inf where not visible."""
    precise = jnp.promote_types(tiles.query.dtype, jnp.float32)
    products = jnp.einsum("bkgth,bkhs->bkgts", tiles.query[i], beside(tiles.key, js, -1), preferred_element_type=precise)
    logits = online.rounded(plan.scale * products)
    if tiles.bias is not None:
        logits += square(plan, tiles.bias, i, js)
    visible, tests = tiles.visible, []
    rows = lambda array: array[i][:, None, None, :, None]
    columns = lambda array: beside(array, js, -1)[:, None, None, None, :]
    if plan.pattern is not None:
        tests.append(plan.pattern.allowed(rows(visible.query_positions), columns(visible.key_positions), tiles.head))
    if visible.query_segment_ids is not None:
        tests.append(rows(visible.query_segment_ids) == columns(visible.key_segment_ids))
    if tiles.real is not None:
        tests.append(columns(tiles.real))
    if (plan.listed < 0).any():
        tests.append(jnp.repeat(js >= 0, plan.tiles[1]))
    if visible.mask is not None:
        tests.append(square(plan, visible.mask, i, js))
    return jnp.where(functools.reduce(jnp.logical_and, tests), logits, -jnp.inf) if tests else logits


def sweep(plan: Plan, part, step, carry):
    """`carry` after `step(carry, i, js)` for every step of a part."""
    steps = plan.listed
    if steps.shape[:2] == (1, 1):  # no loop around a single step
        return step(carry, steps[0, 0, 0], steps[0, 0, 1:])
    steps = steps[0] if len(steps) == 1 else jnp.asarray(steps)[part % plan.parts[1]]
    return jax.lax.scan(lambda carry, words: (step(carry, words[0], words[1:]), None), carry, steps)[0]


# ---------------------------------------------------------------------------------------------------------- tiles


def beside(tiles, js, axis: int):
    """Tiles js of [j, ...] side by side along an axis; a tile for -1 is some tile."""
    return tiles[js[0]] if len(js) == 1 else jnp.concatenate([tiles[jnp.maximum(j, 0)] for j in js], axis)


def put(tiles, tile, index):
    return jax.lax.dynamic_update_index_in_dim(tiles, tile, index, 0)


def add_at(tiles, change, index):
    return put(tiles, tiles[index] + change, index)


def add_beside(tiles, changes, js):
    """[j, ..., s] with changes [..., w s] added to tiles js."""
    if len(js) == 1:
        return add_at(tiles, changes, js[0])
    changes = jnp.stack(jnp.split(changes, len(js), -1))
    return tiles.at[jnp.where(js < 0, len(tiles), js)].add(changes, mode="drop", unique_indices=True)


def square(plan: Plan, array, i, js):
    """The tiles (i, js) of a mask or bias [b|1, K|1, G|1, T|1, S|1], side by side."""
    if array.shape[4] == 1:
        js = js[:1]
    return jnp.concatenate([jax.lax.dynamic_slice(array, *corner(plan, array, i, j)) for j in js], -1)


def add_to_bias(plan: Plan, array, changes, i, js):
    """`array` with the changes of tiles (i, js) added, summed over the axes that `array` broadcasts."""
    for j, change in zip(js, jnp.split(changes, len(js), -1), strict=True):
        starts, shape = corner(plan, array, i, j)
        change = change.sum([axis for axis, size in enumerate(shape) if size != change.shape[axis]], keepdims=True)
        array = jax.lax.dynamic_update_slice(array, jax.lax.dynamic_slice(array, starts, shape) + change, starts)
    return array


def corner(plan: Plan, array, i, j):
    """Where the tile of a mask or bias [b|1, K|1, G|1, T|1, S|1] starts, and its shape."""
    starts, shape = [0, 0, 0], [*array.shape[:3]]
    for size, index, tile in zip(array.shape[3:], (i, jnp.maximum(j, 0)), plan.tiles, strict=True):
        starts.append(0 if size == 1 else index * tile)
        shape.append(1 if size == 1 else tile)
    return list(map(jnp.int32, starts)), shape


def cut(plan: Plan, part, query, key, bias, visible: Visible) -> Tiles:
    """The arguments of a part in tiles: transposed once, contiguous, batch axes first."""
    keys, kv_heads, groups = key.shape[1], key.shape[2], query.shape[2] // key.shape[2]
    (query_tile, key_tile), (query_count, key_count) = plan.tiles, plan.counts

    def rows(array, tile, count):
        if array is None:
            return None
        return rearrange(pad(parts.share(plan.parts, array, part, None), 1, tile * count), "b (i t) -> i b t", i=count)

    def square(array):
        if array is None:
            return None
        array = parts.share(plan.parts, array, part, 1)
        for axis, tile, count in ((2, query_tile, query_count), (3, key_tile, key_count)):
            array = array if array.shape[axis] == 1 else pad(array, axis, tile * count)
        return rearrange(array, "b (k g) t s -> b k g t s", g=1 if array.shape[1] == 1 else groups)

    positions = visible[:2] if plan.pattern is not None else (None, None)
    positions = [None if x is None else jnp.asarray(x) for x in positions]
    in_tiles = Visible(
        rows(positions[0], query_tile, query_count),
        rows(positions[1], key_tile, key_count),
        rows(visible.query_segment_ids, query_tile, query_count),
        rows(visible.key_segment_ids, key_tile, key_count),
        square(visible.mask),
    )
    whole = keys == key_tile * key_count
    real = None if whole else jnp.asarray(np.arange(key_tile * key_count).reshape(key_count, 1, key_tile) < keys)
    head = 0
    if plan.pattern is not None and plan.pattern.heads > 1:
        first = part % plan.parts[1] * (kv_heads // plan.parts[1])
        head = rearrange(first * groups + jnp.arange(kv_heads // plan.parts[1] * groups), "(k g) -> k g 1 1", g=groups)
    return Tiles(cut_queries(plan, part, query, groups), cut_keys(plan, part, key, "h s"), square(bias), in_tiles, real, head)


def cut_queries(plan: Plan, part, array, groups: int):
    """What a part has of [B, T, N, ...] -> [i, b, K, G, t, ...]."""
    tile, count = plan.tiles[0], plan.counts[0]
    array = pad(parts.share(plan.parts, array, part), 1, tile * count)
    return laid(rearrange(array, "b (i t) (k g) ... -> i b k g t ...", i=count, g=groups))


def cut_keys(plan: Plan, part, array, order: str):
    """What a part has of [B, S, K, H] -> [j, b, K, s, H] for the order "s h", [j, b, K, H, s] for "h s".

    A product on a CPU wants the positions last in one of its operands: transposed here, once, they cost a sixth of what they
    cost transposed in each step.
    """
    tile, count = plan.tiles[1], plan.counts[1]
    array = pad(parts.share(plan.parts, array, part), 1, tile * count)
    return laid(rearrange(array, "b (j s) k h -> j b k " + order, j=count))


def join_queries(array, length: int):
    """[i, b, K, G, t, ...] -> [b, T, N, ...]."""
    return rearrange(array, "i b k g t ... -> b (i t) (k g) ...")[:, :length]


def pad(array, axis: int, length: int):
    """`array` with zeros (or False) at the end of `axis`, up to `length`."""
    width = [(0, 0)] * array.ndim
    width[axis] = (0, length - array.shape[axis])
    return array if width[axis][1] == 0 else jnp.pad(array, width)


# ----------------------------------------------------------------------------------------------------------- plan


def plan_of(query, key, value, visible: Visible, pattern: Pattern | None, scale: float) -> Plan:
    """Sizes of parts and tiles, and the steps in which the pattern allows something."""
    (batch, queries, heads, features), (_, keys, kv_heads, _) = query.shape, key.shape
    groups, features = heads // kv_heads, max(features, value.shape[3])
    is_shared = pattern is None or pattern.heads == 1
    reach = None if pattern is None else pattern.reach
    cuts = parts_of(batch, kv_heads if is_shared else 1, groups, queries, keys, features, most_of(reach))
    if not is_shared:  # each head of keys has steps of its own
        cuts = cuts[0], kv_heads
    tiles = tile_sizes(batch * heads // (cuts[0] * cuts[1]), queries, keys, reach)
    block_size = None if pattern is None else pattern.tile
    if block_size is not None:
        tiles = tuple(min(length, block_tile(block_size, most_of(None))) for length in (queries, keys))
    counts = -(-queries // tiles[0]), -(-keys // tiles[1])
    some = np.ones((1 if is_shared else kv_heads, *counts), bool)
    if pattern is not None and all(isinstance(positions, np.ndarray) for positions in visible[:2]):
        rows, columns = (extremes(x, tile, count) for x, tile, count in zip(visible[:2], tiles, counts, strict=True))
        ranges = tuple(x[:, None] for x in rows), columns, np.arange(pattern.heads)[:, None, None]
        some = np.broadcast_to(pattern.coverage(*ranges) > patterns.NONE, (pattern.heads, *counts))
        if not is_shared:  # query heads that share a head of keys share its steps
            some = some.reshape(kv_heads, groups, *counts).any(1)
        each = some if is_shared else some.repeat(groups, 0)
        pattern = patterns.undecided(pattern, each, *ranges)
    width = 1 if block_size is None else max(1, min(MOST_TILES, STEP_KEYS // tiles[1], int(some.sum(2).max())))
    steps = steps_of(some, width)
    return Plan(cuts, tiles, counts, steps.shape, steps.tobytes(), pattern, scale)


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


def parts_of(batch: int, kv_heads: int, groups: int, queries: int, keys: int, features: int, most: int) -> tuple[int, int]:
    """How many parts batch and heads of keys are cut into, so that tiles and arrays of a part are of a good size.

    Args:
        features: of a query or of a value, whichever are more.
        most: positions that a tile may hold.
    """
    tiles = tile_bytes() // (4 * min(queries, most) * min(keys, most))  # samples times heads
    return parts.parts_of(batch, kv_heads, groups, min(tiles, parts.room(max(queries, keys), features)))


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


def extremes(positions: np.ndarray, tile: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The smallest and the largest position in each tile, over the batch."""
    short = tile * count - positions.shape[1]
    # In int64: a limit is added to them.
    parts = np.pad(positions.astype(np.int64), ((0, 0), (0, short)), mode="edge").reshape(-1, count, tile)
    return parts.min((0, 2)), parts.max((0, 2))
