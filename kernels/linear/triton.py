"""Linear attention as a scan over chunks with the state in registers: numerator, denominator and running maximum at once.

One program owns one head of one sample, a block of value features and a segment of the sequence. The sums before every
segment come from a first pass over the keys and a merge; with enough heads there is one segment and one pass. With a
projection the features are computed from query and key where they are used, and never stored.

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
MAX_FEATURES = 256
MAX_HEAD = 128
PROGRAMS = 264  # two for each multiprocessor of a large GPU
ALIGNMENT = 128  # segments start at multiples of it, and every chunk divides it


# ------------------------------------------------------------------------------------------------------------- helpers


@triton.jit
def _operand(x, BF16: tl.constexpr):
    """What goes into a matrix product: bfloat16, or float32 for everything else."""
    return x.to(tl.bfloat16) if BF16 else x.to(tl.float32)


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
def _projection(pointer, M: tl.constexpr, MP: tl.constexpr, H: tl.constexpr, HP: tl.constexpr):
    rows = tl.arange(0, MP)
    return _tile(pointer, rows, rows < M, tl.arange(0, HP), H, H)


@triton.jit
def _features(
    pointer, rows, ok, high, low, N: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, H: tl.constexpr, HP: tl.constexpr,
    FEATURES: tl.constexpr, FLOOR: tl.constexpr, OFFSET: tl.constexpr, BF16: tl.constexpr, PRECISE: tl.constexpr,
    ACROSS: tl.constexpr,
):  # fmt: skip
    """The features of the rows and their log scales (without log(M) / 2): [C, M], or [M, C] if ACROSS."""
    if FEATURES == "given":
        phi = _tile(pointer, rows, ok, tl.arange(0, MP), M, N * M)
        if ACROSS:
            phi = tl.trans(phi)
        scale = tl.zeros_like(rows).to(tl.float32)
    else:
        axis: tl.constexpr = 0 if ACROSS else 1
        x = _tile(pointer, rows, ok, tl.arange(0, HP), H, N * H)
        weight = _projection(high, M, MP, H, HP)
        if ACROSS:
            logits = tl.dot(_operand(weight, BF16), tl.trans(_operand(x, BF16)), input_precision=PRECISE)
        else:
            logits = tl.dot(_operand(x, BF16), tl.trans(_operand(weight, BF16)), input_precision=PRECISE)
        if BF16:
            # The projection in two parts: an exponent that lost its digits would be an error of per cents.
            rest = _projection(low, M, MP, H, HP)
            if ACROSS:
                logits = tl.dot(rest.to(tl.bfloat16), tl.trans(x.to(tl.bfloat16)), logits)
            else:
                logits = tl.dot(x.to(tl.bfloat16), tl.trans(rest.to(tl.bfloat16)), logits)
        real = tl.expand_dims(tl.arange(0, MP) < M, 1 - axis)
        if FEATURES == "softmax":
            logits = tl.where(real, logits * (H**-0.25), float("-inf"))
            largest = tl.max(logits, axis)
            phi = tl.exp(tl.maximum(logits - tl.expand_dims(largest, axis), FLOOR))
            wide = x.to(tl.float32)
            scale = largest - (0.5 * H**-0.5) * tl.sum(wide * wide, 1)
        else:
            phi = (tl.maximum(logits, 0.0) + OFFSET) * (M**-0.5)
            scale = tl.zeros_like(rows).to(tl.float32)
        phi = tl.where(real, phi, 0.0)
    return phi, scale


@triton.jit
def _grad_input(
    grad, pointer, rows, ok, high, low, N: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, H: tl.constexpr,
    HP: tl.constexpr, FEATURES: tl.constexpr, FLOOR: tl.constexpr, OFFSET: tl.constexpr, DEAD: tl.constexpr,
    BF16: tl.constexpr, PRECISION: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """[H, C], the gradient of the rows that the features were made of, from that of the features [M, C]."""
    phi, _ = _features(pointer, rows, ok, high, low, N, M, MP, H, HP, FEATURES, FLOOR, OFFSET, BF16, PRECISE, True)
    if FEATURES == "softmax":
        grad = tl.where(phi > DEAD, grad * phi, 0.0) * (H**-0.25)
    else:
        grad = tl.where(phi > DEAD, grad, 0.0) * (M**-0.5)
    weight = _projection(high, M, MP, H, HP)
    out = tl.dot(tl.trans(_operand(weight, BF16)), _operand(grad, BF16), input_precision=PRECISION)
    if FEATURES == "softmax":
        x = _tile(pointer, rows, ok, tl.arange(0, HP), H, N * H)
        out -= tl.trans(x).to(tl.float32) * (tl.sum(grad, 0) * (H**-0.25))[None, :]
    return out


@triton.jit
def _log_scale(pointer, rows, ok, own, N: tl.constexpr, HAS_SCALE: tl.constexpr):
    """The log scale of the keys, -inf for those that nothing sees."""
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
def _add(numerator, denominator, before, phi, value, scale, BF16: tl.constexpr, PRECISION: tl.constexpr):
    """The state after keys of features [M, C]."""
    last = tl.maximum(tl.max(scale, 0), before)
    weight = tl.exp(scale - _finite(last))
    decay = tl.exp(before - _finite(last))
    weighed = _operand(value.to(tl.float32) * weight[:, None], BF16)
    numerator = tl.dot(phi, weighed, numerator * decay, input_precision=PRECISION)
    denominator = denominator * decay + tl.sum(phi.to(tl.float32) * weight[None, :], 1)
    return numerator, denominator, last


# ------------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def linear_key_sums(
    key, value, scale, mask, high, low, numerator_out, denominator_out, largest_out,
    S: tl.constexpr, N: tl.constexpr, M: tl.constexpr, H: tl.constexpr, V: tl.constexpr, MP: tl.constexpr, HP: tl.constexpr,
    WIDTH: tl.constexpr, BLOCKS: tl.constexpr, SEGMENTS: tl.constexpr, SEGMENT: tl.constexpr, FEATURES: tl.constexpr,
    FLOOR: tl.constexpr, OFFSET: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_MASK: tl.constexpr, MASK_STRIDE: tl.constexpr,
    PROJECTION_STRIDE: tl.constexpr, BF16: tl.constexpr, PRECISION: tl.constexpr, PRECISE: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The state of each segment alone: sums over its keys, relative to its own largest log scale."""
    sample, head, block, segment = _place(SEGMENTS, BLOCKS, N)
    key += (sample * S * N + head) * WIDTH
    value += (sample * S * N + head) * V
    scale += sample * S * N + head
    mask += sample * MASK_STRIDE
    high += sample * PROJECTION_STRIDE
    low += sample * PROJECTION_STRIDE
    columns = block * BLOCK_V + tl.arange(0, BLOCK_V)
    numerator = tl.zeros((MP, BLOCK_V), tl.float32)
    denominator = tl.zeros((MP,), tl.float32)
    before = float("-inf")
    for start in range(segment * SEGMENT, tl.minimum(segment * SEGMENT + SEGMENT, S), CHUNK):
        rows = start + tl.arange(0, CHUNK)
        ok = _real_keys(mask, rows, S, HAS_MASK)
        phi, own = _features(key, rows, ok, high, low, N, M, MP, H, HP, FEATURES, FLOOR, OFFSET, BF16, PRECISE, True)
        own = _log_scale(scale, rows, ok, own, N, HAS_SCALE)
        values = _tile(value, rows, ok, columns, V, N * V)
        numerator, denominator, before = _add(
            numerator, denominator, before, _operand(phi, BF16), values, own, BF16, PRECISION
        )
    at = (sample * N + head) * SEGMENTS + segment
    features = tl.arange(0, MP)
    inside = (features < M)[:, None] & (columns < V)[None, :]
    tl.store(numerator_out + at * (M * V) + features[:, None] * V + columns[None, :], numerator, mask=inside)
    if block == 0:
        tl.store(denominator_out + at * M + features, denominator, mask=features < M)
        tl.store(largest_out + at, before)


@triton.jit
def linear_forward(
    query, key, value, scale, mask, high, low, numerator_in, denominator_in, largest_in,
    out, weight_out, maximum_out, numerator_out, denominator_out, largest_out,
    T: tl.constexpr, N: tl.constexpr, M: tl.constexpr, H: tl.constexpr, V: tl.constexpr, MP: tl.constexpr, HP: tl.constexpr,
    WIDTH: tl.constexpr, BLOCKS: tl.constexpr, SEGMENTS: tl.constexpr, SEGMENT: tl.constexpr, STATES: tl.constexpr,
    FEATURES: tl.constexpr, FLOOR: tl.constexpr, OFFSET: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_MASK: tl.constexpr,
    MASK_STRIDE: tl.constexpr, PROJECTION_STRIDE: tl.constexpr, CAUSAL: tl.constexpr, EPS: tl.constexpr,
    SMALLEST: tl.constexpr, BF16: tl.constexpr, PRECISION: tl.constexpr, PRECISE: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_V: tl.constexpr,
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
    out += (sample * T * N + head) * V
    weight_out += (sample * N + head) * T
    maximum_out += (sample * N + head) * T
    columns = block * BLOCK_V + tl.arange(0, BLOCK_V)
    features = tl.arange(0, MP)
    inside = (features < M)[:, None] & (columns < V)[None, :]
    state = (sample * N + head) * STATES + (segment if CAUSAL else 0)
    numerator = tl.load(
        numerator_in + state * (M * V) + features[:, None] * V + columns[None, :], mask=inside, other=0.0
    )
    denominator = tl.load(denominator_in + state * M + features, mask=features < M, other=0.0)
    before = tl.load(largest_in + state)
    for start in range(segment * SEGMENT, tl.minimum(segment * SEGMENT + SEGMENT, T), CHUNK):
        rows = start + tl.arange(0, CHUNK)
        ok = rows < T
        phi, _ = _features(query, rows, ok, high, low, N, M, MP, H, HP, FEATURES, FLOOR, OFFSET, BF16, PRECISE, False)
        phi = _operand(phi, BF16)
        sums = tl.dot(phi, _operand(numerator, BF16), input_precision=PRECISION)
        total = tl.sum(phi.to(tl.float32) * denominator[None, :], 1)
        if CAUSAL:
            seen = _real_keys(mask, rows, T, HAS_MASK)
            keys, own = _features(key, rows, seen, high, low, N, M, MP, H, HP, FEATURES, FLOOR, OFFSET, BF16, PRECISE, True)
            keys = _operand(keys, BF16)
            own = _log_scale(scale, rows, seen, own, N, HAS_SCALE)
            values = _tile(value, rows, seen, columns, V, N * V)
            visible = rows[None, :] <= rows[:, None]
            maximum = tl.maximum(tl.max(tl.where(visible, own[None, :], float("-inf")), 1), before)
            past = tl.exp(before - _finite(maximum))
            weights = tl.dot(phi, keys, input_precision=PRECISION)
            weights = tl.where(visible, weights * tl.exp(own[None, :] - _finite(maximum)[:, None]), 0.0)
            sums = tl.dot(_operand(weights, BF16), _operand(values, BF16), sums * past[:, None], input_precision=PRECISION)
            total = total * past + tl.sum(weights, 1)
            numerator, denominator, before = _add(numerator, denominator, before, keys, values, own, BF16, PRECISION)
        else:
            maximum = tl.zeros_like(total) + before
        total += EPS
        weight = tl.where(total > SMALLEST, 1.0 / total, 0.0)
        place = rows.to(tl.int64)[:, None] * (N * V) + columns[None, :]
        tl.store(out + place, (sums * weight[:, None]).to(out.dtype.element_ty), mask=ok[:, None] & (columns < V)[None, :])
        if block == 0:
            tl.store(weight_out + rows, weight, mask=ok)
            tl.store(maximum_out + rows, maximum, mask=ok)
    if CAUSAL and segment == SEGMENTS - 1:
        at = sample * N + head
        tl.store(numerator_out + at * (M * V) + features[:, None] * V + columns[None, :], numerator, mask=inside)
        if block == 0:
            tl.store(denominator_out + at * M + features, denominator, mask=features < M)
            tl.store(largest_out + at, before)


@triton.jit
def linear_query_sums(
    query, grad_out, weight, slope, maximum, high, low, before_in, numerator_out, denominator_out,
    T: tl.constexpr, N: tl.constexpr, M: tl.constexpr, H: tl.constexpr, V: tl.constexpr, MP: tl.constexpr, HP: tl.constexpr,
    WIDTH: tl.constexpr, BLOCKS: tl.constexpr, SEGMENTS: tl.constexpr, SEGMENT: tl.constexpr, FEATURES: tl.constexpr,
    FLOOR: tl.constexpr, OFFSET: tl.constexpr, PROJECTION_STRIDE: tl.constexpr, BF16: tl.constexpr,
    PRECISION: tl.constexpr, PRECISE: tl.constexpr, CHUNK: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """What each segment's queries send back to the state before the segment."""
    sample, head, block, segment = _place(SEGMENTS, BLOCKS, N)
    query += (sample * T * N + head) * WIDTH
    grad_out += (sample * T * N + head) * V
    weight += (sample * N + head) * T
    slope += (sample * N + head) * T
    maximum += (sample * N + head) * T
    high += sample * PROJECTION_STRIDE
    low += sample * PROJECTION_STRIDE
    columns = block * BLOCK_V + tl.arange(0, BLOCK_V)
    at = (sample * N + head) * SEGMENTS + segment
    before = tl.load(before_in + at)
    numerator = tl.zeros((MP, BLOCK_V), tl.float32)
    denominator = tl.zeros((MP,), tl.float32)
    for start in range(segment * SEGMENT, tl.minimum(segment * SEGMENT + SEGMENT, T), CHUNK):
        rows = start + tl.arange(0, CHUNK)
        ok = rows < T
        phi, _ = _features(query, rows, ok, high, low, N, M, MP, H, HP, FEATURES, FLOOR, OFFSET, BF16, PRECISE, True)
        phi = _operand(phi, BF16)
        factor = tl.load(weight + rows, mask=ok, other=0.0)
        factor *= tl.exp(before - _finite(tl.load(maximum + rows, mask=ok, other=0.0)))
        factor = tl.where(ok, factor, 0.0)
        grads = _tile(grad_out, rows, ok, columns, V, N * V).to(tl.float32) * factor[:, None]
        numerator = tl.dot(phi, _operand(grads, BF16), numerator, input_precision=PRECISION)
        factor *= tl.load(slope + rows, mask=ok, other=0.0)
        denominator -= tl.sum(phi.to(tl.float32) * factor[None, :], 1)
    features = tl.arange(0, MP)
    inside = (features < M)[:, None] & (columns < V)[None, :]
    tl.store(numerator_out + at * (M * V) + features[:, None] * V + columns[None, :], numerator, mask=inside)
    if block == 0:
        tl.store(denominator_out + at * M + features, denominator, mask=features < M)


@triton.jit
def linear_backward_query(
    query, key, value, scale, mask, high, low, numerator_in, denominator_in, largest_in, grad_out, weight, slope, maximum,
    grad_query,
    T: tl.constexpr, N: tl.constexpr, M: tl.constexpr, H: tl.constexpr, V: tl.constexpr, MP: tl.constexpr, HP: tl.constexpr,
    WIDTH: tl.constexpr, BLOCKS: tl.constexpr, SEGMENTS: tl.constexpr, SEGMENT: tl.constexpr, STATES: tl.constexpr,
    FEATURES: tl.constexpr, FLOOR: tl.constexpr, OFFSET: tl.constexpr, DEAD: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_MASK: tl.constexpr,
    MASK_STRIDE: tl.constexpr, PROJECTION_STRIDE: tl.constexpr, CAUSAL: tl.constexpr, BF16: tl.constexpr,
    PRECISION: tl.constexpr, PRECISE: tl.constexpr, CHUNK: tl.constexpr, BLOCK_V: tl.constexpr,
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
    grad_out += (sample * T * N + head) * V
    weight += (sample * N + head) * T
    slope += (sample * N + head) * T
    maximum += (sample * N + head) * T
    grad_query += ((sample * BLOCKS + block) * T * N + head) * WIDTH
    columns = block * BLOCK_V + tl.arange(0, BLOCK_V)
    features = tl.arange(0, MP)
    inside = (features < M)[:, None] & (columns < V)[None, :]
    state = (sample * N + head) * STATES + (segment if CAUSAL else 0)
    numerator = tl.load(
        numerator_in + state * (M * V) + features[:, None] * V + columns[None, :], mask=inside, other=0.0
    )
    denominator = tl.load(denominator_in + state * M + features, mask=features < M, other=0.0)
    before = tl.load(largest_in + state)
    for start in range(segment * SEGMENT, tl.minimum(segment * SEGMENT + SEGMENT, T), CHUNK):
        rows = start + tl.arange(0, CHUNK)
        ok = rows < T
        grads = tl.trans(_operand(_tile(grad_out, rows, ok, columns, V, N * V), BF16))
        down = tl.load(slope + rows, mask=ok, other=0.0)
        down = tl.where(block == 0, down, 0.0)  # the denominator is not cut into blocks
        largest = _finite(tl.load(maximum + rows, mask=ok, other=0.0))
        grad = tl.dot(_operand(numerator, BF16), grads, input_precision=PRECISION)
        grad = (grad - denominator[:, None] * down[None, :]) * tl.exp(before - largest)[None, :]
        if CAUSAL:
            seen = _real_keys(mask, rows, T, HAS_MASK)
            keys, own = _features(key, rows, seen, high, low, N, M, MP, H, HP, FEATURES, FLOOR, OFFSET, BF16, PRECISE, True)
            keys = _operand(keys, BF16)
            own = _log_scale(scale, rows, seen, own, N, HAS_SCALE)
            values = _tile(value, rows, seen, columns, V, N * V)
            visible = rows[:, None] <= rows[None, :]
            scores = tl.dot(_operand(values, BF16), grads, input_precision=PRECISION) - down[None, :]
            scores = tl.where(visible, scores * tl.exp(own[:, None] - largest[None, :]), 0.0)
            grad = tl.dot(keys, _operand(scores, BF16), grad, input_precision=PRECISION)
            numerator, denominator, before = _add(numerator, denominator, before, keys, values, own, BF16, PRECISION)
        grad *= tl.load(weight + rows, mask=ok, other=0.0)[None, :]
        if FEATURES == "given":
            width = features
        else:
            grad = _grad_input(
                grad, query, rows, ok, high, low, N, M, MP, H, HP, FEATURES, FLOOR, OFFSET, DEAD, BF16, PRECISION, PRECISE
            )
            width = tl.arange(0, HP)
        place = rows.to(tl.int64)[None, :] * (N * WIDTH) + width[:, None]
        tl.store(grad_query + place, grad.to(grad_query.dtype.element_ty), mask=(width < WIDTH)[:, None] & ok[None, :])


@triton.jit
def linear_backward_key(
    query, key, value, scale, mask, high, low, grad_out, weight, slope, maximum,
    numerator_in, denominator_in, largest_in, before_in,
    grad_key, grad_value, grad_scale, numerator_out, denominator_out,
    S: tl.constexpr, N: tl.constexpr, M: tl.constexpr, H: tl.constexpr, V: tl.constexpr, MP: tl.constexpr, HP: tl.constexpr,
    WIDTH: tl.constexpr, BLOCKS: tl.constexpr, SEGMENTS: tl.constexpr, SEGMENT: tl.constexpr, STATES: tl.constexpr,
    FEATURES: tl.constexpr, FLOOR: tl.constexpr, OFFSET: tl.constexpr, DEAD: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_MASK: tl.constexpr,
    MASK_STRIDE: tl.constexpr, PROJECTION_STRIDE: tl.constexpr, CAUSAL: tl.constexpr, BF16: tl.constexpr,
    PRECISION: tl.constexpr, PRECISE: tl.constexpr, CHUNK: tl.constexpr, BLOCK_V: tl.constexpr,
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
    grad_out += (sample * S * N + head) * V
    weight += (sample * N + head) * S
    slope += (sample * N + head) * S
    maximum += (sample * N + head) * S
    grad_key += ((sample * BLOCKS + block) * S * N + head) * WIDTH
    grad_value += (sample * S * N + head) * V
    grad_scale += (sample * BLOCKS + block) * S * N + head
    columns = block * BLOCK_V + tl.arange(0, BLOCK_V)
    features = tl.arange(0, MP)
    inside = (features < M)[:, None] & (columns < V)[None, :]
    state = (sample * N + head) * STATES + (segment if CAUSAL else 0)
    numerator = tl.load(
        numerator_in + state * (M * V) + features[:, None] * V + columns[None, :], mask=inside, other=0.0
    )
    denominator = tl.load(denominator_in + state * M + features, mask=features < M, other=0.0)
    denominator = tl.where(block == 0, denominator, 0.0)
    last = tl.load(largest_in + state)
    first = segment * SEGMENT
    chunks = tl.cdiv(tl.minimum(SEGMENT, S - first), CHUNK)
    for step in range(0, chunks):
        start = first + (chunks - 1 - step) * CHUNK
        rows = start + tl.arange(0, CHUNK)
        seen = _real_keys(mask, rows, S, HAS_MASK)
        keys, own = _features(key, rows, seen, high, low, N, M, MP, H, HP, FEATURES, FLOOR, OFFSET, BF16, PRECISE, False)
        keys = _operand(keys, BF16)
        own = _log_scale(scale, rows, seen, own, N, HAS_SCALE)
        values = _operand(_tile(value, rows, seen, columns, V, N * V), BF16)
        after = tl.exp(own - _finite(last))
        sums = _operand(numerator, BF16)
        of_value = tl.dot(keys, sums, input_precision=PRECISION) * after[:, None]
        of_key = tl.dot(sums, tl.trans(values), input_precision=PRECISION)
        of_key = (of_key + denominator[:, None]) * after[None, :]
        if CAUSAL:
            ok = rows < S
            queries, _ = _features(query, rows, ok, high, low, N, M, MP, H, HP, FEATURES, FLOOR, OFFSET, BF16, PRECISE, True)
            queries = _operand(queries, BF16)
            factor = tl.load(weight + rows, mask=ok, other=0.0)
            largest = _finite(tl.load(maximum + rows, mask=ok, other=0.0))
            down = tl.load(slope + rows, mask=ok, other=0.0) * factor
            down = tl.where(block == 0, down, 0.0)
            wide = _tile(grad_out, rows, ok, columns, V, N * V).to(tl.float32) * factor[:, None]
            grads = _operand(wide, BF16)
            weights = tl.dot(keys, queries, input_precision=PRECISION)
            late = rows[:, None] <= rows[None, :]
            weights = tl.where(late, weights * tl.exp(own[:, None] - largest[None, :]), 0.0)
            of_value = tl.dot(_operand(weights, BF16), grads, of_value, input_precision=PRECISION)
            scores = tl.dot(grads, tl.trans(values), input_precision=PRECISION) - down[:, None]
            visible = rows[None, :] <= rows[:, None]
            scores = tl.where(visible, scores * tl.exp(own[None, :] - largest[:, None]), 0.0)
            of_key = tl.dot(queries, _operand(scores, BF16), of_key, input_precision=PRECISION)
            # To the reference of the chunk before: the maximum at its end.
            before = tl.load(before_in + state)
            before = tl.where(step == chunks - 1, before, tl.load(maximum + tl.maximum(start - 1, 0)))
            decay = tl.exp(before - _finite(last))
            past = tl.where(ok, tl.exp(before - largest), 0.0)
            numerator = tl.dot(
                queries, _operand(wide * past[:, None], BF16), numerator * decay, input_precision=PRECISION
            )
            denominator = denominator * decay - tl.sum(queries.to(tl.float32) * (down * past)[None, :], 1)
            last = before
        here = rows.to(tl.int64)
        place = here[:, None] * (N * V) + columns[None, :]
        exists = rows < S
        tl.store(
            grad_value + place, of_value.to(grad_value.dtype.element_ty), mask=exists[:, None] & (columns < V)[None, :]
        )
        if FEATURES == "given":
            width = features
            if HAS_SCALE:
                phi, _ = _features(
                    key, rows, seen, high, low, N, M, MP, H, HP, FEATURES, FLOOR, OFFSET, BF16, PRECISE, True
                )
                tl.store(grad_scale + here * N, tl.sum(phi.to(tl.float32) * of_key, 0), mask=exists)
        else:
            of_key = _grad_input(
                of_key, key, rows, seen, high, low, N, M, MP, H, HP, FEATURES, FLOOR, OFFSET, DEAD, BF16, PRECISION, PRECISE
            )
            width = tl.arange(0, HP)
        place = here[None, :] * (N * WIDTH) + width[:, None]
        tl.store(grad_key + place, of_key.to(grad_key.dtype.element_ty), mask=(width < WIDTH)[:, None] & exists[None, :])
    if CAUSAL and segment == 0:
        at = sample * N + head
        tl.store(numerator_out + at * (M * V) + features[:, None] * V + columns[None, :], numerator, mask=inside)
        if block == 0:
            tl.store(denominator_out + at * M + features, denominator, mask=features < M)


# -------------------------------------------------------------------------------------------------------- launching it


def attention(query, key, value, key_log_scale, mask, is_causal, initial_state, eps, *, mode):
    """See `linear.attention`; returns the outputs and the state after the last key."""
    _decline(query, key, value, query.shape[-1])
    arrays = bind(query, key, value, key_log_scale, mask, None, initial_state)
    return _run(Plan("given", is_causal, eps, mode), arrays)


def random_feature_attention(query, key, value, projection, kernel, mask, is_causal, initial_state, *, mode):
    """See `linear.random_feature_attention`; returns the outputs and the state after the last key."""
    _decline(query, key, value, projection.shape[0])
    arrays = bind(query, key, value, None, mask, projection, initial_state)
    return _run(Plan(kernel, is_causal, 0.0, mode), arrays)


def _decline(query, key, value, features):
    if any(x.dtype.name not in launch.FLOATS for x in (query, key, value)):
        raise launch.Declined("the kernel takes float32, bfloat16 and float16 only.")
    if features > MAX_FEATURES:
        raise launch.Declined(f"the state of more than {MAX_FEATURES} features does not fit into registers.")
    if max(query.shape[-1] if features != query.shape[-1] else 0, value.shape[-1]) > MAX_HEAD:
        raise launch.Declined(f"heads have at most {MAX_HEAD} features.")


def power(size: int) -> int:
    """The tile that holds `size`: a power of two that the tensor cores can take."""
    return max(16, triton.next_power_of_2(size))


def heuristic(kernel: str, mode, *, features: int, values: int, bf16: bool, map: str, causal: bool) -> launch.Config:
    """Block sizes and warps for `features` and `values` padded to powers of two."""
    if mode == "interpret":  # the cost there is per step, whatever its size
        return launch.Config(dict(CHUNK=64, BLOCK_V=values))
    return launch.Config(dict(CHUNK=64 if bf16 else 32, BLOCK_V=min(64, values)), num_warps=8, num_stages=1)


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
            MP=power(self.features), HP=power(self.width), WIDTH=self.width,
            FEATURES=plan.features, FLOOR=LOG_FLOOR, OFFSET=RELU_OFFSET, DEAD=dead,
            PROJECTION_STRIDE=0 if high is None or high.shape[0] == 1 else self.features * self.width,
            HAS_SCALE=arrays.scale is not None, HAS_MASK=arrays.mask is not None,
            MASK_STRIDE=0 if arrays.mask is None or arrays.mask.shape[0] == 1 else self.keys,
            CAUSAL=plan.is_causal, EPS=float(plan.eps), SMALLEST=SMALLEST_DENOMINATOR, BF16=self.bf16,
            # float16 has neither the range of the sums nor that of the features, but TF32 has all of its digits.
            PRECISION=launch.dot_precision(jnp.float32 if "float32" in dtypes else jnp.float16), PRECISE="tf32x3",
        )  # fmt: skip

    def config(self, kernel) -> launch.Config:
        features, values = power(self.features), power(self.values)
        sizes = dict(features=features, values=values, bf16=self.bf16, map=self.plan.features, causal=self.plan.is_causal)
        return launch.config(kernel.__name__, heuristic(kernel.__name__, self.plan.mode, **sizes), **sizes)

    def blocks(self, kernel) -> int:
        return -(-self.values // self.config(kernel).blocks["BLOCK_V"])

    def cut(self, length: int) -> tuple[int, int]:
        """How many segments of what length."""
        count = segments(length, self.batch * self.heads, self.plan.mode)
        size = -(-length // (count * ALIGNMENT)) * ALIGNMENT
        return -(-length // size), size

    def launch(self, kernel, inputs, outputs, *, length, states=1):
        """Every segment of `length` tokens; outputs are given as shapes, or as (shape, dtype) where not float32."""
        count, size = self.cut(length)
        blocks = self.blocks(kernel)
        constants = {**self.constants, "SEGMENTS": count, "SEGMENT": size, "STATES": states, "BLOCKS": blocks}
        shapes = {
            name: jax.ShapeDtypeStruct(shape[0], shape[1]) if isinstance(shape[0], tuple) else
            jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in outputs.items()
        }  # fmt: skip
        return launch.call(
            kernel, inputs, shapes, grid=self.batch * self.heads * blocks * count,
            constants={name: value for name, value in constants.items() if name in kernel.arg_names},
            config=self.config(kernel), mode=self.plan.mode,
        )  # fmt: skip

    def state_shapes(self, *parts: int):
        """Of numerator, denominator and maximum."""
        rows = self.batch, self.heads, *parts
        return (*rows, self.features, self.values), (*rows, self.features), rows

    def before(self):
        """The states before the segments, [B, N, G, ...], and the state after all keys (None if that is yet to come)."""
        arrays, (count, _) = self.arrays, self.cut(self.keys)
        initial = arrays.numerator, arrays.denominator, arrays.largest
        if self.plan.is_causal and count == 1:
            return tuple(x[:, :, None] for x in initial), None
        sums = self.launch(
            linear_key_sums,
            dict(key=arrays.key, value=arrays.value, scale=arrays.scale, mask=arrays.mask, **self.projection),
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


def _whole_batch(arrays: Arrays, *others):
    """The arrays, and others, with the same batch, from a state; mask and projection may be one for all."""
    size = max(x.shape[0] for x in (*arrays, *others) if x is not None)
    whole = lambda x: x if x is None or x.shape[0] == size else jnp.broadcast_to(x, (size, *x.shape[1:]))
    arrays = Arrays(*(
        x if name in ("mask", "projection") else whole(x) for name, x in zip(Arrays._fields, arrays, strict=True)
    ))  # fmt: skip
    if arrays.numerator is None:
        shape = size, arrays.query.shape[2], _num_features(arrays)
        arrays = arrays._replace(
            numerator=jnp.zeros((*shape, arrays.value.shape[-1])), denominator=jnp.zeros(shape),
            largest=jnp.full(shape[:2], -jnp.inf),
        )  # fmt: skip
    return arrays, *map(whole, others)


def _num_features(arrays: Arrays) -> int:
    return arrays.query.shape[3] if arrays.projection is None else arrays.projection.shape[1]


def _forward(plan: Plan, *arrays):
    (arrays,) = _whole_batch(Arrays(*arrays))
    call = _Call(plan, arrays)
    states, last = call.before()
    rows = call.batch, call.heads, call.queries
    causal = plan.is_causal
    out, weight, maximum, *final = call.launch(
        linear_forward,
        dict(
            query=arrays.query, key=arrays.key if causal else None, value=arrays.value if causal else None,
            scale=arrays.scale, mask=arrays.mask, **call.projection,
            numerator_in=states[0], denominator_in=states[1], largest_in=states[2],
        ),
        dict(
            out=((*arrays.query.shape[:3], call.values), arrays.value.dtype), weight_out=rows, maximum_out=rows,
            **dict(zip(("numerator_out", "denominator_out", "largest_out"),
                       call.state_shapes() if causal else [(call.batch,)] * 3, strict=True)),
        ),
        length=call.queries, states=states[0].shape[2],
    )  # fmt: skip
    return out, *(final if last is None else last), weight, maximum, *states


def _backward(plan: Plan, *operands):
    count = len(operands) - len(Arrays._fields)
    arrays, out, weight, maximum, *rest = _whole_batch(Arrays(*operands[count:]), *operands[:count])
    states, grad_out, grad_state, after_all = rest[:3], rest[3], rest[4:6], rest[6]
    call = _Call(plan, arrays)
    causal, length = plan.is_causal, arrays.query.shape[1]
    wide = functools.partial(jnp.asarray, dtype=jnp.float32)
    slope = jnp.einsum("btnv,btnv->bnt", wide(grad_out), wide(out))
    of_rows = dict(grad_out=grad_out, weight=weight, slope=slope, maximum=maximum)
    of_keys = dict(key=arrays.key, value=arrays.value, scale=arrays.scale, mask=arrays.mask, **call.projection)
    state_in = dict(zip(("numerator_in", "denominator_in", "largest_in"), states, strict=True))
    width = arrays.query.shape[2:]

    none = dict.fromkeys(("key", "value"))
    (grad_query,) = call.launch(
        linear_backward_query,
        dict(query=arrays.query, **of_keys | ({} if causal else none), **state_in, **of_rows),
        dict(grad_query=((call.batch, call.blocks(linear_backward_query), length, *width), _partial(call, arrays.query,
             linear_backward_query))),
        length=length, states=states[0].shape[2],
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
            dict(query=arrays.query, **of_rows, **call.projection, before_in=places),
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
            numerator_in=incoming[0], denominator_in=incoming[1], largest_in=after, before_in=before,
        ),
        dict(
            grad_key=((call.batch, blocks, keys, *width), _partial(call, arrays.key, linear_backward_key)),
            grad_value=(arrays.value.shape, arrays.value.dtype),
            grad_scale=(call.batch, blocks, *arrays.key.shape[1:3]) if given else (call.batch,),
            numerator_out=call.state_shapes()[0] if causal else (call.batch,),
            denominator_out=call.state_shapes()[1] if causal else (call.batch,),
        ),
        length=keys, states=incoming[0].shape[2],
    )  # fmt: skip
    if not causal:
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
    out, *rest = launch.fold_vmap(functools.partial(_forward, plan))(*arrays)
    numerator, denominator, largest = rest[:3]
    return out, (numerator, denominator, largest - shift), (largest, *rest[3:])


def backward(plan: Plan, arrays: Arrays, out, residuals, gradients):
    grad_out, grad_state = gradients
    largest, *residuals = residuals
    run = launch.fold_vmap(functools.partial(_backward, plan))
    grads = run(out, *residuals, grad_out, *grad_state[:2], largest, *_shifted(plan, arrays)[0])
    of_scale = grads[3] if len(grads) == 7 else None
    of_projection = None
    if arrays.projection is not None:
        # Seldom wanted, and then not in a hurry: unused, the compiler removes it.
        of_projection = xla.backward(plan, arrays, *xla.saved(plan, arrays), gradients).projection
    of_state = (None,) * 3 if arrays.numerator is None else grads[-3:]
    return Arrays(*grads[:3], of_scale, None, of_projection, *of_state)


def _shifted(plan: Plan, arrays: Arrays):
    """The kernels leave the constant -log(M) / 2 out of the log scales of softmax features."""
    shift = 0.5 * math.log(_num_features(arrays)) if plan.features == "softmax" else 0.0
    return arrays if arrays.largest is None else arrays._replace(largest=arrays.largest + shift), shift


_run = differentiable(forward, backward)
