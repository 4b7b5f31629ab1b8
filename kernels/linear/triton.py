"""Linear attention as a scan over chunks that carries the state: numerator, denominator and running maximum at once.

One program owns one head of one sample, a block of value features and a segment of the sequence. The sums before every
segment come from a first pass over the keys and a merge; with enough heads there is one segment and one pass. With a
projection the features are computed from query and key where they are used, and never stored; only the largest exponent
of a token comes from a pass of its own. The state stays in registers where one block of features is all of it; else it
passes through them block by block, and lives in the output that the caller gets in the end.

The backward pass runs forwards once more for the gradient of the query and backwards for those of key and value. Blocks
of value features add up: their parts of the gradients of query and key are summed outside. No result of a product is
transposed on its way into another: what is needed in both orientations is computed in both.
"""

import functools
import math

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from subquad.kernels import launch
from subquad.kernels.linear import xla
from subquad.kernels.linear.features import LOG_FLOOR, RELU_OFFSET
from subquad.kernels.linear.gradient import Arrays, Plan, bind, differentiable
from subquad.kernels.linear.reference import SMALLEST_DENOMINATOR, finite

OWNER = "linear"
SHARED = [[Arrays._fields.index(name)] for name in ("mask", "projection")]  # may be one for all samples
MAX_HEAD = 128
PROGRAMS = 264  # two for each multiprocessor of a large GPU
ALIGNMENT = 256  # segments start at multiples of it, and every chunk divides it


# ------------------------------------------------------------------------------------------------------------- helpers


@triton.jit
def _operand(x, BF16: tl.constexpr):
    """What goes into a matrix product: bfloat16, or float32 for everything else."""
    return x.to(tl.bfloat16) if BF16 else x.to(tl.float32)


@triton.jit
def _column(x, BF16: tl.constexpr):
    """The vector as a matrix for a product, [*, 16]: in bfloat16 its digits are in two columns; the others are 0.

    A product, and the sum of its columns, is a product with the vector that asks nobody to hold all of it.
    """
    at = tl.arange(0, 16)[None, :]
    x = x[:, None]
    if BF16:
        high = x.to(tl.bfloat16).to(tl.float32)
        x = tl.where(at == 0, high, tl.where(at == 1, x - high, 0.0)).to(tl.bfloat16)
    else:
        x = tl.where(at == 0, x, 0.0)
    return x


@triton.jit
def _finite(x):
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit
def _place(SEGMENTS: tl.constexpr, BLOCKS: tl.constexpr, N: tl.constexpr):
    """(sample, head, block of value features, segment) of this program; the first is int64, for large arrays."""
    program = tl.program_id(0)
    segment = program % SEGMENTS
    block = (program // SEGMENTS) % BLOCKS
    row = (program // (SEGMENTS * BLOCKS)).to(tl.int64)
    return row // N, row % N, block, segment


@triton.jit
def _tile(pointer, rows, ok, columns, WIDTH: tl.constexpr, STRIDE: tl.constexpr):
    """[rows, columns] of a matrix, 0 where not `ok` or beyond its width."""
    where = rows.to(tl.int64)[:, None] * STRIDE + columns[None, :]
    return tl.load(pointer + where, mask=ok[:, None] & (columns < WIDTH)[None, :], other=0.0)


@triton.jit
def _projection(pointer, features, H: tl.constexpr, HP: tl.constexpr, M: tl.constexpr):
    return _tile(pointer, features, features < M, tl.arange(0, HP), H, H)


@triton.jit
def _inputs(pointer, rows, ok, N: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, FEATURES: tl.constexpr):
    """What the features of a chunk are made of, [C, H]. Given features are loaded where they are used."""
    if FEATURES == "given":
        return rows
    else:
        return _tile(pointer, rows, ok, tl.arange(0, HP), H, N * H)


@triton.jit
def _largest(pointer, rows, ok, FEATURES: tl.constexpr):
    """The largest exponent among a token's features."""
    if FEATURES == "softmax":
        return tl.load(pointer + rows, mask=ok, other=0.0)
    else:
        return tl.zeros_like(rows).to(tl.float32)


@triton.jit
def _logits(x, pointer, rows, ok, high, low, features, N: tl.constexpr, M: tl.constexpr, H: tl.constexpr,
            HP: tl.constexpr, BF16: tl.constexpr, DIGITS: tl.constexpr, ACROSS: tl.constexpr):  # fmt: skip
    """The inputs times the projection, [C, M], or [M, C] if ACROSS; in float32 with the precision DIGITS."""
    if BF16 and HP <= 64:
        # The projection in two parts: an exponent that lost its digits would be an error of per cents.
        weight, rest = _projection(high, features, H, HP, M), _projection(low, features, H, HP, M)
        if ACROSS:
            logits = tl.dot(rest, tl.trans(x), tl.dot(weight, tl.trans(x)))
        else:
            logits = tl.dot(x, tl.trans(rest), tl.dot(x, tl.trans(weight)))
    else:
        # A slice at a time, loaded anew: the parts of a whole operand are more than the registers hold.
        SLICE: tl.constexpr = 64 if BF16 else 16
        if ACROSS:
            logits = tl.zeros((features.shape[0], rows.shape[0]), tl.float32)
        else:
            logits = tl.zeros((rows.shape[0], features.shape[0]), tl.float32)
        for first in range(0, HP + (tl.program_id(0) >> 30), SLICE):
            columns = first + tl.arange(0, SLICE)
            inputs = _operand(_tile(pointer, rows, ok, columns, H, N * H), BF16)
            weight = _tile(high, features, features < M, columns, H, H)
            if BF16:
                rest = _tile(low, features, features < M, columns, H, H)
                if ACROSS:
                    logits = tl.dot(rest, tl.trans(inputs), tl.dot(weight, tl.trans(inputs), logits))
                else:
                    logits = tl.dot(inputs, tl.trans(rest), tl.dot(inputs, tl.trans(weight), logits))
            elif ACROSS:
                logits = tl.dot(weight, tl.trans(inputs), logits, input_precision=DIGITS)
            else:
                logits = tl.dot(inputs, tl.trans(weight), logits, input_precision=DIGITS)
    return logits


@triton.jit
def _features(
    pointer, x, rows, ok, largest, high, low, features, N: tl.constexpr, M: tl.constexpr, H: tl.constexpr,
    HP: tl.constexpr, FEATURES: tl.constexpr, FLOOR: tl.constexpr, OFFSET: tl.constexpr, BF16: tl.constexpr,
    DIGITS: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """A block of the features of a chunk: [C, M], or [M, C] if ACROSS."""
    if FEATURES == "given":
        phi = _tile(pointer, rows, ok, features, M, N * M)
        if ACROSS:
            phi = tl.trans(phi)
    else:
        axis: tl.constexpr = 0 if ACROSS else 1
        logits = _logits(x, pointer, rows, ok, high, low, features, N, M, H, HP, BF16, DIGITS, ACROSS)
        if FEATURES == "softmax":
            phi = tl.exp(tl.maximum(logits * (H**-0.25) - tl.expand_dims(largest, axis), FLOOR))
        else:
            phi = (tl.maximum(logits, 0.0) + OFFSET) * (M**-0.5)
        phi = tl.where(tl.expand_dims(features < M, 1 - axis), phi, 0.0)
    return phi


@triton.jit
def _grad_logits(grad, phi, DEAD: tl.constexpr, M: tl.constexpr, H: tl.constexpr, FEATURES: tl.constexpr):
    """The gradient of what the projection gave, from that of the features and the features, [M, C]."""
    if FEATURES == "softmax":
        return tl.where(phi > DEAD, grad * phi, 0.0) * (H**-0.25)
    else:
        return tl.where(phi > DEAD, grad, 0.0) * (M**-0.5)


@triton.jit
def _log_scale(pointer, x, largest, rows, ok, N: tl.constexpr, H: tl.constexpr, FEATURES: tl.constexpr,
               HAS_SCALE: tl.constexpr):  # fmt: skip
    """The log scale of keys, without softmax features' log(M) / 2, and -inf for those that nothing sees."""
    own = largest
    if FEATURES == "softmax":
        wide = x.to(tl.float32)
        own -= (0.5 * H**-0.5) * tl.sum(wide * wide, 1)
    if HAS_SCALE:
        own = tl.load(pointer + rows.to(tl.int64) * N, mask=ok, other=0.0).to(tl.float32)
    return tl.where(ok, own, float("-inf"))


@triton.jit
def _real_keys(pointer, rows, S: tl.constexpr, HAS_MASK: tl.constexpr):
    ok = rows < S
    if HAS_MASK:
        ok = ok & (tl.load(pointer + rows, mask=ok, other=0) != 0)
    return ok


@triton.jit
def _load_state(numerator, denominator, features, columns, M: tl.constexpr, V: tl.constexpr):
    numerators = _tile(numerator, features, features < M, columns, V, V)
    return numerators, tl.load(denominator + features, mask=features < M, other=0.0)


@triton.jit
def _store_state(numerator, denominator, numerators, denominators, features, columns, M: tl.constexpr, V: tl.constexpr):
    place = features[:, None] * V + columns[None, :]
    tl.store(numerator + place, numerators, mask=(features < M)[:, None] & (columns < V)[None, :])
    tl.store(denominator + features, denominators, mask=features < M)


# ------------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def linear_largest(
    inputs, high, low, largest,
    T: tl.constexpr, N: tl.constexpr, M: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, PROJECTION_STRIDE: tl.constexpr,
    BF16: tl.constexpr, DIGITS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The largest exponent among each token's softmax features."""
    sample, head, _, chunk = _place((T + CHUNK - 1) // CHUNK, 1, N)
    inputs += (sample * T * N + head) * H
    high += sample * PROJECTION_STRIDE
    low += sample * PROJECTION_STRIDE
    rows = chunk * CHUNK + tl.arange(0, CHUNK)
    x = _tile(inputs, rows, rows < T, tl.arange(0, HP), H, N * H)
    found = tl.full((CHUNK,), float("-inf"), tl.float32)
    for m in range(0, M, BLOCK_M):
        features = m + tl.arange(0, BLOCK_M)
        logits = _logits(x, inputs, rows, rows < T, high, low, features, N, M, H, HP, BF16, DIGITS, False) * (H**-0.25)
        found = tl.maximum(found, tl.max(tl.where((features < M)[None, :], logits, float("-inf")), 1))
    tl.store(largest + (sample * N + head) * T + rows, found, mask=rows < T)


@triton.jit
def linear_key_sums(
    key, value, scale, mask, high, low, key_largest, numerator_out, denominator_out, largest_out,
    S: tl.constexpr, N: tl.constexpr, M: tl.constexpr, H: tl.constexpr, V: tl.constexpr, HP: tl.constexpr,
    WIDTH: tl.constexpr, BLOCKS: tl.constexpr, SEGMENTS: tl.constexpr, SEGMENT: tl.constexpr, FEATURES: tl.constexpr,
    FLOOR: tl.constexpr, OFFSET: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_MASK: tl.constexpr, MASK_STRIDE: tl.constexpr,
    PROJECTION_STRIDE: tl.constexpr, BF16: tl.constexpr, DIGITS: tl.constexpr, PRECISION: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The state of each segment alone: sums over its keys, relative to its own largest log scale."""
    BLOCKS_M: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    sample, head, part, segment = _place(SEGMENTS, BLOCKS * BLOCKS_M, N)
    block, features = part // BLOCKS_M, (part % BLOCKS_M) * BLOCK_M + tl.arange(0, BLOCK_M)
    key += (sample * S * N + head) * WIDTH
    value += (sample * S * N + head) * V
    scale += sample * S * N + head
    mask += sample * MASK_STRIDE
    high += sample * PROJECTION_STRIDE
    low += sample * PROJECTION_STRIDE
    key_largest += (sample * N + head) * S
    columns = block * BLOCK_V + tl.arange(0, BLOCK_V)
    numerators = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    denominators = tl.zeros((BLOCK_M,), tl.float32)
    before = float("-inf")
    for start in range(segment * SEGMENT, tl.minimum(segment * SEGMENT + SEGMENT, S), CHUNK):
        rows = start + tl.arange(0, CHUNK)
        seen = _real_keys(mask, rows, S, HAS_MASK)
        k = _inputs(key, rows, seen, N, H, HP, FEATURES)
        k_largest = _largest(key_largest, rows, seen, FEATURES)
        own = _log_scale(scale, k, k_largest, rows, seen, N, H, FEATURES, HAS_SCALE)
        last = tl.maximum(tl.max(own, 0), before)
        decay, weight = tl.exp(before - _finite(last)), tl.exp(own - _finite(last))
        weighed = _operand(_tile(value, rows, seen, columns, V, N * V).to(tl.float32) * weight[:, None], BF16)
        weight = _column(weight, BF16)
        phi = _features(
            key, k, rows, seen, k_largest, high, low, features, N, M, H, HP, FEATURES, FLOOR, OFFSET, BF16, DIGITS, True
        )
        phi = _operand(phi, BF16)
        numerators = tl.dot(phi, weighed, numerators * decay, input_precision=PRECISION)
        denominators = denominators * decay + tl.sum(tl.dot(phi, weight, input_precision=PRECISION), 1)
        before = last
    at = (sample * N + head) * SEGMENTS + segment
    place = features[:, None] * V + columns[None, :]
    tl.store(numerator_out + at * (M * V) + place, numerators, mask=(features < M)[:, None] & (columns < V)[None, :])
    if block == 0:
        tl.store(denominator_out + at * M + features, denominators, mask=features < M)
    if part == 0:
        tl.store(largest_out + at, before)


@triton.jit
def linear_forward(
    query, key, value, scale, mask, high, low, query_largest, key_largest, numerator_in, denominator_in, largest_in,
    out, weight_out, maximum_out, numerator, denominator, largest_out,
    T: tl.constexpr, N: tl.constexpr, M: tl.constexpr, H: tl.constexpr, V: tl.constexpr, HP: tl.constexpr,
    WIDTH: tl.constexpr, BLOCKS: tl.constexpr, SEGMENTS: tl.constexpr, SEGMENT: tl.constexpr, STATES: tl.constexpr,
    FEATURES: tl.constexpr, FLOOR: tl.constexpr, OFFSET: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_MASK: tl.constexpr,
    MASK_STRIDE: tl.constexpr, PROJECTION_STRIDE: tl.constexpr, CAUSAL: tl.constexpr, EPS: tl.constexpr,
    SMALLEST: tl.constexpr, BF16: tl.constexpr, DIGITS: tl.constexpr, PRECISION: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The outputs of a segment from the state before it (causal), or from that of all keys."""
    sample, head, block, segment = _place(SEGMENTS, BLOCKS, N)
    query += (sample * T * N + head) * WIDTH
    key += (sample * T * N + head) * WIDTH
    value += (sample * T * N + head) * V
    scale += sample * T * N + head
    mask += sample * MASK_STRIDE
    high += sample * PROJECTION_STRIDE
    low += sample * PROJECTION_STRIDE
    query_largest += (sample * N + head) * T
    key_largest += (sample * N + head) * T
    out += (sample * T * N + head) * V
    weight_out += (sample * N + head) * T
    maximum_out += (sample * N + head) * T
    columns = block * BLOCK_V + tl.arange(0, BLOCK_V)
    state = (sample * N + head) * STATES + (segment if CAUSAL else 0)
    numerator += state * (M * V)
    denominator += (state * BLOCKS + block) * M
    RESIDENT: tl.constexpr = M <= BLOCK_M
    numerators, denominators = _load_state(numerator, denominator, tl.arange(0, BLOCK_M), columns, M, V)
    before = tl.load(largest_in + state)
    for start in range(segment * SEGMENT, tl.minimum(segment * SEGMENT + SEGMENT, T), CHUNK):
        rows = start + tl.arange(0, CHUNK)
        ok = rows < T
        q = _inputs(query, rows, ok, N, H, HP, FEATURES)
        q_largest = _largest(query_largest, rows, ok, FEATURES)
        sums = tl.zeros((CHUNK, BLOCK_V), tl.float32)
        total = tl.zeros((CHUNK, 16), tl.float32)
        if CAUSAL:
            seen = _real_keys(mask, rows, T, HAS_MASK)
            k = _inputs(key, rows, seen, N, H, HP, FEATURES)
            k_largest = _largest(key_largest, rows, seen, FEATURES)
            own = _log_scale(scale, k, k_largest, rows, seen, N, H, FEATURES, HAS_SCALE)
            values = _tile(value, rows, seen, columns, V, N * V)
            last = tl.maximum(tl.max(own, 0), before)
            decay, weight = tl.exp(before - _finite(last)), tl.exp(own - _finite(last))
            weighed = _operand(values.to(tl.float32) * weight[:, None], BF16)
            weight = _column(weight, BF16)
            weights = tl.zeros((CHUNK, CHUNK), tl.float32)
        for first_feature in tl.range(0, M, BLOCK_M, disable_licm=True):
            features = first_feature + tl.arange(0, BLOCK_M)
            if not RESIDENT:
                numerators, denominators = _load_state(numerator, denominator, features, columns, M, V)
            phi = _features(
                query, q, rows, ok, q_largest, high, low, features, N, M, H, HP, FEATURES, FLOOR, OFFSET, BF16, DIGITS, False
            )
            phi = _operand(phi, BF16)
            sums = tl.dot(phi, _operand(numerators, BF16), sums, input_precision=PRECISION)
            total = tl.dot(phi, _column(denominators, BF16), total, input_precision=PRECISION)
            if CAUSAL:
                keys = _features(
                    key, k, rows, seen, k_largest, high, low, features, N, M, H, HP, FEATURES, FLOOR, OFFSET,
                    BF16, DIGITS, True,
                )
                keys = _operand(keys, BF16)
                weights = tl.dot(phi, keys, weights, input_precision=PRECISION)
                numerators = tl.dot(keys, weighed, numerators * decay, input_precision=PRECISION)
                denominators = denominators * decay + tl.sum(tl.dot(keys, weight, input_precision=PRECISION), 1)
                if not RESIDENT:
                    _store_state(numerator, denominator, numerators, denominators, features, columns, M, V)
        total = tl.sum(total, 1)
        if CAUSAL:
            visible = rows[None, :] <= rows[:, None]
            maximum = tl.maximum(tl.max(tl.where(visible, own[None, :], float("-inf")), 1), before)
            past = tl.exp(before - _finite(maximum))
            weights = tl.where(visible, weights * tl.exp(own[None, :] - _finite(maximum)[:, None]), 0.0)
            sums = tl.dot(_operand(weights, BF16), _operand(values, BF16), sums * past[:, None], input_precision=PRECISION)
            total = total * past + tl.sum(weights, 1)
            before = last
            if not RESIDENT:
                tl.debug_barrier()
        else:
            maximum = tl.zeros_like(total) + before
        total += EPS
        one_over = tl.where(total > SMALLEST, 1.0 / total, 0.0)
        place = rows.to(tl.int64)[:, None] * (N * V) + columns[None, :]
        tl.store(out + place, (sums * one_over[:, None]).to(out.dtype.element_ty), mask=ok[:, None] & (columns < V)[None, :])
        if block == 0:
            tl.store(weight_out + rows, one_over, mask=ok)
            tl.store(maximum_out + rows, maximum, mask=ok)
    if CAUSAL:
        if RESIDENT:
            _store_state(numerator, denominator, numerators, denominators, tl.arange(0, BLOCK_M), columns, M, V)
        if (segment == SEGMENTS - 1) & (block == 0):
            tl.store(largest_out + sample * N + head, before)


@triton.jit
def linear_query_sums(
    query, grad_out, weight, slope, maximum, high, low, query_largest, before_in, numerator_out, denominator_out,
    T: tl.constexpr, N: tl.constexpr, M: tl.constexpr, H: tl.constexpr, V: tl.constexpr, HP: tl.constexpr,
    WIDTH: tl.constexpr, BLOCKS: tl.constexpr, SEGMENTS: tl.constexpr, SEGMENT: tl.constexpr, FEATURES: tl.constexpr,
    FLOOR: tl.constexpr, OFFSET: tl.constexpr, PROJECTION_STRIDE: tl.constexpr, BF16: tl.constexpr,
    DIGITS: tl.constexpr, PRECISION: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """What each segment's queries send back to the state before the segment."""
    BLOCKS_M: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    sample, head, part, segment = _place(SEGMENTS, BLOCKS * BLOCKS_M, N)
    block, features = part // BLOCKS_M, (part % BLOCKS_M) * BLOCK_M + tl.arange(0, BLOCK_M)
    query += (sample * T * N + head) * WIDTH
    grad_out += (sample * T * N + head) * V
    weight += (sample * N + head) * T
    slope += (sample * N + head) * T
    maximum += (sample * N + head) * T
    high += sample * PROJECTION_STRIDE
    low += sample * PROJECTION_STRIDE
    query_largest += (sample * N + head) * T
    columns = block * BLOCK_V + tl.arange(0, BLOCK_V)
    at = (sample * N + head) * SEGMENTS + segment
    before = tl.load(before_in + at)
    numerators = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    denominators = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(segment * SEGMENT, tl.minimum(segment * SEGMENT + SEGMENT, T), CHUNK):
        rows = start + tl.arange(0, CHUNK)
        ok = rows < T
        q = _inputs(query, rows, ok, N, H, HP, FEATURES)
        q_largest = _largest(query_largest, rows, ok, FEATURES)
        factor = tl.load(weight + rows, mask=ok, other=0.0)
        factor *= tl.exp(before - _finite(tl.load(maximum + rows, mask=ok, other=float("inf"))))
        factor = tl.where(ok, factor, 0.0)
        grads = _operand(_tile(grad_out, rows, ok, columns, V, N * V).to(tl.float32) * factor[:, None], BF16)
        down = _column(factor * tl.load(slope + rows, mask=ok, other=0.0), BF16)
        phi = _features(
            query, q, rows, ok, q_largest, high, low, features, N, M, H, HP, FEATURES, FLOOR, OFFSET, BF16, DIGITS, True
        )
        phi = _operand(phi, BF16)
        numerators = tl.dot(phi, grads, numerators, input_precision=PRECISION)
        denominators -= tl.sum(tl.dot(phi, down, input_precision=PRECISION), 1)
    place = features[:, None] * V + columns[None, :]
    tl.store(numerator_out + at * (M * V) + place, numerators, mask=(features < M)[:, None] & (columns < V)[None, :])
    if block == 0:
        tl.store(denominator_out + at * M + features, denominators, mask=features < M)


@triton.jit
def linear_backward_query(
    query, key, value, scale, mask, high, low, query_largest, key_largest, numerator_in, denominator_in, largest_in,
    grad_out, weight, slope, maximum, grad_query, numerator, denominator,
    T: tl.constexpr, N: tl.constexpr, M: tl.constexpr, H: tl.constexpr, V: tl.constexpr, HP: tl.constexpr,
    WIDTH: tl.constexpr, BLOCKS: tl.constexpr, SEGMENTS: tl.constexpr, SEGMENT: tl.constexpr, STATES: tl.constexpr,
    FEATURES: tl.constexpr, FLOOR: tl.constexpr, OFFSET: tl.constexpr, DEAD: tl.constexpr, HAS_SCALE: tl.constexpr,
    HAS_MASK: tl.constexpr, MASK_STRIDE: tl.constexpr, PROJECTION_STRIDE: tl.constexpr, CAUSAL: tl.constexpr,
    BF16: tl.constexpr, DIGITS: tl.constexpr, PRECISION: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The part of the query's gradient that goes through one block of value features."""
    sample, head, block, segment = _place(SEGMENTS, BLOCKS, N)
    query += (sample * T * N + head) * WIDTH
    key += (sample * T * N + head) * WIDTH
    value += (sample * T * N + head) * V
    scale += sample * T * N + head
    mask += sample * MASK_STRIDE
    high += sample * PROJECTION_STRIDE
    low += sample * PROJECTION_STRIDE
    query_largest += (sample * N + head) * T
    key_largest += (sample * N + head) * T
    grad_out += (sample * T * N + head) * V
    weight += (sample * N + head) * T
    slope += (sample * N + head) * T
    maximum += (sample * N + head) * T
    grad_query += ((sample * BLOCKS + block) * T * N + head) * WIDTH
    columns = block * BLOCK_V + tl.arange(0, BLOCK_V)
    state = (sample * N + head) * STATES + (segment if CAUSAL else 0)
    numerator += state * (M * V)
    denominator += (state * BLOCKS + block) * M
    RESIDENT: tl.constexpr = M <= BLOCK_M
    numerators, denominators = _load_state(numerator, denominator, tl.arange(0, BLOCK_M), columns, M, V)
    before = tl.load(largest_in + state)
    for start in range(segment * SEGMENT, tl.minimum(segment * SEGMENT + SEGMENT, T), CHUNK):
        rows = start + tl.arange(0, CHUNK)
        ok = rows < T
        here = rows.to(tl.int64)
        q = _inputs(query, rows, ok, N, H, HP, FEATURES)
        q_largest = _largest(query_largest, rows, ok, FEATURES)
        grads = tl.trans(_operand(_tile(grad_out, rows, ok, columns, V, N * V), BF16))
        one_over = tl.load(weight + rows, mask=ok, other=0.0)
        down = tl.load(slope + rows, mask=ok, other=0.0)
        down = tl.where(block == 0, down, 0.0)  # the denominator is not cut into blocks
        largest = _finite(tl.load(maximum + rows, mask=ok, other=float("inf")))
        past = tl.exp(before - largest)
        if CAUSAL:
            seen = _real_keys(mask, rows, T, HAS_MASK)
            k = _inputs(key, rows, seen, N, H, HP, FEATURES)
            k_largest = _largest(key_largest, rows, seen, FEATURES)
            own = _log_scale(scale, k, k_largest, rows, seen, N, H, FEATURES, HAS_SCALE)
            values = _tile(value, rows, seen, columns, V, N * V)
            visible = rows[:, None] <= rows[None, :]
            scores = tl.dot(_operand(values, BF16), grads, input_precision=PRECISION) - down[None, :]
            scores = tl.where(visible, scores * tl.exp(own[:, None] - largest[None, :]), 0.0)
            scores = _operand(scores, BF16)
            last = tl.maximum(tl.max(own, 0), before)
            decay, factor = tl.exp(before - _finite(last)), tl.exp(own - _finite(last))
            weighed = _operand(values.to(tl.float32) * factor[:, None], BF16)
            factor = _column(factor, BF16)
        if FEATURES != "given":
            of_inputs = tl.zeros((HP, CHUNK), tl.float32)
            of_length = tl.zeros((CHUNK,), tl.float32)
        for first_feature in tl.range(0, M, BLOCK_M, disable_licm=True):
            features = first_feature + tl.arange(0, BLOCK_M)
            if not RESIDENT:
                numerators, denominators = _load_state(numerator, denominator, features, columns, M, V)
            grad = tl.dot(_operand(numerators, BF16), grads, input_precision=PRECISION)
            grad = (grad - denominators[:, None] * down[None, :]) * past[None, :]
            if CAUSAL:
                keys = _features(
                    key, k, rows, seen, k_largest, high, low, features, N, M, H, HP, FEATURES, FLOOR, OFFSET,
                    BF16, DIGITS, True,
                )
                keys = _operand(keys, BF16)
                grad = tl.dot(keys, scores, grad, input_precision=PRECISION)
                numerators = tl.dot(keys, weighed, numerators * decay, input_precision=PRECISION)
                denominators = denominators * decay + tl.sum(tl.dot(keys, factor, input_precision=PRECISION), 1)
                if not RESIDENT:
                    _store_state(numerator, denominator, numerators, denominators, features, columns, M, V)
            grad *= one_over[None, :]
            if FEATURES == "given":
                place = here[None, :] * (N * WIDTH) + features[:, None]
                inside = (features < WIDTH)[:, None] & ok[None, :]
                tl.store(grad_query + place, grad.to(grad_query.dtype.element_ty), mask=inside)
            else:
                phi = _features(
                    query, q, rows, ok, q_largest, high, low, features, N, M, H, HP, FEATURES, FLOOR, OFFSET,
                    BF16, DIGITS, True,
                )
                grad = _grad_logits(grad, phi, DEAD, M, H, FEATURES)
                projection = tl.trans(_operand(_projection(high, features, H, HP, M), BF16))
                of_inputs = tl.dot(projection, _operand(grad, BF16), of_inputs, input_precision=PRECISION)
                of_length += tl.sum(grad, 0)
        if FEATURES != "given":
            if FEATURES == "softmax":
                of_inputs -= tl.trans(q).to(tl.float32) * (of_length * (H**-0.25))[None, :]
            width = tl.arange(0, HP)
            place = here[None, :] * (N * WIDTH) + width[:, None]
            inside = (width < WIDTH)[:, None] & ok[None, :]
            tl.store(grad_query + place, of_inputs.to(grad_query.dtype.element_ty), mask=inside)
        if CAUSAL:
            before = last
            if not RESIDENT:
                tl.debug_barrier()


@triton.jit
def linear_backward_key(
    query, key, value, scale, mask, high, low, query_largest, key_largest, grad_out, weight, slope, maximum,
    numerator_in, denominator_in, largest_in, before_in,
    grad_key, grad_value, grad_scale, numerator, denominator,
    S: tl.constexpr, N: tl.constexpr, M: tl.constexpr, H: tl.constexpr, V: tl.constexpr, HP: tl.constexpr,
    WIDTH: tl.constexpr, BLOCKS: tl.constexpr, SEGMENTS: tl.constexpr, SEGMENT: tl.constexpr, STATES: tl.constexpr,
    FEATURES: tl.constexpr, FLOOR: tl.constexpr, OFFSET: tl.constexpr, DEAD: tl.constexpr, HAS_SCALE: tl.constexpr,
    HAS_MASK: tl.constexpr, MASK_STRIDE: tl.constexpr, PROJECTION_STRIDE: tl.constexpr, CAUSAL: tl.constexpr,
    BF16: tl.constexpr, DIGITS: tl.constexpr, PRECISION: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values, backwards from what comes after the segment; relative to the maximum at each place."""
    sample, head, block, segment = _place(SEGMENTS, BLOCKS, N)
    query += (sample * S * N + head) * WIDTH
    key += (sample * S * N + head) * WIDTH
    value += (sample * S * N + head) * V
    scale += sample * S * N + head
    mask += sample * MASK_STRIDE
    high += sample * PROJECTION_STRIDE
    low += sample * PROJECTION_STRIDE
    query_largest += (sample * N + head) * S
    key_largest += (sample * N + head) * S
    grad_out += (sample * S * N + head) * V
    weight += (sample * N + head) * S
    slope += (sample * N + head) * S
    maximum += (sample * N + head) * S
    grad_key += ((sample * BLOCKS + block) * S * N + head) * WIDTH
    grad_value += (sample * S * N + head) * V
    grad_scale += (sample * BLOCKS + block) * S * N + head
    columns = block * BLOCK_V + tl.arange(0, BLOCK_V)
    state = (sample * N + head) * STATES + (segment if CAUSAL else 0)
    numerator += state * (M * V)
    denominator += (state * BLOCKS + block) * M
    RESIDENT: tl.constexpr = M <= BLOCK_M
    numerators, denominators = _load_state(numerator, denominator, tl.arange(0, BLOCK_M), columns, M, V)
    alone = tl.where(block == 0, 1.0, 0.0)  # the denominator is not cut into blocks
    last = tl.load(largest_in + state)
    first = segment * SEGMENT
    chunks = tl.cdiv(tl.minimum(SEGMENT, S - first), CHUNK)
    for step in range(0, chunks):
        start = first + (chunks - 1 - step) * CHUNK
        rows = start + tl.arange(0, CHUNK)
        ok = rows < S
        here = rows.to(tl.int64)
        seen = _real_keys(mask, rows, S, HAS_MASK)
        k = _inputs(key, rows, seen, N, H, HP, FEATURES)
        k_largest = _largest(key_largest, rows, seen, FEATURES)
        own = _log_scale(scale, k, k_largest, rows, seen, N, H, FEATURES, HAS_SCALE)
        values = tl.trans(_operand(_tile(value, rows, seen, columns, V, N * V), BF16))
        after = tl.exp(own - _finite(last))
        of_value = tl.zeros((CHUNK, BLOCK_V), tl.float32)
        if CAUSAL:
            q = _inputs(query, rows, ok, N, H, HP, FEATURES)
            q_largest = _largest(query_largest, rows, ok, FEATURES)
            # A row past the end has no weight, and no exponent that could overflow.
            largest = _finite(tl.load(maximum + rows, mask=ok, other=float("inf")))
            # To the reference of the chunk before: the maximum at its end.
            before = tl.load(maximum + tl.maximum(start - 1, 0))
            before = tl.where(step == chunks - 1, tl.load(before_in + state), before)
            decay = tl.exp(before - _finite(last))
            past = tl.where(ok, tl.exp(before - largest), 0.0)
            one_over = tl.load(weight + rows, mask=ok, other=0.0)
            down = tl.load(slope + rows, mask=ok, other=0.0) * one_over * alone
            wide = _tile(grad_out, rows, ok, columns, V, N * V).to(tl.float32) * one_over[:, None]
            grads, sent = _operand(wide, BF16), _operand(wide * past[:, None], BF16)
            visible = rows[None, :] <= rows[:, None]
            scores = tl.dot(grads, values, input_precision=PRECISION) - down[:, None]
            scores = tl.where(visible, scores * tl.exp(own[None, :] - largest[:, None]), 0.0)
            scores = _operand(scores, BF16)
            down = _column(down * past, BF16)
            weights = tl.zeros((CHUNK, CHUNK), tl.float32)
        if FEATURES != "given":
            of_inputs = tl.zeros((HP, CHUNK), tl.float32)
        of_length = tl.zeros((CHUNK,), tl.float32)
        for first_feature in tl.range(0, M, BLOCK_M, disable_licm=True):
            features = first_feature + tl.arange(0, BLOCK_M)
            if not RESIDENT:
                numerators, denominators = _load_state(numerator, denominator, features, columns, M, V)
            keys = _features(
                key, k, rows, seen, k_largest, high, low, features, N, M, H, HP, FEATURES, FLOOR, OFFSET, BF16, DIGITS, False
            )
            keys = _operand(keys, BF16)
            sums = _operand(numerators, BF16)
            of_value = tl.dot(keys, sums, of_value, input_precision=PRECISION)
            grad = tl.dot(sums, values, input_precision=PRECISION)
            grad = (grad + (denominators * alone)[:, None]) * after[None, :]
            if CAUSAL:
                queries = _features(
                    query, q, rows, ok, q_largest, high, low, features, N, M, H, HP, FEATURES, FLOOR, OFFSET,
                    BF16, DIGITS, True,
                )
                queries = _operand(queries, BF16)
                weights = tl.dot(keys, queries, weights, input_precision=PRECISION)
                grad = tl.dot(queries, scores, grad, input_precision=PRECISION)
                numerators = tl.dot(queries, sent, numerators * decay, input_precision=PRECISION)
                denominators = denominators * decay - tl.sum(tl.dot(queries, down, input_precision=PRECISION), 1)
                if not RESIDENT:
                    _store_state(numerator, denominator, numerators, denominators, features, columns, M, V)
            if FEATURES == "given":
                place = here[None, :] * (N * WIDTH) + features[:, None]
                inside = (features < WIDTH)[:, None] & ok[None, :]
                tl.store(grad_key + place, grad.to(grad_key.dtype.element_ty), mask=inside)
                if HAS_SCALE:
                    phi = tl.trans(_tile(key, rows, seen, features, M, N * M))
                    of_length += tl.sum(phi.to(tl.float32) * grad, 0)
            else:
                phi = _features(
                    key, k, rows, seen, k_largest, high, low, features, N, M, H, HP, FEATURES, FLOOR, OFFSET,
                    BF16, DIGITS, True,
                )
                grad = _grad_logits(grad, phi, DEAD, M, H, FEATURES)
                projection = tl.trans(_operand(_projection(high, features, H, HP, M), BF16))
                of_inputs = tl.dot(projection, _operand(grad, BF16), of_inputs, input_precision=PRECISION)
                of_length += tl.sum(grad, 0)
        if FEATURES == "given":
            if HAS_SCALE:
                tl.store(grad_scale + here * N, of_length, mask=ok)
        else:
            if FEATURES == "softmax":
                of_inputs -= tl.trans(k).to(tl.float32) * (of_length * (H**-0.25))[None, :]
            width = tl.arange(0, HP)
            place = here[None, :] * (N * WIDTH) + width[:, None]
            inside = (width < WIDTH)[:, None] & ok[None, :]
            tl.store(grad_key + place, of_inputs.to(grad_key.dtype.element_ty), mask=inside)
        of_value *= after[:, None]
        if CAUSAL:
            late = rows[:, None] <= rows[None, :]
            weights = tl.where(late, weights * tl.exp(own[:, None] - largest[None, :]), 0.0)
            of_value = tl.dot(_operand(weights, BF16), grads, of_value, input_precision=PRECISION)
            last = before
            if not RESIDENT:
                tl.debug_barrier()
        place = here[:, None] * (N * V) + columns[None, :]
        tl.store(grad_value + place, of_value.to(grad_value.dtype.element_ty), mask=ok[:, None] & (columns < V)[None, :])
    if CAUSAL and RESIDENT:
        _store_state(numerator, denominator, numerators, denominators, tl.arange(0, BLOCK_M), columns, M, V)


# -------------------------------------------------------------------------------------------------------- launching it


def attention(query, key, value, key_log_scale, mask, is_causal, initial_state, eps, *, mode):
    """See `linear.attention`; returns the outputs and the state after the last key."""
    _decline(query, key, value, given=True)
    arrays = bind(query, key, value, key_log_scale, mask, None, initial_state)
    return _run(Plan("given", is_causal, eps, mode), arrays)


def random_feature_attention(query, key, value, projection, kernel, mask, is_causal, initial_state, *, mode):
    """See `linear.random_feature_attention`; returns the outputs and the state after the last key."""
    _decline(query, key, value, given=False)
    arrays = bind(query, key, value, None, mask, projection, initial_state)
    return _run(Plan(kernel, is_causal, 0.0, mode), arrays)


def gated(query, key, value, log_decay, beta, initial_state, normalize, scale, *, mode):
    """See `linear.gated`."""
    raise launch.Declined("decays and the delta rule have no kernel yet.")


def _decline(query, key, value, given: bool):
    if any(x.dtype.name not in launch.FLOATS for x in (query, key, value)):
        raise launch.Declined("the kernel takes float32, bfloat16 and float16 only.")
    if max(0 if given else query.shape[-1], value.shape[-1]) > MAX_HEAD:
        raise launch.Declined(f"heads have at most {MAX_HEAD} features.")


def power(size: int) -> int:
    """The tile that holds `size`: a power of two that the tensor cores can take."""
    return max(16, triton.next_power_of_2(size))


def heuristic(
    kernel: str, mode, *, features: int, values: int, width: int, bf16: bool, map: str, causal: bool
) -> launch.Config:
    """Block sizes and warps for `features`, `values` and the `width` of a head, all padded to powers of two."""
    if mode == "interpret":  # the cost there is per step, whatever its size
        tile = 64, features, values, 4
    else:
        tile = _tile_sizes(kernel, features, width, bf16, map, causal)
    blocks = dict(CHUNK=tile[0], BLOCK_M=min(tile[1], features), BLOCK_V=min(tile[2], values))
    if kernel == "linear_largest":
        blocks.pop("BLOCK_V")
    return launch.Config(blocks, tile[3], 1)


def _tile_sizes(kernel: str, features: int, width: int, bf16: bool, map: str, causal: bool) -> tuple[int, int, int, int]:
    """CHUNK, BLOCK_M, BLOCK_V and warps: the largest found with which nothing overflows the registers of Hopper."""
    name, wide = kernel.removeprefix("linear_"), width > 64
    if bf16:
        if map == "given":
            if not causal or features > 32 and name != "backward_key":
                return 64, 64, 64, 8
            # The state of few features stays in registers.
            of_key = (32, 64 if features == 64 else 16, 64, 8) if features > 32 else (32, 32, 64, 4)
            few = dict(forward=(32, 32, 64, 4), backward_query=(32, 32, 64, 4), backward_key=of_key)
            return few.get(name, (64, 64, 64, 8))
        if causal:
            softmax = map == "softmax"
            if width == 32 or not softmax and width < 32:
                of_key = (64, 16, 16, 8) if softmax else (64, 16, 32, 4)
            else:
                of_key = 32 if softmax else 64, 16, 32, 8
            sums = 64, 128 if softmax and width == 64 else 64, 64, 8
            narrow = dict(forward=sums, backward_query=(64, 16, 64 if softmax else 32, 8), backward_key=of_key)
            broad = dict(forward=(64, 64, 32, 8), backward_query=(32, 16, 64, 8), backward_key=(32, 16, 16, 8))
            return (broad if wide else narrow).get(name, (64, 64, 64, 8))
        return (64, 32, 64, 8) if name == "backward_key" else (64, 64, 64, 8)
    # Three TF32 products need both halves of both operands at once.
    if name == "largest":
        return 16, 32, 64, 4
    if name in ("key_sums", "query_sums") or (map == "given" and not causal):
        return 32, 32 if name == "forward" else 64, 64, 8
    if map == "given":
        return dict(forward=(16, 16, 16, 8), backward_query=(16, 16, 32, 4), backward_key=(16, 16, 16, 4))[name]
    of_key = (16, 32, 16, 4) if map == "softmax" and width == 16 else (16, 16, 16, 8)
    return dict(forward=(16, 16, 16, 8), backward_query=(16, 16, 32, 4), backward_key=of_key)[name]


def segments(length: int, programs: int, mode) -> int:
    """The number of segments that keep the GPU busy, of at least four chunks each."""
    if mode == "interpret":
        return 2 if length > ALIGNMENT else 1
    return max(1, min(-(-PROGRAMS // programs), length // (4 * ALIGNMENT)))


class _Call:
    """The sizes of one call, and the launches made with them."""

    def __init__(self, plan: Plan, arrays: Arrays):
        self.plan, self.arrays = plan, arrays
        self.batch, self.queries, self.heads, self.width = arrays.query.shape
        self.keys, self.values = arrays.key.shape[1], arrays.value.shape[3]
        self.features = _num_features(arrays)
        dtypes = {arrays.query.dtype.name, arrays.key.dtype.name, arrays.value.dtype.name}
        self.bf16 = dtypes == {"bfloat16"}
        high = low = arrays.projection
        if high is not None:
            high = low = arrays.projection.astype(jnp.float32)
            if self.bf16:
                high, low = high.astype(jnp.bfloat16), (high - high.astype(jnp.bfloat16)).astype(jnp.bfloat16)
        self.projection = dict(high=high, low=low)
        # Features at or below this are where the map is flat.
        dead = 1.01 * math.exp(LOG_FLOOR) if plan.features == "softmax" else 1.000001 * RELU_OFFSET * self.features**-0.5
        self.constants = dict(
            T=self.queries, S=self.keys, N=self.heads, M=self.features, H=self.width, V=self.values,
            HP=power(self.width), WIDTH=self.width,
            FEATURES=plan.features, FLOOR=LOG_FLOOR, OFFSET=RELU_OFFSET, DEAD=dead,
            PROJECTION_STRIDE=0 if high is None or high.shape[0] == 1 else self.features * self.width,
            HAS_SCALE=arrays.scale is not None, HAS_MASK=arrays.mask is not None,
            MASK_STRIDE=0 if arrays.mask is None or arrays.mask.shape[0] == 1 else self.keys,
            CAUSAL=plan.is_causal, EPS=float(plan.eps), SMALLEST=SMALLEST_DENOMINATOR, BF16=self.bf16,
            DIGITS=launch.dot_precision(jnp.float32),
            # float16 has neither the range of the sums nor that of the features, but TF32 has all of its digits.
            PRECISION=launch.dot_precision(jnp.float32 if "float32" in dtypes else jnp.float16),
        )  # fmt: skip

    def config(self, kernel) -> launch.Config:
        features, values = power(self.features), power(self.values)
        sizes = dict(
            features=features, values=values, width=power(self.width), bf16=self.bf16, map=self.plan.features,
            causal=self.plan.is_causal,
        )  # fmt: skip
        return launch.config(kernel.__name__, heuristic(kernel.__name__, self.plan.mode, **sizes), **sizes)

    def largest(self) -> dict:
        """The largest exponents of queries and keys, [B, N, T], for kernels with softmax features."""
        if self.plan.features != "softmax":
            return dict(query_largest=None, key_largest=None)
        found = {}
        for name in ("query", "key"):
            inputs = getattr(self.arrays, name)
            length, config = inputs.shape[1], self.config(linear_largest)
            constants = {**self.constants, "T": length}
            (found[f"{name}_largest"],) = launch.call(
                linear_largest, dict(inputs=inputs, **self.projection),
                dict(largest=jax.ShapeDtypeStruct((self.batch, self.heads, length), jnp.float32)),
                grid=self.batch * self.heads * -(-length // config.blocks["CHUNK"]),
                constants={name: value for name, value in constants.items() if name in linear_largest.arg_names},
                config=config, mode=self.plan.mode,
            )  # fmt: skip
        return found

    def blocks(self, kernel) -> int:
        return -(-self.values // self.config(kernel).blocks["BLOCK_V"])

    def cut(self, length: int) -> tuple[int, int]:
        """How many segments of what length."""
        count = segments(length, self.batch * self.heads, self.plan.mode)
        size = -(-length // (count * ALIGNMENT)) * ALIGNMENT
        return -(-length // size), size

    def launch(self, kernel, inputs, outputs, *, length, states=1, state=None):
        """Every segment of `length` tokens; outputs are given as shapes, or as (shape, dtype) where not float32.

        `state`: the states before the segments, which become the last two outputs: the kernel's to overwrite.
        """
        count, size = self.cut(length)
        blocks = self.blocks(kernel)
        constants = {**self.constants, "SEGMENTS": count, "SEGMENT": size, "STATES": states, "BLOCKS": blocks}
        shapes = {
            name: jax.ShapeDtypeStruct(shape[0], shape[1]) if isinstance(shape[0], tuple) else
            jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in outputs.items()
        }  # fmt: skip
        aliases, programs = None, self.batch * self.heads * blocks * count
        if state is None:
            programs *= -(-self.features // self.config(kernel).blocks["BLOCK_M"])
        else:
            numerator, denominator, largest = state
            denominator = jnp.broadcast_to(denominator[..., None, :], (*denominator.shape[:3], blocks, self.features))
            inputs = inputs | dict(numerator_in=numerator, denominator_in=denominator, largest_in=largest)
            inputs = {name: inputs[name] for name in kernel.arg_names if name in inputs}
            shapes |= {x: jax.ShapeDtypeStruct(inputs[f"{x}_in"].shape, jnp.float32) for x in ("numerator", "denominator")}
            shapes = {name: shapes[name] for name in kernel.arg_names if name in shapes}
            aliases = dict(numerator_in="numerator", denominator_in="denominator")
        return launch.call(
            kernel, inputs, shapes, grid=programs,
            constants={name: value for name, value in constants.items() if name in kernel.arg_names},
            config=self.config(kernel), mode=self.plan.mode, aliases=aliases,
        )  # fmt: skip

    def state_shapes(self, segments: int):
        """Of numerators, denominators and maxima."""
        rows = self.batch, self.heads, segments
        return (*rows, self.features, self.values), (*rows, self.features), rows

    def before(self, key_largest):
        """The states before the segments, [B, N, G, ...], and the state after all keys (None if that is yet to come)."""
        arrays, (count, _) = self.arrays, self.cut(self.keys)
        initial = arrays.numerator, arrays.denominator, arrays.largest
        if self.plan.is_causal and count == 1:
            return tuple(x[:, :, None] for x in initial), None
        sums = self.launch(
            linear_key_sums,
            dict(key=arrays.key, value=arrays.value, scale=arrays.scale, mask=arrays.mask, **self.projection,
                 key_largest=key_largest),
            dict(zip(("numerator_out", "denominator_out", "largest_out"), self.state_shapes(count), strict=True)),
            length=self.keys,
        )
        states = [jnp.concatenate([x[:, :, None], y], 2) for x, y in zip(initial, sums, strict=True)]
        largest = jax.lax.cummax(states[2], axis=2)
        if not self.plan.is_causal:
            largest = largest[:, :, -1:]
        weights = jnp.exp(states[2][:, :, None] - finite(largest)[..., None])  # [B, N, place, segment]
        if self.plan.is_causal:
            weights = jnp.where(jnp.tri(count + 1, dtype=bool), weights, 0)
        merged = (*_weigh(weights, states[0], states[1]), largest)
        if self.plan.is_causal:
            return tuple(x[:, :, :-1] for x in merged), None
        return merged, tuple(x[:, :, 0] for x in merged)


def _weigh(weights, numerators, denominators):
    """Sums over the segments j of weights [B, N, i, j]."""
    add = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    return add("bnij,bnjmv->bnimv", weights, numerators), add("bnij,bnjm->bnim", weights, denominators)


def _with_state(arrays: Arrays) -> Arrays:
    """The arrays with an initial state, that of no keys if none was given."""
    if arrays.numerator is not None:
        return arrays
    batch, _, heads, _ = arrays.query.shape
    shape = batch, heads, _num_features(arrays)
    return arrays._replace(
        numerator=jnp.zeros((*shape, arrays.value.shape[-1]), jnp.float32), denominator=jnp.zeros(shape, jnp.float32),
        largest=jnp.full(shape[:2], -jnp.inf, jnp.float32),
    )  # fmt: skip


def _num_features(arrays: Arrays) -> int:
    return arrays.query.shape[3] if arrays.projection is None else arrays.projection.shape[1]


def _forward(plan: Plan, *arrays):
    arrays = _with_state(Arrays(*arrays))
    call = _Call(plan, arrays)
    largest = call.largest()
    states, last = call.before(largest["key_largest"])
    rows = call.batch, call.heads, call.queries
    causal = plan.is_causal
    out, weight, maximum, numerator, denominator, final = call.launch(
        linear_forward,
        dict(
            query=arrays.query, key=arrays.key if causal else None, value=arrays.value if causal else None,
            scale=arrays.scale, mask=arrays.mask, **call.projection, **largest,
        ),
        dict(
            out=((*arrays.query.shape[:3], call.values), arrays.value.dtype), weight_out=rows, maximum_out=rows,
            largest_out=rows[:2],
        ),
        length=call.queries, states=states[0].shape[2], state=states,
    )  # fmt: skip
    if causal:
        last = numerator[:, :, -1], denominator[:, :, -1, 0], final
    return out, *last, weight, maximum, *states


def _backward(plan: Plan, *operands):
    count = len(Arrays._fields)
    arrays = _with_state(Arrays(*operands[:count]))
    out, weight, maximum, *states, grad_out, grad_numerator, grad_denominator, after_all = operands[count:]
    grad_state = grad_numerator, grad_denominator
    call = _Call(plan, arrays)
    causal, length = plan.is_causal, arrays.query.shape[1]
    wide = functools.partial(jnp.asarray, dtype=jnp.float32)
    slope = jnp.einsum("btnv,btnv->bnt", wide(grad_out), wide(out), precision=jax.lax.Precision.HIGHEST)
    of_rows = dict(grad_out=grad_out, weight=weight, slope=slope, maximum=maximum)
    largest = call.largest()
    of_keys = dict(key=arrays.key, value=arrays.value, scale=arrays.scale, mask=arrays.mask, **call.projection, **largest)
    width = arrays.query.shape[2:]

    none = dict.fromkeys(("key", "value"))
    grad_query, *_ = call.launch(
        linear_backward_query,
        dict(query=arrays.query, **of_keys | ({} if causal else none), **of_rows),
        dict(grad_query=((call.batch, call.blocks(linear_backward_query), length, *width), _partial(call, arrays.query,
             linear_backward_query))),
        length=length, states=states[0].shape[2], state=states,
    )  # fmt: skip

    # What comes after each segment, [B, N, G, ...]: the queries of later ones, and the final state's own gradient.
    count = call.cut(length)[0]
    before = states[2]  # [B, N, G]
    after = jnp.concatenate([before[:, :, 1:], after_all[:, :, None]], 2) if causal else before
    places = before if causal else jnp.broadcast_to(before, (call.batch, call.heads, count))
    if causal and count == 1:
        incoming = tuple(x[:, :, None] for x in grad_state)
    else:
        sums = call.launch(
            linear_query_sums,
            dict(query=arrays.query, **of_rows, **call.projection, query_largest=largest["query_largest"],
                 before_in=places),
            dict(zip(("numerator_out", "denominator_out"), call.state_shapes(count)[:2], strict=True)),
            length=length,
        )
        sums = [jnp.concatenate([x, y[:, :, None]], 2) for x, y in zip(sums, grad_state, strict=True)]
        sources = jnp.concatenate([places, after_all[:, :, None]], 2)
        weights = jnp.exp(after[..., None] - finite(sources)[:, :, None, :])
        if causal:
            weights = jnp.where(jnp.tri(count, count + 1, k=0, dtype=bool), 0, weights)
        incoming = _weigh(weights, *sums)
    blocks = call.blocks(linear_backward_key)
    keys = arrays.key.shape[1]
    given = plan.features == "given" and arrays.scale is not None
    grad_key, grad_value, grad_scale, *of_initial = call.launch(
        linear_backward_key,
        dict(
            query=arrays.query if causal else None, **of_keys, **(of_rows if causal else dict.fromkeys(of_rows)),
            before_in=before,
        ),
        dict(
            grad_key=((call.batch, blocks, keys, *width), _partial(call, arrays.key, linear_backward_key)),
            grad_value=(arrays.value.shape, arrays.value.dtype),
            grad_scale=(call.batch, blocks, *arrays.key.shape[1:3]) if given else (call.batch,),
        ),
        length=keys, states=incoming[0].shape[2], state=(*incoming, after),
    )  # fmt: skip
    if causal:
        of_initial = of_initial[0][:, :, 0], of_initial[1][:, :, 0, 0]
    else:
        decay = jnp.exp(arrays.largest - finite(before[:, :, 0]))
        of_initial = [incoming[0][:, :, 0] * decay[..., None, None], incoming[1][:, :, 0] * decay[..., None]]
    of_largest = jnp.sum(arrays.numerator * of_initial[0], (2, 3)) + jnp.sum(arrays.denominator * of_initial[1], 2)
    total = lambda x, like: jnp.sum(x, 1, dtype=jnp.float32).astype(like.dtype)
    return (
        total(grad_query, arrays.query), total(grad_key, arrays.key), grad_value,
        *([total(grad_scale, arrays.scale)] if given else []), *of_initial, of_largest,
    )  # fmt: skip


def _partial(call, array, kernel):
    """float32 for what is still to be added up."""
    return array.dtype if call.blocks(kernel) == 1 else jnp.float32


def forward(plan: Plan, arrays: Arrays):
    arrays, shift = _shifted(plan, arrays)
    out, *rest = launch.fold_vmap(functools.partial(_forward, plan), SHARED)(*arrays)
    numerator, denominator, largest = rest[:3]
    return out, (numerator, denominator, largest - shift), (largest, *rest[3:])


def backward(plan: Plan, arrays: Arrays, out, residuals, gradients):
    grad_out, grad_state = gradients
    largest, *residuals = residuals
    run = launch.fold_vmap(functools.partial(_backward, plan), SHARED)
    grads = run(*_shifted(plan, arrays)[0], out, *residuals, grad_out, *grad_state[:2], largest)
    of_scale = grads[3] if len(grads) == 7 else None
    of_projection = None
    if arrays.projection is not None:
        # Seldom wanted, and then not in a hurry: unused, the compiler removes it.
        of_projection = _grad_projection(plan, arrays, gradients)
    of_state = (None,) * 3 if arrays.numerator is None else grads[-3:]
    return Arrays(*grads[:3], of_scale, None, of_projection, *of_state)


def _grad_projection(plan: Plan, arrays: Arrays, gradients):
    mask = None if arrays.mask is None else arrays.mask[:, None, None]
    state = None if arrays.numerator is None else (arrays.numerator, arrays.denominator, arrays.largest)

    def run(projection):
        return xla.random_feature_attention(
            arrays.query, arrays.key, arrays.value, projection[0], plan.features, mask, plan.is_causal, state
        )

    return jax.vjp(run, arrays.projection)[1](gradients)[0]


def _shifted(plan: Plan, arrays: Arrays):
    """The kernels leave the constant -log(M) / 2 out of the log scales of softmax features."""
    shift = 0.5 * math.log(_num_features(arrays)) if plan.features == "softmax" else 0.0
    return arrays if arrays.largest is None else arrays._replace(largest=arrays.largest + shift), shift


_run = differentiable(forward, backward)
