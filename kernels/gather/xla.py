"""Attention to listed keys, a few lists at a time: gather the keys and values of a list, and attend to them at once.

A list and the queries that see it are an item. Keys and values are rows: of sample b, place s and head j the row
(b S + s) K + j; the row B S K is nobody's.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from subquad.kernels import precision
from subquad.kernels.memory import bits, numbers
from subquad.kernels.softmax import online

# Bytes of the keys, values and logits of one step: on a CPU what its cache holds, on an accelerator few steps.
CPU_BYTES, ACCELERATOR_BYTES = 1 << 20, 1 << 27


class Plan(NamedTuple):
    """Everything static about a call."""

    block_size: int
    lists: int  # per block: one for each head of keys, or of queries
    steps: int
    by_sorting: bool  # how rows are added, see `add_rows`
    scale: float


def attention(query, key, value, indices, block_size, mask, positions, correct_duplicates, scale):
    """Arguments as checked by `gather.attention` -> (out [B, T, N, V], lse [B, T, N])."""
    (heads, features), (keys, kv_heads) = query.shape[2:], key.shape[1:3]
    lists = max(indices.shape[1], kv_heads)
    rows = rows_of(indices, lists, keys, kv_heads, mask, correct_duplicates)
    on_cpu = jax.default_backend() == "cpu"
    queries = block_size * heads // lists
    item = 4 * rows.shape[1] * (features + value.shape[3] + 2 * queries)
    steps = math.ceil(len(rows) * item / (CPU_BYTES if on_cpu else ACCELERATOR_BYTES))
    plan = Plan(block_size, lists, min(steps, len(rows)), not on_cpu, scale)
    return compiled(plan, query, key, value, rows, positions)


def rows_of(indices, lists, keys, kv_heads, mask, correct_duplicates):
    """The rows of keys that each item sees, [items, L], items by sample, block and head."""
    batch = len(indices)
    is_key = (indices >= 0) & (indices < keys)
    if mask is not None:
        is_key &= jnp.take_along_axis(mask, jnp.clip(indices, 0, keys - 1), axis=3)
    places = jnp.where(is_key, indices, keys)
    if correct_duplicates:
        # Lists that are constants of a program XLA would sort while it compiles, for seconds.
        places = jnp.sort(jax.lax.optimization_barrier(places), axis=-1)
        again = jnp.pad(places[..., 1:] == places[..., :-1], ((0, 0),) * 3 + ((1, 0),))
        places = jnp.where(again, keys, places)
    sample, head = jnp.arange(batch)[:, None, None, None], jnp.arange(lists)[:, None, None] * kv_heads // lists
    rows = jnp.where(places < keys, (sample * keys + places) * kv_heads + head, batch * keys * kv_heads)
    return rearrange(rows, "b j i l -> (b i j) l")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(plan, query, key, value, rows, positions):
    return _forward(plan, query, key, value, rows, positions)[0]


@precision.full
def _forward(plan, query, key, value, rows, positions):
    logits_of = _logits_of(plan, key, positions)
    values = bits(rearrange(value, "b s k v -> (b s k) v"))

    def step(_, item):
        queries, places, at = item
        logits = logits_of(queries, places, at)[0]

        def weigh(weights):
            seen = numbers(_read(values, places), value.dtype)
            return jnp.einsum("crl,clv->crv", weights.astype(value.dtype), seen, preferred_element_type=logits.dtype)

        out, *sums = online.finish(online.update(online.start(queries.shape[:2], value.shape[3], logits.dtype), logits, weigh))
        return _, (out.astype(query.dtype), *sums)

    items = _to_items(plan, query), _in_steps(plan, rows, key.size // key.shape[3]), _query_positions(plan, query, positions)
    out, maximum, log_normaliser = (_from_items(plan, x, query) for x in jax.lax.scan(step, 0, items)[1])
    return (out, maximum + log_normaliser), (query, key, value, rows, positions, out, maximum, log_normaliser)


@precision.full
def _backward(plan, saved, gradients):
    query, key, value, rows, positions, out, *sums = saved
    *by_query, query = online.residue(out, sums, *gradients, True, query)
    precise, nobody = by_query[0].dtype, key.size // key.shape[3]
    logits_of = _logits_of(plan, key, positions)
    values = bits(rearrange(value, "b s k v -> (b s k) v"))
    dot = functools.partial(jnp.einsum, preferred_element_type=precise)

    def step(grads, item):
        queries, places, at, maximum, log_normaliser, shift, grad_out = item
        logits, keys = logits_of(queries, places, at)
        weights = online.weights_of(logits, maximum[..., None], log_normaliser[..., None])
        grad_weights = dot("crv,clv->crl", grad_out, numbers(_read(values, places), value.dtype))
        scaled = (plan.scale * weights * (grad_weights - shift[..., None])).astype(query.dtype)
        of_keys, of_values = dot("crl,crh->clh", scaled, queries), dot("crl,crv->clv", weights.astype(value.dtype), grad_out)
        return add_rows(plan.by_sorting, grads, places, (of_keys, of_values)), dot("crl,clh->crh", scaled, keys).astype(
            query.dtype
        )

    start = tuple(jnp.zeros((nobody, x.shape[3]), precise) for x in (key, value))
    tokens = (_to_items(plan, x) for x in (*by_query, gradients[0]))
    items = _to_items(plan, query), _in_steps(plan, rows, nobody), _query_positions(plan, query, positions), *tokens
    grads, grad_query = jax.lax.scan(step, start, items)
    grad_key, grad_value = (x.reshape(like.shape).astype(like.dtype) for x, like in zip(grads, (key, value), strict=True))
    return _from_items(plan, grad_query, query), grad_key, grad_value, None, None


precision.define_passes(_attention, _forward, _backward)

# Compiled once per plan and shape also for callers who compile nothing; inside their `jit` it is part of theirs.
compiled = jax.jit(_attention, static_argnums=0)


def add_rows(by_sorting, totals, places, additions):
    """Each of the totals [rows, F] with its additions [..., F] added at `places` [...], with the same bits every time.

    A CPU adds one after the other. An accelerator adds what meets in one row in any order: there the additions are sorted by
    row and summed along the order, and the last of each row alone is added.
    """
    places, additions = places.ravel(), [x.reshape(-1, x.shape[-1]) for x in additions]
    if not by_sorting:
        return tuple(total.at[places].add(x, mode="drop") for total, x in zip(totals, additions, strict=True))
    order = jnp.argsort(places, stable=True)
    places = places[order]

    def join(left, right):
        same = (left[0] == right[0])[:, None]
        return right[0], *(y + jnp.where(same, x, 0) for x, y in zip(left[1:], right[1:], strict=True))

    _, *sums = jax.lax.associative_scan(join, (places, *(x[order] for x in additions)))
    is_last = jnp.append(places[1:] != places[:-1], True)
    nowhere = len(totals[0]) + jnp.arange(len(places))  # apart from each other, too
    places = jnp.where(is_last & (places < len(totals[0])), places, nowhere)
    return tuple(total.at[places].add(x, mode="drop", unique_indices=True) for total, x in zip(totals, sums, strict=True))


def _logits_of(plan, key, positions):
    """(queries [c, r, H], places [c, L], the queries' positions [c, r]) -> (logits [c, r, L], keys [c, L, H])."""
    batch, length, kv_heads, _ = key.shape
    keys, precise = bits(rearrange(key, "b s k h -> (b s k) h")), jnp.promote_types(key.dtype, jnp.float32)
    by_place = None if positions is None else jnp.broadcast_to(positions[1], (batch, length)).ravel()

    def logits_of(queries, places, at):
        listed = numbers(_read(keys, places), key.dtype)
        logits = online.rounded(plan.scale * jnp.einsum("crh,clh->crl", queries, listed, preferred_element_type=precise))
        seen = (places < len(keys))[:, None]
        if by_place is not None:
            seen &= _read(by_place, places // kv_heads)[:, None] <= at[..., None]
        return jnp.where(seen, logits, -jnp.inf), listed

    return logits_of


def _read(rows, places):
    return rows.at[places].get(mode="fill", fill_value=0)


def _query_positions(plan, query, positions):
    if positions is None:
        return None
    return _to_items(plan, jnp.broadcast_to(positions[0][..., None], query.shape[:3]))


def _to_items(plan, array):
    """[B, T, N, ...] as [steps, items, queries of an item, ...]."""
    short = -array.shape[1] % plan.block_size
    array = jnp.pad(array, ((0, 0), (0, short), *((0, 0),) * (array.ndim - 2)))
    items = rearrange(array, "b (i t) (j g) ... -> (b i j) (t g) ...", t=plan.block_size, j=plan.lists)
    return _in_steps(plan, items, 0)


def _in_steps(plan, items, fill):
    size = math.ceil(len(items) / plan.steps)
    items = jnp.pad(items, ((0, plan.steps * size - len(items)), *((0, 0),) * (items.ndim - 1)), constant_values=fill)
    return items.reshape(plan.steps, size, *items.shape[1:])


def _from_items(plan, array, query):
    """And back, of the length of the query."""
    batch, length, heads, _ = query.shape
    blocks = math.ceil(length / plan.block_size)
    array = array.reshape(-1, *array.shape[2:])[: batch * blocks * plan.lists]
    array = rearrange(array, "(b i j) (t g) ... -> b (i t) (j g) ...", b=batch, j=plan.lists, t=plan.block_size)
    return array[:, :length]
