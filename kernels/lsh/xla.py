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
import numpy as np
from einops import rearrange

from subquad.kernels import precision
from subquad.kernels.lsh.reference import AXES, Layout, inverse_norm
from subquad.kernels.operation import operation
from subquad.kernels.padding import pad_to
from subquad.kernels.softmax import online
from subquad.kernels.xla_cpu import from_uint_bits, to_uint_bits, zeros_depending_on

# Bytes of one tile of logits. On a CPU a tile should stay in the cache; on an accelerator every step of a loop is a kernel
# launch, so steps should be few.
CPU_TILE_BYTES, ACCELERATOR_TILE_BYTES = 1 << 20, 1 << 25
# Chunks whose logits take more are cut into parts of their queries: a larger buffer is mapped anew at every step.
CHUNK_BYTES = 1 << 24
# The logit of a key that is not seen: exp of it, less anything that occurs, is exactly 0.
LOWEST = -1e30


class Items(NamedTuple):
    """The items of a call in blocks, K steps of I items of one round: C queries that see W keys each.

    Places count samples, tokens and heads as they lie in memory, from 0; one past the last is nobody (padding).
    """

    queries: jax.Array  # int32 [K, I, C]: places
    query_codes: jax.Array  # int32 [K, I, C], as `sort` returns them for the item's round
    keys: jax.Array  # int32 [K, I, W]: places
    key_codes: jax.Array  # int32 [K, I, W]
    round: jax.Array  # int32 [K]


def hash_buckets(vectors, rotations, factors, num_rotations):
    """See `lsh.hash_buckets`; by blocks of tokens, so that the rotated vectors are never stored."""
    batch, length, heads, _ = vectors.shape
    _, _, rounds, columns = rotations.shape
    rows = max(1, min(length, tile_bytes() // (4 * batch * heads * rounds * columns)))
    return _hash_buckets(math.ceil(length / rows), factors, vectors, rotations, num_rotations)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _hash_buckets(steps, factors, vectors, rotations, num_rotations):
    _, length, heads, _ = vectors.shape
    columns = rotations.shape[-1]
    rows = math.ceil(length / steps)
    rotations = jnp.broadcast_to(rotations, (heads, *rotations.shape[1:])).astype(jnp.float32)
    rotations = rearrange(rotations, "n h r f -> n r f h")

    def block(tokens):
        own, used = tokens
        own = from_uint_bits(own, vectors.dtype).astype(jnp.float32)
        # Tokens last: what follows goes along them, and so in long vectors.
        rotated = jnp.einsum("nrfh,nbth->nrfbt", rotations, own, precision=jax.lax.Precision.HIGHEST)
        if used is not None:
            rotated = jnp.where(jnp.arange(columns)[:, None, None] < used, rotated, 0)
        bucket, unit, column = 0, 1, 0
        for factor in factors:
            bucket += unit * nearest(rotated[:, :, column : column + factor // 2])
            unit, column = unit * factor, column + factor // 2
        return bucket

    pad = lambda x: pad_to(x, 1, steps * rows)
    own = rearrange(pad(to_uint_bits(vectors)), "b (k t) n h -> k n b t h", k=steps)
    used = None if num_rotations is None else rearrange(pad(num_rotations), "b (k t) -> k b t", k=steps)
    buckets = jax.lax.map(block, (own, used))
    return rearrange(buckets, "k n r b t -> b r (k t) n")[:, :, :length]


def nearest(rotated):
    """argmax([x, -x]) over axis 2 of [N, R, F, B, T], without its slow pairs of value and index."""
    columns = rotated.shape[2]
    largest = jnp.max(jnp.abs(rotated), axis=2, keepdims=True)
    column = jnp.arange(columns, dtype=jnp.int32)[:, None, None]
    names = jnp.where(rotated == largest, column, jnp.where(-rotated == largest, columns + column, 2 * columns - 1))
    return jnp.min(names, axis=2)


def attention(layout, query_key, value, buckets, mask, segment_ids, scale):
    """See `lsh.attention`."""
    layout, gain, buckets = prepare(layout, query_key, buckets, mask, scale)
    return attend(layout, query_key, gain, value, buckets, segment_ids)


def prepare(layout: Layout, query_key, buckets, mask, scale):
    """(layout, gain, buckets) as an implementation's operation takes them."""
    if layout.reach != "ring":
        others = math.ceil(query_key.shape[1] / layout.chunk_size) - 1
        layout = layout._replace(before=min(layout.before, others), after=min(layout.after, others))
    if mask is not None:
        buckets = jnp.where(mask[:, 0, 0, None, :, None], buckets, layout.num_buckets)
    # A checkpoint: else the backward pass keeps the query in float32.
    return layout, scale * jax.checkpoint(inverse_norm)(query_key), buckets


def lay_out(layout: Layout, order, codes) -> tuple[Items, jax.Array | None]:
    """Cuts the sorted sequence of every round into items; `order` and `codes` [B, N, R, T], as `sort` returns them.

    Returns: the items, and where keys count once the codes by place, int32 [R, places + 1].
    """
    batch, heads, rounds, length = order.shape
    nobody = batch * length * heads
    order, codes = (rearrange(x, "b n r t -> (b n) r t") for x in (order, codes))
    sample, head = np.divmod(np.arange(batch * heads, dtype=np.int32)[:, None, None], heads)
    place = jnp.where(codes < 0, nobody, (sample * length + order) * heads + head)
    by_place = None
    if layout.correct_duplicates and rounds > 1:
        row = jnp.arange(rounds)[:, None]
        by_place = jnp.zeros((rounds, nobody), jnp.int32).at[row, place].set(codes, **NOBODY_WRITTEN)

    chunks = math.ceil(length / layout.chunk_size)
    own = pad_to(jnp.stack([place, codes]), 3, chunks * layout.chunk_size, constant_values=nobody)
    own = rearrange(own, "x g r (n c) -> x g r n c", n=chunks)
    around = chunks_in_reach(layout, own, nobody)
    cuts = min(layout.chunk_size, math.ceil(4 * layout.chunk_size * around.shape[-1] / CHUNK_BYTES))
    if cuts > 1:
        own = pad_to(own, 4, math.ceil(layout.chunk_size / cuts) * cuts, constant_values=nobody)
        own = rearrange(own, "x g r n (s c) -> x g r (n s) c", s=cuts)
        around = jnp.repeat(around, cuts, axis=3)

    count = batch * heads * chunks * cuts
    # Two cuts of one chunk add to the same keys, so they are not taken in one step.
    most = 1 if cuts > 1 else tile_bytes() // (4 * own.shape[-1] * around.shape[-1])
    steps = math.ceil(count / max(1, min(count, most)))
    round_ = jnp.repeat(jnp.arange(rounds, dtype=jnp.int32), steps)
    queries = in_steps(own, steps, nobody, no_code=-(1 << 30))
    keys = in_steps(around, steps, nobody, no_code=(1 << 30) - 1)
    return Items(*queries, *keys, round_), by_place


def chunks_in_reach(layout: Layout, own, nobody: int):
    """The chunks [..., chunks, C] that each chunk of a sequence sees, side by side: [..., chunks, W]."""
    # Chunks that begin with a segment overlap two of those that items are.
    before, after = layout.before + layout.has_segments, layout.after + layout.has_segments
    chunks = own.shape[3]
    if layout.reach == "ring":
        ring = rearrange(own, "x g r n c -> x g (r n) c")
        around = jnp.concatenate([jnp.roll(ring, -step, axis=2) for step in range(-before, after + 1)], axis=-1)
        return rearrange(around, "x g (r n) w -> x g r n w", n=chunks)
    ends = jnp.pad(own, ((0, 0), (0, 0), (0, 0), (before, after), (0, 0)), constant_values=nobody)
    return jnp.concatenate([ends[:, :, :, first : first + chunks] for first in range(before + after + 1)], axis=-1)


def in_steps(items, steps: int, nobody: int, no_code: int):
    """Places and codes, stacked as [2, groups, R, items, C], by the steps of all rounds: two of [R steps, I, C]."""
    items = rearrange(items, "x g r n c -> r x (g n) c")
    items = pad_to(items, 2, steps * math.ceil(items.shape[2] / steps), constant_values=nobody)
    places, codes = rearrange(items, "r x (k i) c -> x (r k) i c", k=steps)
    return places, jnp.where(places < nobody, codes, no_code)


def sort(layout: Layout, buckets, segment_ids):
    """The positions in order of segment, bucket and position, and a code for each, both int32 [B, N, R, T].

    j is in reach of i where code_j - code_i is -before..after. Padding, whose bucket is `num_buckets`, comes last; its codes
    are negative, and out of reach of all others. The first positions of other runs are further away than any chunk in reach,
    because chunks do not fall along the order.
    """
    buckets = rearrange(buckets, "b r t n -> b n r t").astype(jnp.int32)
    length = buckets.shape[-1]
    index = jnp.arange(length, dtype=jnp.int32)
    if segment_ids is None and (layout.num_buckets + 1) * length < 2**31:
        # One integer that holds both sorts several times faster than a pair.
        key = jnp.sort(buckets * length + index, axis=-1)
        order, keys = key % length, [key // length]
    else:
        keys = [buckets]
        if segment_ids is not None:
            segments = jnp.where(buckets < layout.num_buckets, segment_ids[:, None, None], jnp.iinfo(jnp.int32).max)
            keys = [segments, buckets]
        *keys, order = jax.lax.sort((*keys, jnp.broadcast_to(index, buckets.shape)), num_keys=len(keys) + 1)
    first = lambda key: jnp.diff(key, axis=-1, prepend=key[..., :1]) != 0  # of a run, but for the very first
    chunk = index // layout.chunk_size if layout.reach != "ring" else jnp.zeros_like(index)
    if segment_ids is not None:
        start = jax.lax.cummax(jnp.where(first(keys[0]), index, 0), axis=3)
        chunk = jnp.cumsum((index - start) % layout.chunk_size == 0, axis=-1, dtype=jnp.int32)
    conditions = keys if layout.reach == "bucket" else keys[:-1]
    run = sum(jnp.cumsum(first(key), axis=-1, dtype=jnp.int32) for key in conditions)
    far = layout.before + layout.after + 1
    return order, jnp.where(keys[-1] < layout.num_buckets, chunk + far * run, -far * (1 + index))


def at_their_places(order, in_order):
    """[..., R, T] in sorted order -> [..., T, R] in the order of positions."""
    lead, (rounds, length) = order.shape[:-2], order.shape[-2:]
    order, in_order = order.reshape(-1, rounds, length), in_order.reshape(-1, rounds, length)
    group, row = jnp.arange(order.shape[0])[:, None, None], jnp.arange(rounds)[:, None]
    out = jnp.zeros((order.shape[0], length, rounds), in_order.dtype)
    out = out.at[group, order, row].set(in_order, unique_indices=True, **IN_BOUNDS)
    return out.reshape(*lead, length, rounds)


def tile_bytes() -> int:
    return CPU_TILE_BYTES if jax.default_backend() == "cpu" else ACCELERATOR_TILE_BYTES


IN_BOUNDS = dict(mode="promise_in_bounds", wrap_negative_indices=False)
NOBODY_READ = dict(mode="fill", fill_value=0, wrap_negative_indices=False)
NOBODY_WRITTEN = dict(mode="drop", wrap_negative_indices=False)


def rows(flat, places):
    """Rows of a flat array at these places, zeros for nobody. They are stored: fused into what follows, an index would be
    looked up for every pair of a query and a key."""
    return from_uint_bits(jax.lax.optimization_barrier(to_uint_bits(flat).at[places].get(**NOBODY_READ)), flat.dtype)


def visible(layout: Layout, block: Items, codes, keys_first: bool):
    """Which key counts for which query: those visible in this round, and in none before where keys count once.

    Returns: bool [I, C, W], or [I, W, C] with `keys_first`.
    """
    query_axis, key_axis = (1, 2) if keys_first else (2, 1)
    across = lambda queries, keys: (jnp.expand_dims(queries, query_axis), jnp.expand_dims(keys, key_axis))
    queries, keys = across(block.queries, block.keys)
    seen = (keys < queries) if layout.is_causal else (keys != queries)
    seen &= in_reach(layout, *across(block.query_codes, block.key_codes))
    for earlier, code in enumerate([] if codes is None else codes[:-1]):
        again = in_reach(layout, *across(rows(code, block.queries), rows(code, block.keys)))
        seen &= ~again | (block.round <= earlier)
    return seen


def in_reach(layout: Layout, query_codes, key_codes):
    distance = key_codes - query_codes
    return (-layout.before <= distance) & (distance <= layout.after)


@precision.full
def forward(layout, query, gain, value, buckets, segment_ids):
    """Outputs [B, T, N, V]: the softmax over what each token sees, and its own value where it sees nothing.

    Args:
        query: [B, T, N, H].
        gain: [B, T, N], float32: the logit of a query and a key is their product times the key's gain.
        value: [B, T, N, V].
        buckets: [B, R, T, N]; that of padding is `num_buckets`.
        segment_ids: [B, T] or None.
    """
    arguments = query, gain, value
    sorting = sort(layout, buckets, segment_ids)
    items, codes = lay_out(layout, *sorting)
    query, gain, value = map(by_place, arguments)
    into = dict(preferred_element_type=gain.dtype)

    def step(carry, block):
        out, log_total = carry
        block = jax.lax.optimization_barrier(block)
        queries, keys = block.queries, block.keys
        logits = jnp.einsum("ich,iwh->icw", rows(query, queries), rows(query, keys), **into)
        logits = online.rounded(logits * rows(gain, keys)[:, None])
        logits = jnp.where(visible(layout, block, codes, False), logits, LOWEST)
        before = rows(log_total, queries)
        largest = jnp.maximum(jnp.max(logits, axis=-1), before)
        largest = jnp.where(largest > LOWEST, largest, 0)
        weight = jnp.exp(logits - largest[..., None])
        decay = jnp.exp(before - largest)
        total = decay + weight.sum(-1)
        new = jnp.einsum("icw,iwv->icv", weight.astype(value.dtype), rows(value, keys), **into)
        new += decay[..., None] * rows(out, queries)
        new /= jnp.where(total > 0, total, 1)[..., None]
        out = out.at[queries].set(new, **NOBODY_WRITTEN)
        return (out, log_total.at[queries].set(largest + jnp.log(total), **NOBODY_WRITTEN)), None

    start = jnp.zeros(value.shape, gain.dtype), jnp.full(len(gain), -jnp.inf, gain.dtype)
    (out, log_total), _ = jax.lax.scan(step, start, items)
    out = jnp.where(jnp.isneginf(log_total)[:, None], value, out.astype(value.dtype))
    out, log_total = (x.reshape(like.shape) for x, like in zip((out, log_total), arguments[:0:-1], strict=True))
    return out, (*arguments, *sorting, out, log_total)


@precision.full
def backward(layout, saved, grad_out):
    *arguments, order, sorted_codes, out, log_total = saved
    items, codes = lay_out(layout, order, sorted_codes)
    query, gain, value, out, log_total, grad_out = map(by_place, (*arguments, out, log_total, grad_out))
    delta = jnp.sum(grad_out.astype(gain.dtype) * out.astype(gain.dtype), axis=-1)
    alone = jnp.isneginf(log_total)
    log_total = jnp.where(alone, 0, log_total)
    into = dict(preferred_element_type=gain.dtype)

    def step(carry, block):
        grad_query, grad_gain, grad_value = carry
        block = jax.lax.optimization_barrier(block)
        queries, keys = block.queries, block.keys
        query_rows, key_rows, grad_rows = rows(query, queries), rows(query, keys), rows(grad_out, queries)
        gains = rows(gain, keys)[..., None]
        # Keys first: two of the three products with gradients are then of a matrix as it lies in memory.
        products = jnp.einsum("iwh,ich->iwc", key_rows, query_rows, **into)
        logits = jnp.where(visible(layout, block, codes, True), online.rounded(products * gains), LOWEST)
        weight = online.weights_of(logits, rows(log_total, queries)[:, None], 0)
        grad_weight = jnp.einsum("iwv,icv->iwc", rows(value, keys), grad_rows, **into)
        grad_logits = weight * (grad_weight - rows(delta, queries)[:, None])
        grad_products = (grad_logits * gains).astype(query.dtype)
        grad_values = jnp.einsum("iwc,icv->iwv", weight.astype(value.dtype), grad_rows, **into)
        grad_keys = jnp.einsum("iwc,ich->iwh", grad_products, query_rows, **into)
        grad_queries = jnp.einsum("iwc,iwh->ich", grad_products, key_rows, **into)
        grad_gains = jnp.sum(grad_logits * products, axis=2)
        grad_query = grad_query.at[queries].add(grad_queries, **NOBODY_WRITTEN)
        for some in parts:
            grad_query = grad_query.at[keys[:, some]].add(grad_keys[:, some], **NOBODY_WRITTEN)
            grad_gain = grad_gain.at[keys[:, some]].add(grad_gains[:, some], **NOBODY_WRITTEN)
            grad_value = grad_value.at[keys[:, some]].add(grad_values[:, some], **NOBODY_WRITTEN)
        return (grad_query, grad_gain, grad_value), None

    # Elsewhere than on a CPU a chunk at a time: no place occurs twice in one, so that sums have one order.
    width = items.keys.shape[2]
    chunk = width if jax.default_backend() == "cpu" else layout.chunk_size
    parts = [slice(first, first + chunk) for first in range(0, width, chunk)]
    start = *(zeros_depending_on(delta, x.shape, gain.dtype) for x in (query, gain)), jnp.where(alone[:, None], grad_out, 0)
    gradients, _ = jax.lax.scan(step, (*start[:2], start[2].astype(gain.dtype)), items)
    words = zip(gradients, arguments, strict=True)
    return *(x.reshape(like.shape).astype(like.dtype) for x, like in words), None, None


attend = operation(
    forward,
    backward,
    **AXES,
    saved=("b n r t", "b n r t", "b t n"),
)


def by_place(array):
    """[B, T, N, ...] -> [places, ...]."""
    return array.reshape(-1, *array.shape[3:])


def extend(query, key, value, query_buckets, key_buckets, start, mask, scale, correct_duplicates):
    """See `lsh.extend`; by tiles of queries."""
    batch, length, heads, _ = query.shape
    rows = max(1, min(length, tile_bytes() // (4 * batch * heads * key.shape[1])))
    options = math.ceil(length / rows), correct_duplicates
    return _extend(*options, query, key, value, query_buckets, key_buckets, start, mask, scale)


@functools.partial(jax.jit, static_argnums=(0, 1))
@precision.full
def _extend(steps, correct_duplicates, query, key, value, query_buckets, key_buckets, start, mask, scale):
    batch, length = query.shape[:2]
    places = key.shape[1]
    real = jnp.ones((batch, places), bool) if mask is None else jnp.broadcast_to(mask[:, 0, 0], (batch, places))
    key, value = rearrange(key, "b s n h -> b n h s"), rearrange(value, "b s n v -> b n s v")
    key_buckets = rearrange(key_buckets, "b r s n -> r b n 1 s")
    count = math.ceil(length / steps)

    @jax.checkpoint
    def tile(queries):
        query, buckets, own = queries
        same = sum((a[..., None] == b).astype(jnp.float32) for a, b in zip(buckets, key_buckets, strict=True))
        same = jnp.minimum(same, 1) if correct_duplicates else same
        own_real = jnp.take_along_axis(real, own, axis=1, mode="clip")[:, None]
        is_before = jnp.arange(places)[None, None, None] < own[:, None, :, None]
        counts = same * (own_real[..., None] & real[:, None, None] & is_before)
        logits = online.rounded(scale * jnp.einsum("bnth,bnhs->bnts", query, key, preferred_element_type=jnp.float32))
        weights, lse = online.counted(logits, counts)
        out = jnp.einsum("bnts,bnsv->bntv", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
        alone = (own_real & jnp.isneginf(lse))[..., None]
        own_value = jnp.take_along_axis(value, own[:, None, :, None], axis=2, mode="clip")
        return jnp.where(alone, own_value, out)

    query, query_buckets = pad_to(query, 1, steps * count), pad_to(query_buckets, 2, steps * count)
    queries = (
        rearrange(query, "b (k t) n h -> k b n t h", k=steps),
        rearrange(query_buckets, "b r (k t) n -> k r b n t", k=steps),
        jnp.reshape(start, (-1, 1)) + jnp.arange(steps * count).reshape(steps, 1, count),
    )
    out = rearrange(jax.lax.map(tile, queries), "k b n t v -> b (k t) n v")[:, :length]
    return out.astype(value.dtype)
