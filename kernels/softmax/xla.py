"""Tiled softmax attention: memory O(T), a fixed number of steps, a backward pass that recomputes the weights.

One loop runs over the triples (part of the batch and heads, query tile, key tile) that hold at least one visible pair
of positions. The list is built in NumPy where the positions are known while tracing, so that a causal or windowed call
visits only its own tiles and its number of steps is a constant of the program.
"""

import dataclasses
import functools
import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from subquad.kernels.softmax import online

# Bytes of one tile of logits over all heads of a part. On a CPU, for each core: what a core works on should stay in its
# cache. On an accelerator every step is a kernel launch, so steps should be few.
CORE_TILE_BYTES, ACCELERATOR_TILE_BYTES = 1 << 18, 1 << 26


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static about a call."""

    parts: tuple[int, int]  # of the batch and of the heads of keys
    tiles: tuple[int, int]  # positions per query tile and per key tile
    counts: tuple[int, int]  # query tiles and key tiles
    steps: bytes  # int32 [3, P]: the part (batch parts times head parts), the query tile and the key tile of each step
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
    """The arguments cut into tiles: i and j count query tiles and key tiles of t and s positions, p parts of b samples and
    r parts of k heads.

    An axis p or r of 1 stands for all parts, an axis b of 1 for all samples.
    """

    query: jax.Array  # [p r, i, b, k, G, t, H]
    key: jax.Array  # [p r, j, b, k, s, H]
    value: jax.Array  # [p r, j, b, k, s, V]
    bias: jax.Array | None  # [p|1, r|1, b|1, k|1, G|1, T|1, S|1]
    visible: Visible  # [p|1, i, b|1, t] and [p|1, j, b|1, s]; the mask as the bias
    real: jax.Array | None  # [1, j, 1, s]: False past the end of the keys


def parts_of(batch: int, kv_heads: int, groups: int, queries: int, keys: int, most: int) -> tuple[int, int]:
    """How many parts batch and heads of keys are cut into, so that a tile of a part is neither too large nor too small.

    Args:
        most: positions that a tile may hold.
    """
    room = max(1, tile_bytes() // (4 * min(queries, most) * min(keys, most)) // groups)  # samples times heads
    divisor = lambda size, most: next(parts for parts in range(1, size + 1) if size % parts == 0 and size // parts <= most)
    return divisor(batch, max(1, room // kv_heads)), divisor(kv_heads, room)


def tile_bytes() -> int:
    if jax.default_backend() != "cpu":
        return ACCELERATOR_TILE_BYTES
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return CORE_TILE_BYTES * min(cores, 16)


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
    """The tile that cuts `length` into as many parts as `tile` would, with the least padding."""
    return -(-length // -(-length // tile))


def visible_steps(parts: int, tiles, counts, band, query_positions, key_positions) -> np.ndarray:
    """int32 [3, P]: the steps (part, query tile, key tile) in which something may be visible, in this order.

    All of them unless both positions are NumPy arrays.
    """
    seen = np.ones((parts, *counts), bool)
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
    parts = np.pad(positions, ((0, 0), (0, short)), mode="edge").reshape(-1, count, tile)
    return parts.min((0, 2)), parts.max((0, 2))


def pad(array, axis: int, length: int):
    """`array` with zeros (or False) at the end of `axis`, up to `length`."""
    width = [(0, 0)] * array.ndim
    width[axis] = (0, length - array.shape[axis])
    return array if width[axis][1] == 0 else jnp.pad(array, width)


def cut(plan: Plan, query, key, value, bias, visible: Visible) -> Tiles:
    """The arguments in tiles: transposed once, contiguous, batch axes first."""
    kv_heads, keys = key.shape[2:0:-1]
    groups = query.shape[2] // kv_heads
    (query_tile, key_tile), (query_count, key_count) = plan.tiles, plan.counts

    def share(array, axis=0):  # parts that an axis of samples, or of heads, is cut into
        return 1 if array.shape[axis] == 1 else plan.parts[axis]

    def rows(array, tile, count):
        if array is None:
            return None
        return rearrange(pad(array, 1, tile * count), "(p b) (i t) -> p i b t", i=count, p=share(array))

    def square(array):
        if array is None:
            return None
        for axis, tile, count in ((2, query_tile, query_count), (3, key_tile, key_count)):
            array = array if array.shape[axis] == 1 else pad(array, axis, tile * count)
        g = 1 if array.shape[1] == 1 else groups
        return rearrange(array, "(p b) (r k g) t s -> p r b k g t s", g=g, p=share(array), r=share(array, 1))

    p, r = plan.parts
    key, value = (
        rearrange(pad(x, 1, key_tile * key_count), "(p b) (j s) (r k) h -> (p r) j b k s h", j=key_count, p=p, r=r)
        for x in (key, value)
    )
    seen = Visible(
        rows(visible.query_positions, query_tile, query_count),
        rows(visible.key_positions, key_tile, key_count),
        rows(visible.query_segment_ids, query_tile, query_count),
        rows(visible.key_segment_ids, key_tile, key_count),
        square(visible.mask),
    )
    whole = keys == key_tile * key_count
    real = None if whole else jnp.asarray(np.arange(key_tile * key_count).reshape(1, key_count, 1, key_tile) < keys)
    return Tiles(cut_queries(plan, query, kv_heads), key, value, square(bias), seen, real)


def cut_queries(plan: Plan, array, kv_heads: int):
    """[B, T, N, ...] -> [p r, i, b, k, G, t, ...]."""
    tile, count = plan.tiles[0], plan.counts[0]
    array = pad(array, 1, tile * count)
    (p, r), k = plan.parts, kv_heads // plan.parts[1]
    return rearrange(array, "(p b) (i t) (r k g) ... -> (p r) i b k g t ...", p=p, r=r, i=count, k=k)


def join_queries(plan: Plan, array, length: int):
    """[p r, i, b, k, G, t, ...] -> [B, T, N, ...]."""
    return rearrange(array, "(p r) i b k g t ... -> (p b) (i t) (r k g) ...", r=plan.parts[1])[:, :length]


def take(tiles, part, index):
    """The tile [...] at (part, index) of [p|1, i, ...]."""
    return tiles[part if tiles.shape[0] > 1 else 0, index]


def put(tiles, tile, part, index):
    return jax.lax.dynamic_update_slice(tiles, tile[None, None], (part, index) + (0,) * tile.ndim)


def logits_of(plan: Plan, tiles: Tiles, part, i, j):
    """The logits of one step, [b, K, G, t, s] in float32, -inf where not visible."""
    precise = jnp.promote_types(tiles.query.dtype, jnp.float32)
    query, key = take(tiles.query, part, i), take(tiles.key, part, j)
    logits = plan.scale * jnp.einsum("bkgth,bksh->bkgts", query, key, preferred_element_type=precise)
    if tiles.bias is not None:
        logits += tile_of(plan, tiles.bias, part, i, j)
    visible, tests, samples = tiles.visible, [], part // plan.parts[1]
    if plan.band is not None:
        at, of = take(visible.query_positions, samples, i), take(visible.key_positions, samples, j)
        distance = of[:, None, :] - at[:, :, None]
        left, right = plan.band
        tests += [] if left is None else [distance >= -left]
        tests += [] if right is None else [distance <= right]
    if visible.query_segment_ids is not None:
        at, of = take(visible.query_segment_ids, samples, i), take(visible.key_segment_ids, samples, j)
        tests.append(of[:, None, :] == at[:, :, None])
    if tiles.real is not None:
        tests.append(take(tiles.real, part, j)[:, None, :])
    tests = [test[:, None, None] for test in tests]
    if visible.mask is not None:
        tests.append(tile_of(plan, visible.mask, part, i, j))
    return jnp.where(functools.reduce(jnp.logical_and, tests), logits, -jnp.inf) if tests else logits


def tile_corner(plan: Plan, array, part, i, j):
    """Where the tile of a mask or bias [p|1, r|1, b|1, k|1, G|1, T|1, S|1] starts, and its shape."""
    heads = plan.parts[1]
    starts = [part // heads if array.shape[0] > 1 else 0, part % heads if array.shape[1] > 1 else 0, 0, 0, 0]
    shape = [1, 1, *array.shape[2:5]]
    for size, index, tile in zip(array.shape[5:], (i, j), plan.tiles, strict=True):
        starts.append(0 if size == 1 else index * tile)
        shape.append(1 if size == 1 else tile)
    return starts, shape


def tile_of(plan: Plan, array, part, i, j):
    return jax.lax.dynamic_slice(array, *tile_corner(plan, array, part, i, j))[0, 0]


def add_tile(plan: Plan, array, tile, part, i, j):
    """`array` with `tile`, summed over the axes that `array` broadcasts, added where the tile lies."""
    starts, shape = tile_corner(plan, array, part, i, j)
    summed = [axis for axis, size in enumerate(shape[2:]) if size != tile.shape[axis]]
    tile = tile.sum(summed, keepdims=True)[None, None]
    return jax.lax.dynamic_update_slice(array, jax.lax.dynamic_slice(array, starts, shape) + tile, starts)


def sweep(plan: Plan, step, carry):
    """`carry` after `step(carry, part, i, j)` for every step of the plan."""
    steps = np.frombuffer(plan.steps, np.int32).reshape(3, -1)
    if steps.shape[1] == 1:  # no loop around a single step
        return step(carry, 0, 0, 0)
    return jax.lax.scan(lambda carry, at: (step(carry, *at), None), carry, tuple(steps))[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def flash(plan: Plan, query, key, value, bias, visible: Visible):
    """Attention over the tiles of `plan` -> (out [B, T, N, V], lse [B, T, N])."""
    tiles = cut(plan, query, key, value, bias, visible)
    precise = jnp.promote_types(query.dtype, jnp.float32)

    def step(states, part, i, j):
        def weigh(weights):
            weights = weights.astype(value.dtype)
            return jnp.einsum("bkgts,bksv->bkgtv", weights, take(tiles.value, part, j), preferred_element_type=precise)

        state = jax.tree.map(lambda all_tiles: take(all_tiles, part, i), states)
        state = online.update(state, logits_of(plan, tiles, part, i, j), weigh)
        return jax.tree.map(lambda all_tiles, tile: put(all_tiles, tile, part, i), states, state)

    states = sweep(plan, step, online.start(tiles.query.shape[:-1], value.shape[-1], precise))
    out, lse = online.finish(states)
    return join_queries(plan, out.astype(query.dtype), query.shape[1]), join_queries(plan, lse, query.shape[1])


def flash_forward(plan, query, key, value, bias, visible):
    out, lse = flash(plan, query, key, value, bias, visible)
    return (out, lse), (query, key, value, bias, visible, out, lse)


def flash_backward(plan, residuals, gradients):
    *arguments, out, lse = residuals
    query, key, value, bias, _ = arguments
    tiles = cut(plan, *arguments)
    precise = lse.dtype
    lse, shift, grad_out = (cut_queries(plan, x, key.shape[2]) for x in (*online.residue(out, lse, *gradients), gradients[0]))
    dot = functools.partial(jnp.einsum, preferred_element_type=precise)

    def step(grads, part, i, j):
        own_query, own_grad, own_key = take(tiles.query, part, i), take(grad_out, part, i), take(tiles.key, part, j)
        weights = jnp.exp(logits_of(plan, tiles, part, i, j) - take(lse, part, i)[..., None])
        grad_weights = dot("bkgtv,bksv->bkgts", own_grad, take(tiles.value, part, j))
        grad_logits = weights * (grad_weights - take(shift, part, i)[..., None])
        scaled, weights = (grad_logits * plan.scale).astype(query.dtype), weights.astype(value.dtype)
        changes = (
            (dot("bkgts,bksh->bkgth", scaled, own_key), i),
            (dot("bkgth,bkgts->bkhs", own_query, scaled), j),
            (dot("bkgtv,bkgts->bkvs", own_grad, weights), j),
        )
        *arrays, grad_bias = grads
        arrays = [put(x, take(x, part, at) + by, part, at) for x, (by, at) in zip(arrays, changes, strict=True)]
        return *arrays, None if bias is None else add_tile(plan, grad_bias, grad_logits, part, i, j)

    # Gradients of keys and values with the features before the positions: a product that turns a tile of weights takes
    # twice the time of one that turns a tile of queries.
    like = tiles.query, tiles.key.swapaxes(4, 5), tiles.value.swapaxes(4, 5), tiles.bias
    grads = sweep(plan, step, jax.tree.map(lambda x: jnp.zeros(x.shape, precise), like))
    grad_query = join_queries(plan, grads[0].astype(query.dtype), query.shape[1])
    grad_key, grad_value = (
        rearrange(x.astype(like.dtype), "(p r) j b k h s -> (p b) (j s) (r k) h", r=plan.parts[1])[:, : like.shape[1]]
        for x, like in zip(grads[1:3], (key, value), strict=True)
    )
    grad_bias = None
    if bias is not None:
        grad_bias = rearrange(grads[3].astype(bias.dtype), "p r b k g t s -> (p b) (r k g) t s")
        grad_bias = grad_bias[:, :, : bias.shape[2], : bias.shape[3]]
    return grad_query, grad_key, grad_value, grad_bias, None


flash.defvjp(flash_forward, flash_backward)

# Compiled once per plan and shape also for callers who compile nothing; inside their `jit` it is part of theirs.
compiled = jax.jit(flash, static_argnums=0)


def attention(query, key, value, bias, visible: Visible, band, scale: float):
    """Arguments as checked by `subquad.kernels.softmax.attention` -> (out [B, T, N, V], lse [B, T, N])."""
    (batch, queries, heads), (_, keys, kv_heads) = query.shape[:3], key.shape[:3]
    reach = None if band is None or None in band else sum(band) + 1
    parts = parts_of(batch, kv_heads, heads // kv_heads, queries, keys, most_of(reach))
    tiles = tile_sizes(batch * heads // (parts[0] * parts[1]), queries, keys, reach)
    counts = (-(-queries // tiles[0]), -(-keys // tiles[1]))
    steps = visible_steps(parts[0] * parts[1], tiles, counts, band, visible.query_positions, visible.key_positions)
    plan = Plan(parts, tiles, counts, steps.tobytes(), band, scale)
    return compiled(plan, query, key, value, bias, visible)
