"""Tiled strided attention: one online softmax over the near and the far keys, read where they lie.

Positions are laid out as rows of `step` positions, so that the positions of one column make up one attention problem of
their own: `step` is the stride for the far set of "strided", and 1 for everything else. A tile is some rows of some
columns, sliced out of the arrays as they come and transposed in the cache: no array is copied as a whole.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from subquad.kernels import precision
from subquad.kernels.memory import laid
from subquad.kernels.softmax import online, parts
from subquad.kernels.softmax.xla import balance
from subquad.kernels.strided.pattern import Pattern

# Bytes of one tile of logits; the rows of queries and of keys in it. On an accelerator every step is a launch.
CPU_TILE, ACCELERATOR_TILE = (1 << 19, 64, 256), (1 << 26, 1024, 2048)
ZERO = np.int32(0)  # beside the places of a tile, which are int32 also where JAX's integers have 64 bits


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Every step that visits one of the two sets of keys."""

    kind: str  # the set: "window" and "steps" of strided, "block" and "columns" of fixed
    step: int  # positions per row
    tile: tuple[int, int, int, int]  # samples, columns, rows of queries, rows of keys
    work: bytes  # int32 [P, 8]: see `steps_of`


def tile_limits() -> tuple[int, int, int]:
    return CPU_TILE if jax.default_backend() == "cpu" else ACCELERATOR_TILE


def plan(pattern: Pattern, batch: int, length: int, heads: int) -> tuple[Sweep, ...]:
    """The sweeps over the near set and over the far one, as far as they hold anything."""
    make = functools.partial(sweep_of, pattern, batch, length, heads)
    if pattern.columns is None:
        return (*((make("window"),) if pattern.near else ()), *((make("steps"),) if pattern.rows(length) > pattern.gap else ()))
    return (*((make("block"),) if pattern.near else ()), *((make("columns"),) if pattern.summaries(length) else ()))


def sweep_of(pattern: Pattern, batch: int, length: int, heads: int, kind: str) -> Sweep:
    size, most_queries, most_keys = tile_limits()
    stride, causal = pattern.stride, pattern.is_causal
    step = stride if kind == "steps" else 1
    rows = -(-length // step)
    if kind == "block":  # a tile of queries never crosses the end of a block
        queries = balance(min(stride, length), most_queries)
        starts = (np.arange(0, length, stride)[:, None] + np.arange(0, stride, queries)).ravel()
        ends = np.minimum(starts + queries, (starts // stride + 1) * stride)
        starts, ends = starts[starts < length], ends[starts < length]
    else:
        queries = balance(rows, most_queries)
        starts = np.arange(0, rows, queries)
        ends = starts + queries
    ends = np.minimum(ends, rows)

    if kind == "window":
        first, last = starts - pattern.window, ends + (0 if causal else pattern.window)
    elif kind == "steps":
        first, last = np.zeros_like(starts), ends - pattern.gap if causal else np.full_like(ends, rows)
    elif kind == "block":
        first, last = starts // stride * stride, ends if causal else (starts // stride + 1) * stride
    else:
        keys = pattern.summaries(length)
        seen = ((ends - 1) // stride + (0 if pattern.near else 1)) * len(pattern.columns[0])
        first, last = np.zeros_like(starts), np.minimum(keys, seen) if causal else np.full_like(ends, keys)
    limit = pattern.summaries(length) if kind == "columns" else rows
    first, last = np.maximum(first, 0), np.minimum(last, limit)
    keys = balance(max(1, int((last - first).max())), most_keys)

    area = max(1, size // (4 * heads * queries * keys))
    samples = max(part for part in range(1, batch + 1) if batch % part == 0 and part <= max(1, area))
    columns = balance(step, min(step, max(1, area // samples)))
    work = []
    for sample in range(0, batch, samples):
        for column in range(0, step, columns):
            for start, end, low, high in zip(starts, ends, first, last, strict=True):
                for key in range(low, high, keys):
                    # A slice that would cross the end starts earlier: what it holds twice is counted once.
                    work.append((
                        sample, min(column, step - columns), column, min(start, rows - queries), start, end,
                        min(key, limit - keys), key,
                    ))  # fmt: skip
    return Sweep(kind, step, (samples, columns, queries, keys), np.array(work, np.int32).reshape(-1, 8).tobytes())


@dataclasses.dataclass(frozen=True)
class Tile:
    """Where one step reads and writes: traced numbers, and the static sizes."""

    sweep: Sweep
    at: tuple

    def corner(self, of_keys: bool):
        sample, column, _, row, _, _, key, _ = self.at
        samples, columns, queries, keys = self.sweep.tile
        if of_keys:
            return (sample, key, column), (samples, keys, columns)
        return (sample, row, column), (samples, queries, columns)

    def take(self, array, of_keys: bool):
        """[B, T, N, ...] -> its tile [b, r, N, t, ...]."""
        starts, sizes = self.corner(of_keys)
        array, rest = self.view(array)
        tile = jax.lax.dynamic_slice(array, (*starts, *(ZERO for _ in rest)), (*sizes, *rest))
        return jnp.moveaxis(tile, 1, 3 if rest else 2)

    def put(self, array, tile, of_keys: bool):
        """`array` with its tile replaced."""
        starts, _ = self.corner(of_keys)
        view, rest = self.view(array)
        tile = jnp.moveaxis(tile, 3 if rest else 2, 1)
        # Else XLA on a CPU may turn all of the array before a loop, and again after it.
        return laid(jax.lax.dynamic_update_slice(view, tile, (*starts, *(ZERO for _ in rest))).reshape(array.shape))

    def add(self, array, tile, of_keys: bool):
        return self.put(array, self.take(array, of_keys) + tile, of_keys)

    def view(self, array):
        batch, length, *rest = array.shape
        return array.reshape(batch, length // self.sweep.step, self.sweep.step, *rest), rest


def visible(pattern: Pattern, length: int, tile: Tile, valid, positions):
    """bool, broadcasts to [b, r, N, t, s]: what the queries of a tile see of its keys."""
    sweep = tile.sweep
    _, column, own_column, row, start, end, key, own_key = tile.at
    samples, columns, queries, keys = sweep.tile
    columns = column + jnp.arange(columns)[:, None]
    rows, of_rows = row + jnp.arange(queries), key + jnp.arange(keys)
    at = (rows * sweep.step + columns)[:, None, :, None]  # [r, 1, t, 1]
    if sweep.kind == "columns":
        of = jax.lax.dynamic_slice_in_dim(positions, key, keys, 1)[:, None, :]  # [N|1, 1, s]
    else:
        of = (of_rows * sweep.step + columns)[:, None, None, :]
    of_real = (of_rows >= own_key) & (of_rows < own_key + keys) & (of < length)
    at_real = ((rows >= start) & (rows < end))[:, None] & (columns >= own_column)[:, None, :, None]
    distance, stride = at - of, pattern.stride
    if sweep.kind == "window":
        seen = (distance <= pattern.window) & (distance >= (0 if pattern.is_causal else -pattern.window))
    elif sweep.kind == "steps":
        away = distance if pattern.is_causal else abs(distance)
        seen = away >= pattern.gap * stride
    else:
        same = at // stride == of // stride
        seen = same if sweep.kind == "block" else ~same if pattern.near else jnp.ones_like(same)
        seen &= distance >= 0 if pattern.is_causal else True
    seen = (seen & of_real & at_real)[None]
    return seen if valid is None else seen & valid_of(tile, valid)


def valid_of(tile: Tile, valid):
    """The key mask of a tile; [B, S] or, of columns, [B, S, N]."""
    taken = tile.take(valid[..., None] if valid.ndim == 2 else valid, True)  # [b, r, N|1, s]
    return taken[:, :, :, None, :]


def logits_of(scale: float, tile: Tile, seen, query, key):
    precise = jnp.promote_types(query.dtype, jnp.float32)
    query, key = tile.take(query, False), tile.take(key, True)
    logits = online.rounded(scale * jnp.einsum("brnth,brnsh->brnts", query, key, preferred_element_type=precise))
    return jnp.where(seen, logits, -jnp.inf)


def scan(sweep: Sweep, step, carry):
    """`carry` after `step(carry, tile)` for all the work."""
    work = np.frombuffer(sweep.work, np.int32).reshape(-1, 8)
    if len(work) == 1:
        return step(carry, Tile(sweep, tuple(work[0])))
    return jax.lax.scan(lambda carry, at: (step(carry, Tile(sweep, tuple(at))), None), carry, work)[0]


def pick(pattern: Pattern, length: int):
    """A function [B, S, N, ...] -> [B, U, N, ...] of the keys in the columns, and their positions [N|1, U]."""
    columns, heads = np.array(pattern.columns), np.arange(len(pattern.columns))
    blocks = pattern.summaries(length) // columns.shape[1]
    positions = (np.arange(blocks)[None, :, None] * pattern.stride + columns[:, None]).reshape(len(columns), -1)

    def function(array):
        array = pad(array, blocks * pattern.stride)[:, : blocks * pattern.stride]
        array = rearrange(array, "b (i l) ... -> b i l ...", l=pattern.stride)
        if len(heads) == 1:
            return rearrange(array[:, :, columns[0]], "b i c ... -> b (i c) ...")
        return rearrange(array[:, :, columns.T, heads], "b i c ... -> b (i c) ...")

    return function, jnp.asarray(positions.astype(np.int32))


def pad(array, length: int):
    """`array` [B, T, ...] with zeros (or False) at the end of T, up to `length`."""
    short = length - array.shape[1]
    return array if short <= 0 else jnp.pad(array, ((0, 0), (0, short)) + ((0, 0),) * (array.ndim - 2))


def keys_of(pattern: Pattern, sweep: Sweep, length: int, key, value, valid):
    """(keys, values, their mask, their positions) as a sweep reads them."""
    if sweep.kind != "columns":
        return key, value, valid, None
    columns, positions = pick(pattern, length)
    if valid is not None:
        valid = columns(jnp.broadcast_to(valid[:, :, None], (*valid.shape, len(pattern.columns))))
    return columns(key), columns(value), valid, positions


def parts_of(pattern: Pattern, query, value) -> tuple[int, int]:
    """Parts of the batch and of the heads, which stay together where their columns differ."""
    batch, length, heads = query.shape[:3]
    room = parts.room(length, max(query.shape[3], value.shape[3]))
    differ = pattern.columns is not None and len(pattern.columns) > 1
    return parts.parts_of(batch, 1 if differ else heads, heads if differ else 1, room)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
@precision.full
def flash(pattern: Pattern, length: int, scale: float, query, key, value, valid):
    """Attention under `pattern`; the arrays may be padded beyond `length`."""
    return flash_forward(pattern, length, scale, query, key, value, valid)[0]


@precision.full
def flash_forward(pattern, length, scale, query, key, value, valid):
    precise = jnp.promote_types(query.dtype, jnp.float32)
    cuts = parts_of(pattern, query, value)

    def attend(part):
        own = [parts.share(cuts, x, part) for x in (query, key, value)]
        return attend_part(pattern, length, scale, *own, parts.share(cuts, valid, part, None))

    rows = query.shape[:3]
    sums = jax.ShapeDtypeStruct(rows, precise)
    shapes = jax.ShapeDtypeStruct((*rows, value.shape[3]), query.dtype), sums, sums
    out, maximum, log_normaliser = parts.part_by_part(cuts, attend, shapes, (2, 2, 2))
    return (out, maximum + log_normaliser), (query, key, value, valid, out, maximum, log_normaliser)


def attend_part(pattern, length, scale, query, key, value, valid):
    """Outputs, maximum and log(normaliser) of some samples and heads."""
    precise = jnp.promote_types(query.dtype, jnp.float32)
    states = online.start(query.shape[:3], value.shape[3], precise)
    for sweep in plan(pattern, query.shape[0], length, query.shape[2]):
        own_key, own_value, own_valid, positions = keys_of(pattern, sweep, length, key, value, valid)

        def step(states, tile, key=own_key, value=own_value, valid=own_valid, positions=positions):
            def weigh(weights):
                values = tile.take(value, True)
                return jnp.einsum("brnts,brnsv->brntv", weights.astype(value.dtype), values, preferred_element_type=precise)

            logits = logits_of(scale, tile, visible(pattern, length, tile, valid, positions), query, key)
            state = online.update(jax.tree.map(lambda x: tile.take(x, False), states), logits, weigh)
            return jax.tree.map(lambda x, new: tile.put(x, new, False), states, state)

        states = scan(sweep, step, states)
    out, *sums = online.finish(states)
    return out.astype(query.dtype), *sums


@precision.full
def flash_backward(pattern, length, scale, residuals, gradients):
    query, key, value, valid, out, *sums = residuals
    cuts = parts_of(pattern, query, value)
    *rows, query = online.residue(out, sums, *gradients, valid is not None, query)

    def grads_of(part):
        own = [parts.share(cuts, x, part) for x in (query, key, value, *rows, gradients[0])]
        return gradients_part(pattern, length, scale, *own, parts.share(cuts, valid, part, None))

    return *parts.part_by_part(cuts, grads_of, (query, key, value), (2, 2, 2)), None


def gradients_part(pattern, length, scale, query, key, value, maximum, log_normaliser, shift, grad_out, valid):
    """The gradients of query, key and value of some samples and heads."""
    precise = maximum.dtype
    dot = functools.partial(jnp.einsum, preferred_element_type=precise)
    grads = tuple(jnp.zeros(x.shape, precise) for x in (query, key, value))
    for sweep in plan(pattern, query.shape[0], length, query.shape[2]):
        own_key, own_value, own_valid, positions = keys_of(pattern, sweep, length, key, value, valid)

        def step(grads, tile, key=own_key, value=own_value, valid=own_valid, positions=positions):
            own_query, own_grad = tile.take(query, False), tile.take(grad_out, False)
            logits = logits_of(scale, tile, visible(pattern, length, tile, valid, positions), query, key)
            weights = online.weights_of(logits, *(tile.take(x, False)[..., None] for x in (maximum, log_normaliser)))
            grad_weights = dot("brntv,brnsv->brnts", own_grad, tile.take(value, True))
            grad_logits = weights * (grad_weights - tile.take(shift, False)[..., None])
            scaled, weights = (scale * grad_logits).astype(query.dtype), weights.astype(value.dtype)
            grad_query, grad_key, grad_value = grads
            return (
                tile.add(grad_query, dot("brnts,brnsh->brnth", scaled, tile.take(key, True)), False),
                tile.add(grad_key, dot("brnts,brnth->brnsh", scaled, own_query), True),
                tile.add(grad_value, dot("brnts,brntv->brnsv", weights, own_grad), True),
            )

        if sweep.kind != "columns":
            grads = scan(sweep, step, grads)
            continue
        zeros = tuple(jnp.zeros(x.shape, precise) for x in (own_key, own_value))
        grad_query, *compact = scan(sweep, step, (grads[0], *zeros))
        places = (positions[0],) if len(positions) == 1 else (positions.T, np.arange(len(positions)))
        add = lambda grad, change, places=places: grad.at[:, *places].add(change, mode="drop", unique_indices=True)
        grads = (grad_query, *map(add, grads[1:], compact))
    return tuple(grad.astype(x.dtype) for grad, x in zip(grads, (query, key, value), strict=True))


precision.define_passes(flash, flash_forward, flash_backward)

# Compiled once per pattern and shape also for callers who compile nothing; inside their `jit` it is part of theirs.
compiled = jax.jit(flash, static_argnums=(0, 1, 2))


def attention(query, key, value, valid, pattern: Pattern, scale: float):
    """Arguments as checked by `subquad.kernels.strided` -> (out [B, T, N, V], lse [B, T, N])."""
    length = query.shape[1]
    if valid is not None:
        valid = jnp.broadcast_to(valid, query.shape[:2])
    if pattern.columns is None:  # whole rows
        query, key, value = (pad(x, pattern.rows(length) * pattern.stride) for x in (query, key, value))
        valid = None if valid is None else pad(valid, query.shape[1])
    out, lse = compiled(pattern, length, scale, query, key, value, valid)
    return out[:, :length], lse[:, :length]
