"""Relative attention as fused kernels, forward and backward, with no array of T x S.

The position score of query a and key b of a tile depends on their distance only: on the a - b that is added to that of the
first ones. So the scores of a tile by distance are the product of its queries and two blocks of neighbouring relative keys,
the farther one from that distance on and the nearer one before it. As the tile is square, the parts of the two products that
it needs fit together in one square, whose rows are then turned, each by its own number of columns and mirrored:

    by_distance[a, c] = position_a . (farther if c <= a else nearer)_c
    by_key[a, b] = by_distance[a, (a - b) mod BLOCK]              and by_distance[a, c] = by_key[a, (a - c) mod BLOCK]

Going from one key tile to the next the nearer block becomes the farther one, so each is multiplied once. `_turn` moves the
elements through shared memory, in an order that keeps its banks free of conflicts.

The backward pass is three kernels, each of which owns what it sums: query tiles (gradients of both queries), key tiles
(of key and value) and distance blocks (of relative keys, summed over the batch afterwards). Nothing is added atomically,
so results repeat bit for bit.
"""

import functools

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jax.ad_checkpoint import checkpoint_name

from subquad.kernels import launch, precision
from subquad.kernels.relative.reference import SAVED
from subquad.kernels.softmax import online

OWNER = "relative.attention"
SHARED = [[4], [5]]  # relative keys and mask may be one for all samples
LOG2E = tl.constexpr(1.4426950408889634)

# ------------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _rows(base, index, limit, STRIDE: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Rows `index` of an array whose row `limit` does not exist: [len(index), PADDED], 0 outside."""
    column = tl.arange(0, PADDED)
    inside = ((index >= 0) & (index < limit))[:, None]
    if WIDTH != PADDED:
        inside = inside & (column < WIDTH)[None, :]
    return tl.load(base + index[:, None] * STRIDE + column[None, :], mask=inside, other=0.0)


@triton.jit
def _products(left, left_at, right, right_at, left_limit, right_limit, STRIDE: tl.constexpr, WIDTH: tl.constexpr,
              PADDED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Of rows of two arrays, [len(left_at), len(right_at)].

    Of wide float32 rows a slice at a time: the parts of whole ones, for three TF32 products, are more than the registers hold.
    """
    if PRECISION != "tf32x3" or PADDED <= 64:
        rows = _rows(left, left_at, left_limit, STRIDE, WIDTH, PADDED)
        others = _rows(right, right_at, right_limit, STRIDE, WIDTH, PADDED)
        total = tl.dot(rows, tl.trans(others), input_precision=PRECISION)
    else:
        total = tl.zeros((left_at.shape[0], right_at.shape[0]), tl.float32)
        for first in range(0, PADDED + (tl.program_id(0) >> 30), 16):
            column = first + tl.arange(0, 16)[None, :]
            inside = (left_at >= 0) & (left_at < left_limit)
            rows = tl.load(left + left_at[:, None] * STRIDE + column, mask=inside[:, None] & (column < WIDTH), other=0.0)
            inside = (right_at >= 0) & (right_at < right_limit)
            others = tl.load(right + right_at[:, None] * STRIDE + column, mask=inside[:, None] & (column < WIDTH), other=0.0)
            total = tl.dot(rows, tl.trans(others), total, input_precision=PRECISION)
    return total


@triton.jit
def _own_products(own, left, left_at, right, right_at, left_limit, right_limit, STRIDE: tl.constexpr, WIDTH: tl.constexpr,
                  PADDED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """`_products` in a loop, of left rows that a program keeps as `own`: where those are sliced it reads them again."""
    if PRECISION != "tf32x3" or PADDED <= 64:
        others = _rows(right, right_at, right_limit, STRIDE, WIDTH, PADDED)
        total = tl.dot(own, tl.trans(others), input_precision=PRECISION)
    else:
        total = _products(left, left_at, right, right_at, left_limit, right_limit, STRIDE, WIDTH, PADDED, PRECISION)
    return total


@triton.jit
def _store_rows(base, index, limit, tile, STRIDE: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    column = tl.arange(0, PADDED)
    inside = ((index >= 0) & (index < limit))[:, None] & (column < WIDTH)[None, :]
    tl.store(base + index[:, None] * STRIDE + column[None, :], tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _turn(tile, ACROSS: tl.constexpr, BLOCK: tl.constexpr):
    """Between by_key and by_distance, either way; queries are the rows of the tile, or its columns if ACROSS.

    Neighbouring threads hold rows 0 to 7 and pairs of columns of a product, and each writes and reads one element at a
    time: with bits 1 and 2 of the column and 0 to 2 of the row as the lowest of the address, they meet 32 banks.
    """
    row = tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    if ACROSS:
        row, column = (column - row) & (BLOCK - 1), column + tl.zeros_like(row)
    else:
        row, column = row + tl.zeros_like(column), (row - column) & (BLOCK - 1)
    place = ((column >> 1) & 3) | ((row & 7) << 2) | ((column & 1) << 5) | ((column >> 3) << 6) | ((row >> 3) * (8 * BLOCK))
    tile = tl.permute(tl.reshape(tile, [BLOCK // 8, 8, BLOCK // 8, 4, 2]), [0, 2, 4, 1, 3])
    place = tl.permute(tl.reshape(place, [BLOCK // 8, 8, BLOCK // 8, 4, 2]), [0, 2, 4, 1, 3])
    turned = tl.gather(tl.reshape(tile, [BLOCK * BLOCK]), tl.reshape(place, [BLOCK * BLOCK]), 0)
    turned = tl.permute(tl.reshape(turned, [BLOCK // 8, BLOCK // 8, 2, 8, 4]), [0, 3, 1, 4, 2])
    return tl.reshape(turned, [BLOCK, BLOCK])


@triton.jit
def _seen(mask, at, of, T: tl.constexpr, S: tl.constexpr, OFFSET: tl.constexpr, MASK: tl.constexpr,
          MASK_T: tl.constexpr, MASK_S: tl.constexpr):  # fmt: skip
    """Whether query `at` sees key `of`; both broadcast to the shape of a tile."""
    seen = (of >= 0) & (of < S) & (of <= at + OFFSET)
    if MASK:
        inside = seen & (at < T)
        seen = inside & (tl.load(mask + at.to(tl.int64) * MASK_T + of * MASK_S, mask=inside, other=0) != 0)
    return seen


@triton.jit
def _forward_tiles(state, first, last, content, position, key, value, relative, mask, start,
                   T: tl.constexpr, S: tl.constexpr, N: tl.constexpr, H: tl.constexpr, V: tl.constexpr,
                   MASK: tl.constexpr, MASK_T: tl.constexpr, MASK_S: tl.constexpr, PRECISION: tl.constexpr,
                   BLOCK: tl.constexpr, H_PADDED: tl.constexpr, V_PADDED: tl.constexpr, PARTIAL: tl.constexpr):  # fmt: skip
    """The state after the key tiles first to last - 1; PARTIAL: some of their keys may be hidden."""
    OFFSET: tl.constexpr = S - T
    top, total, out, farther = state
    a = tl.arange(0, BLOCK)[:, None]
    c = tl.arange(0, BLOCK)
    t = start + c
    for j in range(first, last):
        near = _rows(relative, start + OFFSET - (j + 1) * BLOCK + c, S, N * H, H, H_PADDED)
        nearer = tl.dot(position, tl.trans(near), input_precision=PRECISION)
        by_distance = tl.where(c[None, :] <= a, farther, nearer)
        farther = nearer
        k = _rows(key, j * BLOCK + c, S, N * H, H, H_PADDED)
        scores = tl.dot(content, tl.trans(k), input_precision=PRECISION)
        scores += _turn(by_distance, False, BLOCK)
        scores *= LOG2E
        if PARTIAL:
            seen = _seen(mask, t[:, None], (j * BLOCK + c)[None, :], T, S, OFFSET, MASK, MASK_T, MASK_S)
            scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        # A row that has seen nothing has maximum -inf, and -inf - -inf is not 0.
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weights, 1)
        v = _rows(value, j * BLOCK + c, S, N * V, V, V_PADDED)
        out = out * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        top = new_top
    return top, total, out, farther


@triton.jit
def relative_forward(
    content, position, key, value, relative, mask, out, lse,
    T: tl.constexpr, S: tl.constexpr, N: tl.constexpr, H: tl.constexpr, V: tl.constexpr, RELATIVE_B: tl.constexpr,
    MASK: tl.constexpr, MASK_B: tl.constexpr, MASK_N: tl.constexpr, MASK_T: tl.constexpr, MASK_S: tl.constexpr,
    PRECISION: tl.constexpr, H_PADDED: tl.constexpr, V_PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out [B, T, N, V] and the natural log-sum-exp [B, N, T], +inf in rows that see nothing; one query tile a program."""
    OFFSET: tl.constexpr = S - T
    TILES: tl.constexpr = (T + BLOCK - 1) // BLOCK
    i = TILES - 1 - tl.program_id(0) % TILES
    head = (tl.program_id(0) // TILES).to(tl.int64)
    b, n = head // N, head % N
    content += b * (T * N * H) + n * H
    position += b * (T * N * H) + n * H
    key += b * (S * N * H) + n * H
    value += b * (S * N * V) + n * V
    relative += b * RELATIVE_B + n * H
    mask += b * MASK_B + n * MASK_N

    t = i * BLOCK + tl.arange(0, BLOCK)
    own_content = _rows(content, t, T, N * H, H, H_PADDED)
    own_position = _rows(position, t, T, N * H, H, H_PADDED)
    far = _rows(relative, t + OFFSET, S, N * H, H, H_PADDED)
    farther = tl.dot(own_position, tl.trans(far), input_precision=PRECISION)
    state = (
        tl.full([BLOCK], float("-inf"), tl.float32), tl.zeros([BLOCK], tl.float32),
        tl.zeros([BLOCK, V_PADDED], tl.float32), farther,
    )  # fmt: skip
    whole = 0 if MASK else (i * BLOCK + OFFSET + 1) // BLOCK
    last = tl.cdiv(tl.minimum(i * BLOCK + OFFSET + BLOCK, S), BLOCK)
    state = _forward_tiles(
        state, 0, whole, own_content, own_position, key, value, relative, mask, i * BLOCK, T, S, N, H, V, MASK, MASK_T, MASK_S,
        PRECISION, BLOCK, H_PADDED, V_PADDED, False,
    )  # fmt: skip
    top, total, summed, farther = _forward_tiles(
        state, whole, last, own_content, own_position, key, value, relative, mask, i * BLOCK, T, S, N, H, V, MASK, MASK_T,
        MASK_S, PRECISION, BLOCK, H_PADDED, V_PADDED, True,
    )  # fmt: skip
    some = total > 0
    total = tl.where(some, total, 1.0)
    _store_rows(out + b * (T * N * V) + n * V, t, T, summed / total[:, None], N * V, V, V_PADDED)
    tl.store(lse + head * T + t, tl.where(some, (top + tl.log2(total)) / LOG2E, float("inf")), mask=t < T)


@triton.jit
def _query_tiles(state, first, last, own_content, own_position, own_grad, content, position, grad, lse, shift, key, value,
                 relative, mask, start, T: tl.constexpr, S: tl.constexpr, N: tl.constexpr, H: tl.constexpr, V: tl.constexpr,
                 MASK: tl.constexpr, MASK_T: tl.constexpr, MASK_S: tl.constexpr, PRECISION: tl.constexpr,
                 BLOCK: tl.constexpr, H_PADDED: tl.constexpr, V_PADDED: tl.constexpr, PARTIAL: tl.constexpr):  # fmt: skip
    OFFSET: tl.constexpr = S - T
    d_content, d_position, farther, before = state
    a = tl.arange(0, BLOCK)[:, None]
    c = tl.arange(0, BLOCK)
    t = start + c
    for j in range(first, last):
        near = start + OFFSET - (j + 1) * BLOCK + c
        nearer = _own_products(own_position, position, t, relative, near, T, S, N * H, H, H_PADDED, PRECISION)
        by_distance = tl.where(c[None, :] <= a, farther, nearer)
        farther = nearer
        s = j * BLOCK + c
        scores = _own_products(own_content, content, t, key, s, T, S, N * H, H, H_PADDED, PRECISION)
        scores += _turn(by_distance, False, BLOCK)
        # At most 0: a log-sum-exp beyond 1e9 is rounded by hundreds, and exp2 of that overflows.
        weights = tl.exp2(tl.minimum(scores * LOG2E - lse[:, None], 0.0))
        if PARTIAL:
            seen = _seen(mask, t[:, None], s[None, :], T, S, OFFSET, MASK, MASK_T, MASK_S)
            weights = tl.where(seen, weights, 0.0)
        d_weights = _own_products(own_grad, grad, t, value, s, T, S, N * V, V, V_PADDED, PRECISION)
        k = _rows(key, s, S, N * H, H, H_PADDED)
        d_scores = (weights * (d_weights - shift[:, None])).to(k.dtype)
        d_content += tl.dot(d_scores, k, input_precision=PRECISION)
        # A block of relative keys was the nearer one in the tile before, and is the farther one now: other keys.
        d_by_distance = _turn(tl.where(c[None, :] <= a, d_scores, before), False, BLOCK)
        before = d_scores
        near = _rows(relative, start + OFFSET - j * BLOCK + c, S, N * H, H, H_PADDED)
        d_position += tl.dot(d_by_distance, near, input_precision=PRECISION)
    return d_content, d_position, farther, before


@triton.jit
def relative_backward_query(
    content, position, key, value, relative, mask, grad, lse, shift, d_content, d_position,
    T: tl.constexpr, S: tl.constexpr, N: tl.constexpr, H: tl.constexpr, V: tl.constexpr, RELATIVE_B: tl.constexpr,
    MASK: tl.constexpr, MASK_B: tl.constexpr, MASK_N: tl.constexpr, MASK_T: tl.constexpr, MASK_S: tl.constexpr,
    PRECISION: tl.constexpr, H_PADDED: tl.constexpr, V_PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients of both queries, [B, T, N, H]; one query tile a program."""
    OFFSET: tl.constexpr = S - T
    TILES: tl.constexpr = (T + BLOCK - 1) // BLOCK
    i = TILES - 1 - tl.program_id(0) % TILES
    head = (tl.program_id(0) // TILES).to(tl.int64)
    b, n = head // N, head % N
    queries = b * (T * N * H) + n * H
    key += b * (S * N * H) + n * H
    value += b * (S * N * V) + n * V
    relative += b * RELATIVE_B + n * H
    mask += b * MASK_B + n * MASK_N

    t = i * BLOCK + tl.arange(0, BLOCK)
    content += queries
    position += queries
    grad += b * (T * N * V) + n * V
    own_content = _rows(content, t, T, N * H, H, H_PADDED)
    own_position = _rows(position, t, T, N * H, H, H_PADDED)
    own_grad = _rows(grad, t, T, N * V, V, V_PADDED)
    own_lse = tl.load(lse + head * T + t, mask=t < T, other=float("inf")) * LOG2E
    own_shift = tl.load(shift + head * T + t, mask=t < T, other=0.0)
    farther = _own_products(own_position, position, t, relative, t + OFFSET, T, S, N * H, H, H_PADDED, PRECISION)
    nothing = tl.zeros([BLOCK, H_PADDED], tl.float32)
    state = nothing, nothing, farther, tl.zeros([BLOCK, BLOCK], own_content.dtype)
    whole = 0 if MASK else (i * BLOCK + OFFSET + 1) // BLOCK
    # As many tiles as if the keys went on, so that the nearer block of the last tile is wholly in the future.
    last = tl.cdiv(i * BLOCK + OFFSET + BLOCK, BLOCK)
    state = _query_tiles(
        state, 0, whole, own_content, own_position, own_grad, content, position, grad, own_lse, own_shift, key, value,
        relative, mask, i * BLOCK, T, S, N, H, V, MASK, MASK_T, MASK_S, PRECISION, BLOCK, H_PADDED, V_PADDED, False,
    )  # fmt: skip
    by_content, by_position, farther, before = _query_tiles(
        state, whole, last, own_content, own_position, own_grad, content, position, grad, own_lse, own_shift, key, value,
        relative, mask, i * BLOCK, T, S, N, H, V, MASK, MASK_T, MASK_S, PRECISION, BLOCK, H_PADDED, V_PADDED, True,
    )  # fmt: skip
    _store_rows(d_content + queries, t, T, by_content, N * H, H, H_PADDED)
    _store_rows(d_position + queries, t, T, by_position, N * H, H, H_PADDED)


@triton.jit
def _key_tiles(state, first, last, own_key, own_value, content, position, grad, lse, shift, key, value, relative, mask,
               start, T: tl.constexpr, S: tl.constexpr, N: tl.constexpr, H: tl.constexpr, V: tl.constexpr,
               MASK: tl.constexpr, MASK_T: tl.constexpr, MASK_S: tl.constexpr, PRECISION: tl.constexpr,
               BLOCK: tl.constexpr, H_PADDED: tl.constexpr, V_PADDED: tl.constexpr, PARTIAL: tl.constexpr):  # fmt: skip
    """Tiles lie on their side, [keys, queries]: no product is transposed before it enters the next."""
    OFFSET: tl.constexpr = S - T
    d_key, d_value = state
    c = tl.arange(0, BLOCK)[:, None]
    a = tl.arange(0, BLOCK)[None, :]
    s = start + tl.arange(0, BLOCK)
    for i in range(first, last):
        t = i * BLOCK + tl.arange(0, BLOCK)
        far = t + OFFSET - start
        farther = _products(relative, far, position, t, S, T, N * H, H, H_PADDED, PRECISION)
        nearer = _products(relative, far - BLOCK, position, t, S, T, N * H, H, H_PADDED, PRECISION)
        by_distance = tl.where(c <= a, farther, nearer)
        scores = _own_products(own_key, key, s, content, t, S, T, N * H, H, H_PADDED, PRECISION)
        scores += _turn(by_distance, True, BLOCK)
        own_lse = tl.load(lse + t, mask=t < T, other=float("inf")) * LOG2E
        weights = tl.exp2(tl.minimum(scores * LOG2E - own_lse[None, :], 0.0))
        if PARTIAL:
            seen = _seen(mask, t[None, :], s[:, None], T, S, OFFSET, MASK, MASK_T, MASK_S)
            weights = tl.where(seen, weights, 0.0)
        own_grad = _rows(grad, t, T, N * V, V, V_PADDED)
        d_value += tl.dot(weights.to(own_grad.dtype), own_grad, input_precision=PRECISION)
        d_weights = _own_products(own_value, value, s, grad, t, S, T, N * V, V, V_PADDED, PRECISION)
        own_shift = tl.load(shift + t, mask=t < T, other=0.0)
        d_scores = weights * (d_weights - own_shift[None, :])
        own_content = _rows(content, t, T, N * H, H, H_PADDED)
        d_key += tl.dot(d_scores.to(own_content.dtype), own_content, input_precision=PRECISION)
    return d_key, d_value


@triton.jit
def relative_backward_key(
    content, position, key, value, relative, mask, grad, lse, shift, d_key, d_value,
    T: tl.constexpr, S: tl.constexpr, N: tl.constexpr, H: tl.constexpr, V: tl.constexpr, RELATIVE_B: tl.constexpr,
    MASK: tl.constexpr, MASK_B: tl.constexpr, MASK_N: tl.constexpr, MASK_T: tl.constexpr, MASK_S: tl.constexpr,
    PRECISION: tl.constexpr, H_PADDED: tl.constexpr, V_PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients of key [B, S, N, H] and value [B, S, N, V]; one key tile a program."""
    OFFSET: tl.constexpr = S - T
    QUERY_TILES: tl.constexpr = (T + BLOCK - 1) // BLOCK
    KEY_TILES: tl.constexpr = (S + BLOCK - 1) // BLOCK
    j = tl.program_id(0) % KEY_TILES
    head = (tl.program_id(0) // KEY_TILES).to(tl.int64)
    b, n = head // N, head % N
    queries = b * (T * N * H) + n * H
    keys, values = b * (S * N * H) + n * H, b * (S * N * V) + n * V
    s = j * BLOCK + tl.arange(0, BLOCK)
    key += keys
    value += values
    own_key = _rows(key, s, S, N * H, H, H_PADDED)
    own_value = _rows(value, s, S, N * V, V, V_PADDED)
    content += queries
    position += queries
    grad += b * (T * N * V) + n * V
    lse += head * T
    shift += head * T
    relative += b * RELATIVE_B + n * H
    mask += b * MASK_B + n * MASK_N

    # From `whole` on every query sees every key. Keys after the last one are computed too, and not stored.
    first = tl.maximum(j * BLOCK - OFFSET, 0) // BLOCK
    whole = QUERY_TILES if MASK else tl.minimum(tl.cdiv(tl.maximum((j + 1) * BLOCK - 1 - OFFSET, 0), BLOCK), QUERY_TILES)
    state = tl.zeros([BLOCK, H_PADDED], tl.float32), tl.zeros([BLOCK, V_PADDED], tl.float32)
    state = _key_tiles(
        state, first, whole, own_key, own_value, content, position, grad, lse, shift, key, value, relative,
        mask, j * BLOCK, T, S, N, H, V, MASK, MASK_T, MASK_S, PRECISION, BLOCK, H_PADDED, V_PADDED, True,
    )  # fmt: skip
    by_key, by_value = _key_tiles(
        state, whole, QUERY_TILES, own_key, own_value, content, position, grad, lse, shift, key, value, relative,
        mask, j * BLOCK, T, S, N, H, V, MASK, MASK_T, MASK_S, PRECISION, BLOCK, H_PADDED, V_PADDED, False,
    )  # fmt: skip
    _store_rows(d_key + keys, s, S, by_key, N * H, H, H_PADDED)
    _store_rows(d_value + values, s, S, by_value, N * V, V, V_PADDED)


@triton.jit
def _distance_tiles(d_relative, first, last, content, position, grad, lse, shift, key, value, relative, mask, e,
                    T: tl.constexpr, S: tl.constexpr, N: tl.constexpr, H: tl.constexpr, V: tl.constexpr,
                    MASK: tl.constexpr, MASK_T: tl.constexpr, MASK_S: tl.constexpr, PRECISION: tl.constexpr,
                    BLOCK: tl.constexpr, H_PADDED: tl.constexpr, V_PADDED: tl.constexpr, PARTIAL: tl.constexpr):  # fmt: skip
    """Tiles lie by [distances, queries]: here it is the scores of the content, of two key blocks, that are turned."""
    OFFSET: tl.constexpr = S - T
    c = tl.arange(0, BLOCK)[:, None]
    a = tl.arange(0, BLOCK)[None, :]
    distance = e * BLOCK + tl.arange(0, BLOCK)
    for i in range(first, last):
        t = i * BLOCK + tl.arange(0, BLOCK)
        # Row c, column a is the pair of query t_a and key s_0 + a - c: of these keys where c <= a, else of those before.
        s = t + OFFSET - e * BLOCK
        these = _products(key, s, content, t, S, T, N * H, H, H_PADDED, PRECISION)
        those = _products(key, s - BLOCK, content, t, S, T, N * H, H, H_PADDED, PRECISION)
        scores = _products(relative, distance, position, t, S, T, N * H, H, H_PADDED, PRECISION)
        scores += _turn(tl.where(c <= a, these, those), True, BLOCK)
        own_lse = tl.load(lse + t, mask=t < T, other=float("inf")) * LOG2E
        weights = tl.exp2(tl.minimum(scores * LOG2E - own_lse[None, :], 0.0))
        if PARTIAL:
            of = (i - e) * BLOCK + OFFSET + a - c
            seen = _seen(mask, t[None, :], of, T, S, OFFSET, MASK, MASK_T, MASK_S)
            weights = tl.where(seen, weights, 0.0)
        these = _products(value, s, grad, t, S, T, N * V, V, V_PADDED, PRECISION)
        those = _products(value, s - BLOCK, grad, t, S, T, N * V, V, V_PADDED, PRECISION)
        d_weights = _turn(tl.where(c <= a, these, those), True, BLOCK)
        own_shift = tl.load(shift + t, mask=t < T, other=0.0)
        d_scores = weights * (d_weights - own_shift[None, :])
        own_position = _rows(position, t, T, N * H, H, H_PADDED)
        d_relative += tl.dot(d_scores.to(own_position.dtype), own_position, input_precision=PRECISION)
    return d_relative


@triton.jit
def relative_backward_distance(
    content, position, key, value, relative, mask, grad, lse, shift, d_relative,
    T: tl.constexpr, S: tl.constexpr, N: tl.constexpr, H: tl.constexpr, V: tl.constexpr, RELATIVE_B: tl.constexpr,
    MASK: tl.constexpr, MASK_B: tl.constexpr, MASK_N: tl.constexpr, MASK_T: tl.constexpr, MASK_S: tl.constexpr,
    PRECISION: tl.constexpr, H_PADDED: tl.constexpr, V_PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each sample's gradient of the relative keys, [B, S, N, H] in float32; one block of distances a program."""
    OFFSET: tl.constexpr = S - T
    QUERY_TILES: tl.constexpr = (T + BLOCK - 1) // BLOCK
    BLOCKS: tl.constexpr = (S + BLOCK - 1) // BLOCK
    e = tl.program_id(0) % BLOCKS
    head = (tl.program_id(0) // BLOCKS).to(tl.int64)
    b, n = head // N, head % N
    content += b * (T * N * H) + n * H
    position += b * (T * N * H) + n * H
    key += b * (S * N * H) + n * H
    value += b * (S * N * V) + n * V
    grad += b * (T * N * V) + n * V
    lse += head * T
    shift += head * T
    relative += b * RELATIVE_B + n * H
    mask += b * MASK_B + n * MASK_N

    distance = e * BLOCK + tl.arange(0, BLOCK)
    # Before `first` all keys would lie before the first one; from `whole` on none does.
    first = tl.maximum(e * BLOCK - OFFSET, 0) // BLOCK
    whole = QUERY_TILES if MASK else tl.minimum(tl.cdiv(tl.maximum((e + 1) * BLOCK - 1 - OFFSET, 0), BLOCK), QUERY_TILES)
    total = tl.zeros([BLOCK, H_PADDED], tl.float32)
    total = _distance_tiles(
        total, first, whole, content, position, grad, lse, shift, key, value, relative, mask, e,
        T, S, N, H, V, MASK, MASK_T, MASK_S, PRECISION, BLOCK, H_PADDED, V_PADDED, True,
    )  # fmt: skip
    total = _distance_tiles(
        total, whole, QUERY_TILES, content, position, grad, lse, shift, key, value, relative, mask, e,
        T, S, N, H, V, MASK, MASK_T, MASK_S, PRECISION, BLOCK, H_PADDED, V_PADDED, False,
    )  # fmt: skip
    _store_rows(d_relative + b * (S * N * H) + n * H, distance, S, total, N * H, H, H_PADDED)


# ------------------------------------------------------------------------------------------------------------ launches


def heuristic(kernel: str, mode: launch.Mode, dtype, features: int, length: int) -> launch.Config:
    """Square tiles that compile without spills, which three TF32 products for one of float32 make small.

    In the interpreter, where a step costs the same whatever its size, they are as large as the queries need.
    """
    if mode == "interpret":
        return launch.Config({"BLOCK": min(256, _padded(length))})
    if dtype == jnp.float32:
        return launch.Config({"BLOCK": 16}, num_warps=8, num_stages=2)
    warps = 8 if kernel in ("relative_backward_query", "relative_backward_key") and features > 32 else 4
    return launch.Config({"BLOCK": 32}, num_warps=warps, num_stages=1 if features <= 16 else 2)


def _padded(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def _launch(mode, kernel, arrays, outputs, cut):
    """Runs a kernel that takes one tile of the axis `cut` at a time. The mask and the relative keys may lack the batch."""
    content, value, relative, mask = (arrays[name] for name in ("content", "value", "relative", "mask"))
    (B, T, N, H), (_, S, _, V) = content.shape, value.shape
    strides = (0, 0, 0, 0)
    if mask is not None:
        steps = (mask[0].size, mask[0, 0].size, mask.shape[3], 1)
        strides = tuple(0 if size == 1 else step for size, step in zip(mask.shape, steps, strict=True))
    constants = dict(
        T=T, S=S, N=N, H=H, V=V, RELATIVE_B=0 if relative.shape[0] == 1 else S * N * H, MASK=mask is not None,
        MASK_B=strides[0], MASK_N=strides[1], MASK_T=strides[2], MASK_S=strides[3],
        PRECISION=launch.dot_precision(jnp.promote_types(content.dtype, value.dtype)),
        H_PADDED=_padded(H), V_PADDED=_padded(V),
    )  # fmt: skip
    own = heuristic(kernel.__name__, mode, content.dtype, max(H, V), T)
    config = launch.config(kernel.__name__, own, H=H, V=V, dtype=content.dtype.name)
    grid = B * N * triton.cdiv(constants[cut], config.blocks["BLOCK"])
    return launch.call(kernel, arrays, outputs, grid=grid, constants=constants, config=config, mode=mode)


def _named(content, position, key, value, relative, mask):
    """The operands by the names that all kernels give them."""
    return dict(content=content, position=position, key=key, value=value, relative=relative, mask=mask)


def _run_forward(mode, *operands):
    arrays = _named(*operands)
    batch, T, N, _ = arrays["content"].shape
    value = arrays["value"]
    outputs = dict(
        out=jax.ShapeDtypeStruct((batch, T, N, value.shape[3]), value.dtype),
        lse=jax.ShapeDtypeStruct((batch, N, T), jnp.float32),
    )
    return _launch(mode, relative_forward, arrays, outputs, "T")


def _run_backward(mode, *operands):
    *operands, grad, lse, shift = operands
    arrays = _named(*operands) | dict(grad=grad, lse=lse, shift=shift)
    like = lambda name, dtype=None: jax.ShapeDtypeStruct(arrays[name].shape, dtype or arrays[name].dtype)
    queries = dict(d_content=like("content"), d_position=like("position"))
    keys = dict(d_key=like("key"), d_value=like("value"))
    return (
        *_launch(mode, relative_backward_query, arrays, queries, "T"),
        *_launch(mode, relative_backward_key, arrays, keys, "S"),
        *_launch(mode, relative_backward_distance, arrays, dict(d_relative=like("key", jnp.float32)), "S"),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(mode, content, position, key, value, relative, mask):
    return _forward(mode, content, position, key, value, relative, mask)[0]


def _forward(mode, content, position, key, value, relative, mask):
    operands = content, position, key, value, relative, mask
    out, lse = launch.fold_vmap(functools.partial(_run_forward, mode), SHARED)(*operands)
    out, lse = checkpoint_name((out, lse), SAVED)
    return out, (*operands, out, lse)


def _backward(mode, saved, grad):
    content, position, *others, out, lse = saved
    no_lse, is_masked = jnp.zeros((), lse.dtype), others[-1] is not None
    lse, shift, *queries = online.residue(out, (lse.swapaxes(1, 2),), grad, no_lse, is_masked, content, position)
    run = launch.fold_vmap(functools.partial(_run_backward, mode), SHARED)
    *gradients, d_relative = run(*queries, *others, grad, lse.swapaxes(1, 2), shift.swapaxes(1, 2))
    relative = others[2]
    return *gradients, d_relative.sum(0, keepdims=True).astype(relative.dtype), None


precision.define_passes(_attend, _forward, _backward)


def attention(query, key, value, relative_key, content_bias, position_bias, *, mask, scale, mode):
    N, H = query.shape[2:]
    S, V = value.shape[1], value.shape[3]
    if {query.dtype.name, value.dtype.name} - set(launch.FLOATS):
        raise launch.Declined(f"query and value are {query.dtype} and {value.dtype}, and it takes {', '.join(launch.FLOATS)}.")
    if max(H, V) > 128:
        raise launch.Declined(f"heads have {max(H, V)} features, and its tiles hold at most 128.")
    if S * N * max(H, V) >= 2**31:
        raise launch.Declined("a sample has 2^31 or more elements, and it counts them in 32 bits.")

    def biased(bias):
        return ((query.astype(jnp.float32) + bias) * scale).astype(query.dtype)

    key, relative = key.astype(query.dtype), relative_key[None, :S].astype(query.dtype)
    return _attend(mode, biased(content_bias), biased(position_bias), key, value, relative, mask)
