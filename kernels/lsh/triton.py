"""LSH attention on a GPU: rows gathered by pointer inside the kernels, results written at the tokens' own positions.

The rounds run one after another. The forward kernel goes on with the running softmax that the rounds before it left at
each token, the backward kernel with the running sums of the gradients. So there is one float32 row per token whatever
the number of rounds, nothing is unsorted or combined afterwards, and every row has one writer: no atomics, one order of
summation.

A program owns a tile of places in the order of bucket and position. Forward it goes through the keys in reach of its
queries. Backward it goes through the keys of its queries and then through the queries of its keys, so that both gradients
of a shared query and key, and that of the key's length, meet in its registers.

A key counts in the first round in which it is in reach, rather than 1 / N_ij in each of N_ij rounds: the same sum.
"""

import functools
import math

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from einops import rearrange

from subquad.kernels import launch, precision
from subquad.kernels.lsh import xla

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1e30)
# Sums of three bfloat16 parts: the six products that float32 can tell apart, so that buckets are decided in float32.
HASH_PRECISION = "bf16x6"
MOST_FEATURES = 128


# ------------------------------------------------------------------------------------------------------------- hashing


@triton.jit
def hash_kernel(
    vectors, rotations, num_rotations, buckets,
    VECTORS_STRIDE: tl.constexpr, ROTATIONS_STRIDE: tl.constexpr, USED_STRIDE: tl.constexpr,
    HEADS: tl.constexpr, ROTATION_HEADS: tl.constexpr, LENGTH: tl.constexpr, FEATURES: tl.constexpr, ROUNDS: tl.constexpr,
    ALL_COLUMNS: tl.constexpr, FIRST_COLUMN: tl.constexpr, COLUMNS: tl.constexpr, HAS_USED: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """argmax([x R; -x R]) over COLUMNS columns, for a tile of tokens of one head, in every round."""
    TILES: tl.constexpr = (LENGTH + BLOCK_T - 1) // BLOCK_T
    tile, group = tl.program_id(0) % TILES, (tl.program_id(0) // TILES).to(tl.int64)
    batch, head = group // HEADS, group % HEADS
    token, feature = tile * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_H)
    x_at = vectors + batch * VECTORS_STRIDE + (token.to(tl.int64)[:, None] * HEADS + head) * FEATURES + feature[None, :]
    x = tl.load(x_at, mask=(token < LENGTH)[:, None] & (feature < FEATURES)[None, :], other=0).to(tl.float32)
    used = COLUMNS
    if HAS_USED:
        used = tl.load(num_rotations + batch * USED_STRIDE)
    rotations += batch * ROTATIONS_STRIDE + (head % ROTATION_HEADS) * FEATURES * ROUNDS * ALL_COLUMNS + FIRST_COLUMN
    for r in range(ROUNDS):
        best = tl.full([BLOCK_T], -1.0, tl.float32)
        name = tl.full([BLOCK_T], 2 * COLUMNS - 1, tl.int32)
        for start in range(0, COLUMNS, BLOCK_F):
            column = start + tl.arange(0, BLOCK_F)
            r_at = rotations + feature[:, None] * (ROUNDS * ALL_COLUMNS) + r * ALL_COLUMNS + column[None, :]
            rotation = tl.load(r_at, mask=(feature < FEATURES)[:, None] & (column < COLUMNS)[None, :], other=0)
            rotated = tl.dot(x, rotation.to(tl.float32), input_precision=PRECISION)
            rotated = tl.where((column < used)[None, :], rotated, 0.0)
            size = tl.where((column < COLUMNS)[None, :], tl.abs(rotated), -1.0)
            largest = tl.max(size, axis=1)
            side = tl.where(rotated >= 0, column[None, :], COLUMNS + column[None, :])
            nearest = tl.min(tl.where(size == largest[:, None], side, 2 * COLUMNS - 1), axis=1)
            # The first of equals, and a direction comes before all opposites.
            name = tl.where(largest > best, nearest, tl.where(largest == best, tl.minimum(name, nearest), name))
            best = tl.maximum(best, largest)
        to = buckets + ((batch * ROUNDS + r) * LENGTH + token) * HEADS + head
        tl.store(to, name, mask=token < LENGTH)


def hash_buckets(vectors, rotations, factors, num_rotations, *, mode):
    """See `lsh.hash_buckets`."""
    _check(vectors)
    rotations = rotations.astype(jnp.float32)[None]
    used = None if num_rotations is None else num_rotations.astype(jnp.int32)
    return launch.fold_vmap(functools.partial(_hash, mode, factors))(vectors, rotations, used)


def _hash(mode, factors, vectors, rotations, used):
    (_, length, heads, features), (_, rotation_heads, _, rounds, columns) = vectors.shape, rotations.shape
    batch = max(x.shape[0] for x in (vectors, rotations, used) if x is not None)
    bucket, unit, first = 0, 1, 0
    for factor in factors:
        config = hash_config(mode, length, features, factor // 2)
        constants = dict(
            VECTORS_STRIDE=_stride(vectors), ROTATIONS_STRIDE=_stride(rotations), USED_STRIDE=_stride(used),
            HEADS=heads, ROTATION_HEADS=rotation_heads, LENGTH=length, FEATURES=features, ROUNDS=rounds,
            ALL_COLUMNS=columns, FIRST_COLUMN=first, COLUMNS=factor // 2, HAS_USED=used is not None,
            PRECISION=HASH_PRECISION if mode == "triton" else "ieee", BLOCK_H=_width(features),
        )  # fmt: skip
        (digit,) = launch.call(
            hash_kernel,
            dict(vectors=vectors, rotations=rotations, num_rotations=used),
            dict(buckets=jax.ShapeDtypeStruct((batch, rounds, length, heads), jnp.int32)),
            grid=batch * heads * math.ceil(length / config.blocks["BLOCK_T"]),
            constants=constants, config=config, mode=mode,
        )  # fmt: skip
        bucket += unit * digit
        unit, first = unit * factor, first + factor // 2
    return bucket


def hash_config(mode, length, features, columns):
    if mode == "interpret":
        return launch.Config(dict(BLOCK_T=_power(min(length, 256)), BLOCK_F=_power(min(columns, 64))))
    # The three parts of an operand live beside the operand itself.
    heuristic = launch.Config(dict(BLOCK_T=64, BLOCK_F=_power(min(columns, 32))), num_warps=4, num_stages=1)
    return launch.config("lsh.hash", heuristic, features=features, columns=columns)


# ----------------------------------------------------------------------------------------------------------- attention


@triton.jit
def _tokens(
    order, buckets, index, inside, round_,
    LENGTH: tl.constexpr, ROUNDS: tl.constexpr, PADDED: tl.constexpr, NUM_BUCKETS: tl.constexpr, RING: tl.constexpr,
):  # fmt: skip
    """Positions and buckets of the tokens at these places of a round, or of the ring of all rounds.

    A place that is not `inside`, or holds padding, has a bucket of at least NUM_BUCKETS.
    """
    if RING:
        index = (index % (ROUNDS * PADDED) + ROUNDS * PADDED) % (ROUNDS * PADDED)
        inside &= index % PADDED < LENGTH
        at = index // PADDED * LENGTH + index % PADDED
    else:
        order += round_.to(tl.int64) * LENGTH
        buckets += round_.to(tl.int64) * LENGTH
        at = index
    return tl.load(order + at, mask=inside, other=0), tl.load(buckets + at, mask=inside, other=NUM_BUCKETS)


@triton.jit
def _rows(array, position, real, STRIDE: tl.constexpr, FEATURES: tl.constexpr, BLOCK: tl.constexpr):
    """Rows [places, BLOCK] of one head; zeros where they are not real."""
    feature = tl.arange(0, BLOCK)
    at = array + position.to(tl.int64)[:, None] * STRIDE + feature[None, :]
    return tl.load(at, mask=real[:, None] & (feature < FEATURES)[None, :], other=0)


@triton.jit
def _products(rows, others, array, position, real, other_array, other_position, other_real, STRIDE: tl.constexpr,
              FEATURES: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Of `rows`, which a program keeps, and `others`, which it reads: [places, other places].

    Of wide float32 rows both are read again, a slice at a time: the parts of whole ones, for three TF32 products, are more
    than the registers hold.
    """
    if PRECISION != "tf32x3" or BLOCK <= 64:
        total = tl.dot(rows, tl.trans(others), input_precision=PRECISION)
    else:
        total = tl.zeros((rows.shape[0], others.shape[0]), tl.float32)
        at, other_at = position.to(tl.int64)[:, None] * STRIDE, other_position.to(tl.int64)[:, None] * STRIDE
        # An end that is known only at run time keeps the loop from being unrolled.
        for first in range(0, BLOCK + (tl.program_id(0) >> 30), 16):
            feature = first + tl.arange(0, 16)[None, :]
            left = tl.load(array + at + feature, mask=real[:, None] & (feature < FEATURES), other=0)
            right = tl.load(other_array + other_at + feature, mask=other_real[:, None] & (feature < FEATURES), other=0)
            total = tl.dot(left, tl.trans(right), total, input_precision=PRECISION)
    return total


@triton.jit
def _put_rows(array, position, real, rows, STRIDE: tl.constexpr, FEATURES: tl.constexpr, BLOCK: tl.constexpr):
    feature = tl.arange(0, BLOCK)
    at = array + position.to(tl.int64)[:, None] * STRIDE + feature[None, :]
    tl.store(at, rows.to(array.dtype.element_ty), mask=real[:, None] & (feature < FEATURES)[None, :])


@triton.jit
def _inverse_norm(rows):
    """1 / |q|, and 0 where q is 0."""
    rows = rows.to(tl.float32)
    square = tl.sum(rows * rows, axis=1)
    return tl.where(square > 0, tl.rsqrt(tl.where(square > 0, square, 1.0)), 0.0)


@triton.jit
def _across(query, key, KEYS_FIRST: tl.constexpr):
    """Vectors of queries and of keys, shaped to meet in a matrix [queries, keys], or [keys, queries]."""
    if KEYS_FIRST:
        return query[None, :], key[:, None]
    else:
        return query[:, None], key[None, :]


@triton.jit
def _visible(
    codes, round_, q_index, q_position, q_bucket, k_index, k_position, k_bucket, KEYS_FIRST: tl.constexpr,
    ROUNDS: tl.constexpr, CHUNK: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr, NUM_BUCKETS: tl.constexpr,
    IS_CAUSAL: tl.constexpr, SAME_BUCKET: tl.constexpr, SPANS: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    """Which query sees which key in this round, and saw it in none before where keys count ONCE."""
    query, key = _across(q_position, k_position, KEYS_FIRST)
    if IS_CAUSAL:
        visible = key < query
    else:
        visible = key != query
    if SAME_BUCKET:
        # Nobody's bucket, which is no key's, equals no bucket.
        of_query, of_key = _across(tl.where(q_bucket < NUM_BUCKETS, q_bucket, -1), k_bucket, KEYS_FIRST)
        visible &= of_query == of_key
    else:
        real_query, real_key = _across(q_bucket < NUM_BUCKETS, k_bucket < NUM_BUCKETS, KEYS_FIRST)
        visible &= real_query & real_key
    if SPANS:  # the tile has queries of several chunks; indices start no lower than this many chunks below 0
        LOW: tl.constexpr = (BEFORE + AFTER) * CHUNK
        query_chunk, key_chunk = _across((q_index + LOW) // CHUNK, (k_index + LOW) // CHUNK, KEYS_FIRST)
        visible &= (key_chunk - query_chunk >= -BEFORE) & (key_chunk - query_chunk <= AFTER)
    if ONCE:
        for earlier in range(0, round_):
            query_code = tl.load(codes + q_position * ROUNDS + earlier)
            key_code = tl.load(codes + k_position * ROUNDS + earlier)
            query_code, key_code = _across(query_code, key_code, KEYS_FIRST)
            visible &= (key_code - query_code < -BEFORE) | (key_code - query_code > AFTER)
    return visible


@triton.jit
def _reach(
    tile, offset, BELOW: tl.constexpr, ABOVE: tl.constexpr, LENGTH: tl.constexpr, CHUNK: tl.constexpr, RING: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
):  # fmt: skip
    """The places from BELOW chunks below the tile's first chunk to ABOVE chunks above its last: first, and one past."""
    first = (tile * BLOCK_OWN // CHUNK - BELOW) * CHUNK
    last = ((tl.minimum(tile * BLOCK_OWN + BLOCK_OWN, LENGTH) - 1) // CHUNK + ABOVE + 1) * CHUNK
    if not RING:
        first, last = tl.maximum(first, 0), tl.minimum(last, LENGTH)
    return first + offset, last + offset


@triton.jit
def forward_kernel(
    query_key, value, order, buckets, codes, scale, round_number, out_before, log_before, out, log_total,
    QUERY_STRIDE: tl.constexpr, VALUE_STRIDE: tl.constexpr, ORDER_STRIDE: tl.constexpr, CODES_STRIDE: tl.constexpr,
    SCALE_STRIDE: tl.constexpr, HEADS: tl.constexpr, LENGTH: tl.constexpr, FEATURES: tl.constexpr, VALUES: tl.constexpr,
    ROUNDS: tl.constexpr, CHUNK: tl.constexpr, PADDED: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr,
    NUM_BUCKETS: tl.constexpr, IS_CAUSAL: tl.constexpr, SAME_BUCKET: tl.constexpr, RING: tl.constexpr, ONCE: tl.constexpr,
    SPANS: tl.constexpr, IS_FIRST: tl.constexpr, IS_LAST: tl.constexpr, PRECISION: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_OWN: tl.constexpr, BLOCK_OTHER: tl.constexpr,
):  # fmt: skip
    """One round: the running softmax of a tile of queries goes on with the keys in reach."""
    TILES: tl.constexpr = (LENGTH + BLOCK_OWN - 1) // BLOCK_OWN
    tile, group = tl.program_id(0) % TILES, (tl.program_id(0) // TILES).to(tl.int64)
    batch, head = group // HEADS, group % HEADS
    round_ = tl.load(round_number)
    query_key += batch * QUERY_STRIDE + head * FEATURES
    value += batch * VALUE_STRIDE + head * VALUES
    order += batch * ORDER_STRIDE + head * ROUNDS * LENGTH
    buckets += batch * ORDER_STRIDE + head * ROUNDS * LENGTH
    codes += batch * CODES_STRIDE + head * LENGTH * ROUNDS
    out += (batch * LENGTH * HEADS + head) * VALUES
    out_before += (batch * LENGTH * HEADS + head) * VALUES
    log_total += batch * LENGTH * HEADS + head
    log_before += batch * LENGTH * HEADS + head
    factor = tl.load(scale + batch * SCALE_STRIDE) * LOG2E
    offset = 0
    if RING:
        offset = round_ * PADDED

    own = tile * BLOCK_OWN + tl.arange(0, BLOCK_OWN)
    present = own < LENGTH
    q_position, q_bucket = _tokens(
        order, buckets, own + offset, present, round_, LENGTH, ROUNDS, PADDED, NUM_BUCKETS, RING)
    real = q_bucket < NUM_BUCKETS
    query = _rows(query_key, q_position, real, HEADS * FEATURES, FEATURES, BLOCK_H)
    if IS_FIRST:
        largest = tl.full([BLOCK_OWN], LOWEST, tl.float32)
        total = tl.zeros([BLOCK_OWN], tl.float32)
        sums = tl.zeros([BLOCK_OWN, BLOCK_V], tl.float32)
    else:
        before = tl.load(log_before + q_position * HEADS, mask=present, other=float("-inf"))
        seen = before > float("-inf")
        largest = tl.where(seen, before * LOG2E, LOWEST)
        total = tl.where(seen, 1.0, 0.0)
        sums = _rows(out_before, q_position, present, HEADS * VALUES, VALUES, BLOCK_V).to(tl.float32)

    first, last = _reach(tile, offset, BEFORE, AFTER, LENGTH, CHUNK, RING, BLOCK_OWN)
    for start in range(first, last, BLOCK_OTHER):
        other = start + tl.arange(0, BLOCK_OTHER)
        k_position, k_bucket = _tokens(
            order, buckets, other, other < last, round_, LENGTH, ROUNDS, PADDED, NUM_BUCKETS, RING)
        k_real = k_bucket < NUM_BUCKETS
        key = _rows(query_key, k_position, k_real, HEADS * FEATURES, FEATURES, BLOCK_H)
        k_value = _rows(value, k_position, k_real, HEADS * VALUES, VALUES, BLOCK_V)
        logits = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        logits *= (_inverse_norm(key) * factor)[None, :]
        visible = _visible(
            codes, round_, own + offset, q_position, q_bucket, other, k_position, k_bucket, False,
            ROUNDS, CHUNK, BEFORE, AFTER, NUM_BUCKETS, IS_CAUSAL, SAME_BUCKET, SPANS, ONCE)
        logits = tl.where(visible, logits, LOWEST)
        top = tl.maximum(largest, tl.max(logits, axis=1))
        weights = tl.where(visible, tl.exp2(logits - top[:, None]), 0.0)
        decay = tl.exp2(largest - top)
        total = total * decay + tl.sum(weights, axis=1)
        sums = sums * decay[:, None]
        sums = tl.dot(weights.to(k_value.dtype), k_value, sums, input_precision=PRECISION)
        largest = top

    seen = total > 0
    total = tl.where(seen, total, 1.0)
    sums = sums / total[:, None]
    if IS_LAST:
        alone = real & (seen == 0)
        sums += _rows(value, q_position, alone, HEADS * VALUES, VALUES, BLOCK_V).to(tl.float32)
    _put_rows(out, q_position, present, sums, HEADS * VALUES, VALUES, BLOCK_V)
    log = tl.where(seen, (largest + tl.log2(total)) * LN2, float("-inf"))
    tl.store(log_total + q_position * HEADS, log, mask=present)


@triton.jit
def backward_kernel(
    query_key, value, d_out, log_total, delta, order, buckets, codes, scale, round_number, d_query_before, d_value_before,
    d_query, d_value, d_scale,
    QUERY_STRIDE: tl.constexpr, VALUE_STRIDE: tl.constexpr, ORDER_STRIDE: tl.constexpr, CODES_STRIDE: tl.constexpr,
    SCALE_STRIDE: tl.constexpr, OUT_STRIDE: tl.constexpr, LOG_STRIDE: tl.constexpr,
    HEADS: tl.constexpr, LENGTH: tl.constexpr, FEATURES: tl.constexpr, VALUES: tl.constexpr,
    ROUNDS: tl.constexpr, CHUNK: tl.constexpr, PADDED: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr,
    NUM_BUCKETS: tl.constexpr, IS_CAUSAL: tl.constexpr, SAME_BUCKET: tl.constexpr, RING: tl.constexpr, ONCE: tl.constexpr,
    SPANS: tl.constexpr, IS_FIRST: tl.constexpr, PRECISION: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_OWN: tl.constexpr, BLOCK_OTHER: tl.constexpr,
):  # fmt: skip
    """One round: a tile of tokens, as queries of the keys in reach, then as keys of the queries whose reach they are in."""
    TILES: tl.constexpr = (LENGTH + BLOCK_OWN - 1) // BLOCK_OWN
    tile, group = tl.program_id(0) % TILES, (tl.program_id(0) // TILES).to(tl.int64)
    batch, head = group // HEADS, group % HEADS
    round_ = tl.load(round_number)
    query_key += batch * QUERY_STRIDE + head * FEATURES
    value += batch * VALUE_STRIDE + head * VALUES
    d_out += batch * OUT_STRIDE + head * VALUES
    order += batch * ORDER_STRIDE + head * ROUNDS * LENGTH
    buckets += batch * ORDER_STRIDE + head * ROUNDS * LENGTH
    codes += batch * CODES_STRIDE + head * LENGTH * ROUNDS
    log_total += batch * LOG_STRIDE + head
    delta += batch * LOG_STRIDE + head
    d_query += (batch * LENGTH * HEADS + head) * FEATURES
    d_query_before += (batch * LENGTH * HEADS + head) * FEATURES
    d_value += (batch * LENGTH * HEADS + head) * VALUES
    d_value_before += (batch * LENGTH * HEADS + head) * VALUES
    scale_ = tl.load(scale + batch * SCALE_STRIDE)
    factor = scale_ * LOG2E
    offset = 0
    if RING:
        offset = round_ * PADDED

    own = tile * BLOCK_OWN + tl.arange(0, BLOCK_OWN)
    present = own < LENGTH
    position, bucket = _tokens(
        order, buckets, own + offset, present, round_, LENGTH, ROUNDS, PADDED, NUM_BUCKETS, RING)
    real = bucket < NUM_BUCKETS
    query = _rows(query_key, position, real, HEADS * FEATURES, FEATURES, BLOCK_H)
    d_own = _rows(d_out, position, real, HEADS * VALUES, VALUES, BLOCK_V)
    log = tl.load(log_total + position * HEADS, mask=present, other=float("-inf"))
    seen = log > float("-inf")
    log = tl.where(seen, log * LOG2E, 0.0)
    own_delta = tl.load(delta + position * HEADS, mask=present, other=0)
    d_products = tl.zeros([BLOCK_OWN, BLOCK_H], tl.float32)
    first, last = _reach(tile, offset, BEFORE, AFTER, LENGTH, CHUNK, RING, BLOCK_OWN)
    for start in range(first, last, BLOCK_OTHER):
        other = start + tl.arange(0, BLOCK_OTHER)
        k_position, k_bucket = _tokens(
            order, buckets, other, other < last, round_, LENGTH, ROUNDS, PADDED, NUM_BUCKETS, RING)
        k_real = k_bucket < NUM_BUCKETS
        key = _rows(query_key, k_position, k_real, HEADS * FEATURES, FEATURES, BLOCK_H)
        k_value = _rows(value, k_position, k_real, HEADS * VALUES, VALUES, BLOCK_V)
        gain = _inverse_norm(key)
        products = _products(
            query, key, query_key, position, real, query_key, k_position, k_real,
            HEADS * FEATURES, FEATURES, BLOCK_H, PRECISION)
        logits = products * (gain * factor)[None, :]
        visible = _visible(
            codes, round_, own + offset, position, bucket, other, k_position, k_bucket, False,
            ROUNDS, CHUNK, BEFORE, AFTER, NUM_BUCKETS, IS_CAUSAL, SAME_BUCKET, SPANS, ONCE)
        # At most 0: a log-sum-exp beyond 1e9 is rounded by hundreds, and exp2 of that overflows.
        weights = tl.exp2(tl.where(visible, tl.minimum(logits - log[:, None], 0.0), LOWEST))
        d_weights = _products(
            d_own, k_value, d_out, position, real, value, k_position, k_real, HEADS * VALUES, VALUES, BLOCK_V, PRECISION)
        d_logits = weights * (d_weights - own_delta[:, None]) * gain[None, :]
        d_products = tl.dot(d_logits.to(key.dtype), key, d_products, input_precision=PRECISION)

    own_value = _rows(value, position, real, HEADS * VALUES, VALUES, BLOCK_V)
    gain = _inverse_norm(query)
    d_gain = tl.zeros([BLOCK_OWN], tl.float32)
    d_values = tl.zeros([BLOCK_OWN, BLOCK_V], tl.float32)
    first, last = _reach(tile, offset, AFTER, BEFORE, LENGTH, CHUNK, RING, BLOCK_OWN)
    for start in range(first, last, BLOCK_OTHER):
        other = start + tl.arange(0, BLOCK_OTHER)
        q_position, q_bucket = _tokens(
            order, buckets, other, other < last, round_, LENGTH, ROUNDS, PADDED, NUM_BUCKETS, RING)
        q_real = q_bucket < NUM_BUCKETS
        their_query = _rows(query_key, q_position, q_real, HEADS * FEATURES, FEATURES, BLOCK_H)
        d_rows = _rows(d_out, q_position, q_real, HEADS * VALUES, VALUES, BLOCK_V)
        q_log = tl.load(log_total + q_position * HEADS, mask=q_real, other=float("-inf"))
        q_log = tl.where(q_log > float("-inf"), q_log * LOG2E, 0.0)
        q_delta = tl.load(delta + q_position * HEADS, mask=q_real, other=0)
        products = _products(
            query, their_query, query_key, position, real, query_key, q_position, q_real,
            HEADS * FEATURES, FEATURES, BLOCK_H, PRECISION)
        visible = _visible(
            codes, round_, other, q_position, q_bucket, own + offset, position, bucket, True,
            ROUNDS, CHUNK, BEFORE, AFTER, NUM_BUCKETS, IS_CAUSAL, SAME_BUCKET, SPANS, ONCE)
        logits = products * (gain * factor)[:, None]
        weights = tl.exp2(tl.where(visible, tl.minimum(logits - q_log[None, :], 0.0), LOWEST))
        d_values = tl.dot(weights.to(d_rows.dtype), d_rows, d_values, input_precision=PRECISION)
        d_weights = _products(
            own_value, d_rows, value, position, real, d_out, q_position, q_real, HEADS * VALUES, VALUES, BLOCK_V, PRECISION)
        d_logits = weights * (d_weights - q_delta[None, :])
        d_gain += tl.sum(d_logits * products, axis=1)
        d_logits *= gain[:, None]
        d_products = tl.dot(d_logits.to(their_query.dtype), their_query, d_products, input_precision=PRECISION)

    through_length = d_gain * gain * gain * gain
    d_rows = scale_ * (d_products - through_length[:, None] * query.to(tl.float32))
    if IS_FIRST:
        alone = real & (seen == 0)
        d_values += tl.where(alone[:, None], d_own.to(tl.float32), 0.0)
    else:
        d_rows += _rows(d_query_before, position, present, HEADS * FEATURES, FEATURES, BLOCK_H)
        d_values += _rows(d_value_before, position, present, HEADS * VALUES, VALUES, BLOCK_V)
    _put_rows(d_query, position, present, d_rows, HEADS * FEATURES, FEATURES, BLOCK_H)
    _put_rows(d_value, position, present, d_values, HEADS * VALUES, VALUES, BLOCK_V)
    tl.store(d_scale + group * TILES + tile, tl.sum(d_gain * gain, axis=0))


def attention(layout, query_key, value, buckets, mask, scale, *, mode):
    """See `lsh.attention`."""
    _check(query_key, value)
    length = query_key.shape[1]
    if layout.reach != "ring":
        others = math.ceil(length / layout.chunk_size) - 1
        layout = layout._replace(before=min(layout.before, others), after=min(layout.after, others))
    buckets = rearrange(buckets, "b r t n -> b n r t")
    if mask is not None:
        buckets = jnp.where(mask, buckets, layout.num_buckets)
    order, sorted_buckets = xla.sort(layout, buckets)
    codes = None
    if layout.correct_duplicates and buckets.shape[2] > 1:
        codes = xla.at_their_places(order, xla.reach_codes(layout, sorted_buckets))
    scale = jnp.asarray(scale, jnp.float32).reshape(1)
    return _attention(layout, mode, query_key, value, scale, order, sorted_buckets, codes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(layout, mode, query_key, value, scale, order, buckets, codes):
    return _forward(layout, mode, query_key, value, scale, order, buckets, codes)[0]


def _forward(layout, mode, *arrays):
    out, log_total = launch.fold_vmap(functools.partial(_forward_rounds, layout, mode))(*arrays)
    return out, (*arrays, out, log_total)


def _backward(layout, mode, saved, d_out):
    *arrays, out, log_total = saved
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    run = launch.fold_vmap(functools.partial(_backward_rounds, layout, mode))
    d_query_key, d_value, d_scale = run(*arrays, d_out, log_total, delta)
    return d_query_key, d_value, d_scale.sum(keepdims=True), None, None, None


precision.define_passes(_attention, _forward, _backward)


def _forward_rounds(layout, mode, query_key, value, scale, order, buckets, codes):
    batch, rounds, config, constants = _plan(layout, mode, "forward", query_key, value, scale, order, codes)
    _, length, heads, values = value.shape
    rows = jax.ShapeDtypeStruct((batch, length, heads, values), jnp.float32)
    log_total = jax.ShapeDtypeStruct((batch, length, heads), jnp.float32)
    inputs = dict(query_key=query_key, value=value, order=order, buckets=buckets, codes=codes, scale=scale)
    before = None, None
    for r in range(rounds):
        dtype = value.dtype if r == rounds - 1 else jnp.float32
        in_place = {} if r == 0 else dict(log_before="log_total")
        if r > 0 and dtype == jnp.float32:
            in_place["out_before"] = "out"
        before = launch.call(
            forward_kernel,
            dict(**inputs, round_number=jnp.full(1, r, jnp.int32), out_before=before[0], log_before=before[1]),
            dict(out=rows.update(dtype=dtype), log_total=log_total),
            grid=batch * heads * math.ceil(length / config.blocks["BLOCK_OWN"]),
            constants=dict(**constants, IS_FIRST=r == 0, IS_LAST=r == rounds - 1),
            config=config, mode=mode, aliases=in_place,
        )  # fmt: skip
    return before


def _backward_rounds(layout, mode, query_key, value, scale, order, buckets, codes, d_out, log_total, delta):
    batch, rounds, config, constants = _plan(
        layout, mode, "backward", query_key, value, scale, order, codes, d_out, log_total, delta)
    (_, length, heads, features), values = query_key.shape, value.shape[-1]
    # One of the two may be shared by the samples of a `vmap`, and then so must be the other: they have one stride.
    log_total, delta = jnp.broadcast_arrays(log_total, delta)
    constants |= dict(OUT_STRIDE=_stride(d_out), LOG_STRIDE=_stride(log_total))
    tiles = math.ceil(length / config.blocks["BLOCK_OWN"])
    inputs = dict(
        query_key=query_key, value=value, d_out=d_out, log_total=log_total, delta=delta, order=order, buckets=buckets,
        codes=codes, scale=scale,
    )  # fmt: skip
    before, d_scale = (None, None), 0
    for r in range(rounds):
        last = r == rounds - 1
        dtypes = (query_key.dtype, value.dtype) if last else (jnp.float32, jnp.float32)
        shapes = dict(
            d_query=jax.ShapeDtypeStruct((batch, length, heads, features), dtypes[0]),
            d_value=jax.ShapeDtypeStruct((batch, length, heads, values), dtypes[1]),
            d_scale=jax.ShapeDtypeStruct((batch, heads, tiles), jnp.float32),
        )
        in_place = {f"{name}_before": name for name in ("d_query", "d_value") if r and shapes[name].dtype == jnp.float32}
        *before, in_round = launch.call(
            backward_kernel,
            dict(**inputs, round_number=jnp.full(1, r, jnp.int32), d_query_before=before[0], d_value_before=before[1]),
            shapes,
            grid=batch * heads * tiles, constants=dict(**constants, IS_FIRST=r == 0),
            config=config, mode=mode, aliases=in_place,
        )  # fmt: skip
        d_scale += in_round.sum((1, 2))
    return *before, d_scale


def _plan(layout, mode, direction, query_key, value, scale, order, codes, *others):
    """Batch, rounds, configuration and constants of the two attention kernels."""
    (_, length, heads, features), values, rounds = query_key.shape, value.shape[-1], order.shape[2]
    arrays = (query_key, value, scale, order, *others)
    config = attention_config(mode, direction, layout.chunk_size, length, max(features, values), query_key.dtype)
    constants = dict(
        QUERY_STRIDE=_stride(query_key), VALUE_STRIDE=_stride(value), ORDER_STRIDE=_stride(order),
        CODES_STRIDE=_stride(codes), SCALE_STRIDE=_stride(scale),
        HEADS=heads, LENGTH=length, FEATURES=features, VALUES=values, ROUNDS=rounds,
        CHUNK=layout.chunk_size, PADDED=math.ceil(length / layout.chunk_size) * layout.chunk_size,
        BEFORE=layout.before, AFTER=layout.after, NUM_BUCKETS=layout.num_buckets,
        IS_CAUSAL=layout.is_causal, SAME_BUCKET=layout.reach == "bucket", RING=layout.reach == "ring",
        ONCE=codes is not None, SPANS=layout.chunk_size % config.blocks["BLOCK_OWN"] != 0,
        PRECISION=_precision(query_key, value), BLOCK_H=_width(features), BLOCK_V=_width(values),
    )  # fmt: skip
    return max(x.shape[0] for x in arrays), rounds, config, constants


def attention_config(mode, direction, chunk_size, length, features, dtype):
    if mode == "interpret":
        block = _power(min(length, 128))
        return launch.Config(dict(BLOCK_OWN=block, BLOCK_OTHER=block))
    # The largest tiles that no kernel's registers overflow with on Hopper. One no longer than a chunk leaves no query
    # without a key in its range.
    width = _width(features)
    if dtype == jnp.float32:  # the parts of every operand live beside it
        tile = 16, 32, 8
    elif direction == "forward":
        tile = (32, 64, 4) if chunk_size <= 32 else (64, 64, 8)
    else:
        tile = (16, 64, 4) if width <= 32 else (32, 64, 8)
    heuristic = launch.Config(dict(BLOCK_OWN=tile[0], BLOCK_OTHER=tile[1]), num_warps=tile[2], num_stages=1)
    return launch.config(
        f"lsh.{direction}", heuristic, chunk_size=chunk_size, features=features, bits=8 * jnp.dtype(dtype).itemsize
    )


# -------------------------------------------------------------------------------------------------------------- extend


@triton.jit
def _shared_rounds(
    query_buckets, key_buckets, q_token, k_token, q_real, k_real, begin, KEYS_FIRST: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, HEADS: tl.constexpr, ROUNDS: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    """In how many rounds a query shares its bucket with an earlier key, or 1 where keys count ONCE; 0 where one is not real."""
    query, key = _across(begin + q_token, k_token, KEYS_FIRST)
    earlier = key < query
    count = tl.where(earlier, 0.0, 0.0)
    for r in range(ROUNDS):
        theirs = tl.load(key_buckets + (r * KEYS + k_token) * HEADS, mask=k_real, other=-1)
        ours = tl.load(query_buckets + (r * QUERIES + q_token) * HEADS, mask=q_real, other=-2)
        ours, theirs = _across(ours, theirs, KEYS_FIRST)
        same = tl.where(earlier & (ours == theirs), 1.0, 0.0)
        if ONCE:
            count = tl.maximum(count, same)
        else:
            count += same
    return count


@triton.jit
def extend_forward_kernel(
    query, key, value, query_buckets, key_buckets, valid, start, out, log_total,
    QUERY_STRIDE: tl.constexpr, KEY_STRIDE: tl.constexpr, VALUE_STRIDE: tl.constexpr, QUERY_BUCKETS_STRIDE: tl.constexpr,
    KEY_BUCKETS_STRIDE: tl.constexpr, VALID_STRIDE: tl.constexpr, START_STRIDE: tl.constexpr,
    HEADS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, FEATURES: tl.constexpr, VALUES: tl.constexpr,
    ROUNDS: tl.constexpr, SCALE: tl.constexpr, HAS_VALID: tl.constexpr, ONCE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of new tokens over all earlier keys."""
    TILES: tl.constexpr = (QUERIES + BLOCK_Q - 1) // BLOCK_Q
    tile, group = tl.program_id(0) % TILES, (tl.program_id(0) // TILES).to(tl.int64)
    batch, head = group // HEADS, group % HEADS
    query += batch * QUERY_STRIDE + head * FEATURES
    key += batch * KEY_STRIDE + head * FEATURES
    value += batch * VALUE_STRIDE + head * VALUES
    query_buckets += batch * QUERY_BUCKETS_STRIDE + head
    key_buckets += batch * KEY_BUCKETS_STRIDE + head
    valid += batch * VALID_STRIDE
    begin = tl.load(start + batch * START_STRIDE).to(tl.int32)

    q_token = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    present = q_token < QUERIES
    own = tl.minimum(begin + q_token, KEYS - 1)
    q_real = present
    if HAS_VALID:
        q_real &= tl.load(valid + own, mask=present, other=0) != 0
    rows = _rows(query, q_token, present, HEADS * FEATURES, FEATURES, BLOCK_H)
    largest = tl.full([BLOCK_Q], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    sums = tl.zeros([BLOCK_Q, BLOCK_V], tl.float32)
    last = tl.minimum(begin + tl.minimum(tile * BLOCK_Q + BLOCK_Q, QUERIES) - 1, KEYS)
    for first in range(0, last, BLOCK_K):
        k_token = first + tl.arange(0, BLOCK_K)
        k_real = k_token < last
        if HAS_VALID:
            k_real &= tl.load(valid + k_token, mask=k_real, other=0) != 0
        k_rows = _rows(key, k_token, k_real, HEADS * FEATURES, FEATURES, BLOCK_H)
        k_value = _rows(value, k_token, k_real, HEADS * VALUES, VALUES, BLOCK_V)
        count = _shared_rounds(
            query_buckets, key_buckets, q_token, k_token, q_real, k_real, begin, False,
            QUERIES, KEYS, HEADS, ROUNDS, ONCE)
        logits = tl.dot(rows, tl.trans(k_rows), input_precision=PRECISION) * (SCALE * LOG2E)
        logits = tl.where(count > 0, logits, LOWEST)
        top = tl.maximum(largest, tl.max(logits, axis=1))
        weights = count * tl.exp2(logits - top[:, None])
        decay = tl.exp2(largest - top)
        total = total * decay + tl.sum(weights, axis=1)
        sums = sums * decay[:, None]
        sums = tl.dot(weights.to(k_value.dtype), k_value, sums, input_precision=PRECISION)
        largest = top

    seen = total > 0
    total = tl.where(seen, total, 1.0)
    sums = sums / total[:, None]
    sums += _rows(value, own, q_real & (seen == 0), HEADS * VALUES, VALUES, BLOCK_V).to(tl.float32)
    out += (batch * QUERIES * HEADS + head) * VALUES
    _put_rows(out, q_token, present, sums, HEADS * VALUES, VALUES, BLOCK_V)
    log = tl.where(seen, (largest + tl.log2(total)) * LN2, float("-inf"))
    tl.store(log_total + (batch * QUERIES + q_token) * HEADS + head, log, mask=present)


@triton.jit
def extend_query_kernel(
    query, key, value, query_buckets, key_buckets, valid, start, d_out, log_total, delta, d_query,
    QUERY_STRIDE: tl.constexpr, KEY_STRIDE: tl.constexpr, VALUE_STRIDE: tl.constexpr, QUERY_BUCKETS_STRIDE: tl.constexpr,
    KEY_BUCKETS_STRIDE: tl.constexpr, VALID_STRIDE: tl.constexpr, START_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr, LOG_STRIDE: tl.constexpr,
    HEADS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, FEATURES: tl.constexpr, VALUES: tl.constexpr,
    ROUNDS: tl.constexpr, SCALE: tl.constexpr, HAS_VALID: tl.constexpr, ONCE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of new tokens' queries."""
    TILES: tl.constexpr = (QUERIES + BLOCK_Q - 1) // BLOCK_Q
    tile, group = tl.program_id(0) % TILES, (tl.program_id(0) // TILES).to(tl.int64)
    batch, head = group // HEADS, group % HEADS
    query += batch * QUERY_STRIDE + head * FEATURES
    key += batch * KEY_STRIDE + head * FEATURES
    value += batch * VALUE_STRIDE + head * VALUES
    query_buckets += batch * QUERY_BUCKETS_STRIDE + head
    key_buckets += batch * KEY_BUCKETS_STRIDE + head
    valid += batch * VALID_STRIDE
    begin = tl.load(start + batch * START_STRIDE).to(tl.int32)

    q_token = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    present = q_token < QUERIES
    # Where nothing is seen, nothing depends on the query.
    log = tl.load(log_total + batch * LOG_STRIDE + q_token * HEADS + head, mask=present, other=float("-inf"))
    q_real = log > float("-inf")
    log = tl.where(q_real, log * LOG2E, 0.0)
    q_delta = tl.load(delta + batch * LOG_STRIDE + q_token * HEADS + head, mask=present, other=0)
    rows = _rows(query, q_token, present, HEADS * FEATURES, FEATURES, BLOCK_H)
    d_rows = _rows(d_out + batch * OUT_STRIDE + head * VALUES, q_token, present, HEADS * VALUES, VALUES, BLOCK_V)
    sums = tl.zeros([BLOCK_Q, BLOCK_H], tl.float32)
    last = tl.minimum(begin + tl.minimum(tile * BLOCK_Q + BLOCK_Q, QUERIES) - 1, KEYS)
    # The parts of wide operands, for three TF32 products, would fill the registers if they were made before the loop.
    for first in tl.range(0, last, BLOCK_K, disable_licm=PRECISION == "tf32x3" and BLOCK_H > 64):
        k_token = first + tl.arange(0, BLOCK_K)
        k_real = k_token < last
        if HAS_VALID:
            k_real &= tl.load(valid + k_token, mask=k_real, other=0) != 0
        k_rows = _rows(key, k_token, k_real, HEADS * FEATURES, FEATURES, BLOCK_H)
        k_value = _rows(value, k_token, k_real, HEADS * VALUES, VALUES, BLOCK_V)
        count = _shared_rounds(
            query_buckets, key_buckets, q_token, k_token, q_real, k_real, begin, False,
            QUERIES, KEYS, HEADS, ROUNDS, ONCE)
        logits = tl.dot(rows, tl.trans(k_rows), input_precision=PRECISION) * (SCALE * LOG2E)
        weights = count * tl.exp2(tl.where(count > 0, tl.minimum(logits - log[:, None], 0.0), LOWEST))
        d_weights = tl.dot(d_rows, tl.trans(k_value), input_precision=PRECISION)
        d_logits = weights * (d_weights - q_delta[:, None])
        sums = tl.dot(d_logits.to(k_rows.dtype), k_rows, sums, input_precision=PRECISION)
    d_query += (batch * QUERIES * HEADS + head) * FEATURES
    _put_rows(d_query, q_token, present, SCALE * sums, HEADS * FEATURES, FEATURES, BLOCK_H)


@triton.jit
def extend_key_kernel(
    query, key, value, query_buckets, key_buckets, valid, start, d_out, log_total, delta, d_key, d_value,
    QUERY_STRIDE: tl.constexpr, KEY_STRIDE: tl.constexpr, VALUE_STRIDE: tl.constexpr, QUERY_BUCKETS_STRIDE: tl.constexpr,
    KEY_BUCKETS_STRIDE: tl.constexpr, VALID_STRIDE: tl.constexpr, START_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr, LOG_STRIDE: tl.constexpr,
    HEADS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, FEATURES: tl.constexpr, VALUES: tl.constexpr,
    ROUNDS: tl.constexpr, SCALE: tl.constexpr, HAS_VALID: tl.constexpr, ONCE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The gradients of a tile of keys and values."""
    TILES: tl.constexpr = (KEYS + BLOCK_K - 1) // BLOCK_K
    tile, group = tl.program_id(0) % TILES, (tl.program_id(0) // TILES).to(tl.int64)
    batch, head = group // HEADS, group % HEADS
    query += batch * QUERY_STRIDE + head * FEATURES
    key += batch * KEY_STRIDE + head * FEATURES
    value += batch * VALUE_STRIDE + head * VALUES
    d_out += batch * OUT_STRIDE + head * VALUES
    log_total += batch * LOG_STRIDE + head
    delta += batch * LOG_STRIDE + head
    query_buckets += batch * QUERY_BUCKETS_STRIDE + head
    key_buckets += batch * KEY_BUCKETS_STRIDE + head
    valid += batch * VALID_STRIDE
    begin = tl.load(start + batch * START_STRIDE).to(tl.int32)

    k_token = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    present = k_token < KEYS
    k_real = present
    if HAS_VALID:
        k_real &= tl.load(valid + k_token, mask=present, other=0) != 0
    k_rows = _rows(key, k_token, k_real, HEADS * FEATURES, FEATURES, BLOCK_H)
    k_value = _rows(value, k_token, k_real, HEADS * VALUES, VALUES, BLOCK_V)
    # A new token that sees no other sees itself.
    itself = k_token - begin
    alone = k_real & (itself >= 0) & (itself < QUERIES)
    alone &= tl.load(log_total + itself * HEADS, mask=alone, other=0) == float("-inf")
    to_values = _rows(d_out, itself, alone, HEADS * VALUES, VALUES, BLOCK_V).to(tl.float32)
    to_keys = tl.zeros([BLOCK_K, BLOCK_H], tl.float32)
    for first in range(tl.maximum(tile * BLOCK_K + 1 - begin, 0), QUERIES, BLOCK_Q):
        q_token = first + tl.arange(0, BLOCK_Q)
        q_present = q_token < QUERIES
        log = tl.load(log_total + q_token * HEADS, mask=q_present, other=float("-inf"))
        q_real = log > float("-inf")
        log = tl.where(q_real, log * LOG2E, 0.0)
        q_delta = tl.load(delta + q_token * HEADS, mask=q_present, other=0)
        rows = _rows(query, q_token, q_present, HEADS * FEATURES, FEATURES, BLOCK_H)
        d_rows = _rows(d_out, q_token, q_present, HEADS * VALUES, VALUES, BLOCK_V)
        count = _shared_rounds(
            query_buckets, key_buckets, q_token, k_token, q_real, k_real, begin, True,
            QUERIES, KEYS, HEADS, ROUNDS, ONCE)
        logits = tl.dot(k_rows, tl.trans(rows), input_precision=PRECISION) * (SCALE * LOG2E)
        weights = count * tl.exp2(tl.where(count > 0, tl.minimum(logits - log[None, :], 0.0), LOWEST))
        to_values = tl.dot(weights.to(d_rows.dtype), d_rows, to_values, input_precision=PRECISION)
        d_weights = tl.dot(k_value, tl.trans(d_rows), input_precision=PRECISION)
        d_logits = weights * (d_weights - q_delta[None, :])
        to_keys = tl.dot(d_logits.to(rows.dtype), rows, to_keys, input_precision=PRECISION)
    d_key += (batch * KEYS * HEADS + head) * FEATURES
    d_value += (batch * KEYS * HEADS + head) * VALUES
    _put_rows(d_key, k_token, present, SCALE * to_keys, HEADS * FEATURES, FEATURES, BLOCK_H)
    _put_rows(d_value, k_token, present, to_values, HEADS * VALUES, VALUES, BLOCK_V)


def extend(query, key, value, query_buckets, key_buckets, start, mask, scale, correct_duplicates, *, mode):
    """See `lsh.extend`."""
    _check(query, key, value)
    if isinstance(scale, jax.core.Tracer):
        raise launch.Declined("scale must be known while tracing.")
    if not query.dtype == key.dtype == value.dtype:
        raise launch.Declined("query, key and value must have one dtype.")
    valid = None if mask is None else mask[:, 0, 0]
    start = jnp.asarray(start, jnp.int32).reshape(-1)
    options = float(scale), bool(correct_duplicates), mode
    return _extend(options, query, key, value, query_buckets, key_buckets, valid, start)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _extend(options, *arrays):
    return _extend_forward(options, *arrays)[0]


def _extend_forward(options, *arrays):
    out, log_total = launch.fold_vmap(functools.partial(_extend_out, options))(*arrays)
    return out, (*arrays, out, log_total)


def _extend_backward(options, saved, d_out):
    *arrays, out, log_total = saved
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    gradients = launch.fold_vmap(functools.partial(_extend_gradients, options))(*arrays, d_out, log_total, delta)
    return *gradients, None, None, None, None


precision.define_passes(_extend, _extend_forward, _extend_backward)


def _extend_out(options, *arrays):
    inputs, batch, config, constants = _extend_plan("forward", options, arrays)
    (_, length, heads, _), values = arrays[0].shape, arrays[2].shape[-1]
    outputs = dict(
        out=jax.ShapeDtypeStruct((batch, length, heads, values), arrays[2].dtype),
        log_total=jax.ShapeDtypeStruct((batch, length, heads), jnp.float32),
    )
    grid = batch * heads * math.ceil(length / config.blocks["BLOCK_Q"])
    return launch.call(
        extend_forward_kernel, inputs, outputs, grid=grid, constants=constants, config=config, mode=options[-1]
    )


def _extend_gradients(options, *arrays):
    *arrays, d_out, log_total, delta = arrays
    log_total, delta = jnp.broadcast_arrays(log_total, delta)
    query, key, value = arrays[:3]

    def run(kernel, direction, length, block, **outputs):
        inputs, batch, config, constants = _extend_plan(direction, options, arrays, d_out, log_total)
        return launch.call(
            kernel,
            inputs | dict(d_out=d_out, log_total=log_total, delta=delta),
            {name: jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype) for name, x in outputs.items()},
            grid=batch * query.shape[2] * math.ceil(length / config.blocks[block]),
            constants=constants | dict(OUT_STRIDE=_stride(d_out), LOG_STRIDE=_stride(log_total)),
            config=config, mode=options[-1],
        )  # fmt: skip

    return (
        *run(extend_query_kernel, "query", query.shape[1], "BLOCK_Q", d_query=query),
        *run(extend_key_kernel, "key", key.shape[1], "BLOCK_K", d_key=key, d_value=value),
    )


def _extend_plan(direction, options, arrays, *others):
    scale, once, mode = options
    query, key, value, query_buckets, key_buckets, valid, start = arrays
    (_, queries, heads, features), keys, values = query.shape, key.shape[1], value.shape[-1]
    inputs = dict(query=query, key=key, value=value, query_buckets=query_buckets, key_buckets=key_buckets, valid=valid,
                  start=start)  # fmt: skip
    batch = max(x.shape[0] for x in (*arrays, *others) if x is not None)
    config = extend_config(mode, direction, queries, keys, max(features, values), query.dtype)
    constants = {f"{name.upper()}_STRIDE": _stride(array) for name, array in inputs.items()}
    constants |= dict(
        HEADS=heads, QUERIES=queries, KEYS=keys, FEATURES=features, VALUES=values, ROUNDS=query_buckets.shape[1],
        SCALE=scale, HAS_VALID=valid is not None, ONCE=once, PRECISION=_precision(query, value),
        BLOCK_H=_width(features), BLOCK_V=_width(values),
    )  # fmt: skip
    return inputs, batch, config, constants


def extend_config(mode, direction, queries, keys, features, dtype):
    if mode == "interpret":
        return launch.Config(dict(BLOCK_Q=_power(min(queries, 128)), BLOCK_K=_power(min(keys, 128))))
    if dtype == jnp.float32:
        narrow = (32, 32, 8) if features <= 64 else (16, 32, 4)
        tile = dict(forward=narrow, query=(16, 32, 8), key=(32, 16, 8))[direction]
    else:
        tile = dict(forward=(64, 64, 8), query=(64, 32, 4), key=(64, 64 if features <= 64 else 32, 8))[direction]
    heuristic = launch.Config(
        dict(BLOCK_Q=_power(min(queries, tile[0])), BLOCK_K=tile[1]), num_warps=tile[2], num_stages=1)
    return launch.config(f"lsh.extend.{direction}", heuristic, features=features, bits=8 * jnp.dtype(dtype).itemsize)


# -------------------------------------------------------------------------------------------------------------- common


def _check(*arrays):
    for array in arrays:
        if array.dtype.name not in launch.FLOATS:
            raise launch.Declined(f"the kernel works in float32, bfloat16 and float16 only, not in {array.dtype}.")
        if array.shape[-1] > MOST_FEATURES:
            raise launch.Declined(f"the kernel holds heads of at most {MOST_FEATURES} features.")
        if array.size == 0:
            raise launch.Declined("there is nothing to compute.")


def _stride(array) -> int:
    """Elements from sample to sample; 0 where all samples share one."""
    return 0 if array is None or array.shape[0] == 1 else math.prod(array.shape[1:])


def _power(size: int) -> int:
    """The power of two that holds `size`, at least the 16 that a dot takes."""
    return max(16, triton.next_power_of_2(size))


_width = _power


def _precision(*arrays) -> str:
    return launch.dot_precision(max((x.dtype for x in arrays), key=lambda dtype: jnp.dtype(dtype).itemsize))
