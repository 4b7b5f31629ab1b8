"""Flash attention over lists of tiles: one family of Triton kernels for every pattern whose tiles are known beforehand.

For each tile of queries a row of numbers, made in NumPy while tracing, says which tiles of keys need no test (full) and
which need one (partial): as ranges where the tiles lie side by side, as lists where they do not. Tiles in which nothing is
visible are not visited. The backward pass is deterministic: one kernel goes over the same rows for the queries' gradient,
one over the transposed rows for those of keys and values, one over the tiles of a bias; no atomics.

Logits inside the kernels are in base 2. Every visited tile costs two products forward, three and four in the two backward
kernels, and two more for a bias.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import triton
import triton.language as tl

from subquad.kernels import launch, precision
from subquad.kernels.softmax import online
from subquad.kernels.softmax.xla import Visible

LOG2_E, LN_2 = math.log2(math.e), math.log(2)
LARGEST_HEAD = 128
# Bytes of keys and values of the heads that run side by side: they should stay in the L2 cache.
CACHE_BYTES = 16 << 20


# ------------------------------------------------------------------------------------------------------ jitted helpers


@triton.jit
def load_rows(pointer, start, LENGTH, STRIDE: tl.constexpr, FEATURES: tl.constexpr, ROWS: tl.constexpr,
              PADDED: tl.constexpr, CHECK: tl.constexpr):  # fmt: skip
    """Rows start .. start + ROWS of an array [LENGTH, FEATURES] as [ROWS, PADDED]; 0 outside. CHECK: rows may lie outside."""
    row, feature = tl.arange(0, ROWS), tl.arange(0, PADDED)
    at = pointer + start.to(tl.int64) * STRIDE + row[:, None] * STRIDE + feature[None, :]
    if CHECK:
        inside = start + row[:, None] < LENGTH
        if FEATURES != PADDED:
            inside = inside & (feature[None, :] < FEATURES)
        return tl.load(at, mask=inside, other=0.0)
    if FEATURES != PADDED:
        return tl.load(at, mask=feature[None, :] < FEATURES, other=0.0)
    return tl.load(at)


@triton.jit
def store_rows(pointer, start, tile, LENGTH, STRIDE: tl.constexpr, FEATURES: tl.constexpr, ROWS: tl.constexpr,
               PADDED: tl.constexpr):  # fmt: skip
    """The inverse of `load_rows`."""
    row, feature = tl.arange(0, ROWS), tl.arange(0, PADDED)
    at = pointer + start.to(tl.int64) * STRIDE + row[:, None] * STRIDE + feature[None, :]
    inside = (start + row[:, None] < LENGTH) & (feature[None, :] < FEATURES)
    tl.store(at, tile.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def online_update(maximum, normaliser, accumulator, logits, value, FACTOR: tl.constexpr, GUARD: tl.constexpr,
                  PRECISION: tl.constexpr):  # fmt: skip
    """The online softmax over one more tile of logits [t, s] and values [s, V].

    Logits times FACTOR > 0 are in base 2. GUARD: some of them may be -inf. A row that has seen nothing has maximum -inf.
    """
    highest = tl.maximum(maximum, tl.max(logits, 1) * FACTOR)
    shift = highest
    if GUARD:
        shift = tl.where(highest == float("-inf"), 0.0, highest)
    weights = tl.exp2(logits * FACTOR - shift[:, None])
    decay = tl.exp2(maximum - shift)
    normaliser = normaliser * decay + tl.sum(weights, 1)
    accumulator = tl.dot(weights.to(value.dtype), value, accumulator * decay[:, None], input_precision=PRECISION)
    return highest, normaliser, accumulator


@triton.jit
def online_finish(maximum, normaliser, accumulator):
    """Outputs and log-sum-exp in base 2: 0 and -inf for rows that have seen nothing."""
    empty = normaliser == 0.0
    normaliser = tl.where(empty, 1.0, normaliser)
    lse = tl.where(empty, float("-inf"), maximum + tl.log2(normaliser))
    return accumulator / normaliser[:, None], lse


@triton.jit
def square(pointer, b, n, q, k, OF_B: tl.constexpr, OF_N: tl.constexpr, OF_T: tl.constexpr, OF_S: tl.constexpr,
           T: tl.constexpr, S: tl.constexpr):  # fmt: skip
    """A tile of a mask or bias with strides (OF_B, OF_N, OF_T, OF_S), 0 on an axis of one element; 0 outside.

    q and k are indices of two axes, [t, 1] and [1, s] or the other way round; an axis of one element is read once.
    """
    base = pointer + b * OF_B + n * OF_N
    if OF_T == 0:
        tile = tl.load(base + k * OF_S, mask=k < S, other=0)
    elif OF_S == 0:
        tile = tl.load(base + q.to(tl.int64) * OF_T, mask=q < T, other=0)
    else:
        tile = tl.load(base + q.to(tl.int64) * OF_T + k * OF_S, mask=(q < T) & (k < S), other=0)
    return tile


@triton.jit
def bias_tile(pointer, b, n, q, k, OF_B: tl.constexpr, OF_N: tl.constexpr, OF_T: tl.constexpr, OF_S: tl.constexpr,
              T: tl.constexpr, S: tl.constexpr):  # fmt: skip
    """A tile of the bias as `square` has it, in base 2 and float32. Only -inf hides: the least of the others stays finite."""
    tile = square(pointer, b, n, q, k, OF_B, OF_N, OF_T, OF_S, T, S).to(tl.float32)
    return tl.where(tile == float("-inf"), tile, tl.maximum(tile * 1.4426950408889634, -3.3e38))


@triton.jit
def is_seen(b, n, q, k, mask, query_positions, key_positions, query_segments, key_segments, pattern,
            T: tl.constexpr, S: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, QUERY_START: tl.constexpr,
            KEY_START: tl.constexpr, OF_QUERY_POSITIONS: tl.constexpr, OF_KEY_POSITIONS: tl.constexpr,
            HAS_SEGMENTS: tl.constexpr, OF_QUERY_SEGMENTS: tl.constexpr, OF_KEY_SEGMENTS: tl.constexpr,
            HAS_MASK: tl.constexpr, MASK_B: tl.constexpr, MASK_N: tl.constexpr, MASK_T: tl.constexpr,
            MASK_S: tl.constexpr, BLOCK_SIZE: tl.constexpr, PATTERN_N: tl.constexpr):  # fmt: skip
    """Which key a query sees, for indices q and k of two axes, [t, 1] and [1, s] or the other way round."""
    seen = k < S
    if LEFT is not None or RIGHT is not None:
        if QUERY_START is None:
            at = tl.load(query_positions + b * OF_QUERY_POSITIONS + q, mask=q < T, other=0)
        else:
            at = q + QUERY_START
        if KEY_START is None:
            of = tl.load(key_positions + b * OF_KEY_POSITIONS + k, mask=k < S, other=0)
        else:
            of = k + KEY_START
        if LEFT is not None:
            seen = seen & (of >= at - LEFT)
        if RIGHT is not None:
            seen = seen & (of <= at + RIGHT)
    if HAS_SEGMENTS:
        at = tl.load(query_segments + b * OF_QUERY_SEGMENTS + q, mask=q < T, other=0)
        of = tl.load(key_segments + b * OF_KEY_SEGMENTS + k, mask=k < S, other=0)
        seen = seen & (at == of)
    if HAS_MASK:
        seen = seen & (square(mask, b, n, q, k, MASK_B, MASK_N, MASK_T, MASK_S, T, S) != 0)
    if BLOCK_SIZE is not None:
        COLUMNS: tl.constexpr = (S + BLOCK_SIZE - 1) // BLOCK_SIZE
        at = pattern + n * PATTERN_N + (q // BLOCK_SIZE) * COLUMNS + k // BLOCK_SIZE
        seen = seen & (tl.load(at, mask=(q < T) & (k < S), other=0) != 0)
    return seen


@triton.jit
def place_of(ROWS: tl.constexpr, HEADS: tl.constexpr, TOGETHER: tl.constexpr):
    """(rank of the row, sample, head) of this program: TOGETHER heads share the cache, their longest rows come first."""
    program = tl.program_id(0)
    rest = program % (ROWS * TOGETHER)
    head = (program // (ROWS * TOGETHER)) * TOGETHER + rest % TOGETHER
    return rest // TOGETHER, (head // HEADS).to(tl.int64), (head % HEADS).to(tl.int64)


@triton.jit
def work_of(rows, bounds, rank, b, n, ROWS: tl.constexpr, ROWS_N: tl.constexpr, HAS_BOUNDS: tl.constexpr,
            BOUNDS_B: tl.constexpr):  # fmt: skip
    """The row of this rank: its tile, and three ranges: two of partial tiles, one of full tiles, cut to the bounds."""
    row = rows + n * ROWS_N + rank * 7
    tile = tl.load(row)
    first, first_end, second = tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    second_end, full, full_end = tl.load(row + 4), tl.load(row + 5), tl.load(row + 6)
    if HAS_BOUNDS:
        low = tl.load(bounds + b * BOUNDS_B + tile * 2)
        high = tl.load(bounds + b * BOUNDS_B + tile * 2 + 1)
        first, second, full = tl.maximum(first, low), tl.maximum(second, low), tl.maximum(full, low)
        first_end, second_end = tl.minimum(first_end, high), tl.minimum(second_end, high)
        full_end = tl.minimum(full_end, high)
    return tile, first, tl.maximum(first_end - first, 0), second, tl.maximum(second_end - second, 0), full, full_end


@triton.jit
def tile_at(tiles, i, first, first_count, second, full, TESTED: tl.constexpr, LISTED: tl.constexpr):
    """The i-th partial or full tile of a row."""
    if TESTED:
        tile = tl.where(i < first_count, first + i, second + i - first_count)
    else:
        tile = full + i
    if LISTED:
        tile = tl.load(tiles + tile)
    return tile


# -------------------------------------------------------------------------------------------------------------- kernels
#
# The constants that all kernels share:
#   T S N K H V         shapes; OF_QUERY OF_KEY OF_VALUE, OF_...: the stride of the batch, 0 where samples share an array
#   LEFT ... PATTERN_N  what `is_seen` asks
#   BIAS_B ... BIAS_S   strides of the bias
#   ROWS ROWS_N         rows of the work, and their stride per head (0: the same for all heads)
#   SCALE FACTOR        the logits are scaled by SCALE (in base 2) at once, or by FACTOR when exponents are taken


@triton.jit
def softmax_forward(
    query, key, value, bias, mask, query_positions, key_positions, query_segments, key_segments, pattern, bounds, rows,
    tiles, out, lse,
    T: tl.constexpr, S: tl.constexpr, N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, V: tl.constexpr,
    OF_QUERY: tl.constexpr, OF_KEY: tl.constexpr, OF_VALUE: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, QUERY_START: tl.constexpr, KEY_START: tl.constexpr,
    OF_QUERY_POSITIONS: tl.constexpr, OF_KEY_POSITIONS: tl.constexpr, HAS_SEGMENTS: tl.constexpr,
    OF_QUERY_SEGMENTS: tl.constexpr, OF_KEY_SEGMENTS: tl.constexpr, HAS_MASK: tl.constexpr, MASK_B: tl.constexpr,
    MASK_N: tl.constexpr, MASK_T: tl.constexpr, MASK_S: tl.constexpr, BLOCK_SIZE: tl.constexpr, PATTERN_N: tl.constexpr,
    HAS_BIAS: tl.constexpr, BIAS_B: tl.constexpr, BIAS_N: tl.constexpr, BIAS_T: tl.constexpr, BIAS_S: tl.constexpr,
    ROWS: tl.constexpr, ROWS_N: tl.constexpr, LISTED: tl.constexpr, HAS_BOUNDS: tl.constexpr, BOUNDS_B: tl.constexpr,
    TOGETHER: tl.constexpr, SCALE: tl.constexpr, FACTOR: tl.constexpr, PRECISION: tl.constexpr, PADDED_H: tl.constexpr,
    PADDED_V: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head: out and lse [B, N, T]."""
    rank, b, n = place_of(ROWS, N, TOGETHER)
    tile, first, first_count, second, second_count, full, full_end = work_of(
        rows, bounds, rank, b, n, ROWS, ROWS_N, HAS_BOUNDS, BOUNDS_B
    )
    start = tile * BLOCK_Q
    head = n // (N // K)
    q = start + tl.arange(0, BLOCK_Q)
    own = load_rows(query + b * OF_QUERY + n * H, start, T, N * H, H, BLOCK_Q, PADDED_H, T % BLOCK_Q != 0)
    maximum = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    normaliser = tl.zeros([BLOCK_Q], tl.float32)
    accumulator = tl.zeros([BLOCK_Q, PADDED_V], tl.float32)
    for TESTED in tl.static_range(1, -1, -1):
        count = first_count + second_count if TESTED else full_end - full
        for i in range(count):
            at = tile_at(tiles, i, first, first_count, second, full, TESTED, LISTED) * BLOCK_K
            keys = load_rows(key + b * OF_KEY + head * H, at, S, K * H, H, BLOCK_K, PADDED_H, TESTED and S % BLOCK_K != 0)
            values = load_rows(value + b * OF_VALUE + head * V, at, S, K * V, V, BLOCK_K, PADDED_V, TESTED and S % BLOCK_K != 0)
            logits = tl.dot(own, tl.trans(keys), input_precision=PRECISION)
            k = at + tl.arange(0, BLOCK_K)
            if FACTOR != SCALE:
                logits = logits * SCALE
            if HAS_BIAS:
                logits += bias_tile(bias, b, n, q[:, None], k[None, :], BIAS_B, BIAS_N, BIAS_T, BIAS_S, T, S)
            if TESTED:
                seen = is_seen(
                    b, n, q[:, None], k[None, :], mask, query_positions, key_positions, query_segments, key_segments,
                    pattern, T, S, LEFT, RIGHT, QUERY_START, KEY_START, OF_QUERY_POSITIONS, OF_KEY_POSITIONS,
                    HAS_SEGMENTS, OF_QUERY_SEGMENTS, OF_KEY_SEGMENTS, HAS_MASK, MASK_B, MASK_N, MASK_T, MASK_S,
                    BLOCK_SIZE, PATTERN_N,
                )  # fmt: skip
                logits = tl.where(seen, logits, float("-inf"))
            maximum, normaliser, accumulator = online_update(
                maximum, normaliser, accumulator, logits, values, FACTOR, TESTED or HAS_BIAS, PRECISION
            )
    result, log_sum = online_finish(maximum, normaliser, accumulator)
    store_rows(out + b * T * N * V + n * V, start, result, T, N * V, V, BLOCK_Q, PADDED_V)
    tl.store(lse + (b * N + n) * T + q, log_sum, mask=q < T)


@triton.jit
def softmax_backward_query(
    query, key, value, bias, mask, query_positions, key_positions, query_segments, key_segments, pattern, bounds, rows,
    tiles, lse, shift, grad_out, grad_query,
    T: tl.constexpr, S: tl.constexpr, N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, V: tl.constexpr,
    OF_QUERY: tl.constexpr, OF_KEY: tl.constexpr, OF_VALUE: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, QUERY_START: tl.constexpr, KEY_START: tl.constexpr,
    OF_QUERY_POSITIONS: tl.constexpr, OF_KEY_POSITIONS: tl.constexpr, HAS_SEGMENTS: tl.constexpr,
    OF_QUERY_SEGMENTS: tl.constexpr, OF_KEY_SEGMENTS: tl.constexpr, HAS_MASK: tl.constexpr, MASK_B: tl.constexpr,
    MASK_N: tl.constexpr, MASK_T: tl.constexpr, MASK_S: tl.constexpr, BLOCK_SIZE: tl.constexpr, PATTERN_N: tl.constexpr,
    HAS_BIAS: tl.constexpr, BIAS_B: tl.constexpr, BIAS_N: tl.constexpr, BIAS_T: tl.constexpr, BIAS_S: tl.constexpr,
    ROWS: tl.constexpr, ROWS_N: tl.constexpr, LISTED: tl.constexpr, HAS_BOUNDS: tl.constexpr, BOUNDS_B: tl.constexpr,
    TOGETHER: tl.constexpr, SCALE: tl.constexpr, FACTOR: tl.constexpr, PRECISION: tl.constexpr, PADDED_H: tl.constexpr,
    PADDED_V: tl.constexpr, OF_LSE: tl.constexpr, OF_SHIFT: tl.constexpr, OF_GRAD: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The gradient of one tile of queries of one head."""
    rank, b, n = place_of(ROWS, N, TOGETHER)
    tile, first, first_count, second, second_count, full, full_end = work_of(
        rows, bounds, rank, b, n, ROWS, ROWS_N, HAS_BOUNDS, BOUNDS_B
    )
    start = tile * BLOCK_Q
    head = n // (N // K)
    q = start + tl.arange(0, BLOCK_Q)
    own = load_rows(query + b * OF_QUERY + n * H, start, T, N * H, H, BLOCK_Q, PADDED_H, T % BLOCK_Q != 0)
    grad = load_rows(grad_out + b * OF_GRAD + n * V, start, T, N * V, V, BLOCK_Q, PADDED_V, T % BLOCK_Q != 0)
    log_sum = tl.load(lse + b * OF_LSE + n * T + q, mask=q < T, other=float("inf"))
    mean = tl.load(shift + b * OF_SHIFT + n * T + q, mask=q < T, other=0.0)
    accumulator = tl.zeros([BLOCK_Q, PADDED_H], tl.float32)
    for TESTED in tl.static_range(1, -1, -1):
        count = first_count + second_count if TESTED else full_end - full
        # The parts of wide operands, for three TF32 products, would fill the registers if they were made before the loop.
        for i in tl.range(count, disable_licm=PRECISION == "tf32x3" and PADDED_H > 64):
            at = tile_at(tiles, i, first, first_count, second, full, TESTED, LISTED) * BLOCK_K
            keys = load_rows(key + b * OF_KEY + head * H, at, S, K * H, H, BLOCK_K, PADDED_H, TESTED and S % BLOCK_K != 0)
            values = load_rows(value + b * OF_VALUE + head * V, at, S, K * V, V, BLOCK_K, PADDED_V, TESTED and S % BLOCK_K != 0)
            logits = tl.dot(own, tl.trans(keys), input_precision=PRECISION)
            k = at + tl.arange(0, BLOCK_K)
            if FACTOR != SCALE:
                logits = logits * SCALE
            if HAS_BIAS:
                logits += bias_tile(bias, b, n, q[:, None], k[None, :], BIAS_B, BIAS_N, BIAS_T, BIAS_S, T, S)
            # At most 0: a log-sum-exp beyond 1e9 is rounded by hundreds, and exp2 of that overflows.
            weights = tl.exp2(tl.minimum(logits * FACTOR - log_sum[:, None], 0.0))
            if TESTED:
                seen = is_seen(
                    b, n, q[:, None], k[None, :], mask, query_positions, key_positions, query_segments, key_segments,
                    pattern, T, S, LEFT, RIGHT, QUERY_START, KEY_START, OF_QUERY_POSITIONS, OF_KEY_POSITIONS,
                    HAS_SEGMENTS, OF_QUERY_SEGMENTS, OF_KEY_SEGMENTS, HAS_MASK, MASK_B, MASK_N, MASK_T, MASK_S,
                    BLOCK_SIZE, PATTERN_N,
                )  # fmt: skip
                weights = tl.where(seen, weights, 0.0)
            grad_weights = tl.dot(grad, tl.trans(values), input_precision=PRECISION)
            grad_logits = weights * (grad_weights - mean[:, None])
            accumulator = tl.dot(grad_logits.to(keys.dtype), keys, accumulator, input_precision=PRECISION)
    scale = SCALE * 0.6931471805599453
    store_rows(grad_query + b * T * N * H + n * H, start, accumulator * scale, T, N * H, H, BLOCK_Q, PADDED_H)


@triton.jit
def softmax_backward_key(
    query, key, value, bias, mask, query_positions, key_positions, query_segments, key_segments, pattern, bounds, rows,
    tiles, lse, shift, grad_out, grad_key, grad_value,
    T: tl.constexpr, S: tl.constexpr, N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, V: tl.constexpr,
    OF_QUERY: tl.constexpr, OF_KEY: tl.constexpr, OF_VALUE: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, QUERY_START: tl.constexpr, KEY_START: tl.constexpr,
    OF_QUERY_POSITIONS: tl.constexpr, OF_KEY_POSITIONS: tl.constexpr, HAS_SEGMENTS: tl.constexpr,
    OF_QUERY_SEGMENTS: tl.constexpr, OF_KEY_SEGMENTS: tl.constexpr, HAS_MASK: tl.constexpr, MASK_B: tl.constexpr,
    MASK_N: tl.constexpr, MASK_T: tl.constexpr, MASK_S: tl.constexpr, BLOCK_SIZE: tl.constexpr, PATTERN_N: tl.constexpr,
    HAS_BIAS: tl.constexpr, BIAS_B: tl.constexpr, BIAS_N: tl.constexpr, BIAS_T: tl.constexpr, BIAS_S: tl.constexpr,
    ROWS: tl.constexpr, ROWS_N: tl.constexpr, LISTED: tl.constexpr, HAS_BOUNDS: tl.constexpr, BOUNDS_B: tl.constexpr,
    TOGETHER: tl.constexpr, SCALE: tl.constexpr, FACTOR: tl.constexpr, PRECISION: tl.constexpr, PADDED_H: tl.constexpr,
    PADDED_V: tl.constexpr, OF_LSE: tl.constexpr, OF_SHIFT: tl.constexpr, OF_GRAD: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The gradients of one tile of keys and values of one key head, from all query heads that read it.

    Logits are computed transposed, [s, t]: a product that is transposed afterwards is wrong on Hopper in some versions.
    """
    rank, b, head = place_of(ROWS, K, TOGETHER)
    start = tl.load(rows + head * (N // K) * ROWS_N + rank * 7) * BLOCK_K
    k = start + tl.arange(0, BLOCK_K)
    keys = load_rows(key + b * OF_KEY + head * H, start, S, K * H, H, BLOCK_K, PADDED_H, S % BLOCK_K != 0)
    values = load_rows(value + b * OF_VALUE + head * V, start, S, K * V, V, BLOCK_K, PADDED_V, S % BLOCK_K != 0)
    key_sum = tl.zeros([BLOCK_K, PADDED_H], tl.float32)
    value_sum = tl.zeros([BLOCK_K, PADDED_V], tl.float32)
    for member in range(N // K):
        n = head * (N // K) + member
        _, first, first_count, second, second_count, full, full_end = work_of(
            rows, bounds, rank, b, n, ROWS, ROWS_N, HAS_BOUNDS, BOUNDS_B
        )
        for TESTED in tl.static_range(1, -1, -1):
            count = first_count + second_count if TESTED else full_end - full
            for i in range(count):
                at = tile_at(tiles, i, first, first_count, second, full, TESTED, LISTED) * BLOCK_Q
                q = at + tl.arange(0, BLOCK_Q)
                own = load_rows(query + b * OF_QUERY + n * H, at, T, N * H, H, BLOCK_Q, PADDED_H, T % BLOCK_Q != 0)
                grad = load_rows(grad_out + b * OF_GRAD + n * V, at, T, N * V, V, BLOCK_Q, PADDED_V, T % BLOCK_Q != 0)
                log_sum = tl.load(lse + b * OF_LSE + n * T + q, mask=q < T, other=float("inf"))
                mean = tl.load(shift + b * OF_SHIFT + n * T + q, mask=q < T, other=0.0)
                logits = tl.dot(keys, tl.trans(own), input_precision=PRECISION)
                if FACTOR != SCALE:
                    logits = logits * SCALE
                if HAS_BIAS:
                    logits += bias_tile(bias, b, n, q[None, :], k[:, None], BIAS_B, BIAS_N, BIAS_T, BIAS_S, T, S)
                weights = tl.exp2(tl.minimum(logits * FACTOR - log_sum[None, :], 0.0))
                if TESTED:
                    seen = is_seen(
                        b, n, q[None, :], k[:, None], mask, query_positions, key_positions, query_segments, key_segments,
                        pattern, T, S, LEFT, RIGHT, QUERY_START, KEY_START, OF_QUERY_POSITIONS, OF_KEY_POSITIONS,
                        HAS_SEGMENTS, OF_QUERY_SEGMENTS, OF_KEY_SEGMENTS, HAS_MASK, MASK_B, MASK_N, MASK_T, MASK_S,
                        BLOCK_SIZE, PATTERN_N,
                    )  # fmt: skip
                    weights = tl.where(seen, weights, 0.0)
                value_sum = tl.dot(weights.to(grad.dtype), grad, value_sum, input_precision=PRECISION)
                grad_weights = tl.dot(values, tl.trans(grad), input_precision=PRECISION)
                grad_logits = weights * (grad_weights - mean[None, :])
                key_sum = tl.dot(grad_logits.to(own.dtype), own, key_sum, input_precision=PRECISION)
    scale = SCALE * 0.6931471805599453
    store_rows(grad_key + b * S * K * H + head * H, start, key_sum * scale, S, K * H, H, BLOCK_K, PADDED_H)
    store_rows(grad_value + b * S * K * V + head * V, start, value_sum, S, K * V, V, BLOCK_K, PADDED_V)


@triton.jit
def products(left, start, right, at, T: tl.constexpr, S: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
             FEATURES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PADDED: tl.constexpr,
             PRECISION: tl.constexpr):  # fmt: skip
    """Of rows start .. of [T, FEATURES] and rows at .. of [S, FEATURES], which lie LEFT and RIGHT apart: [ROWS, COLUMNS].

    Of wide float32 rows a slice at a time: the parts of whole ones, for three TF32 products, are more than the registers hold.
    """
    if PRECISION != "tf32x3" or PADDED <= 64:
        rows = load_rows(left, start, T, LEFT, FEATURES, ROWS, PADDED, T % ROWS != 0)
        others = load_rows(right, at, S, RIGHT, FEATURES, COLUMNS, PADDED, S % COLUMNS != 0)
        total = tl.dot(rows, tl.trans(others), input_precision=PRECISION)
    else:
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[:, None]
        left += start.to(tl.int64) * LEFT
        right += at.to(tl.int64) * RIGHT
        for first in range(0, FEATURES + (tl.program_id(0) >> 30), 16):
            feature = first + tl.arange(0, 16)[None, :]
            rows = tl.load(left + row * LEFT + feature, mask=(start + row < T) & (feature < FEATURES), other=0.0)
            others = tl.load(right + column * RIGHT + feature, mask=(at + column < S) & (feature < FEATURES), other=0.0)
            total = tl.dot(rows, tl.trans(others), total, input_precision=PRECISION)
    return total


@triton.jit
def softmax_backward_bias(
    query, key, value, bias, mask, query_positions, key_positions, query_segments, key_segments, pattern, states, lse,
    shift, grad_out, grad_bias,
    T: tl.constexpr, S: tl.constexpr, N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, V: tl.constexpr,
    OF_QUERY: tl.constexpr, OF_KEY: tl.constexpr, OF_VALUE: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, QUERY_START: tl.constexpr, KEY_START: tl.constexpr,
    OF_QUERY_POSITIONS: tl.constexpr, OF_KEY_POSITIONS: tl.constexpr, HAS_SEGMENTS: tl.constexpr,
    OF_QUERY_SEGMENTS: tl.constexpr, OF_KEY_SEGMENTS: tl.constexpr, HAS_MASK: tl.constexpr, MASK_B: tl.constexpr,
    MASK_N: tl.constexpr, MASK_T: tl.constexpr, MASK_S: tl.constexpr, BLOCK_SIZE: tl.constexpr, PATTERN_N: tl.constexpr,
    HAS_BIAS: tl.constexpr, BIAS_B: tl.constexpr, BIAS_N: tl.constexpr, BIAS_T: tl.constexpr, BIAS_S: tl.constexpr,
    SCALE: tl.constexpr, FACTOR: tl.constexpr, PRECISION: tl.constexpr, PADDED_H: tl.constexpr, PADDED_V: tl.constexpr,
    OF_LSE: tl.constexpr, OF_SHIFT: tl.constexpr, OF_GRAD: tl.constexpr, SAMPLES: tl.constexpr, HEADS: tl.constexpr,
    WIDE_T: tl.constexpr, WIDE_S: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of the bias' gradient [., HEADS, WIDE_T, WIDE_S]: the sum over all that reads it, in a fixed order.

    SAMPLES: consecutive samples that read the same bias. HEADS, WIDE_T, WIDE_S: the bias' own sizes.
    """
    TILES_T: tl.constexpr = (T + BLOCK_Q - 1) // BLOCK_Q
    TILES_S: tl.constexpr = (S + BLOCK_K - 1) // BLOCK_K
    OWN_T: tl.constexpr = 1 if WIDE_T == 1 else TILES_T
    OWN_S: tl.constexpr = 1 if WIDE_S == 1 else TILES_S
    program = tl.program_id(0)
    own_j, own_i = program % OWN_S, (program // OWN_S) % OWN_T
    own_n, own_b = (program // (OWN_S * OWN_T)) % HEADS, program // (OWN_S * OWN_T * HEADS)
    count = SAMPLES * (N // HEADS) * (TILES_T // OWN_T) * (TILES_S // OWN_S)
    if OWN_T == TILES_T and OWN_S == TILES_S:
        count = tl.where(tl.load(states + own_i * TILES_S + own_j) == 0, 0, count)
    total = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    for step in range(count):
        j = own_j + step % (TILES_S // OWN_S)
        rest = step // (TILES_S // OWN_S)
        i = own_i + rest % (TILES_T // OWN_T)
        rest = rest // (TILES_T // OWN_T)
        n = (own_n + rest % (N // HEADS)).to(tl.int64)
        b = (own_b * SAMPLES + rest // (N // HEADS)).to(tl.int64)
        head = n // (N // K)
        start, at = i * BLOCK_Q, j * BLOCK_K
        q, k = start + tl.arange(0, BLOCK_Q), at + tl.arange(0, BLOCK_K)
        log_sum = tl.load(lse + b * OF_LSE + n * T + q, mask=q < T, other=float("inf"))
        mean = tl.load(shift + b * OF_SHIFT + n * T + q, mask=q < T, other=0.0)
        logits = products(
            query + b * OF_QUERY + n * H, start, key + b * OF_KEY + head * H, at, T, S, N * H, K * H, H, BLOCK_Q, BLOCK_K,
            PADDED_H, PRECISION,
        ) * SCALE  # fmt: skip
        logits += bias_tile(bias, b, n, q[:, None], k[None, :], BIAS_B, BIAS_N, BIAS_T, BIAS_S, T, S)
        seen = is_seen(
            b, n, q[:, None], k[None, :], mask, query_positions, key_positions, query_segments, key_segments,
            pattern, T, S, LEFT, RIGHT, QUERY_START, KEY_START, OF_QUERY_POSITIONS, OF_KEY_POSITIONS,
            HAS_SEGMENTS, OF_QUERY_SEGMENTS, OF_KEY_SEGMENTS, HAS_MASK, MASK_B, MASK_N, MASK_T, MASK_S,
            BLOCK_SIZE, PATTERN_N,
        )  # fmt: skip
        weights = tl.where(seen, tl.exp2(tl.minimum(logits - log_sum[:, None], 0.0)), 0.0)
        grad_weights = products(
            grad_out + b * OF_GRAD + n * V, start, value + b * OF_VALUE + head * V, at, T, S, N * V, K * V, V, BLOCK_Q, BLOCK_K,
            PADDED_V, PRECISION,
        )  # fmt: skip
        total += weights * (grad_weights - mean[:, None])
    base = grad_bias + (own_b * HEADS + own_n).to(tl.int64) * (WIDE_T * WIDE_S)
    row, column = own_i * BLOCK_Q + tl.arange(0, BLOCK_Q), own_j * BLOCK_K + tl.arange(0, BLOCK_K)
    if WIDE_T == 1 and WIDE_S == 1:
        tl.store(base, tl.sum(tl.sum(total, 1), 0))
    elif WIDE_T == 1:
        tl.store(base + column, tl.sum(total, 0), mask=column < WIDE_S)
    elif WIDE_S == 1:
        tl.store(base + row, tl.sum(total, 1), mask=row < WIDE_T)
    else:
        inside = (row[:, None] < WIDE_T) & (column[None, :] < WIDE_S)
        tl.store(base + row[:, None].to(tl.int64) * WIDE_S + column[None, :], total, mask=inside)


# ---------------------------------------------------------------------------------------------------- which tile sees what


@dataclasses.dataclass(frozen=True)
class Geometry:
    """What is known of the visible pairs while tracing.

    Positions are a number (they count from it), the bytes of an int32 [B|1, length] array, or None: known at run time only.
    """

    queries: int
    keys: int
    left: int | None
    right: int | None
    query_positions: int | bytes | None
    key_positions: int | bytes | None
    tested: bool  # by a mask or segments, so that no tile is full
    pattern: bytes | None = None  # bool [N|1, blocks of queries, blocks of keys]
    block_size: int | None = None


@dataclasses.dataclass(frozen=True)
class Work:
    """The rows of one kernel: see `work_of` and `tile_at`."""

    rows: np.ndarray  # int32 [N|1, I, 7], the longest first
    tiles: np.ndarray | None  # int32 [P]; None: the ranges count the tiles themselves


def blocks_of(geometry: Geometry) -> np.ndarray:
    size = geometry.block_size
    shape = -1, -(-geometry.queries // size), -(-geometry.keys // size)
    return np.frombuffer(geometry.pattern, bool).reshape(shape)


def extremes(positions: int | bytes, length: int, tile: int) -> tuple[np.ndarray, np.ndarray]:
    """The smallest and the largest position of each tile, over the batch."""
    starts = np.arange(0, length, tile)
    if isinstance(positions, int):
        return positions + starts, positions + np.minimum(starts + tile, length) - 1
    array = np.frombuffer(positions, np.int32).reshape(-1, length)
    return np.minimum.reduceat(array, starts, 1).min(0), np.maximum.reduceat(array, starts, 1).max(0)


@functools.lru_cache(maxsize=64)
def states_of(geometry: Geometry, query_tile: int, key_tile: int) -> np.ndarray:
    """int8 [N|1, I, J]: 0 where nothing is visible, 1 where the tile must be tested, 2 where all of it is visible."""
    counts = -(-geometry.queries // query_tile), -(-geometry.keys // key_tile)
    seen, full = np.ones((1, *counts), bool), np.ones((1, *counts), bool)
    left, right = geometry.left, geometry.right
    if left is not None or right is not None:
        if geometry.query_positions is None or geometry.key_positions is None:
            full[:] = False
        else:
            first_query, last_query = (x[:, None] for x in extremes(geometry.query_positions, geometry.queries, query_tile))
            first_key, last_key = extremes(geometry.key_positions, geometry.keys, key_tile)
            if left is not None:
                seen &= last_key >= first_query - left
                full &= first_key >= last_query - left
            if right is not None:
                seen &= first_key <= last_query + right
                full &= last_key <= first_query + right
    if geometry.pattern is not None:
        blocks, size = blocks_of(geometry), geometry.block_size
        total = np.pad(blocks, ((0, 0), (1, 0), (1, 0))).astype(np.int32).cumsum(1).cumsum(2)
        starts = [np.arange(count) * tile // size for count, tile in zip(counts, (query_tile, key_tile), strict=True)]
        ends = [
            (np.minimum((np.arange(count) + 1) * tile, length) - 1) // size + 1
            for count, tile, length in zip(counts, (query_tile, key_tile), (geometry.queries, geometry.keys), strict=True)
        ]
        corner = lambda i, j: total[:, i[:, None], j]
        inside = corner(ends[0], ends[1]) - corner(starts[0], ends[1]) - corner(ends[0], starts[1]) + corner(*starts)
        seen = seen & (inside > 0)
        full = full & (inside == (ends[0] - starts[0])[:, None] * (ends[1] - starts[1]))
    if geometry.keys % key_tile:
        full[..., -1] = False
    if geometry.tested:
        full[:] = False
    return np.where(seen, 1 + full, 0).astype(np.int8)


@functools.lru_cache(maxsize=64)
def work(geometry: Geometry, query_tile: int, key_tile: int, transposed: bool) -> Work:
    """The rows for tiles of queries, or, transposed, for tiles of keys."""
    states = states_of(geometry, query_tile, key_tile)
    states = states.swapaxes(1, 2) if transposed else states
    seen, full = states > 0, states == 2
    (first, end), (first_full, end_full) = spans(seen), spans(full)
    none = ~full.any(2)
    first_full, end_full = np.where(none, end, first_full), np.where(none, end, end_full)
    lengths = seen.sum(2)
    if (lengths == end - first).all() and (full.sum(2) == end_full - first_full).all():
        tiles = None
        ranges = first, first_full, end_full, end, first_full, end_full
    else:
        partial = seen & ~full
        # Per row the partial tiles, then the full ones.
        tiles = np.concatenate([np.nonzero(partial)[2], np.nonzero(full)[2]]).astype(np.int32)
        ends = [array.sum(2).cumsum().reshape(lengths.shape) for array in (partial, full)]
        starts = [end - array.sum(2) for end, array in zip(ends, (partial, full), strict=True)]
        zero, offset = np.zeros_like(lengths), partial.sum()
        ranges = starts[0], ends[0], zero, zero, starts[1] + offset, ends[1] + offset
    # One order for all heads: those that share keys go through the rows together.
    order = np.argsort(-lengths.sum(0), kind="stable")
    rows = np.stack([np.broadcast_to(np.arange(lengths.shape[1]), lengths.shape), *ranges], axis=2)
    return Work(np.ascontiguousarray(rows[:, order].astype(np.int32)), tiles)


def spans(marks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first marked place along the last axis, and one after the last; 0 and 0 where there is none."""
    some = marks.any(2)
    return marks.argmax(2), np.where(some, marks.shape[2] - marks[..., ::-1].argmax(2), 0)


def bounds_of(geometry: Geometry, visible: Visible, query_tile: int, key_tile: int, transposed: bool):
    """int32 [B|1, I, 2]: the range of tiles outside of which nothing is visible, as far as only arrays can tell.

    For key padding, segments, and positions that are known at run time; None where these say nothing.
    """
    queries, keys = geometry.queries, geometry.keys
    counts = -(-queries // query_tile), -(-keys // key_tile)
    possible = []

    def cut(array, tile, reduce):
        count = -(-array.shape[1] // tile)
        array = jnp.pad(array, ((0, 0), (0, count * tile - array.shape[1])), mode="edge")
        return reduce(array.reshape(len(array), count, tile), axis=2)

    def sides(query_array, key_array):
        low_query, high_query = (cut(query_array, query_tile, f)[:, :, None] for f in (jnp.min, jnp.max))
        low_key, high_key = (cut(key_array, key_tile, f)[:, None] for f in (jnp.min, jnp.max))
        return low_query, high_query, low_key, high_key

    if visible.mask is not None and visible.mask.shape[1:3] == (1, 1) and visible.mask.shape[3] == keys:
        possible.append(cut(visible.mask[:, 0, 0], key_tile, jnp.any)[:, None])
    if visible.query_segment_ids is not None:
        low_query, high_query, low_key, high_key = sides(visible.query_segment_ids, visible.key_segment_ids)
        possible.append((low_key <= high_query) & (low_query <= high_key))
    if visible.query_positions is not None or visible.key_positions is not None:
        start = lambda start, length: start + jnp.arange(length, dtype=jnp.int32)[None]
        at, of = visible.query_positions, visible.key_positions
        at = start(geometry.query_positions, queries) if at is None else at
        of = start(geometry.key_positions, keys) if of is None else of
        low_query, high_query, low_key, high_key = sides(at, of)
        if geometry.left is not None:
            possible.append(high_key >= low_query - geometry.left)
        if geometry.right is not None:
            possible.append(low_key <= high_query + geometry.right)
    if not possible or counts[1 - transposed] == 1:
        return None
    seen = functools.reduce(jnp.logical_and, possible)
    seen = jnp.broadcast_to(seen, (len(seen), *counts))
    seen = seen.swapaxes(1, 2) if transposed else seen
    some, first = seen.any(2), jnp.argmax(seen, 2)
    end = jnp.where(some, seen.shape[2] - jnp.argmax(seen[..., ::-1], 2), 0)
    return jnp.stack([first, end], axis=2).astype(jnp.int32)


# ------------------------------------------------------------------------------------------------------------- the sizes


# BLOCK_Q, BLOCK_K, warps and stages by features of a head, of the tiles that meet nothing but a band and of all others.
# Of float32: three TF32 products keep six parts of each operand in registers, so tiles are small.
FLOAT32_TILES = {
    "softmax_forward": {64: ((64, 32, 4, 2),) * 2, LARGEST_HEAD: ((32, 16, 8, 1),) * 2},
    "softmax_backward_query": {64: ((64, 16, 4, 2), (16, 32, 8, 2)), LARGEST_HEAD: ((16, 32, 8, 1),) * 2},
    "softmax_backward_key": {LARGEST_HEAD: ((16, 16, 8, 1),) * 2},
    "softmax_backward_bias": {64: ((16, 32, 4, 2),) * 2, LARGEST_HEAD: ((32, 32, 8, 1),) * 2},
}


def tile_sizes(
    kernel: str, dtype, features: int, biased: bool, crowded: bool, reach: int | None, block_size: int | None, mode: launch.Mode
) -> launch.Config:
    """The heuristic configuration of a kernel: the largest that compiles without spills.

    Args:
        features: the larger of H and V, padded.
        biased: whether there is a bias, whose tiles take shared memory.
        crowded: whether a tile meets more than a band that is known beforehand, which takes registers.
        reach: keys that one query can see at most, where that is known.
        block_size: of a pattern.
    """
    if mode == "interpret":  # there a step costs the same whatever its size
        return launch.Config({"BLOCK_Q": 512, "BLOCK_K": 512})
    hopper = (launch.capability() or 90) >= 90
    wide = features > 64
    # Tiles that stick out of a narrow band, or of a block, are wasted work.
    narrow = reach is not None and reach <= 512 or block_size is not None and block_size % 128 != 0
    # The test of a pattern of blocks takes the registers that 128 wide queries would need.
    narrow = narrow or block_size is not None and wide and kernel == "softmax_forward"
    if dtype == jnp.float32:
        sizes = next(sizes[crowded] for limit, sizes in FLOAT32_TILES[kernel].items() if features <= limit)
        if kernel == "softmax_forward" and block_size is not None:
            sizes = *sizes[:2], 8, sizes[3]
    elif kernel == "softmax_backward_key":
        tile = 64 if narrow or not hopper else 128
        sizes = 32 if wide else 64, tile, 8 if wide or crowded or tile == 128 else 4, 2
    elif kernel == "softmax_backward_bias" or narrow or not hopper and kernel != "softmax_forward":
        sizes = 64, 64, 8 if wide or kernel == "softmax_backward_bias" else 4, 2
    elif kernel == "softmax_forward" and hopper and not biased and not (wide and crowded) and block_size is None:
        sizes = 128, 128, 8, 3
    else:
        sizes = 128, 64, 8, 2
    query, key, warps, stages = sizes
    return launch.Config({"BLOCK_Q": query, "BLOCK_K": key}, warps, stages)


def config_of(kernel: str, plan: "Plan", query, key, value) -> launch.Config:
    """The configuration of a kernel for one call, with no tile larger than what it cuts."""
    (_, queries, _, features), (_, keys, _, value_features) = query.shape, value.shape
    geometry = plan.geometry
    band = geometry.left, geometry.right
    reach = None if None in band else sum(band) + 1
    size = max(padded(features), padded(value_features))
    crowded = plan.biased or geometry.tested or geometry.pattern is not None
    crowded = crowded or geometry.query_positions is None or geometry.key_positions is None
    config = tile_sizes(kernel, query.dtype, size, plan.biased, crowded, reach, geometry.block_size, plan.mode)
    if plan.mode == "triton":
        sizes = dict(
            dtype=query.dtype.name, features=size, biased=plan.biased, crowded=crowded, reach=reach,
            block_size=geometry.block_size,
        )  # fmt: skip
        config = launch.config(kernel, config, **sizes)
    blocks = {name: min(config.blocks[name], padded(length)) for name, length in (("BLOCK_Q", queries), ("BLOCK_K", keys))}
    return dataclasses.replace(config, blocks=blocks)


def padded(size: int) -> int:
    """The size that a tile gives to an axis: `tl.dot` takes powers of two from 16 on."""
    return max(16, triton.next_power_of_2(size))


# ---------------------------------------------------------------------------------------------------------- the launches


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static about a call."""

    geometry: Geometry
    scale: float
    biased: bool
    samples: int  # that share one bias
    mode: launch.Mode


class Call:
    """The inputs and constants that the kernels of one call share."""

    def __init__(self, plan: Plan, batch: int, query, key, value, bias, visible: Visible):
        self.plan, self.batch, self.visible = plan, batch, visible
        self.arrays = query, key, value
        geometry = plan.geometry
        pattern = None if geometry.pattern is None else jnp.asarray(blocks_of(geometry))
        self.inputs = dict(
            query=query, key=key, value=value, bias=bias, mask=visible.mask, query_positions=visible.query_positions,
            key_positions=visible.key_positions, query_segments=visible.query_segment_ids,
            key_segments=visible.key_segment_ids, pattern=pattern,
        )  # fmt: skip
        (_, queries, heads, features), (_, keys, kv_heads, value_features) = query.shape, value.shape
        self.heads = {"query": heads, "key": kv_heads}
        scale = plan.scale * LOG2_E
        # exp2(FACTOR x) keeps the order of x only for FACTOR > 0, and a bias comes after the scale.
        early = bias is not None or not scale > 0
        start = lambda positions: positions if isinstance(positions, int) else None
        self.constants = dict(
            T=queries, S=keys, N=heads, K=kv_heads, H=features, V=value_features,
            OF_QUERY=per_sample(query), OF_KEY=per_sample(key), OF_VALUE=per_sample(value),
            LEFT=geometry.left, RIGHT=geometry.right,
            QUERY_START=start(geometry.query_positions), KEY_START=start(geometry.key_positions),
            OF_QUERY_POSITIONS=per_sample(visible.query_positions), OF_KEY_POSITIONS=per_sample(visible.key_positions),
            HAS_SEGMENTS=visible.query_segment_ids is not None,
            OF_QUERY_SEGMENTS=per_sample(visible.query_segment_ids), OF_KEY_SEGMENTS=per_sample(visible.key_segment_ids),
            HAS_MASK=visible.mask is not None, **strides("MASK", visible.mask),
            BLOCK_SIZE=geometry.block_size, PATTERN_N=0 if pattern is None or len(pattern) == 1 else pattern[0].size,
            HAS_BIAS=bias is not None, **strides("BIAS", bias), SCALE=scale, FACTOR=1.0 if early else scale,
            PRECISION=launch.dot_precision(query.dtype), PADDED_H=padded(features), PADDED_V=padded(value_features),
        )  # fmt: skip

    def launch(self, kernel, inputs: dict, outputs: dict, *, along: str, constants: dict | None = None):
        """Runs a kernel over the rows of tiles `along` "query" or "key"."""
        config = config_of(kernel.__name__, self.plan, *self.arrays)
        geometry, sizes = self.plan.geometry, (config.blocks["BLOCK_Q"], config.blocks["BLOCK_K"])
        todo = work(geometry, *sizes, along == "key")
        bounds = None if todo.tiles is not None else bounds_of(geometry, self.visible, *sizes, along == "key")
        programs = self.batch * self.heads[along]
        count = todo.rows.shape[1]
        lists = dict(bounds=bounds, rows=jnp.asarray(todo.rows), tiles=None if todo.tiles is None else jnp.asarray(todo.tiles))
        return launch.call(
            kernel,
            self.inputs | lists | inputs,
            outputs,
            grid=programs * count,
            constants=self.constants
            | dict(
                ROWS=count,
                ROWS_N=0 if len(todo.rows) == 1 else count * 7,
                LISTED=todo.tiles is not None,
                HAS_BOUNDS=bounds is not None,
                BOUNDS_B=per_sample(bounds),
                TOGETHER=self.together(programs, along),
            )
            | (constants or {}),
            config=config,
            mode=self.plan.mode,
        )

    def together(self, programs: int, along: str) -> int:
        """Heads whose programs run side by side: as many as keep what they read over and over in the cache."""
        query, key, value = self.arrays
        read = key.shape[1] * (key.shape[3] + value.shape[3]) if along == "query" else query.shape[1] * (
            query.shape[3] + value.shape[3]
        )  # fmt: skip
        groups = query.shape[2] // key.shape[2]
        room = max(1, CACHE_BYTES // (read * query.dtype.itemsize))
        room = room * groups if along == "query" else max(1, room // groups)
        return max(count for count in range(1, min(room, programs) + 1) if programs % count == 0)


def batch_of(*arrays) -> int:
    """Samples of a call some of whose arrays are shared by all of them."""
    return max(len(array) for array in arrays if array is not None)


def per_sample(array) -> int:
    """The stride of the batch axis of [B|1, ...]; 0 where samples share the array, or there is none."""
    return 0 if array is None or len(array) == 1 else math.prod(array.shape[1:])


def strides(name: str, array) -> dict[str, int]:
    """The strides of a mask or bias, 0 on axes of one element."""
    shape = (1, 1, 1, 1) if array is None else array.shape
    steps = [0 if size == 1 else math.prod(shape[axis + 1 :]) for axis, size in enumerate(shape)]
    return {f"{name}_{axis}": step for axis, step in zip("BNTS", steps, strict=True)}


def forward(plan: Plan, query, key, value, bias, *visible):
    """(out [B, T, N, V], lse [B, N, T] in base 2)."""
    call = Call(plan, batch_of(query, key, value, bias, *visible), query, key, value, bias, Visible(*visible))
    (_, queries, heads, _), features = query.shape, value.shape[3]
    outputs = dict(
        out=jax.ShapeDtypeStruct((call.batch, queries, heads, features), query.dtype),
        lse=jax.ShapeDtypeStruct((call.batch, heads, queries), jnp.float32),
    )
    return call.launch(softmax_forward, {}, outputs, along="query")


def backward(plan: Plan, query, key, value, bias, lse, shift, grad_out, *visible):
    """The gradients of query, key and value, each [B, ...], and the bias' [B / samples, ...] in float32.

    Args:
        lse: [B, N, T], in base 2, +inf for rows that see nothing.
        shift: [B, N, T], as `online.residue` has it.
    """
    batch = batch_of(query, key, value, bias, lse, shift, grad_out, *visible)
    call = Call(plan, batch, query, key, value, bias, Visible(*visible))
    shape = lambda like: jax.ShapeDtypeStruct((batch, *like.shape[1:]), like.dtype)
    inputs = dict(lse=lse, shift=shift, grad_out=grad_out)
    constants = dict(OF_LSE=per_sample(lse), OF_SHIFT=per_sample(shift), OF_GRAD=per_sample(grad_out))
    run = functools.partial(call.launch, inputs=inputs, constants=constants)
    (grad_query,) = run(softmax_backward_query, outputs=dict(grad_query=shape(query)), along="query")
    grad_key, grad_value = run(softmax_backward_key, outputs=dict(grad_key=shape(key), grad_value=shape(value)), along="key")
    if bias is None:
        return grad_query, grad_key, grad_value
    return grad_query, grad_key, grad_value, bias_gradient(call, bias, inputs, constants)


def bias_gradient(call: Call, bias, inputs, constants):
    plan, geometry = call.plan, call.plan.geometry
    config = config_of("softmax_backward_bias", plan, *call.arrays)
    tiles = config.blocks["BLOCK_Q"], config.blocks["BLOCK_K"]
    heads, *wide = bias.shape[1:]
    counts = [1 if size == 1 else -(-size // tile) for size, tile in zip(wide, tiles, strict=True)]
    states = states_of(geometry, *tiles).max(0)
    return launch.call(
        softmax_backward_bias,
        call.inputs | dict(states=jnp.asarray(states)) | inputs,
        dict(grad_bias=jax.ShapeDtypeStruct((call.batch // plan.samples, *bias.shape[1:]), jnp.float32)),
        grid=math.prod((call.batch // plan.samples, heads, *counts)),
        constants=call.constants | constants | dict(SAMPLES=plan.samples, HEADS=heads, WIDE_T=wide[0], WIDE_S=wide[1]),
        config=config,
        mode=plan.mode,
    )[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def flash(plan: Plan, query, key, value, bias, visible: Visible):
    """Attention as `plan` says -> (out [B, T, N, V], lse [B, T, N])."""
    return flash_forward(plan, query, key, value, bias, visible)[0]


def flash_forward(plan, query, key, value, bias, visible):
    out, lse = launch.fold_vmap(functools.partial(forward, plan))(query, key, value, bias, *visible)
    lse = lse.swapaxes(1, 2)
    # Kept in base 2: there and back, a log-sum-exp of -1e9 would be so far from its logits that weights overflow.
    return (out, lse * LN_2), (query, key, value, bias, visible, out, lse)


def flash_backward(plan, residuals, gradients):
    query, key, value, bias, visible, out, lse = residuals
    lse, shift, query = online.residue(out, (lse,), *gradients, plan.geometry.tested, query)
    lse, shift = (x.swapaxes(1, 2) for x in (lse, shift))
    run = launch.fold_vmap(functools.partial(backward, plan))
    grad_query, grad_key, grad_value, *rest = run(query, key, value, bias, lse, shift, gradients[0], *visible)
    return grad_query, grad_key, grad_value, rest[0].astype(bias.dtype) if rest else None, None


precision.define_passes(flash, flash_forward, flash_backward)


def attention(query, key, value, bias, visible: Visible, band, scale: float, *, mode: launch.Mode):
    """Arguments as checked by `subquad.kernels.softmax.attention` -> (out [B, T, N, V], lse [B, T, N])."""
    return listed(query, key, value, bias, visible, band, scale, None, None, mode)


def listed(query, key, value, bias, visible: Visible, band, scale: float, blocks, block_size, mode: launch.Mode):
    """`attention`, where a query moreover sees only the blocks of keys that bool `blocks` [N|1, I, J] allows its block."""
    if query.dtype.name not in launch.FLOATS:
        raise launch.Declined(f"the operands are {query.dtype}, and the kernel takes {', '.join(launch.FLOATS)} only.")
    features = max(query.shape[3], value.shape[3])
    if features > LARGEST_HEAD:
        raise launch.Declined(f"a head has {features} features, and a tile of the kernel holds {LARGEST_HEAD}.")
    positions, arrays = zip(*map(known, visible[:2]), strict=True)
    geometry = Geometry(
        query.shape[1],
        key.shape[1],
        *((None, None) if band is None else band),
        *positions,
        tested=visible.mask is not None or visible.query_segment_ids is not None,
        pattern=None if blocks is None else blocks.tobytes(),
        block_size=block_size,
    )
    shared = bias is not None and len(bias) == 1
    plan = Plan(geometry, scale, bias is not None, len(query) if shared else 1, mode)
    return flash(plan, query, key, value, bias, Visible(*arrays, *visible[2:]))


def known(positions) -> tuple[int | bytes | None, jax.Array | None]:
    """(what a `Geometry` knows of these positions, the array that the kernel must read)."""
    if positions is None:
        return 0, None
    if not isinstance(positions, np.ndarray):
        return None, positions
    first = int(positions.flat[0])
    if (positions == first + np.arange(positions.shape[1])).all():
        return first, None
    return positions.astype(np.int32).tobytes(), jnp.asarray(positions)
