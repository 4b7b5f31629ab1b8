"""Tiled softmax attention: memory O(T), a fixed number of steps, a backward pass that recomputes the weights.

Samples and heads are taken part by part, so that what is kept in tiles and in float32 is that of one part. In a part one
loop runs over the pairs (query tile, key tile) that hold at least one visible pair of positions. The list is built in
NumPy where the positions are known while tracing, so that a causal or windowed call visits only its own tiles and its
number of steps is a constant of the program.
"""

import dataclasses
import functools
import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from subquad.kernels import precision
from subquad.kernels.memory import laid
from subquad.kernels.softmax import online, parts

# Bytes of one tile of logits over all heads of a part. On a CPU, for each core: what a core works on should stay in its
# cache. On an accelerator every step is a kernel launch, so steps should be few.
CORE_TILE_BYTES, ACCELERATOR_TILE_BYTES = 1 << 18, 1 << 26


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static about a call."""

    parts: tuple[int, int]  # of the batch and of the heads of keys
    tiles: tuple[int, int]  # positions per query tile and per key tile
    counts: tuple[int, int]  # query tiles and key tiles
    steps: bytes  # int32 [2, P]: the query tile and the key tile of each step
    band: tuple[int | None, int | None] | None  # visible: query - left <= key <= query + right; None: no test needed
    scale: float


class Visible(NamedTuple):
    """What decides which key a query sees; None where nothing is said. [B|1, T] or [B|1, S], and the mask 4-D."""

    query_positions: jax.Array | None
    key_positions: jax.Array | None
    query_segment_ids: jax.Array | None
    key_segment_ids: jax.Array | None
    mask: jax.Array | None


class Tiles(NamedTuple):
    """What makes the logits of one part, cut into tiles: i and j count query tiles and key tiles of t and s positions.

    An axis b of 1 stands for all samples.
    """

    query: jax.Array  # [i, b, K, G, t, H]
    key: jax.Array  # [j, b, K, H, s], see `cut_keys`
    bias: jax.Array | None  # [b|1, K|1, G|1, T|1, S|1]
    visible: Visible  # [i, b|1, t] and [j, b|1, s]; the mask as the bias
    real: jax.Array | None  # [j, 1, s]: False past the end of the keys


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


def visible_steps(tiles, counts, band, query_positions, key_positions) -> np.ndarray:
    """int32 [2, P]: the steps (query tile, key tile) in which something may be visible, in this order.

    All of them unless both positions are NumPy arrays.
    """
    seen = np.ones(counts, bool)
    if isinstance(query_positions, np.ndarray) and isinstance(key_positions, np.ndarray):
        (first_query, last_query), (first_key, last_key) = (
            extremes(positions, tile, count)
            for positions, tile, count in zip((query_positions, key_positions), tiles, counts, strict=True)
        )
        left, right = band
        if left is not None:
            seen &= last_key >= first_query[:, None] - left
        if right is not None:
            seen &= first_key <= last_query[:, None] + right
    return np.stack(np.nonzero(seen)).astype(np.int32)


def extremes(positions: np.ndarray, tile: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The smallest and the largest position in each tile, over the batch."""
    short = tile * count - positions.shape[1]
    # In int64: a limit is added to them.
    parts = np.pad(positions.astype(np.int64), ((0, 0), (0, short)), mode="edge").reshape(-1, count, tile)
    return parts.min((0, 2)), parts.max((0, 2))


def pad(array, axis: int, length: int):
    """`array` with zeros (or False) at the end of `axis`, up to `length`."""
    width = [(0, 0)] * array.ndim
    width[axis] = (0, length - array.shape[axis])
    return array if width[axis][1] == 0 else jnp.pad(array, width)


def cut(plan: Plan, part, query, key, bias, visible: Visible) -> Tiles:
    """The arguments of a part in tiles: transposed once, contiguous, batch axes first."""
    keys, groups = key.shape[1], query.shape[2] // key.shape[2]
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

    seen = Visible(
        rows(visible.query_positions, query_tile, query_count),
        rows(visible.key_positions, key_tile, key_count),
        rows(visible.query_segment_ids, query_tile, query_count),
        rows(visible.key_segment_ids, key_tile, key_count),
        square(visible.mask),
    )
    whole = keys == key_tile * key_count
    real = None if whole else jnp.asarray(np.arange(key_tile * key_count).reshape(key_count, 1, key_tile) < keys)
    return Tiles(cut_queries(plan, part, query, groups), cut_keys(plan, part, key, "h s"), square(bias), seen, real)


def cut_queries(plan: Plan, part, array, groups: int):
    """What a part has of [B, T, N, ...] -> [i, b, K, G, t, ...]."""
    tile, count = plan.tiles[0], plan.counts[0]
    array = pad(parts.share(plan.parts, array, part), 1, tile * count)
    return laid(rearrange(array, "b (i t) (k g) ... -> i b k g t ...", i=count, g=groups))


def cut_keys(plan: Plan, part, array, order: str):
    """What a part has of [B, S, K, H] -> [j, b, K, s, H] for the order "s h", [j, b, K, H, s] for "h s".

    A product on a CPU wants the positions last in one of its operands: what is turned here, once, costs a sixth of what it
    costs turned in each step.
    """
    tile, count = plan.tiles[1], plan.counts[1]
    array = pad(parts.share(plan.parts, array, part), 1, tile * count)
    return laid(rearrange(array, "b (j s) k h -> j b k " + order, j=count))


def join_queries(array, length: int):
    """[i, b, K, G, t, ...] -> [b, T, N, ...]."""
    return rearrange(array, "i b k g t ... -> b (i t) (k g) ...")[:, :length]


def put(tiles, tile, index):
    return jax.lax.dynamic_update_index_in_dim(tiles, tile, index, 0)


def logits_of(plan: Plan, tiles: Tiles, i, j):
    """The logits of one step, [b, K, G, t, s] in float32, -inf where not visible."""
    precise = jnp.promote_types(tiles.query.dtype, jnp.float32)
    products = jnp.einsum("bkgth,bkhs->bkgts", tiles.query[i], tiles.key[j], preferred_element_type=precise)
    logits = online.rounded(plan.scale * products)
    if tiles.bias is not None:
        logits += jax.lax.dynamic_slice(tiles.bias, *tile_corner(plan, tiles.bias, i, j))
    visible, tests = tiles.visible, []
    if plan.band is not None:
        distance = visible.key_positions[j][:, None, :] - visible.query_positions[i][:, :, None]
        left, right = plan.band
        tests += [] if left is None else [distance >= -left]
        tests += [] if right is None else [distance <= right]
    if visible.query_segment_ids is not None:
        tests.append(visible.key_segment_ids[j][:, None, :] == visible.query_segment_ids[i][:, :, None])
    if tiles.real is not None:
        tests.append(tiles.real[j][:, None, :])
    tests = [test[:, None, None] for test in tests]
    if visible.mask is not None:
        tests.append(jax.lax.dynamic_slice(visible.mask, *tile_corner(plan, visible.mask, i, j)))
    return jnp.where(functools.reduce(jnp.logical_and, tests), logits, -jnp.inf) if tests else logits


def tile_corner(plan: Plan, array, i, j):
    """Where the tile of a mask or bias [b|1, K|1, G|1, T|1, S|1] starts, and its shape."""
    starts, shape = [0, 0, 0], [*array.shape[:3]]
    for size, index, tile in zip(array.shape[3:], (i, j), plan.tiles, strict=True):
        starts.append(0 if size == 1 else index * tile)
        shape.append(1 if size == 1 else tile)
    return list(map(jnp.int32, starts)), shape


def add_tile(plan: Plan, array, tile, i, j):
    """`array` with `tile`, summed over the axes that `array` broadcasts, added where the tile lies."""
    starts, shape = tile_corner(plan, array, i, j)
    tile = tile.sum([axis for axis, size in enumerate(shape) if size != tile.shape[axis]], keepdims=True)
    return jax.lax.dynamic_update_slice(array, jax.lax.dynamic_slice(array, starts, shape) + tile, starts)


def sweep(plan: Plan, step, carry):
    """`carry` after `step(carry, i, j)` for every step of the plan."""
    steps = np.frombuffer(plan.steps, np.int32).reshape(2, -1)
    if steps.shape[1] == 1:  # no loop around a single step
        return step(carry, 0, 0)
    return jax.lax.scan(lambda carry, at: (step(carry, *at), None), carry, tuple(steps))[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
@precision.full
def flash(plan: Plan, query, key, value, bias, visible: Visible):
    """Attention over the tiles of `plan` -> (out [B, T, N, V], lse [B, T, N])."""
    return flash_forward(plan, query, key, value, bias, visible)[0]


@precision.full
def flash_forward(plan, query, key, value, bias, visible):
    precise = jnp.promote_types(query.dtype, jnp.float32)

    def attend(part):
        tiles, values = cut(plan, part, query, key, bias, visible), cut_keys(plan, part, value, "s h")

        def step(states, i, j):
            def weigh(weights):
                weights = weights.astype(value.dtype)
                return jnp.einsum("bkgts,bksv->bkgtv", weights, values[j], preferred_element_type=precise)

            state = online.update(jax.tree.map(lambda x: x[i], states), logits_of(plan, tiles, i, j), weigh)
            return jax.tree.map(lambda x, tile: put(x, tile, i), states, state)

        states = sweep(plan, step, online.start(tiles.query.shape[:-1], value.shape[-1], precise))
        out, *sums = online.finish(states)
        return tuple(join_queries(x, query.shape[1]) for x in (out.astype(query.dtype), *sums))

    rows = query.shape[:3]
    sums = jax.ShapeDtypeStruct(rows, precise)
    shapes = jax.ShapeDtypeStruct((*rows, value.shape[-1]), query.dtype), sums, sums
    out, maximum, log_normaliser = parts.part_by_part(plan.parts, attend, shapes, (2, 2, 2))
    return (out, maximum + log_normaliser), (query, key, value, bias, visible, out, maximum, log_normaliser)


@precision.full
def flash_backward(plan, residuals, gradients):
    *arguments, out, maximum, log_normaliser = residuals
    query, key, value, bias, visible = arguments
    groups, precise = query.shape[2] // key.shape[2], maximum.dtype
    is_masked = visible.mask is not None or visible.query_segment_ids is not None
    *rows, query = online.residue(out, (maximum, log_normaliser), *gradients, is_masked, query)
    dot = functools.partial(jnp.einsum, preferred_element_type=precise)

    def of_part(part):
        tiles, values = cut(plan, part, query, key, bias, visible), cut_keys(plan, part, value, "h s")
        *own_sums, own_shift, grad_out = (cut_queries(plan, part, x, groups) for x in (*rows, gradients[0]))

        def step(grads, i, j):
            weights = online.weights_of(logits_of(plan, tiles, i, j), *(x[i][..., None] for x in own_sums))
            grad_weights = dot("bkgtv,bkvs->bkgts", grad_out[i], values[j])
            grad_logits = weights * (grad_weights - own_shift[i][..., None])
            scaled, weights = (grad_logits * plan.scale).astype(query.dtype), weights.astype(value.dtype)
            changes = (
                (dot("bkgts,bkhs->bkgth", scaled, tiles.key[j]), i),
                (dot("bkgth,bkgts->bkhs", tiles.query[i], scaled), j),
                (dot("bkgtv,bkgts->bkvs", grad_out[i], weights), j),
            )
            *arrays, grad_bias = grads
            arrays = [put(x, x[at] + by, at) for x, (by, at) in zip(arrays, changes, strict=True)]
            return *arrays, None if bias is None else add_tile(plan, grad_bias, grad_logits, i, j)

        # Gradients of keys and values with the features before the positions: a product that turns a tile of weights
        # takes twice the time of one that turns a tile of queries.
        like = tiles.query, tiles.key, values, tiles.bias
        grads = sweep(plan, step, jax.tree.map(lambda x: jnp.zeros(x.shape, precise), like))
        by_key = lambda x: rearrange(x, "j b k h s -> b (j s) k h")[:, : key.shape[1]]
        grad_query, grad_key, grad_value = join_queries(grads[0], query.shape[1]), by_key(grads[1]), by_key(grads[2])
        if bias is None:
            return grad_query, grad_key, grad_value
        grad_bias = rearrange(grads[3], "b k g t s -> b (k g) t s")[:, :, : bias.shape[2], : bias.shape[3]]
        return grad_query, grad_key, grad_value, grad_bias

    # Of a bias that parts share, the sum is in float32.
    shapes = query, key, value, *([] if bias is None else [jax.ShapeDtypeStruct(bias.shape, precise)])
    grads = parts.part_by_part(plan.parts, of_part, shapes, (2, 2, 2, 1)[: len(shapes)])
    grads = [x.astype(like.dtype) for x, like in zip(grads, arguments, strict=False)]
    return *grads, *([None] if bias is None else []), None


precision.define_passes(flash, flash_forward, flash_backward)

# Compiled once per plan and shape also for callers who compile nothing; inside their `jit` it is part of theirs.
compiled = jax.jit(flash, static_argnums=0)


def attention(query, key, value, bias, visible: Visible, band, scale: float):
    """Arguments as checked by `subquad.kernels.softmax.attention` -> (out [B, T, N, V], lse [B, T, N])."""
    (batch, queries, heads), (_, keys, kv_heads) = query.shape[:3], key.shape[:3]
    reach = None if band is None or None in band else sum(band) + 1
    cuts = parts_of(batch, kv_heads, heads // kv_heads, queries, keys, max(query.shape[3], value.shape[3]), most_of(reach))
    tiles = tile_sizes(batch * heads // (cuts[0] * cuts[1]), queries, keys, reach)
    counts = (-(-queries // tiles[0]), -(-keys // tiles[1]))
    steps = visible_steps(tiles, counts, band, visible.query_positions, visible.key_positions)
    plan = Plan(cuts, tiles, counts, steps.tobytes(), band, scale)
    return compiled(plan, query, key, value, bias, visible)
