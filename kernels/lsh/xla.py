"""LSH attention over sorted chunks: linear memory, a backward pass that recomputes the weights.

The sort yields index arrays only. Each step of one loop takes a block of (round, chunk) items, gathers their rows of query
and value by index, and adds what it finds to the running result at the tokens' own places: nothing is ever stored in
sorted order, and every chunk of every head of the batch is an item like any other.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from subquad.kernels.lsh.reference import Layout, inverse_norm

# Bytes of one tile of logits. On a CPU a tile should stay in the cache; on an accelerator every step of a loop is a kernel
# launch, so steps should be few.
CPU_TILE_BYTES, ACCELERATOR_TILE_BYTES = 1 << 20, 1 << 25
# Chunks whose logits take more are cut into parts of their queries: a larger buffer is mapped anew at every step.
CHUNK_BYTES = 1 << 24


class Items(NamedTuple):
    """The items of a call in blocks, K steps of I items of one round: C queries that see W keys each.

    Places count the tokens of all heads of the batch, from 0; one past the last is nobody (padding).
    """

    queries: jax.Array  # int32 [K, 2, I, C]: places, and buckets in the item's round
    keys: jax.Array  # int32 [K, 2, I, W]
    codes: jax.Array | None  # int32 [R, places]: near each other where in reach; only where duplicates are counted


def hash_buckets(vectors, rotations, factors, num_rotations):
    """See `lsh.hash_buckets`; by blocks of tokens, so that the rotated vectors are never stored."""
    batch, length, heads, _ = vectors.shape
    _, _, rounds, columns = rotations.shape
    rows = max(1, min(length, tile_bytes() // (4 * batch * heads * rounds * columns)))
    steps = math.ceil(length / rows)
    rows = math.ceil(length / steps)
    rotations = jnp.broadcast_to(rotations, (heads, *rotations.shape[1:])).astype(jnp.float32)
    used = None if num_rotations is None else jnp.arange(columns) < num_rotations[:, None, None, None, None]

    def block(vectors):
        rotated = jnp.einsum("nbth,nhrf->bntrf", vectors.astype(jnp.float32), rotations, precision=jax.lax.Precision.HIGHEST)
        if used is not None:
            rotated = jnp.where(used, rotated, 0)
        bucket, unit, column = 0, 1, 0
        for factor in factors:
            bucket += unit * nearest(rotated[..., column : column + factor // 2])
            unit, column = unit * factor, column + factor // 2
        return bucket

    padded = jnp.pad(vectors, ((0, 0), (0, steps * rows - length), (0, 0), (0, 0)))
    buckets = jax.lax.map(block, rearrange(padded, "b (k t) n h -> k n b t h", k=steps))
    return rearrange(buckets, "k b n t r -> b r (k t) n")[:, :, :length]


def nearest(rotated):
    """argmax([x, -x]) of the last axis, without its slow pairs of value and index."""
    columns = rotated.shape[-1]
    largest = jnp.max(jnp.abs(rotated), axis=-1, keepdims=True)
    column = jnp.arange(columns, dtype=jnp.int32)
    names = jnp.where(rotated == largest, column, jnp.where(-rotated == largest, columns + column, 2 * columns - 1))
    return jnp.min(names, axis=-1)


def attention(layout, query_key, value, buckets, mask, scale):
    """See `lsh.attention`."""
    batch, length, heads, _ = query_key.shape
    if mask is None:
        real = jnp.ones((batch, length), bool)
    else:
        real = jnp.broadcast_to(mask[:, 0, 0], (batch, length))
        query_key = jnp.where(real[..., None, None], query_key, 0)  # 0 times the NaN of a padding token would be NaN
        value = jnp.where(real[..., None, None], value, 0)
    if layout.reach != "ring":
        others = math.ceil(length / layout.chunk_size) - 1
        layout = layout._replace(before=min(layout.before, others), after=min(layout.after, others))
    items = lay_out(layout, rearrange(buckets, "b r t n -> (b n) r t"), jnp.repeat(real, heads, axis=0))
    query, flat_value = (rearrange(x, "b t n h -> (b n t) h") for x in (query_key, value))
    out, log_total = over_items(layout, query, scale * inverse_norm(query), flat_value, items)
    out, log_total = (rearrange(x, "(b n t) ... -> b t n ...", b=batch, n=heads) for x in (out, log_total))
    alone = jnp.isneginf(log_total) & real[..., None]
    return jnp.where(alone[..., None], value, out)


def lay_out(layout: Layout, buckets, real) -> Items:
    """Sorts buckets [G, R, T] and cuts the order into items; `real` [G, T]."""
    groups, rounds, length = buckets.shape
    nobody = groups * length
    order, sorted_buckets = sort(layout, jnp.where(real[:, None], buckets, layout.num_buckets))
    chunks = math.ceil(length / layout.chunk_size)
    before, after = layout.before, layout.after

    place = order + jnp.arange(groups, dtype=jnp.int32)[:, None, None] * length
    place = jnp.where(sorted_buckets < layout.num_buckets, place, nobody)
    codes = None
    if layout.correct_duplicates and rounds > 1:
        in_order = reach_codes(layout, sorted_buckets)
        row = jnp.arange(rounds)[:, None]
        codes = jnp.zeros((rounds, nobody), jnp.int32).at[row, place].set(in_order, mode="drop")

    short, steps = chunks * layout.chunk_size - length, range(-before, after + 1)
    own = jnp.stack([place, sorted_buckets])
    own = jnp.pad(own, ((0, 0), (0, 0), (0, 0), (0, short)), constant_values=nobody)
    own = rearrange(own, "x g r (n c) -> x g r n c", n=chunks)
    if layout.reach == "ring":
        ring = rearrange(own, "x g r n c -> x g (r n) c")
        around = jnp.concatenate([jnp.roll(ring, -step, axis=2) for step in steps], axis=-1)
        around = rearrange(around, "x g (r n) w -> x g r n w", n=chunks)
    else:
        ends = jnp.pad(own, ((0, 0), (0, 0), (0, 0), (before, after), (0, 0)), constant_values=nobody)
        around = jnp.concatenate([ends[:, :, :, before + step :][:, :, :, :chunks] for step in steps], axis=-1)

    cuts = min(layout.chunk_size, math.ceil(4 * layout.chunk_size * around.shape[-1] / CHUNK_BYTES))
    if cuts > 1:
        per_cut = math.ceil(layout.chunk_size / cuts)
        unused = cuts * per_cut - layout.chunk_size
        own = jnp.pad(own, ((0, 0),) * 4 + ((0, unused),), constant_values=nobody)
        own = rearrange(own, "x g r n (s c) -> x g r (n s) c", s=cuts)
        around = jnp.repeat(around, cuts, axis=3)

    count = groups * chunks * cuts
    # Two cuts of one chunk add to the same keys, so they are not taken in one step.
    most = 1 if cuts > 1 else tile_bytes() // (4 * own.shape[-1] * around.shape[-1])
    per_step = max(1, min(count, most))
    steps = math.ceil(count / per_step)
    per_step = math.ceil(count / steps)

    def blocks(x):
        x = rearrange(x, "x g r n c -> r x (g n) c")
        x = jnp.pad(x, ((0, 0), (0, 0), (0, steps * per_step - count), (0, 0)), constant_values=nobody)
        return rearrange(x, "r x (k i) c -> (r k) x i c", k=steps)

    return Items(blocks(own), blocks(around), codes)


def sort(layout: Layout, buckets):
    """The positions [G, R, T] in order of bucket and position, and their buckets."""
    length = buckets.shape[-1]
    if (layout.num_buckets + 1) * length < 2**31:
        # One integer that holds both sorts several times faster than a pair.
        key = jnp.sort(buckets * length + jnp.arange(length, dtype=jnp.int32), axis=-1)
        return key % length, key // length
    position = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), buckets.shape)
    sorted_buckets, order = jax.lax.sort((buckets, position), num_keys=2)
    return order, sorted_buckets


def reach_codes(layout: Layout, sorted_buckets):
    """An integer for each place of a round: j is in reach of i where code_j - code_i is -before..after."""
    length = sorted_buckets.shape[-1]
    chunk = jnp.arange(length, dtype=jnp.int32) // layout.chunk_size
    if layout.reach != "bucket":
        return jnp.broadcast_to(chunk, sorted_buckets.shape)
    # Chunks do not fall where buckets rise, so a new bucket begins further away than any chunk in reach.
    far, bucket = layout.before + layout.after + 1, sorted_buckets
    if far * (layout.num_buckets + 1) + length >= 2**31:
        bucket = jnp.cumsum(jnp.diff(bucket, axis=-1, prepend=bucket[..., :1]) != 0, axis=-1, dtype=jnp.int32)
    return chunk + far * bucket


def at_their_places(order, in_order):
    """[..., R, T] in sorted order -> [..., T, R] in the order of positions."""
    lead, (rounds, length) = order.shape[:-2], order.shape[-2:]
    order, in_order = order.reshape(-1, rounds, length), in_order.reshape(-1, rounds, length)
    group, row = jnp.arange(order.shape[0])[:, None, None], jnp.arange(rounds)[:, None]
    out = jnp.zeros((order.shape[0], length, rounds), in_order.dtype)
    out = out.at[group, order, row].set(in_order, unique_indices=True, mode="promise_in_bounds")
    return out.reshape(*lead, length, rounds)


def tile_bytes() -> int:
    return CPU_TILE_BYTES if jax.default_backend() == "cpu" else ACCELERATOR_TILE_BYTES


def rows(flat, places):
    """Rows of a flat array at these places; zeros for nobody."""
    return flat.at[places].get(mode="fill", fill_value=0)


def weights(layout: Layout, codes, nobody: int, queries, keys):
    """How much each key counts, [I, C, W] float32: 0 where it is not visible, 1 / N_ij where it is (eq. 12)."""
    (queries, query_buckets), (keys, key_buckets) = queries, keys
    visible = (keys[:, None] < queries[:, :, None]) if layout.is_causal else (keys[:, None] != queries[:, :, None])
    visible &= (queries[:, :, None] < nobody) & (keys[:, None] < nobody)
    if layout.reach == "bucket":
        visible &= query_buckets[:, :, None] == key_buckets[:, None]
    if codes is None:
        return visible.astype(jnp.float32)
    count = jnp.zeros(visible.shape, jnp.int32)
    for code in codes:
        ahead = rows(code, keys)[:, None] - rows(code, queries)[:, :, None]
        count += (-layout.before <= ahead) & (ahead <= layout.after)
    return jnp.where(visible, 1 / jnp.maximum(count, 1), 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def over_items(layout, query, gain, value, items):
    """Flat outputs [places, V] and the log of the softmax's total weight [places], -inf where nothing is visible.

    Args:
        query: [places, H].
        gain: [places], float32: the logit of a query and a key is their product times the key's gain.
        value: [places, V].
    """
    return _forward(layout, query, gain, value, items)[0]


def _forward(layout, query, gain, value, items):
    def step(carry, block):
        out, log_total = carry
        queries, keys = block[0][0], block[1][0]
        logits, key_values = _logits(query, gain, queries, keys)[0], rows(value, keys)
        weight = weights(layout, items.codes, gain.size, *block)
        seen = weight > 0
        before = rows(log_total, queries)
        largest = jnp.maximum(jnp.max(logits, axis=-1, where=seen, initial=-jnp.inf), before)
        finite = jnp.where(jnp.isneginf(largest), 0, largest)
        weight = weight * jnp.exp(jnp.where(seen, logits - finite[..., None], 0))
        decay = jnp.exp(before - finite)
        total = decay + weight.sum(-1)
        new = jnp.einsum("icw,iwv->icv", weight.astype(value.dtype), key_values, preferred_element_type=jnp.float32)
        new += decay[..., None] * rows(out, queries)
        new /= jnp.where(total > 0, total, 1)[..., None]
        out = out.at[queries].set(new, mode="drop")
        return (out, log_total.at[queries].set(finite + jnp.log(total), mode="drop")), None

    start = jnp.zeros(value.shape, jnp.float32), jnp.full(gain.shape, -jnp.inf)
    (out, log_total), _ = jax.lax.scan(step, start, items[:2])
    out = out.astype(value.dtype)
    return (out, log_total), (query, gain, value, items, out, log_total)


def _backward(layout, saved, cotangents):
    query, gain, value, items, out, log_total = saved
    d_out = cotangents[0]
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    log_total = jnp.where(jnp.isneginf(log_total), 0, log_total)

    def step(carry, block):
        d_query, d_gain, d_value = carry
        queries, keys = block[0][0], block[1][0]
        (logits, products, key_gain), key_values = _logits(query, gain, queries, keys), rows(value, keys)
        weight = weights(layout, items.codes, gain.size, *block)
        exponent = jnp.where(weight > 0, logits - rows(log_total, queries)[..., None], 0)
        weight = weight * jnp.exp(exponent)
        d_rows = rows(d_out, queries)
        d_weight = jnp.einsum("icv,iwv->icw", d_rows, key_values, preferred_element_type=jnp.float32)
        d_logits = weight * (d_weight - rows(delta, queries)[..., None])
        d_products = (d_logits * key_gain[:, None]).astype(query.dtype)
        into = dict(preferred_element_type=jnp.float32)
        to_values = jnp.einsum("icw,icv->iwv", weight.astype(value.dtype), d_rows, **into)
        to_queries = jnp.einsum("icw,iwh->ich", d_products, rows(query, keys), **into)
        to_keys = jnp.einsum("icw,ich->iwh", d_products, rows(query, queries), **into)
        to_gains = jnp.sum(d_logits * products, axis=1)
        d_query = d_query.at[queries].add(to_queries, mode="drop")
        # A chunk at a time: within one part no place occurs twice, so that sums on an accelerator have one order.
        for part in range(0, keys.shape[1], layout.chunk_size):
            some = slice(part, part + layout.chunk_size)
            d_query = d_query.at[keys[:, some]].add(to_keys[:, some], mode="drop")
            d_gain = d_gain.at[keys[:, some]].add(to_gains[:, some], mode="drop")
            d_value = d_value.at[keys[:, some]].add(to_values[:, some], mode="drop")
        return (d_query, d_gain, d_value), None

    start = tuple(jnp.zeros(x.shape, jnp.float32) for x in (query, gain, value))
    (d_query, d_gain, d_value), _ = jax.lax.scan(step, start, items[:2])
    return d_query.astype(query.dtype), d_gain, d_value.astype(value.dtype), None


over_items.defvjp(_forward, _backward)


def _logits(query, gain, queries, keys):
    """Logits [I, C, W], the products of query vectors that they are made of, and the gains [I, W] of the keys."""
    products = jnp.einsum("ich,iwh->icw", rows(query, queries), rows(query, keys), preferred_element_type=jnp.float32)
    key_gain = rows(gain, keys)
    return products * key_gain[:, None], products, key_gain


def extend(query, key, value, query_buckets, key_buckets, start, mask, scale, correct_duplicates):
    """See `lsh.extend`; by tiles of queries."""
    batch, length, heads, _ = query.shape
    places = key.shape[1]
    real = jnp.ones((batch, places), bool) if mask is None else jnp.broadcast_to(mask[:, 0, 0], (batch, places))
    key, value = (jnp.where(real[..., None, None], x, 0) for x in (key, value))
    key, value = rearrange(key, "b s n h -> b n h s"), rearrange(value, "b s n v -> b n s v")
    key_buckets = rearrange(key_buckets, "b r s n -> r b n 1 s")
    count = max(1, min(length, tile_bytes() // (4 * batch * heads * places)))
    steps = math.ceil(length / count)
    count = math.ceil(length / steps)

    @jax.checkpoint
    def tile(queries):
        query, buckets, own = queries
        same = sum((a[..., None] == b).astype(jnp.float32) for a, b in zip(buckets, key_buckets, strict=True))
        same = jnp.minimum(same, 1) if correct_duplicates else same
        own_real = jnp.take(real, own, axis=1, mode="clip")[:, None]
        weight = same * (own_real[..., None] & real[:, None, None] & (jnp.arange(places) < own[:, None]))
        logits = scale * jnp.einsum("bnth,bnhs->bnts", query, key, preferred_element_type=jnp.float32)
        seen = weight > 0
        largest = jnp.max(logits, axis=-1, keepdims=True, where=seen, initial=-1e30)
        weight = weight * jnp.exp(jnp.where(seen, logits - jax.lax.stop_gradient(largest), 0))
        total = weight.sum(-1, keepdims=True)
        out = jnp.einsum("bnts,bnsv->bntv", weight.astype(value.dtype), value, preferred_element_type=jnp.float32)
        alone = own_real[..., None] & (total == 0)
        return jnp.where(alone, jnp.take(value, own, axis=2, mode="clip"), out / jnp.where(total > 0, total, 1))

    short = steps * count - length
    query = jnp.pad(query, ((0, 0), (0, short), (0, 0), (0, 0)))
    query_buckets = jnp.pad(query_buckets, ((0, 0), (0, 0), (0, short), (0, 0)))
    queries = (
        rearrange(query, "b (k t) n h -> k b n t h", k=steps),
        rearrange(query_buckets, "b r (k t) n -> k r b n t", k=steps),
        start + jnp.arange(steps * count).reshape(steps, count),
    )
    out = rearrange(jax.lax.map(tile, queries), "k b n t v -> b (k t) n v")[:, :length]
    return out.astype(value.dtype)
