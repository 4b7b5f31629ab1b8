"""FlashAttention in Triton: one forward and two backward kernels for every operation that visits pairs block by block.

An operation is a few functions (`Functions`) that the kernels take as constants; softmax attention is one, LSH attention
another. Only partial blocks are masked, and only they may stick out of the arrays. Lengths are run-time numbers, so that a
new length compiles nothing. The backward pass is deterministic: one kernel sums over the keys of a block of queries, one over
the queries of a block of keys; there are no atomics.

Source: Dao et al., FlashAttention, 2022, arXiv 2205.14135, Algorithm 1; Dao, FlashAttention-2, 2023, arXiv 2307.08691.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from subquad.kernels import launch, tuning

LOG2_E = tl.constexpr(math.log2(math.e))
LARGEST_HEAD = 128  # features that a block holds


class Functions(NamedTuple):
    """What an operation is: `triton.jit` functions, whose last arguments are the operands, SHAPE (..) and OPTIONS.

    q and k are indices of queries and keys on two axes, [t, 1] and [1, s], or [1, t] and [s, 1] in the pass over keys, and
    query_start is the first of q.
    """

    WORK: Any  # (rank, b, n) -> of a row of blocks of head n of sample b: its block, numbers of partial and of full ones, list
    BLOCK: Any  # (list, i, PARTIAL) -> the i-th of the row's partial or full blocks
    PLACES: Any  # (start, LENGTH, SIZE, b, n) -> where a block of queries lies: first row, offsets [SIZE], which exist
    KEY_PLACES: Any  # the same of keys
    LOGITS: Any  # (products, b, n, query_start, q, k, ..) -> logits in the unit SHAPE.UNIT
    VISIBLE: Any  # (b, n, query_start, q, k, ..) -> which query of a partial block sees which key
    STORE: Any = None  # (gradient of the logits, b, n, query_start, q, k, ..): keeps it


class Operands(NamedTuple):
    """What functions may ask: run-time numbers, and pointers that are None where an instance has no such array."""

    T: Any
    S: Any
    ROWS: Any  # of blocks per head: a program computes one
    GROUP: Any  # programs of the heads that run side by side
    query_start: Any  # the first position
    key_start: Any
    since: Any  # of lsh: keys that were in reach in a round from this one on, and before `round`, were counted there
    round: Any
    words: Any  # all of these, and those of a pattern
    bias: Any
    mask: Any
    query_positions: Any
    key_positions: Any
    query_segments: Any
    key_segments: Any
    tables: Any  # of a pattern
    rows: Any  # of `tiles.work`
    tiles: Any
    bounds: Any  # of `tiles.bounds_of`
    order: Any  # of lsh: [B, N, R, T], of `xla.sort`
    codes: Any  # [B, N, T, R], of `xla.at_their_places`; of extend the queries' buckets [B, R, T, N]
    key_buckets: Any  # [B, R, S, N]
    starts: Any  # [B]
    grad_bias: Any


NUM_WORDS = 8  # before those of the pattern


class Shape(NamedTuple):
    """The constants of every instance. Arrays are [B, T, N, H], [B, S, K, H] and [B, S, K, V]."""

    HEADS: int
    KEY_HEADS: int
    FEATURES: int
    VALUES: int
    BLOCK_H: int  # FEATURES as a block has them
    BLOCK_V: int
    SCALE: float  # of the products
    UNIT: float  # > 0, of what LOGITS returns: a scale may wait for the exponent
    PRECISION: str
    MAY_HIDE: bool  # whether a logit of a full block may be -inf
    # Whether all samples share one array.
    ONE_QUERY: bool
    ONE_KEY: bool
    ONE_VALUE: bool
    ONE_GRAD: bool = False


@triton.jit
def flash_forward(
    query, key, value, words, bias, mask, query_positions, key_positions, query_segments, key_segments, tables, rows, tiles,
    bounds, order, codes, key_buckets, starts, out, lse,
    FUNCTIONS: tl.constexpr, SHAPE: tl.constexpr, OPTIONS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head: out [B, T, N, V], and lse [B, N, T] in the unit of the logits."""
    operands = operands_of(
        words, bias, mask, query_positions, key_positions, query_segments, key_segments, tables, rows, tiles, bounds, order,
        codes, key_buckets, starts, None,
    )  # fmt: skip
    T, S = operands.T, operands.S
    rank, b, n = this_program(operands.ROWS, operands.GROUP, SHAPE.HEADS)
    query_block, num_partial, num_full, blocks = FUNCTIONS.WORK(rank, b, n, operands, OPTIONS)
    query_start = query_block * BLOCK_Q
    query, key, value = heads_of(query, key, value, b, n, T, S, SHAPE)
    out = head_of(out, b, n, T, SHAPE.HEADS, SHAPE.VALUES, False)
    query_rows = FUNCTIONS.PLACES(query_start, T, BLOCK_Q, b, n, operands, OPTIONS)
    queries = load_rows(query, query_rows, SHAPE.HEADS, SHAPE.FEATURES, SHAPE.BLOCK_H, True)
    q = query_start + tl.arange(0, BLOCK_Q)
    m_i = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, SHAPE.BLOCK_V], tl.float32)
    for PARTIAL in tl.static_range(1, -1, -1):
        for i in range(num_partial if PARTIAL else num_full):
            key_start = FUNCTIONS.BLOCK(blocks, i, PARTIAL, operands, OPTIONS) * BLOCK_K
            key_rows = FUNCTIONS.KEY_PLACES(key_start, S, BLOCK_K, b, n, operands, OPTIONS)
            keys = load_rows(key, key_rows, SHAPE.KEY_HEADS, SHAPE.FEATURES, SHAPE.BLOCK_H, PARTIAL)
            values = load_rows(value, key_rows, SHAPE.KEY_HEADS, SHAPE.VALUES, SHAPE.BLOCK_V, PARTIAL)
            k = key_start + tl.arange(0, BLOCK_K)
            products = tl.dot(queries, tl.trans(keys), input_precision=SHAPE.PRECISION)
            logits = FUNCTIONS.LOGITS(products, b, n, query_start, q[:, None], k[None, :], operands, SHAPE, OPTIONS)
            if PARTIAL:
                seen = FUNCTIONS.VISIBLE(b, n, query_start, q[:, None], k[None, :], operands, SHAPE, OPTIONS)
                logits = tl.where(seen, logits, float("-inf"))
            m_i, l_i, acc = online_softmax(
                m_i, l_i, acc, logits, values, SHAPE.UNIT, PARTIAL or SHAPE.MAY_HIDE, SHAPE.PRECISION
            )
    empty = l_i == 0.0
    l_i = tl.where(empty, 1.0, l_i)
    store_rows(out, query_rows, acc / l_i[:, None], SHAPE.HEADS, SHAPE.VALUES, SHAPE.BLOCK_V)
    first, row, exists = query_rows
    lse += (b * SHAPE.HEADS + n) * T + first
    tl.store(lse + row, tl.where(empty, float("-inf"), m_i + tl.log2(l_i) / (SHAPE.UNIT * LOG2_E)), mask=exists)


@triton.jit
def flash_backward_query(
    query, key, value, words, bias, mask, query_positions, key_positions, query_segments, key_segments, tables, rows, tiles,
    bounds, order, codes, key_buckets, starts, lse, delta, grad_out, no_bias, grad_query, grad_bias,
    FUNCTIONS: tl.constexpr, SHAPE: tl.constexpr, OPTIONS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The gradient of one block of queries of one head.

        grad_logits = weights * (grad_out values^T - delta)        grad_query = scale grad_logits keys

    lse is in the unit of the logits, and +inf for rows that see nothing.
    """
    operands = operands_of(
        words, bias, mask, query_positions, key_positions, query_segments, key_segments, tables, rows, tiles, bounds, order,
        codes, key_buckets, starts, grad_bias,
    )  # fmt: skip
    T, S = operands.T, operands.S
    rank, b, n = this_program(operands.ROWS, operands.GROUP, SHAPE.HEADS)
    query_block, num_partial, num_full, blocks = FUNCTIONS.WORK(rank, b, n, operands, OPTIONS)
    query_start = query_block * BLOCK_Q
    query, key, value = heads_of(query, key, value, b, n, T, S, SHAPE)
    grad_out = head_of(grad_out, b, n, T, SHAPE.HEADS, SHAPE.VALUES, SHAPE.ONE_GRAD)
    query_rows = FUNCTIONS.PLACES(query_start, T, BLOCK_Q, b, n, operands, OPTIONS)
    queries = load_rows(query, query_rows, SHAPE.HEADS, SHAPE.FEATURES, SHAPE.BLOCK_H, True)
    grads = load_rows(grad_out, query_rows, SHAPE.HEADS, SHAPE.VALUES, SHAPE.BLOCK_V, True)
    q = query_start + tl.arange(0, BLOCK_Q)
    lse_i = load_sums(lse, b, n, query_rows, T, float("inf"), SHAPE.HEADS)
    delta_i = load_sums(delta, b, n, query_rows, T, 0.0, SHAPE.HEADS)
    acc = tl.zeros([BLOCK_Q, SHAPE.BLOCK_H], tl.float32)
    for PARTIAL in tl.static_range(1, -1, -1):
        # The parts of wide operands, for three TF32 products, would fill the registers if they were made before the loop.
        for i in tl.range(
            num_partial if PARTIAL else num_full, disable_licm=SHAPE.PRECISION == "tf32x3" and SHAPE.BLOCK_H > 64
        ):
            key_start = FUNCTIONS.BLOCK(blocks, i, PARTIAL, operands, OPTIONS) * BLOCK_K
            key_rows = FUNCTIONS.KEY_PLACES(key_start, S, BLOCK_K, b, n, operands, OPTIONS)
            keys = load_rows(key, key_rows, SHAPE.KEY_HEADS, SHAPE.FEATURES, SHAPE.BLOCK_H, PARTIAL)
            values = load_rows(value, key_rows, SHAPE.KEY_HEADS, SHAPE.VALUES, SHAPE.BLOCK_V, PARTIAL)
            k = key_start + tl.arange(0, BLOCK_K)
            products = tl.dot(queries, tl.trans(keys), input_precision=SHAPE.PRECISION)
            logits = FUNCTIONS.LOGITS(products, b, n, query_start, q[:, None], k[None, :], operands, SHAPE, OPTIONS)
            weights = weights_of(logits, lse_i[:, None], SHAPE.UNIT)
            if PARTIAL:
                seen = FUNCTIONS.VISIBLE(b, n, query_start, q[:, None], k[None, :], operands, SHAPE, OPTIONS)
                weights = tl.where(seen, weights, 0.0)
            grad_weights = tl.dot(grads, tl.trans(values), input_precision=SHAPE.PRECISION)
            grad_logits = weights * (grad_weights - delta_i[:, None])
            if FUNCTIONS.STORE is not None:
                FUNCTIONS.STORE(grad_logits, b, n, query_start, q[:, None], k[None, :], operands, SHAPE, OPTIONS)
            acc = tl.dot(grad_logits.to(keys.dtype), keys, acc, input_precision=SHAPE.PRECISION)
    grad_query = head_of(grad_query, b, n, T, SHAPE.HEADS, SHAPE.FEATURES, False)
    store_rows(grad_query, query_rows, acc * SHAPE.SCALE, SHAPE.HEADS, SHAPE.FEATURES, SHAPE.BLOCK_H)


@triton.jit
def flash_backward_key(
    query, key, value, words, bias, mask, query_positions, key_positions, query_segments, key_segments, tables, rows, tiles,
    bounds, order, codes, key_buckets, starts, lse, delta, grad_out, grad_key, grad_value,
    FUNCTIONS: tl.constexpr, SHAPE: tl.constexpr, OPTIONS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The gradients of one block of keys and values of one key head, from all query heads that read it.

        grad_value = weights^T grad_out        grad_key = scale grad_logits^T queries

    Logits are computed transposed, [s, t]: a product that is transposed afterwards is wrong on Hopper in some versions.
    """
    GROUPS: tl.constexpr = SHAPE.HEADS // SHAPE.KEY_HEADS
    operands = operands_of(
        words, bias, mask, query_positions, key_positions, query_segments, key_segments, tables, rows, tiles, bounds, order,
        codes, key_buckets, starts, None,
    )  # fmt: skip
    T, S = operands.T, operands.S
    rank, b, key_head = this_program(operands.ROWS, operands.GROUP, SHAPE.KEY_HEADS)
    key_start = FUNCTIONS.WORK(rank, b, key_head * GROUPS, operands, OPTIONS)[0] * BLOCK_K
    key = head_of(key, b, key_head, S, SHAPE.KEY_HEADS, SHAPE.FEATURES, SHAPE.ONE_KEY)
    value = head_of(value, b, key_head, S, SHAPE.KEY_HEADS, SHAPE.VALUES, SHAPE.ONE_VALUE)
    key_rows = FUNCTIONS.KEY_PLACES(key_start, S, BLOCK_K, b, key_head * GROUPS, operands, OPTIONS)
    keys = load_rows(key, key_rows, SHAPE.KEY_HEADS, SHAPE.FEATURES, SHAPE.BLOCK_H, True)
    values = load_rows(value, key_rows, SHAPE.KEY_HEADS, SHAPE.VALUES, SHAPE.BLOCK_V, True)
    k = key_start + tl.arange(0, BLOCK_K)
    acc_key = tl.zeros([BLOCK_K, SHAPE.BLOCK_H], tl.float32)
    acc_value = tl.zeros([BLOCK_K, SHAPE.BLOCK_V], tl.float32)
    for member in range(GROUPS):
        n = key_head * GROUPS + member
        _, num_partial, num_full, blocks = FUNCTIONS.WORK(rank, b, n, operands, OPTIONS)
        query_n = head_of(query, b, n, T, SHAPE.HEADS, SHAPE.FEATURES, SHAPE.ONE_QUERY)
        grad_out_n = head_of(grad_out, b, n, T, SHAPE.HEADS, SHAPE.VALUES, SHAPE.ONE_GRAD)
        for PARTIAL in tl.static_range(1, -1, -1):
            for i in range(num_partial if PARTIAL else num_full):
                query_start = FUNCTIONS.BLOCK(blocks, i, PARTIAL, operands, OPTIONS) * BLOCK_Q
                query_rows = FUNCTIONS.PLACES(query_start, T, BLOCK_Q, b, n, operands, OPTIONS)
                queries = load_rows(query_n, query_rows, SHAPE.HEADS, SHAPE.FEATURES, SHAPE.BLOCK_H, PARTIAL)
                grads = load_rows(grad_out_n, query_rows, SHAPE.HEADS, SHAPE.VALUES, SHAPE.BLOCK_V, PARTIAL)
                q = query_start + tl.arange(0, BLOCK_Q)
                lse_i = load_sums(lse, b, n, query_rows, T, float("inf"), SHAPE.HEADS)
                delta_i = load_sums(delta, b, n, query_rows, T, 0.0, SHAPE.HEADS)
                products = tl.dot(keys, tl.trans(queries), input_precision=SHAPE.PRECISION)
                logits = FUNCTIONS.LOGITS(products, b, n, query_start, q[None, :], k[:, None], operands, SHAPE, OPTIONS)
                weights = weights_of(logits, lse_i[None, :], SHAPE.UNIT)
                if PARTIAL:
                    seen = FUNCTIONS.VISIBLE(b, n, query_start, q[None, :], k[:, None], operands, SHAPE, OPTIONS)
                    weights = tl.where(seen, weights, 0.0)
                acc_value = tl.dot(weights.to(grads.dtype), grads, acc_value, input_precision=SHAPE.PRECISION)
                grad_weights = tl.dot(values, tl.trans(grads), input_precision=SHAPE.PRECISION)
                grad_logits = weights * (grad_weights - delta_i[None, :])
                acc_key = tl.dot(grad_logits.to(queries.dtype), queries, acc_key, input_precision=SHAPE.PRECISION)
    grad_key = head_of(grad_key, b, key_head, S, SHAPE.KEY_HEADS, SHAPE.FEATURES, False)
    grad_value = head_of(grad_value, b, key_head, S, SHAPE.KEY_HEADS, SHAPE.VALUES, False)
    store_rows(grad_key, key_rows, acc_key * SHAPE.SCALE, SHAPE.KEY_HEADS, SHAPE.FEATURES, SHAPE.BLOCK_H)
    store_rows(grad_value, key_rows, acc_value, SHAPE.KEY_HEADS, SHAPE.VALUES, SHAPE.BLOCK_V)


@triton.jit
def operands_of(
    words, bias, mask, query_positions, key_positions, query_segments, key_segments, tables, rows, tiles, bounds, order, codes,
    key_buckets, starts, grad_bias,
):  # fmt: skip
    return Operands(
        tl.load(words), tl.load(words + 1), tl.load(words + 2), tl.load(words + 3), tl.load(words + 4), tl.load(words + 5),
        tl.load(words + 6), tl.load(words + 7), words, bias, mask, query_positions, key_positions, query_segments,
        key_segments, tables, rows, tiles, bounds, order, codes, key_buckets, starts, grad_bias,
    )  # fmt: skip


@triton.jit
def heads_of(query, key, value, b, n, T, S, SHAPE: tl.constexpr):
    """Where head n of sample b begins in queries, keys and values."""
    key_head = n // (SHAPE.HEADS // SHAPE.KEY_HEADS)
    query = head_of(query, b, n, T, SHAPE.HEADS, SHAPE.FEATURES, SHAPE.ONE_QUERY)
    key = head_of(key, b, key_head, S, SHAPE.KEY_HEADS, SHAPE.FEATURES, SHAPE.ONE_KEY)
    return query, key, head_of(value, b, key_head, S, SHAPE.KEY_HEADS, SHAPE.VALUES, SHAPE.ONE_VALUE)


@triton.jit
def online_softmax(m_i, l_i, acc, logits, values, UNIT: tl.constexpr, MAY_HIDE: tl.constexpr, PRECISION: tl.constexpr):
    """Maximum, normaliser and sum of values of each row after one more block of logits [t, s] and values [s, V].

    MAY_HIDE: some logits may be -inf. A row that has seen nothing has maximum -inf. The maximum is subtracted before the
    product: the other way round a GPU contracts the two into one operation, and beyond 1e9 a product that was not rounded
    differs from a maximum that was by hundreds.
    """
    m_new = tl.maximum(m_i, tl.max(logits, 1))
    shift = m_new
    if MAY_HIDE:  # -inf - -inf is not 0
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
    weights = tl.exp2((logits - shift[:, None]) * (UNIT * LOG2_E))
    alpha = tl.exp2((m_i - shift) * (UNIT * LOG2_E))
    l_i = l_i * alpha + tl.sum(weights, 1)
    acc = tl.dot(weights.to(values.dtype), values, acc * alpha[:, None], input_precision=PRECISION)
    return m_new, l_i, acc


@triton.jit
def weights_of(logits, lse_i, UNIT: tl.constexpr):
    """The weights, computed again. At most 1: a log-sum-exp beyond 1e9 is rounded by hundreds, and exp2 of that overflows."""
    return tl.exp2(tl.minimum(logits - lse_i, 0.0) * (UNIT * LOG2_E))


@triton.jit
def this_program(ROWS, GROUP, HEADS: tl.constexpr):
    """(rank of the row, sample, head) of this program: the heads of a group share the cache, their longest rows come first."""
    program = tl.program_id(0)
    place, heads = program % GROUP, GROUP // ROWS
    head = (program - place) // ROWS + place % heads
    return place // heads, (head // HEADS).to(tl.int64), (head % HEADS).to(tl.int64)


@triton.jit
def head_of(array, b, n, LENGTH, HEADS: tl.constexpr, FEATURES: tl.constexpr, ONE: tl.constexpr):
    """Where head n of sample b begins in [B, LENGTH, HEADS, FEATURES]. ONE: all samples share one."""
    start = n * FEATURES
    if not ONE:
        start += b * LENGTH * (HEADS * FEATURES)
    return array + start


@triton.jit
def dense(start, LENGTH, SIZE: tl.constexpr, b, n, operands, OPTIONS: tl.constexpr):
    """PLACES of arrays whose blocks lie one after another."""
    row = tl.arange(0, SIZE)
    return start.to(tl.int64), row, start + row < LENGTH


@triton.jit
def addresses(array, rows, STRIDE: tl.constexpr, FEATURES: tl.constexpr, WIDTH: tl.constexpr):
    """Pointers to rows [t, WIDTH] that lie STRIDE apart, and which of these elements exist."""
    first, row, exists = rows
    feature = tl.arange(0, WIDTH)
    # Only the sum for the whole block is in 64 bits: the offsets within it would take twice the registers.
    at = array + first * STRIDE + row[:, None] * STRIDE + feature[None, :]
    inside = exists[:, None]
    if FEATURES != WIDTH:
        inside = inside & (feature[None, :] < FEATURES)
    return at, inside, feature[None, :] < FEATURES


@triton.jit
def load_rows(array, rows, HEADS: tl.constexpr, FEATURES: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    """Rows of one head of [LENGTH, HEADS, FEATURES] as [t, WIDTH], 0 where there are none. MASKED: some may not exist."""
    at, inside, real = addresses(array, rows, HEADS * FEATURES, FEATURES, WIDTH)
    if MASKED:
        block = tl.load(at, mask=inside, other=0.0)
    elif FEATURES != WIDTH:
        block = tl.load(at, mask=real, other=0.0)
    else:
        block = tl.load(at)
    return block


@triton.jit
def store_rows(array, rows, block, HEADS: tl.constexpr, FEATURES: tl.constexpr, WIDTH: tl.constexpr):
    """The inverse of `load_rows`."""
    at, inside, _ = addresses(array, rows, HEADS * FEATURES, FEATURES, WIDTH)
    tl.store(at, block.to(array.dtype.element_ty), mask=inside)


@triton.jit
def load_sums(array, b, n, rows, T, other, HEADS: tl.constexpr):
    """What [B, N, T] says of these queries; `other` where there are none."""
    first, row, exists = rows
    return tl.load(array + (b * HEADS + n) * T + first + row, mask=exists, other=other)


# ----------------------------------------------------------------------------------------------------------- the launch


def run(
    kernel, arrays: Mapping[str, jax.Array | None], outputs: Mapping[str, jax.ShapeDtypeStruct], *, words, grid: int,
    functions: Functions, shape: Shape, options: tuple, config: tuning.Config, mode: launch.Mode, aliases=None,
):  # fmt: skip
    """Launches a kernel with these of `arrays` that are its parameters, and None for the others.

    `words` are the run-time numbers, in the order of `Operands`. Without a STORE the gradient of the bias is nothing.
    """
    if "grad_bias" in kernel.arg_names:
        outputs = outputs | {"grad_bias": outputs.get("grad_bias", jax.ShapeDtypeStruct((1,), jnp.float32))}
    arrays = {**arrays, "words": launch.words(*words)}
    constants = dict(FUNCTIONS=functions, SHAPE=shape, OPTIONS=options)
    inputs = [name for name in kernel.arg_names if name not in (*constants, *config.blocks, *outputs)]
    return launch.call(
        kernel, {name: arrays.get(name) for name in inputs}, outputs, grid=grid, constants=constants, config=config, mode=mode,
        aliases=aliases,
    )  # fmt: skip


def padded(size: int) -> int:
    """The size that a block gives to an axis: `tl.dot` takes powers of two from 16 on."""
    return max(16, triton.next_power_of_2(size))
