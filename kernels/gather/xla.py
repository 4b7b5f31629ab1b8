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
from subquad.kernels.operation import operation
from subquad.kernels.padding import pad_to
from subquad.kernels.softmax import online
from subquad.kernels.xla_cpu import from_uint_bits, to_uint_bits

# Bytes of the keys, values and logits of one step: on a CPU what its cache holds, on an accelerator few steps.
CPU_BYTES, ACCELERATOR_BYTES = 1 << 20, 1 << 27


class Plan(NamedTuple):
    """Everything static about a call."""

    block_size: int
    step_bytes: int
    by_sorting: bool  # how rows are added, see `add_rows`
    scale: float

    def steps(self, query, value, places) -> int:
        """Of as many items as fit."""
        queries = self.block_size * query.shape[2] // places.shape[2]
        item = 4 * places.shape[3] * (query.shape[3] + value.shape[3] + 2 * queries)
        items = math.prod(places.shape[:3])
        return min(math.ceil(items * item / self.step_bytes), items)


def attention(query, key, value, indices, block_size, mask, positions, correct_duplicates, scale):
    """Arguments as checked by `gather.attention` -> (out [B, T, N, V], lse [B, T, N])."""
    keys, kv_heads = key.shape[1:3]
    places = listed(indices, max(indices.shape[1], kv_heads), keys, mask, correct_duplicates)
    on_cpu = jax.default_backend() == "cpu"
    plan = Plan(block_size, CPU_BYTES if on_cpu else ACCELERATOR_BYTES, not on_cpu, scale)
    return attend(plan, query, key, value, places, positions)


def listed(indices, lists, keys, mask, correct_duplicates):
    """The places that each list names, [B, blocks, lists, L], with S for what is no key, hidden or there already."""
    is_key = (indices >= 0) & (indices < keys)
    if mask is not None:
        is_key = is_key & jnp.take_along_axis(mask, jnp.clip(indices, 0, keys - 1), axis=3)
    places = jnp.where(is_key, indices, keys)
    if correct_duplicates:
        # Lists that are constants of a program XLA would sort while it compiles, for seconds.
        places = jnp.sort(jax.lax.optimization_barrier(places), axis=-1)
        again = jnp.pad(places[..., 1:] == places[..., :-1], ((0, 0),) * 3 + ((1, 0),))
        places = jnp.where(again, keys, places)
    return rearrange(jnp.broadcast_to(places, (len(places), lists, *places.shape[2:])), "b j i l -> b i j l")


@precision.full
def _forward(plan, query, key, value, places, positions):
    logits_of = _logits_of(plan, key, positions)
    values = to_uint_bits(rearrange(value, "b s k v -> (b s k) v"))

    def step(_, item):
        queries, rows, at = item
        logits = logits_of(queries, rows, at)[0]

        def weigh(weights):
            seen = from_uint_bits(_read(values, rows), value.dtype)
            return jnp.einsum("crl,clv->crv", weights.astype(value.dtype), seen, preferred_element_type=logits.dtype)

        out, *sums = online.finish(online.update(online.start(queries.shape[:2], value.shape[3], logits.dtype), logits, weigh))
        return _, (out.astype(query.dtype), *sums)

    steps = plan.steps(query, value, places)
    results = jax.lax.scan(step, 0, _items(plan, steps, query, key, places, positions))[1]
    out, maximum, log_normaliser = (_from_items(plan, places, x, query) for x in results)
    return (out, maximum + log_normaliser), (query, key, value, places, positions, out, maximum, log_normaliser)


@precision.full
def _backward(plan, saved, gradients):
    query, key, value, places, positions, out, *sums = saved
    *by_query, query = online.backward_rows(out, sums, *gradients, True, query)
    precise = by_query[0].dtype
    logits_of = _logits_of(plan, key, positions)
    values = to_uint_bits(rearrange(value, "b s k v -> (b s k) v"))
    dot = functools.partial(jnp.einsum, preferred_element_type=precise)

    def step(grads, item):
        (queries, rows, at), maximum, log_normaliser, shift, grad_out = item
        logits, keys = logits_of(queries, rows, at)
        weights = online.weights_of(logits, maximum[..., None], log_normaliser[..., None])
        grad_weights = dot("crv,clv->crl", grad_out, from_uint_bits(_read(values, rows), value.dtype))
        scaled = (plan.scale * weights * (grad_weights - shift[..., None])).astype(query.dtype)
        of_keys, of_values = dot("crl,crh->clh", scaled, queries), dot("crl,crv->clv", weights.astype(value.dtype), grad_out)
        of_queries = dot("crl,clh->crh", scaled, keys).astype(query.dtype)
        return add_rows(plan.by_sorting, grads, rows, (of_keys, of_values)), of_queries

    start = tuple(jnp.zeros((key.size // key.shape[3], x.shape[3]), precise) for x in (key, value))
    steps = plan.steps(query, value, places)
    tokens = (_to_items(plan, steps, places, x) for x in (*by_query, gradients[0]))
    grads, grad_query = jax.lax.scan(step, start, (_items(plan, steps, query, key, places, positions), *tokens))
    grad_key, grad_value = (x.reshape(like.shape).astype(like.dtype) for x, like in zip(grads, (key, value), strict=True))
    return _from_items(plan, places, grad_query, query), grad_key, grad_value, None, None


attend = operation(
    _forward,
    _backward,
    arrays=("b t n h", "b s n h", "b s n v", "b i n l", ("b t", "b s")),
    outputs=("b t n v", "b t n"),
    saved=("b t n", "b t n"),
    shared=((4,), (5,)),  # the positions
)


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
    """(queries [c, r, H], rows [c, L], the queries' positions [c, r]) -> (logits [c, r, L], keys [c, L, H])."""
    batch, length, kv_heads, _ = key.shape
    keys, precise = to_uint_bits(rearrange(key, "b s k h -> (b s k) h")), jnp.promote_types(key.dtype, jnp.float32)
    by_place = None if positions is None else jnp.broadcast_to(positions[1], (batch, length)).ravel()

    def logits_of(queries, rows, at):
        seen_keys = from_uint_bits(_read(keys, rows), key.dtype)
        logits = online.rounded(plan.scale * jnp.einsum("crh,clh->crl", queries, seen_keys, preferred_element_type=precise))
        seen = (rows < len(keys))[:, None]
        if by_place is not None:
            seen &= _read(by_place, rows // kv_heads)[:, None] <= at[..., None]
        return jnp.where(seen, logits, -jnp.inf), seen_keys

    return logits_of


def _read(array, rows):
    return array.at[rows].get(mode="fill", fill_value=0)


def _items(plan, steps, query, key, places, positions):
    """(queries, rows of keys and the queries' positions, or None) of the items, in steps."""
    (batch, _, lists, _), (_, keys, kv_heads, _) = places.shape, key.shape
    sample, head = jnp.arange(batch)[:, None, None, None], jnp.arange(lists)[:, None] * kv_heads // lists
    nobody = batch * keys * kv_heads
    rows = jnp.where(places < keys, (sample * keys + places) * kv_heads + head, nobody)
    rows = _in_steps(steps, rows.reshape(-1, rows.shape[3]), nobody)
    if positions is not None:
        positions = _to_items(plan, steps, places, jnp.broadcast_to(positions[0][..., None], query.shape[:3]))
    return _to_items(plan, steps, places, query), rows, positions


def _to_items(plan, steps, places, array):
    """[B, T, N, ...] as [steps, items, queries of an item, ...]."""
    array = pad_to(array, 1, -(-array.shape[1] // plan.block_size) * plan.block_size)
    items = rearrange(array, "b (i t) (j g) ... -> (b i j) (t g) ...", t=plan.block_size, j=places.shape[2])
    return _in_steps(steps, items, 0)


def _in_steps(steps, items, fill):
    size = math.ceil(len(items) / steps)
    return pad_to(items, 0, steps * size, constant_values=fill).reshape(steps, size, *items.shape[1:])


def _from_items(plan, places, array, query):
    """And back, of the length of the query."""
    batch, blocks, lists, _ = places.shape
    array = array.reshape(-1, *array.shape[2:])[: batch * blocks * lists]
    array = rearrange(array, "(b i j) (t g) ... -> b (i t) (j g) ...", b=batch, j=lists, t=plan.block_size)
    return array[:, : query.shape[1]]
