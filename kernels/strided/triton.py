"""Strided attention in fused kernels: one online softmax over the near and the far keys.

A program owns a tile of positions and visits the ranges of keys (or, for the gradients of keys, of queries) that its tile
sees. Three kernels, `forward`, `query_gradient` and `key_gradient`, serve every set of keys:

    window    the near set of "strided": neighbouring positions
    steps     its far set: a tile is rows of one column, `stride` positions apart, read by a larger pointer stride
    block     the near set of "fixed": the query's own block
    columns   its far set: the keys of some columns of every block, counted block by block

Queries that share the near keys of "strided" share none of its far keys and the other way round, so its two sets need
different tiles of queries: there the kernel runs once for each set, and the second run takes up the softmax where the
first left it. "fixed" visits both sets in one program.
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
from subquad.kernels.strided.pattern import Pattern

LOG2_E = math.log2(math.e)
MASKED = tl.constexpr(-1e30)


@triton.jit
def pointers(base, position, features, batch, head, T: tl.constexpr, N: tl.constexpr, F: tl.constexpr):
    """Where the features of some positions of one head lie in [B, T, N, F]."""
    return base + (((batch * T + position) * N + head) * F)[:, None] + features[None, :]


@triton.jit
def load(base, position, real, batch, head, T: tl.constexpr, N: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr):
    """[positions, BLOCK] of [B, T, N, F], 0 where there is nothing."""
    features = tl.arange(0, BLOCK)
    mask = real[:, None] & (features < F)[None, :]
    return tl.load(pointers(base, position, features, batch, head, T, N, F), mask=mask, other=0.0)


@triton.jit
def row(base, position, real, batch, head, T: tl.constexpr, N: tl.constexpr, OTHER: tl.constexpr):
    """[positions] of float32 [B, T, N]."""
    return tl.load(base + (batch * T + position) * N + head, mask=real, other=OTHER)


@triton.jit
def own_tile(TILES: tl.constexpr, CLASSES: tl.constexpr, N: tl.constexpr, LAST_FIRST: tl.constexpr):
    """(batch, head, class, tile) of this program. The tiles with the most work come first."""
    program = tl.program_id(0).to(tl.int64)
    tile = (program // CLASSES % TILES).to(tl.int32)
    if LAST_FIRST:
        tile = TILES - 1 - tile
    head = program // (CLASSES * TILES)
    return head // N, head % N, (program % CLASSES).to(tl.int32), tile


@triton.jit
def key_index(
    index, column, head, COLUMNS, KIND: tl.constexpr, T: tl.constexpr, STRIDE: tl.constexpr, KEYS: tl.constexpr,
    PER_BLOCK: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """(position, whether it exists) of the keys of a set, by their number in it."""
    if KIND == "columns":
        real = index < KEYS
        within = index % PER_BLOCK
        if not SHARED:
            within += (head * PER_BLOCK).to(tl.int32)
        position = index // PER_BLOCK * STRIDE + tl.load(COLUMNS + within, mask=real, other=0)
        real = real & (position < T)
    elif KIND == "steps":
        position = index * STRIDE + column
        real = (index >= 0) & (position < T)
    else:
        position = index
        real = (index >= 0) & (index < T)
    return tl.where(real, position, 0), real


@triton.jit
def sees(
    at, of, KIND: tl.constexpr, CAUSAL: tl.constexpr, STRIDE: tl.constexpr, WINDOW: tl.constexpr, GAP: tl.constexpr,
    NEAR: tl.constexpr,
):  # fmt: skip
    """Whether the queries at positions `at` see the keys at `of`, which broadcast against each other."""
    distance = at - of
    if KIND == "window":
        if CAUSAL:
            seen = (distance >= 0) & (distance <= WINDOW)
        else:
            seen = (distance >= -WINDOW) & (distance <= WINDOW)
    elif KIND == "steps":
        if CAUSAL:
            seen = distance >= GAP * STRIDE
        else:
            seen = (distance >= GAP * STRIDE) | (distance <= -GAP * STRIDE)
    else:
        seen = at // STRIDE == of // STRIDE
        if KIND == "columns":
            seen = (seen == 0) | (not NEAR)
        if CAUSAL:
            seen = seen & (distance >= 0)
    return seen


@triton.jit
def keys_seen(
    first, last, KIND: tl.constexpr, CAUSAL: tl.constexpr, T: tl.constexpr, STRIDE: tl.constexpr, WINDOW: tl.constexpr,
    GAP: tl.constexpr, NEAR: tl.constexpr, KEYS: tl.constexpr, PER_BLOCK: tl.constexpr,
):  # fmt: skip
    """The range of keys, by number, that queries number `first` to `last` see."""
    if KIND == "window":
        low = tl.maximum(first - WINDOW, 0)
        high = last + 1 if CAUSAL else tl.minimum(last + 1 + WINDOW, KEYS)
    elif KIND == "steps":
        low = first * 0
        high = last + 1 - GAP if CAUSAL else low + KEYS
    elif KIND == "block":
        low = first // STRIDE * STRIDE
        high = last + 1 if CAUSAL else tl.minimum((last // STRIDE + 1) * STRIDE, KEYS)
    else:
        low = first * 0
        high = low + KEYS
        if CAUSAL:
            high = tl.minimum((last // STRIDE + (0 if NEAR else 1)) * PER_BLOCK, high)
    return low, high


@triton.jit
def queries_seeing(
    first, last, KIND: tl.constexpr, CAUSAL: tl.constexpr, STRIDE: tl.constexpr, WINDOW: tl.constexpr, GAP: tl.constexpr,
    NEAR: tl.constexpr, QUERIES: tl.constexpr, PER_BLOCK: tl.constexpr,
):  # fmt: skip
    """The range of queries, by number, that see keys number `first` to `last`."""
    high = first * 0 + QUERIES
    low = first * 0
    if KIND == "window":
        low = first if CAUSAL else tl.maximum(first - WINDOW, 0)
        high = tl.minimum(last + 1 + WINDOW, QUERIES)
    elif KIND == "steps":
        if CAUSAL:
            low = first + GAP
    elif KIND == "block":
        low = first if CAUSAL else first // STRIDE * STRIDE
        high = tl.minimum((last // STRIDE + 1) * STRIDE, QUERIES)
    elif CAUSAL:
        low = (first // PER_BLOCK + (1 if NEAR else 0)) * STRIDE
    return low, high


@triton.jit
def visible_keys(
    VALID, at, of, real, batch, KIND: tl.constexpr, CAUSAL: tl.constexpr, STRIDE: tl.constexpr, WINDOW: tl.constexpr,
    GAP: tl.constexpr, NEAR: tl.constexpr, HAS_VALID: tl.constexpr, VALID_STEP: tl.constexpr,
):  # fmt: skip
    if HAS_VALID:
        real = real & (tl.load(VALID + batch * VALID_STEP + of, mask=real, other=0) != 0)
    return sees(at, of[None, :], KIND, CAUSAL, STRIDE, WINDOW, GAP, NEAR) & real[None, :]


@triton.jit
def attend(
    query, maximum, total, mixed, at, first, last, column, batch, head, KEY, VALUE, VALID, COLUMNS,
    KIND: tl.constexpr, CAUSAL: tl.constexpr, T: tl.constexpr, N: tl.constexpr, H: tl.constexpr, V: tl.constexpr,
    STRIDE: tl.constexpr, WINDOW: tl.constexpr, GAP: tl.constexpr, NEAR: tl.constexpr, KEYS: tl.constexpr,
    PER_BLOCK: tl.constexpr, SHARED: tl.constexpr, HAS_VALID: tl.constexpr, VALID_STEP: tl.constexpr,
    SCALE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The online softmax of a tile of queries over one set of keys; logits are in base 2."""
    low, high = keys_seen(first, last, KIND, CAUSAL, T, STRIDE, WINDOW, GAP, NEAR, KEYS, PER_BLOCK)
    for start in range(low, high, BLOCK_KEYS):
        index = start + tl.arange(0, BLOCK_KEYS)
        of, real = key_index(index, column, head, COLUMNS, KIND, T, STRIDE, KEYS, PER_BLOCK, SHARED)
        key = load(KEY, of, real, batch, head, T, N, H, BLOCK_H)
        value = load(VALUE, of, real, batch, head, T, N, V, BLOCK_V)
        seen = visible_keys(VALID, at[:, None], of, real, batch, KIND, CAUSAL, STRIDE, WINDOW, GAP, NEAR, HAS_VALID, VALID_STEP)
        logits = tl.dot(query, tl.trans(key), input_precision=PRECISION) * SCALE
        logits = tl.where(seen, logits, MASKED)
        largest = tl.maximum(maximum, tl.max(logits, 1))
        # A row that has seen nothing has the largest logit MASKED, and what it does not see must still weigh nothing.
        weights = tl.where(seen, tl.exp2(logits - largest[:, None]), 0.0)
        decay = tl.exp2(maximum - largest)
        total = total * decay + tl.sum(weights, 1)
        mixed = tl.dot(weights.to(value.dtype), value, mixed * decay[:, None], input_precision=PRECISION)
        maximum = largest
    return maximum, total, mixed


@triton.jit
def forward(
    QUERY, KEY, VALUE, VALID, COLUMNS, BEFORE, BEFORE_LSE, OUT, LSE,
    FIRST: tl.constexpr, SECOND: tl.constexpr, RESUME: tl.constexpr, CAUSAL: tl.constexpr,
    T: tl.constexpr, N: tl.constexpr, H: tl.constexpr, V: tl.constexpr, STRIDE: tl.constexpr, WINDOW: tl.constexpr,
    GAP: tl.constexpr, NEAR: tl.constexpr, CLASSES: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    PER_BLOCK: tl.constexpr, SHARED: tl.constexpr, HAS_VALID: tl.constexpr, VALID_STEP: tl.constexpr,
    SCALE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of the keys in FIRST and SECOND ("": none), after those of an earlier run if RESUME."""
    TILES: tl.constexpr = (QUERIES + BLOCK_QUERIES - 1) // BLOCK_QUERIES
    LN_2: tl.constexpr = 0.6931471805599453
    batch, head, column, tile = own_tile(TILES, CLASSES, N, CAUSAL)
    first = tile * BLOCK_QUERIES
    index = first + tl.arange(0, BLOCK_QUERIES)
    position = index * CLASSES + column
    exists = (index < QUERIES) & (position < T)
    at = tl.where(exists, position, 0)
    last = tl.minimum(first + BLOCK_QUERIES, QUERIES) - 1

    query = load(QUERY, at, exists, batch, head, T, N, H, BLOCK_H)
    if RESUME:
        before = row(BEFORE_LSE, at, exists, batch, head, T, N, 0.0)
        some = before > MASKED
        maximum = tl.where(some, before / LN_2, MASKED)
        total = tl.where(some, 1.0, 0.0)
        mixed = load(BEFORE, at, exists, batch, head, T, N, V, BLOCK_V)
    else:
        maximum = tl.full([BLOCK_QUERIES], MASKED, tl.float32)
        total = tl.zeros([BLOCK_QUERIES], tl.float32)
        mixed = tl.zeros([BLOCK_QUERIES, BLOCK_V], tl.float32)
    if FIRST != "":
        maximum, total, mixed = attend(
            query, maximum, total, mixed, at, first, last, column, batch, head, KEY, VALUE, VALID, COLUMNS, FIRST, CAUSAL,
            T, N, H, V, STRIDE, WINDOW, GAP, NEAR, T if FIRST == "block" else KEYS, PER_BLOCK, SHARED, HAS_VALID, VALID_STEP,
            SCALE, PRECISION, BLOCK_KEYS, BLOCK_H, BLOCK_V,
        )  # fmt: skip
    if SECOND != "":
        maximum, total, mixed = attend(
            query, maximum, total, mixed, at, first, last, column, batch, head, KEY, VALUE, VALID, COLUMNS, SECOND, CAUSAL,
            T, N, H, V, STRIDE, WINDOW, GAP, NEAR, KEYS, PER_BLOCK, SHARED, HAS_VALID, VALID_STEP, SCALE, PRECISION,
            BLOCK_KEYS, BLOCK_H, BLOCK_V,
        )  # fmt: skip

    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    features = tl.arange(0, BLOCK_V)
    mask = exists[:, None] & (features < V)[None, :]
    out = (mixed / total[:, None]).to(OUT.dtype.element_ty)
    tl.store(pointers(OUT, at, features, batch, head, T, N, V), out, mask=mask)
    lse = tl.where(empty, float("-inf"), (maximum + tl.log2(total)) * LN_2)
    tl.store(LSE + (batch * T + at) * N + head, lse, mask=exists)


@triton.jit
def pull_query(
    query, grad, lse, shift, grad_query, at, first, last, column, batch, head, KEY, VALUE, VALID, COLUMNS,
    KIND: tl.constexpr, CAUSAL: tl.constexpr, T: tl.constexpr, N: tl.constexpr, H: tl.constexpr, V: tl.constexpr,
    STRIDE: tl.constexpr, WINDOW: tl.constexpr, GAP: tl.constexpr, NEAR: tl.constexpr, KEYS: tl.constexpr,
    PER_BLOCK: tl.constexpr, SHARED: tl.constexpr, HAS_VALID: tl.constexpr, VALID_STEP: tl.constexpr,
    SCALE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of queries by one set of keys, without the scale."""
    low, high = keys_seen(first, last, KIND, CAUSAL, T, STRIDE, WINDOW, GAP, NEAR, KEYS, PER_BLOCK)
    for start in range(low, high, BLOCK_KEYS):
        index = start + tl.arange(0, BLOCK_KEYS)
        of, real = key_index(index, column, head, COLUMNS, KIND, T, STRIDE, KEYS, PER_BLOCK, SHARED)
        key = load(KEY, of, real, batch, head, T, N, H, BLOCK_H)
        value = load(VALUE, of, real, batch, head, T, N, V, BLOCK_V)
        seen = visible_keys(VALID, at[:, None], of, real, batch, KIND, CAUSAL, STRIDE, WINDOW, GAP, NEAR, HAS_VALID, VALID_STEP)
        logits = tl.dot(query, tl.trans(key), input_precision=PRECISION) * SCALE
        # At most 0: a log-sum-exp beyond 1e9 is rounded by hundreds, and exp2 of that overflows.
        weights = tl.where(seen, tl.exp2(tl.minimum(logits - lse[:, None], 0.0)), 0.0)
        grad_weights = tl.dot(grad, tl.trans(value), input_precision=PRECISION)
        grad_logits = weights * (grad_weights - shift[:, None])
        grad_query = tl.dot(grad_logits.to(key.dtype), key, grad_query, input_precision=PRECISION)
    return grad_query


@triton.jit
def query_gradient(
    QUERY, KEY, VALUE, VALID, COLUMNS, GRAD, ROW_LSE, SHIFT, BEFORE, GRAD_QUERY,
    FIRST: tl.constexpr, SECOND: tl.constexpr, RESUME: tl.constexpr, CAUSAL: tl.constexpr,
    T: tl.constexpr, N: tl.constexpr, H: tl.constexpr, V: tl.constexpr, STRIDE: tl.constexpr, WINDOW: tl.constexpr,
    GAP: tl.constexpr, NEAR: tl.constexpr, CLASSES: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    PER_BLOCK: tl.constexpr, SHARED: tl.constexpr, HAS_VALID: tl.constexpr, VALID_STEP: tl.constexpr,
    SCALE: tl.constexpr, FACTOR: tl.constexpr, PRECISION: tl.constexpr, BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The gradient of the queries by the keys in FIRST and SECOND, added to that of an earlier run if RESUME."""
    TILES: tl.constexpr = (QUERIES + BLOCK_QUERIES - 1) // BLOCK_QUERIES
    LOG2E: tl.constexpr = 1.4426950408889634
    batch, head, column, tile = own_tile(TILES, CLASSES, N, CAUSAL)
    first = tile * BLOCK_QUERIES
    index = first + tl.arange(0, BLOCK_QUERIES)
    position = index * CLASSES + column
    exists = (index < QUERIES) & (position < T)
    at = tl.where(exists, position, 0)
    last = tl.minimum(first + BLOCK_QUERIES, QUERIES) - 1

    query = load(QUERY, at, exists, batch, head, T, N, H, BLOCK_H)
    grad = load(GRAD, at, exists, batch, head, T, N, V, BLOCK_V)
    lse = row(ROW_LSE, at, exists, batch, head, T, N, float("inf")) * LOG2E
    shift = row(SHIFT, at, exists, batch, head, T, N, 0.0)
    grad_query = tl.zeros([BLOCK_QUERIES, BLOCK_H], tl.float32)
    if FIRST != "":
        grad_query = pull_query(
            query, grad, lse, shift, grad_query, at, first, last, column, batch, head, KEY, VALUE, VALID, COLUMNS, FIRST,
            CAUSAL, T, N, H, V, STRIDE, WINDOW, GAP, NEAR, T if FIRST == "block" else KEYS, PER_BLOCK, SHARED, HAS_VALID,
            VALID_STEP, SCALE, PRECISION, BLOCK_KEYS, BLOCK_H, BLOCK_V,
        )  # fmt: skip
    if SECOND != "":
        grad_query = pull_query(
            query, grad, lse, shift, grad_query, at, first, last, column, batch, head, KEY, VALUE, VALID, COLUMNS, SECOND,
            CAUSAL, T, N, H, V, STRIDE, WINDOW, GAP, NEAR, KEYS, PER_BLOCK, SHARED, HAS_VALID, VALID_STEP, SCALE,
            PRECISION, BLOCK_KEYS, BLOCK_H, BLOCK_V,
        )  # fmt: skip
    grad_query *= FACTOR
    if RESUME:
        grad_query += load(BEFORE, at, exists, batch, head, T, N, H, BLOCK_H)
    features = tl.arange(0, BLOCK_H)
    mask = exists[:, None] & (features < H)[None, :]
    stored = grad_query.to(GRAD_QUERY.dtype.element_ty)
    tl.store(pointers(GRAD_QUERY, at, features, batch, head, T, N, H), stored, mask=mask)


@triton.jit
def key_gradient(
    QUERY, KEY, VALUE, VALID, COLUMNS, GRAD, ROW_LSE, SHIFT, BEFORE_KEY, BEFORE_VALUE, SLOTS, GRAD_KEY, GRAD_VALUE,
    KIND: tl.constexpr, RESUME: tl.constexpr, CAUSAL: tl.constexpr,
    T: tl.constexpr, N: tl.constexpr, H: tl.constexpr, V: tl.constexpr, STRIDE: tl.constexpr, WINDOW: tl.constexpr,
    GAP: tl.constexpr, NEAR: tl.constexpr, CLASSES: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    SUMMARIES: tl.constexpr, PER_BLOCK: tl.constexpr, SHARED: tl.constexpr, HAS_VALID: tl.constexpr,
    VALID_STEP: tl.constexpr, SCALE: tl.constexpr, FACTOR: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The gradients of the keys and values of one set, added to those of an earlier run if RESUME.

    For "columns" they lie in the order of the set, [B, KEYS, N, ...]. "block" adds such ones, which SLOTS [N|1, STRIDE]
    finds by the column; "none" visits nothing.
    """
    TILES: tl.constexpr = (KEYS + BLOCK_KEYS - 1) // BLOCK_KEYS
    LOG2E: tl.constexpr = 1.4426950408889634
    batch, head, column, tile = own_tile(TILES, CLASSES, N, False)
    first = tile * BLOCK_KEYS
    index = first + tl.arange(0, BLOCK_KEYS)
    of, exists = key_index(index, column, head, COLUMNS, KIND, T, STRIDE, KEYS, PER_BLOCK, SHARED)
    last = tl.minimum(first + BLOCK_KEYS, KEYS) - 1
    seen_keys = exists
    if HAS_VALID:
        seen_keys = exists & (tl.load(VALID + batch * VALID_STEP + of, mask=exists, other=0) != 0)
    key = load(KEY, of, exists, batch, head, T, N, H, BLOCK_H)
    value = load(VALUE, of, exists, batch, head, T, N, V, BLOCK_V)
    grad_key = tl.zeros([BLOCK_KEYS, BLOCK_H], tl.float32)
    grad_value = tl.zeros([BLOCK_KEYS, BLOCK_V], tl.float32)
    if KIND != "none":
        low, high = queries_seeing(first, last, KIND, CAUSAL, STRIDE, WINDOW, GAP, NEAR, QUERIES, PER_BLOCK)
        for start in range(low, high, BLOCK_QUERIES):
            other = start + tl.arange(0, BLOCK_QUERIES)
            position = other * CLASSES + column
            real = (other < QUERIES) & (position < T)
            at = tl.where(real, position, 0)
            query = load(QUERY, at, real, batch, head, T, N, H, BLOCK_H)
            grad = load(GRAD, at, real, batch, head, T, N, V, BLOCK_V)
            lse = row(ROW_LSE, at, real, batch, head, T, N, float("inf")) * LOG2E
            shift = row(SHIFT, at, real, batch, head, T, N, 0.0)
            # Everything is transposed from the start, [keys, queries]: a product is never transposed into another one.
            seen = sees(at[None, :], of[:, None], KIND, CAUSAL, STRIDE, WINDOW, GAP, NEAR) & seen_keys[:, None] & real[None, :]
            logits = tl.dot(key, tl.trans(query), input_precision=PRECISION) * SCALE
            weights = tl.where(seen, tl.exp2(tl.minimum(logits - lse[None, :], 0.0)), 0.0)
            grad_value = tl.dot(weights.to(grad.dtype), grad, grad_value, input_precision=PRECISION)
            grad_weights = tl.dot(value, tl.trans(grad), input_precision=PRECISION)
            grad_logits = weights * (grad_weights - shift[None, :])
            grad_key = tl.dot(grad_logits.to(query.dtype), query, grad_key, input_precision=PRECISION)
    grad_key *= FACTOR

    kept, kept_in = of, exists
    if KIND == "columns":
        # A column past the end has a place all the same; what lies there is 0.
        exists = index < KEYS
    if RESUME:
        if KIND == "block" or KIND == "none":
            slot = of % STRIDE
            if not SHARED:
                slot += (head * STRIDE).to(tl.int32)
            slot = tl.load(SLOTS + slot, mask=exists, other=-1)
            kept_in = exists & (slot >= 0) & (of // STRIDE < SUMMARIES // PER_BLOCK)
            kept = tl.where(kept_in, of // STRIDE * PER_BLOCK + slot, 0)
            rows: tl.constexpr = SUMMARIES
        else:
            rows: tl.constexpr = T
        grad_key += load(BEFORE_KEY, kept, kept_in, batch, head, rows, N, H, BLOCK_H)
        grad_value += load(BEFORE_VALUE, kept, kept_in, batch, head, rows, N, V, BLOCK_V)
    place = index if KIND == "columns" else of
    PLACES: tl.constexpr = KEYS if KIND == "columns" else T
    features, value_features = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_V)
    tl.store(
        pointers(GRAD_KEY, place, features, batch, head, PLACES, N, H),
        grad_key.to(GRAD_KEY.dtype.element_ty),
        mask=exists[:, None] & (features < H)[None, :],
    )
    tl.store(
        pointers(GRAD_VALUE, place, value_features, batch, head, PLACES, N, V),
        grad_value.to(GRAD_VALUE.dtype.element_ty),
        mask=exists[:, None] & (value_features < V)[None, :],
    )


# -------------------------------------------------------------------------------------------------------------- launches


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of the kernels over one or two sets of keys."""

    first: str
    second: str = ""
    resume: bool = False


def runs_of(pattern: Pattern, length: int) -> list[Run]:
    """The runs whose results add up to attention over both sets."""
    if pattern.columns is not None:
        near = "block" if pattern.near else ""
        far = "columns" if pattern.summaries(length) else ""
        return [Run(near or far, far if near else "")]
    runs = [Run("window")] if pattern.near else []
    if pattern.rows(length) > pattern.gap:
        runs.append(Run("steps", resume=bool(runs)))
    return runs


def block_of(features: int) -> int:
    return max(16, triton.next_power_of_2(features))


def heuristic(kernel: str, kind: str, reach: int, features: int, dtype) -> launch.Config:
    """Block sizes for a kernel.

    Args:
        kind: the first set of keys.
        reach: rows of a column for "steps", else about as many keys as a query sees.
        features: the larger of H and V, as a block.
    """
    # float32 is multiplied in three parts, which takes registers; a gradient of keys has two sums to keep.
    of_keys, broad, stages = kernel == "key_gradient", features > 64, 2
    if jnp.dtype(dtype) != jnp.float32:
        own, step, warps = 64, 64, 8 if broad else 4
        if features > 128:
            own, step = 32 if kernel == "forward" else 16, 16
        elif of_keys and broad:
            step = 32
    elif broad:
        own, step, warps = 16, 16, 4 if kernel == "query_gradient" else 8
        stages = 1 if kernel == "query_gradient" else 2
    elif of_keys:  # with two stages some of the small ones spill
        own, step, warps, stages = (32, 16, 4, 2) if features > 32 else (64, 16, 4, 3)
    else:
        own, step, warps = 64, 32, 4
    own, step = (min(size, max(16, triton.next_power_of_2(reach))) for size in (own, step))
    names = ("BLOCK_KEYS", "BLOCK_QUERIES") if of_keys else ("BLOCK_QUERIES", "BLOCK_KEYS")
    return launch.Config(dict(zip(names, (own, step), strict=True)), warps, stages)


def launch_kernel(kernel, run: Run, pattern: Pattern, scale: float, mode, inputs, outputs):
    """Launches one of the three kernels for `run`; what all of them need to know is worked out here."""
    query, value = inputs["QUERY"], inputs["VALUE"]
    batch, length, heads, features = query.shape
    kind, rows = run.first, pattern.rows(length)
    classes = pattern.stride if kind == "steps" else 1
    queries = rows if kind == "steps" else length
    columns = pattern.columns or ((0,),)
    summaries = pattern.summaries(length)
    keys = dict(window=length, steps=rows, block=length, columns=summaries, none=length)[kind]
    blocks = dict(BLOCK_H=block_of(features), BLOCK_V=block_of(value.shape[3]))
    reach = dict(window=pattern.window, steps=rows, none=length).get(kind, pattern.stride)
    name = kernel.__name__
    found = launch.config(
        f"strided.{name}",
        heuristic(name, kind, reach, max(blocks.values()), query.dtype),
        kind=kind,
        features=max(blocks.values()),
        dtype=query.dtype.name,
        short=min(reach, 128),
    )
    config = dataclasses.replace(found, blocks={**found.blocks, **blocks})
    constants = dict(
        RESUME=run.resume, CAUSAL=pattern.is_causal, T=length, N=heads, H=features, V=value.shape[3], STRIDE=pattern.stride,
        WINDOW=pattern.window, GAP=pattern.gap, NEAR=pattern.near, CLASSES=classes, QUERIES=queries,
        PER_BLOCK=len(columns[0]), SHARED=len(columns) == 1, HAS_VALID=inputs["VALID"] is not None,
        VALID_STEP=length if inputs["VALID"] is not None and len(inputs["VALID"]) > 1 else 0,
        SCALE=scale * LOG2_E, PRECISION=launch.dot_precision(query.dtype),
    )  # fmt: skip
    if name == "key_gradient":
        constants |= dict(KIND=kind, KEYS=keys, SUMMARIES=summaries, FACTOR=scale)
        tiles = -(-keys // config.blocks["BLOCK_KEYS"])
    else:
        keys = summaries if "columns" in (run.first, run.second) else keys
        constants |= dict(FIRST=run.first, SECOND=run.second, KEYS=keys)
        constants |= dict(FACTOR=scale) if name == "query_gradient" else {}
        tiles = -(-queries // config.blocks["BLOCK_QUERIES"])
    listed = jnp.asarray(np.array(columns, np.int32).ravel()) if pattern.columns else None
    inputs = {n: listed if n == "COLUMNS" else array for n, array in inputs.items()}
    grid = batch * heads * tiles * classes
    return launch.call(kernel, inputs, outputs, grid=grid, constants=constants, config=config, mode=mode)


def shape(array, dtype, rows: int | None = None):
    batch, length, *rest = array.shape
    return jax.ShapeDtypeStruct((batch, rows or length, *rest), dtype)


def run_forward(pattern: Pattern, scale: float, mode, query, key, value, valid):
    """(out, lse) by one run of the kernel or two."""
    runs = runs_of(pattern, query.shape[1])
    out = lse = None
    for run in runs:
        # What a later run takes up again is not rounded in between.
        dtype = query.dtype if run is runs[-1] else jnp.float32
        inputs = dict(QUERY=query, KEY=key, VALUE=value, VALID=valid, COLUMNS=None, BEFORE=out, BEFORE_LSE=lse)
        outputs = dict(OUT=shape(value, dtype), LSE=jax.ShapeDtypeStruct(query.shape[:3], jnp.float32))
        out, lse = launch_kernel(forward, run, pattern, scale, mode, inputs, outputs)
    return out, lse


def run_backward(pattern: Pattern, scale: float, mode, query, key, value, grad, lse, shift, valid):
    """The gradients of query, key and value."""
    length = query.shape[1]
    common = dict(QUERY=query, KEY=key, VALUE=value, VALID=valid, COLUMNS=None, GRAD=grad, ROW_LSE=lse, SHIFT=shift)
    runs, grad_query = runs_of(pattern, length), None
    for run in runs:
        outputs = dict(GRAD_QUERY=shape(query, query.dtype if run is runs[-1] else jnp.float32))
        inputs = dict(common, BEFORE=grad_query)
        (grad_query,) = launch_kernel(query_gradient, run, pattern, scale, mode, inputs, outputs)

    slots = None
    if pattern.columns is not None:
        # The far keys first: their gradients are few, and the run over all keys takes them in.
        runs = [Run("columns")] if pattern.summaries(length) else []
        runs.append(Run("block" if pattern.near else "none", resume=bool(runs)))
        slots = np.full((len(pattern.columns), pattern.stride), -1, np.int32)
        np.put_along_axis(slots, np.array(pattern.columns), np.arange(len(pattern.columns[0]))[None], axis=1)
        slots = jnp.asarray(slots.ravel())
    grads = None, None
    for run in runs:
        last = run is runs[-1]
        rows = pattern.summaries(length) if run.first == "columns" else None
        outputs = {
            name: shape(array, array.dtype if last else jnp.float32, rows)
            for name, array in (("GRAD_KEY", key), ("GRAD_VALUE", value))
        }
        inputs = dict(common, BEFORE_KEY=grads[0], BEFORE_VALUE=grads[1], SLOTS=slots)
        grads = launch_kernel(key_gradient, run, pattern, scale, mode, inputs, outputs)
    return grad_query, *grads


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def flash(pattern: Pattern, scale: float, mode, query, key, value, valid):
    run = functools.partial(run_forward, pattern, scale, mode)
    return launch.fold_vmap(run, shared=[[3]])(query, key, value, valid)


def flash_forward(pattern, scale, mode, query, key, value, valid):
    out, lse = flash(pattern, scale, mode, query, key, value, valid)
    return (out, lse), (query, key, value, valid, out, lse)


def flash_backward(pattern, scale, mode, residuals, gradients):
    query, key, value, valid, out, lse = residuals
    lse, shift, query = online.residue(out, (lse,), *gradients, valid is not None, query)
    pull = launch.fold_vmap(functools.partial(run_backward, pattern, scale, mode), shared=[[6]])
    return *pull(query, key, value, gradients[0], lse, shift, valid), None


precision.define_passes(flash, flash_forward, flash_backward)


def attention(query, key, value, valid, pattern: Pattern, scale: float, *, mode: launch.Mode):
    """Arguments as checked by `subquad.kernels.strided` -> (out [B, T, N, V], lse [B, T, N])."""
    if query.dtype.name not in launch.FLOATS:
        raise launch.Declined(f"the kernels take float32, bfloat16 and float16, got {query.dtype}.")
    features, most = max(query.shape[3], value.shape[3]), 128 if query.dtype == jnp.float32 else 256
    if features > most:  # the parts of wider float32 tiles are more than the registers hold
        raise launch.Declined(f"the kernels take up to {most} features in {query.dtype}, got {features}.")
    return flash(pattern, scale, mode, query, key, value, valid)
