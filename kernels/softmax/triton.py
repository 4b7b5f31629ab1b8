"""Softmax attention on the kernels of `subquad.kernels.flash`.

Bias, mask, segments and pattern are functions of the pair of positions. Every visited pair of blocks costs two products
forward, three and four in the two backward kernels, and two more for a bias.
"""

import dataclasses
import functools
import math
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import triton
import triton.language as tl

from subquad.kernels import gpu, launch, tuning
from subquad.kernels.flash import rules
from subquad.kernels.flash import triton as flash
from subquad.kernels.flash.tiles import Geometry, bounds_of, known, range_of, states_of, work
from subquad.kernels.flash.triton import LARGEST_HEAD, dense, head_of, load_rows, load_sums, operands_of, padded, weights_of
from subquad.kernels.operation import operation
from subquad.kernels.padding import pad_to
from subquad.kernels.patterns import NONE, Band, Pattern
from subquad.kernels.softmax import online
from subquad.kernels.softmax.reference import SAVED
from subquad.kernels.softmax.sets import Visible, independent_axes

# Bytes of keys and values of the heads that run side by side: they should stay in the L2 cache.
CACHE_BYTES = 16 << 20


def attention(query, key, value, bias, visible: Visible, pattern: Pattern | None, scale: float, *, mode: launch.Mode):
    """Arguments as checked by `subquad.kernels.softmax.attention` -> (out [B, T, N, V], maximum, log(normaliser))."""
    launch.require_floats(query.dtype)
    launch.require_at_most(LARGEST_HEAD, max(query.shape[3], value.shape[3]), "features in a head")
    positions, arrays = zip(*map(known, visible[:2]), strict=True)
    static = Static(pattern, *positions, scale, mode)
    out, lse = attend(independent_axes(pattern))(static, query, key, value, bias, Visible(*arrays, *visible[2:]))
    return out, *online.split_lse(lse)


# ------------------------------------------------------------------------------------------- the functions of the instance


class Axes(NamedTuple):
    """Which axes of [B, N, T, S] a mask or bias has; the others have one element."""

    B: bool
    N: bool
    T: bool
    S: bool


class Options(NamedTuple):
    """What the functions below do."""

    PATTERN: tuple | None  # as `rules` has it
    BIAS: Axes | None
    MASK: Axes | None
    SEGMENTS: bool
    QUERY_POSITIONS: str  # "array", or they count from a "start", or from "zero", which saves registers
    KEY_POSITIONS: str
    ROWS_PER_HEAD: bool = False
    LISTED: bool = False
    BOUNDED: bool = False


ALIGNMENT = tl.constexpr(8)  # of the rows of a mask or bias, for wide loads at every length


@triton.jit
def work_of(rank, b, n, operands, OPTIONS: tl.constexpr):
    """WORK: a row of `tiles.work`, cut to the bounds."""
    row = operands.rows + rank * 7
    if OPTIONS.ROWS_PER_HEAD:
        row += n * operands.ROWS * 7
    tile = tl.load(row)
    first, first_end, second = tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    second_end, full, full_end = tl.load(row + 4), tl.load(row + 5), tl.load(row + 6)
    if OPTIONS.BOUNDED:
        bounds = operands.bounds + (b * operands.ROWS + tile) * 2
        low, high = tl.load(bounds), tl.load(bounds + 1)
        first, second, full = tl.maximum(first, low), tl.maximum(second, low), tl.maximum(full, low)
        first_end, second_end = tl.minimum(first_end, high), tl.minimum(second_end, high)
        full_end = tl.minimum(full_end, high)
    in_first = tl.maximum(first_end - first, 0)
    return tile, in_first + tl.maximum(second_end - second, 0), full_end - full, (first, in_first, second, full)


@triton.jit
def block_of(ranges, i, PARTIAL: tl.constexpr, operands, OPTIONS: tl.constexpr):
    """BLOCK: of two ranges of partial blocks, or the one of full blocks."""
    first, in_first, second, full = ranges
    if PARTIAL:
        tile = tl.where(i < in_first, first + i, second + i - in_first)
    else:
        tile = full + i
    if OPTIONS.LISTED:
        tile = tl.load(operands.tiles + tile)
    return tile


@triton.jit
def logits_of(products, b, n, query_start, q, k, operands, SHAPE: tl.constexpr, OPTIONS: tl.constexpr):
    """LOGITS: scale products + bias."""
    logits = products
    if SHAPE.UNIT != SHAPE.SCALE:  # -1, which rounds nothing, or a bias follows: see `online_softmax`
        logits = logits * (SHAPE.SCALE / SHAPE.UNIT)
    if OPTIONS.BIAS is not None:
        logits += load_pairs(operands.bias, b, n, query_start, q, k, operands, SHAPE, OPTIONS.BIAS).to(tl.float32)
    return logits


@triton.jit
def visible(b, n, query_start, q, k, operands, SHAPE: tl.constexpr, OPTIONS: tl.constexpr):
    """VISIBLE: what the pattern, the segments and the mask allow."""
    result = k < operands.S
    if OPTIONS.PATTERN is not None:
        query = positions_of(operands.query_positions, operands.query_start, b, q, operands.T, OPTIONS.QUERY_POSITIONS)
        key = positions_of(operands.key_positions, operands.key_start, b, k, operands.S, OPTIONS.KEY_POSITIONS)
        result = result & rules.allowed(query, key, n, operands.tables, operands.words, OPTIONS.PATTERN)
    if OPTIONS.SEGMENTS:
        query = positions_of(operands.query_segments, 0, b, q, operands.T, "array")
        key = positions_of(operands.key_segments, 0, b, k, operands.S, "array")
        result = result & (query == key)
    if OPTIONS.MASK is not None:
        result = result & (load_pairs(operands.mask, b, n, query_start, q, k, operands, SHAPE, OPTIONS.MASK) != 0)
    return result


@triton.jit
def positions_of(array, start, b, index, LENGTH, KIND: tl.constexpr):
    """Positions, or segments, of KIND as `Options` has it; an array is [B, LENGTH]."""
    if KIND == "array":
        result = tl.load(array + b * LENGTH + index, mask=index < LENGTH, other=0)
    elif KIND == "start":
        result = index + start
    else:
        result = index
    return result


@triton.jit
def load_pairs(array, b, n, query_start, q, k, operands, SHAPE: tl.constexpr, AXES: tl.constexpr):
    """A block of a mask or bias, whose rows are as `aligned` makes them; 0 outside. An axis of one element is read once."""
    at, inside = pairs_of(array, b, n, query_start, q, k, operands, SHAPE, AXES)
    return tl.load(at, mask=inside, other=0)


@triton.jit
def store_bias(grad_logits, b, n, query_start, q, k, operands, SHAPE: tl.constexpr, OPTIONS: tl.constexpr):
    """STORE: the gradient of a bias that each pair has for its own."""
    at, inside = pairs_of(operands.grad_bias, b, n, query_start, q, k, operands, SHAPE, OPTIONS.BIAS)
    tl.store(at, grad_logits.to(at.dtype.element_ty), mask=inside)


@triton.jit
def pairs_of(array, b, n, query_start, q, k, operands, SHAPE: tl.constexpr, AXES: tl.constexpr):
    """Where a block of a mask or bias lies, and what of it exists."""
    T, S = operands.T, operands.S
    COLUMNS = tl.cdiv(S, ALIGNMENT) * ALIGNMENT
    matrix = n * 0
    if AXES.N:
        matrix += n
    if AXES.B:
        matrix += b * (SHAPE.HEADS if AXES.N else 1)
    if AXES.T:
        matrix *= T
    if AXES.S:
        matrix *= COLUMNS
    array += matrix
    if not AXES.S:
        k = k * 0
    if not AXES.T:
        at, inside = array + k, k < COLUMNS
    elif not AXES.S:
        at, inside = array + q, q < T
    else:
        # Only the offset of the whole block is in 64 bits.
        array += query_start.to(tl.int64) * COLUMNS
        at, inside = array + (q - query_start) * COLUMNS + k, (q < T) & (k < COLUMNS)
    return at, inside


FUNCTIONS = flash.Functions(work_of, block_of, dense, dense, logits_of, visible)


# ---------------------------------------------------------------------------------------------- the gradient of a bias


@triton.jit
def flash_backward_bias(
    query, key, value, words, bias, mask, query_positions, key_positions, query_segments, key_segments, tables, rows, tiles,
    bounds, order, codes, key_buckets, starts, lse, delta, grad_out, grad_bias,
    FUNCTIONS: tl.constexpr, SHAPE: tl.constexpr, OPTIONS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One block of the gradient of the bias: the sum over all that reads it, in a fixed order.

    The words ROWS and GROUP are the number of consecutive samples that read the same bias, and of all blocks that read a block
    of it; `rows` are the states of the blocks.
    """
    operands = operands_of(
        words, bias, mask, query_positions, key_positions, query_segments, key_segments, tables, rows, tiles, bounds, order,
        codes, key_buckets, starts, None,
    )  # fmt: skip
    T, S, SAMPLES, count = operands.T, operands.S, operands.ROWS, operands.GROUP
    AXES: tl.constexpr = OPTIONS.BIAS
    GROUPS: tl.constexpr = SHAPE.HEADS // SHAPE.KEY_HEADS
    BIAS_HEADS: tl.constexpr = SHAPE.HEADS if AXES.N else 1
    query_blocks, key_blocks = tl.cdiv(T, BLOCK_Q), tl.cdiv(S, BLOCK_K)
    bias_rows, bias_columns = query_blocks if AXES.T else 1, key_blocks if AXES.S else 1
    rest, column = split(tl.program_id(0), bias_columns)
    rest, row = split(rest, bias_rows)
    bias_b, bias_n = split(rest, BIAS_HEADS)
    inner_rows, inner_columns = query_blocks // bias_rows, key_blocks // bias_columns
    if AXES.T and AXES.S:
        count = tl.where(tl.load(rows + row * key_blocks + column) == 0, 0, count)
    total = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    for step in range(count):
        rest, j = split(step, inner_columns)
        rest, i = split(rest, inner_rows)
        sample, head = split(rest, SHAPE.HEADS // BIAS_HEADS)
        b, n = bias_b.to(tl.int64) * SAMPLES + sample, (bias_n + head).to(tl.int64)
        query_start, key_start = (row + i) * BLOCK_Q, (column + j) * BLOCK_K
        q, k = query_start + tl.arange(0, BLOCK_Q), key_start + tl.arange(0, BLOCK_K)
        query_rows = dense(query_start, T, BLOCK_Q, b, n, operands, OPTIONS)
        key_rows = dense(key_start, S, BLOCK_K, b, n, operands, OPTIONS)
        lse_i = load_sums(lse, b, n, query_rows, T, float("inf"), SHAPE.HEADS)
        delta_i = load_sums(delta, b, n, query_rows, T, 0.0, SHAPE.HEADS)
        products = products_of(
            head_of(query, b, n, T, SHAPE.HEADS, SHAPE.FEATURES, SHAPE.ONE_QUERY), query_rows,
            head_of(key, b, n // GROUPS, S, SHAPE.KEY_HEADS, SHAPE.FEATURES, SHAPE.ONE_KEY), key_rows,
            SHAPE.HEADS, SHAPE.KEY_HEADS, SHAPE.FEATURES, SHAPE.BLOCK_H, BLOCK_Q, BLOCK_K, SHAPE.PRECISION,
        )  # fmt: skip
        logits = FUNCTIONS.LOGITS(products, b, n, query_start, q[:, None], k[None, :], operands, SHAPE, OPTIONS)
        weights = weights_of(logits, lse_i[:, None], SHAPE.UNIT)
        seen = FUNCTIONS.VISIBLE(b, n, query_start, q[:, None], k[None, :], operands, SHAPE, OPTIONS)
        weights = tl.where(seen, weights, 0.0)
        grad_weights = products_of(
            head_of(grad_out, b, n, T, SHAPE.HEADS, SHAPE.VALUES, SHAPE.ONE_GRAD), query_rows,
            head_of(value, b, n // GROUPS, S, SHAPE.KEY_HEADS, SHAPE.VALUES, SHAPE.ONE_VALUE), key_rows,
            SHAPE.HEADS, SHAPE.KEY_HEADS, SHAPE.VALUES, SHAPE.BLOCK_V, BLOCK_Q, BLOCK_K, SHAPE.PRECISION,
        )  # fmt: skip
        total += weights * (grad_weights - delta_i[:, None])
    q, k = row * BLOCK_Q + tl.arange(0, BLOCK_Q), column * BLOCK_K + tl.arange(0, BLOCK_K)
    matrix = (bias_b * BIAS_HEADS + bias_n).to(tl.int64)
    if AXES.T and AXES.S:
        at = grad_bias + matrix * T * S + q[:, None].to(tl.int64) * S + k[None, :]
        tl.store(at, total, mask=(q[:, None] < T) & (k[None, :] < S))
    elif AXES.T:
        tl.store(grad_bias + matrix * T + q, tl.sum(total, 1), mask=q < T)
    elif AXES.S:
        tl.store(grad_bias + matrix * S + k, tl.sum(total, 0), mask=k < S)
    else:
        tl.store(grad_bias + matrix, tl.sum(tl.sum(total, 1), 0))


@triton.jit
def split(i, n):
    return i // n, i % n


@triton.jit
def products_of(
    left, left_rows, right, right_rows, LEFT_HEADS: tl.constexpr, RIGHT_HEADS: tl.constexpr, FEATURES: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Products of a block of rows with one of others, [t, s].

    Wide float32 rows are read in slices: the parts of whole ones, for three TF32 products, are more than the registers hold.
    """
    if PRECISION != "tf32x3" or WIDTH <= 64:
        rows = load_rows(left, left_rows, LEFT_HEADS, FEATURES, WIDTH, True)
        others = load_rows(right, right_rows, RIGHT_HEADS, FEATURES, WIDTH, True)
        total = tl.dot(rows, tl.trans(others), input_precision=PRECISION)
    else:
        total = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
        first, row, row_exists = left_rows
        key_first, column, column_exists = right_rows
        left += first * (LEFT_HEADS * FEATURES)
        right += key_first * (RIGHT_HEADS * FEATURES)
        for start in range(0, FEATURES + (tl.program_id(0) >> 30), 16):
            feature = start + tl.arange(0, 16)[None, :]
            row_at = left + row[:, None] * (LEFT_HEADS * FEATURES) + feature
            column_at = right + column[:, None] * (RIGHT_HEADS * FEATURES) + feature
            rows = tl.load(row_at, mask=row_exists[:, None] & (feature < FEATURES), other=0.0)
            others = tl.load(column_at, mask=column_exists[:, None] & (feature < FEATURES), other=0.0)
            total = tl.dot(rows, tl.trans(others), total, input_precision=PRECISION)
    return total


# ---------------------------------------------------------------------------------------------------------- the launches


@dataclasses.dataclass(frozen=True)
class Static:
    """Everything of a call that is no array; positions as a `Geometry` knows them."""

    pattern: Pattern | None
    query_positions: int | bytes | None
    key_positions: int | bytes | None
    scale: float
    mode: launch.Mode


class Call:
    """The inputs and constants that the kernels of one call share."""

    def __init__(self, static: Static, query, key, value, bias, visible: Visible, **gradients):
        self.static, self.visible = static, visible
        self.arrays = query, key, value
        batch = self.batch = max(len(x) for x in jax.tree.leaves((self.arrays, bias, visible, gradients)))
        known_positions = static.query_positions, static.key_positions
        geometry = Geometry(query.shape[1], key.shape[1], *known_positions, static.pattern, visible.is_masked)
        self.geometry = geometry
        lengths = geometry.queries, geometry.keys
        tree = rules.Tree(geometry.pattern, *map(range_of, known_positions, lengths))
        self.pattern_words = tree.words
        each = self.of_each_sample
        self.inputs = dict(
            query=query, key=key, value=value, bias=aligned(bias), mask=aligned(visible.mask),
            query_positions=each(visible.query_positions), key_positions=each(visible.key_positions),
            query_segments=each(visible.query_segment_ids), key_segments=each(visible.key_segment_ids),
            tables=None if tree.table is None else jnp.asarray(tree.table),
        )  # fmt: skip
        sums = {name: each(gradients[name]) for name in ("lse", "delta") if name in gradients}
        self.gradients = gradients | sums
        (_, _, heads, features), (_, _, kv_heads, value_features) = query.shape, value.shape
        self.heads = {"query": heads, "key": kv_heads}
        one = lambda array: array is not None and len(array) == 1 < batch
        self.shape = flash.Shape(
            heads, kv_heads, features, value_features, padded(features), padded(value_features), static.scale,
            unit_of(static.scale, bias), launch.dot_precision(query.dtype), bias is not None,
            *map(one, (*self.arrays, gradients.get("grad_out"))),
        )  # fmt: skip
        self.options = Options(
            tree.node, axes(bias), axes(visible.mask), visible.query_segment_ids is not None,
            kind_of(visible.query_positions, geometry.query_positions), kind_of(visible.key_positions, geometry.key_positions),
        )  # fmt: skip

    def of_each_sample(self, array):
        """[B|1, ...] as [B, ...]: of small arrays, so that kernels need not know which are shared."""
        return None if array is None else jnp.broadcast_to(array, (self.batch, *array.shape[1:]))

    def run(self, kernel, grid: int, rows: tuple[int, int], lists: dict, outputs: dict, config, store=None, aliases=None,
            **options):  # fmt: skip
        """Launches a kernel; `rows` are the words ROWS and GROUP."""
        geometry = self.geometry
        starts = [x if isinstance(x, int) else 0 for x in (geometry.query_positions, geometry.key_positions)]
        return flash.run(
            kernel,
            self.inputs | lists | self.gradients,
            outputs,
            words=(geometry.queries, geometry.keys, *rows, *starts, 0, 0, *self.pattern_words),
            grid=grid,
            functions=FUNCTIONS._replace(STORE=store),
            shape=self.shape,
            options=self.options._replace(**options),
            config=config,
            mode=self.static.mode,
            aliases=aliases,
        )

    def launch_rows(self, kernel, outputs: dict, *, along: str, **options):
        """Runs a kernel over the rows of blocks `along` "query" or "key"."""
        config = self.config_of(kernel)
        geometry, sizes = self.geometry, (config.blocks["BLOCK_Q"], config.blocks["BLOCK_K"])
        todo = work(geometry, *sizes, along == "key")
        bounds = None if todo.tiles is not None else bounds_of(geometry, self.visible, *sizes, along == "key")
        bounds = self.of_each_sample(bounds)
        programs = self.batch * self.heads[along]
        count = todo.rows.shape[1]
        return self.run(
            kernel,
            programs * count,
            (count, count * self.heads_together(programs, along)),
            dict(bounds=bounds, rows=jnp.asarray(todo.rows), tiles=None if todo.tiles is None else jnp.asarray(todo.tiles)),
            outputs,
            config,
            **options,
            ROWS_PER_HEAD=len(todo.rows) > 1,
            LISTED=todo.tiles is not None,
            BOUNDED=bounds is not None,
        )

    def config_of(self, kernel) -> tuning.Config:
        """The configuration of a kernel; short sequences take smaller blocks, powers of two, and the smallest fewer warps."""
        geometry, pattern, mode, dtype = self.geometry, self.static.pattern, self.static.mode, self.arrays[0].dtype
        reach = None if pattern is None else pattern.reach
        block_size = None if pattern is None else pattern.tile
        size = max(self.shape.BLOCK_H, self.shape.BLOCK_V)
        crowded = geometry.tested or not isinstance(pattern, Band | None)
        crowded = crowded or geometry.query_positions is None or geometry.key_positions is None
        ragged = size > min(self.shape.FEATURES, self.shape.VALUES)
        biased = self.inputs["bias"] is not None
        config = tile_sizes(kernel.__name__, dtype, size, ragged, biased, crowded, reach, block_size, mode)
        if mode == "triton":
            sizes = dict(
                dtype=dtype.name, features=size, biased=biased, crowded=crowded, reach=reach, block_size=block_size
            )  # fmt: skip
            config = tuning.config(kernel.__name__, config, **sizes)
        lengths = ("BLOCK_Q", geometry.queries), ("BLOCK_K", geometry.keys)
        blocks = {name: min(config.blocks[name], padded(length)) for name, length in lengths}
        warps = 4 if blocks != config.blocks and math.prod(blocks.values()) <= 256 else config.num_warps
        return dataclasses.replace(config, blocks=blocks, num_warps=min(warps, config.num_warps))

    def heads_together(self, programs: int, along: str) -> int:
        """The number of heads to run side by side: as many as keep what they read over and over in the L2 cache."""
        query, key, value = self.arrays
        read = (key if along == "query" else query).shape[1] * (key.shape[3] + value.shape[3])
        groups = query.shape[2] // key.shape[2]
        most = max(1, CACHE_BYTES // (read * query.dtype.itemsize))
        most = most * groups if along == "query" else max(1, most // groups)
        return max(count for count in range(1, min(most, programs) + 1) if programs % count == 0)


def unit_of(scale: float, bias) -> float:
    """Of the kernels' logits: the scale waits for the exponent where no bias is added before."""
    return 1.0 if bias is not None or scale == 0 else abs(scale)


def kind_of(array, first) -> str:
    """See `Options`; `first`: what a `Geometry` knows of these positions."""
    return "array" if array is not None else "start" if first else "zero"


def axes(array) -> Axes | None:
    return None if array is None else Axes(*(size > 1 for size in array.shape))


def aligned(array):
    """A mask or bias [..., S|1] with zeros behind each row, so that every row starts at a multiple of ALIGNMENT."""
    if array is None or array.shape[3] == 1:
        return array
    return pad_to(array, 3, -(-array.shape[3] // ALIGNMENT.value) * ALIGNMENT.value)


def run_forward(static: Static, query, key, value, bias, visible: Visible):
    """(out [B, T, N, V], lse [B, N, T] in units of `unit_of`)."""
    call = Call(static, query, key, value, bias, visible)
    (_, queries, heads, _), features = query.shape, value.shape[3]
    outputs = dict(
        out=jax.ShapeDtypeStruct((call.batch, queries, heads, features), query.dtype),
        lse=jax.ShapeDtypeStruct((call.batch, heads, queries), jnp.float32),
    )
    return call.launch_rows(flash.flash_forward, outputs, along="query")


def run_backward(static: Static, query, key, value, bias, lse, delta, grad_out, visible: Visible):
    """The gradients of query, key and value, each [B, ...], and the bias' in float32, or None.

    Args:
        lse: [B, N, T] of `run_forward`, +inf for rows that see nothing.
        delta: [B, N, T], of `online.backward_rows`.
    """
    call = Call(static, query, key, value, bias, visible, lse=lse, delta=delta, grad_out=grad_out)
    shape = lambda like: jax.ShapeDtypeStruct((call.batch, *like.shape[1:]), like.dtype)
    # A bias that nothing shares has its gradient from the pass that meets each pair once; pairs in no block have none.
    own = bias is not None and bias.shape == (call.batch, query.shape[2], query.shape[1], key.shape[1])
    # Wide float32 heads that do not fill a block leave that pass no registers for it.
    size, least = max(call.shape.BLOCK_H, call.shape.BLOCK_V), min(call.shape.FEATURES, call.shape.VALUES)
    own = own and min(bias.shape[2:]) > 1 and not (query.dtype == jnp.float32 and size > max(64, least))
    outputs, keeping = dict(grad_query=shape(query)), {}
    if own:
        call.gradients["no_bias"] = zeros = jnp.zeros_like(aligned(bias))
        outputs["grad_bias"] = jax.ShapeDtypeStruct(zeros.shape, zeros.dtype)
        keeping = dict(store=store_bias, aliases=dict(no_bias="grad_bias"))
    grad_query, grad_bias = call.launch_rows(flash.flash_backward_query, outputs, along="query", **keeping)
    outputs = dict(grad_key=shape(key), grad_value=shape(value))
    grad_key, grad_value = call.launch_rows(flash.flash_backward_key, outputs, along="key")
    if bias is not None:
        grad_bias = grad_bias[..., : bias.shape[3]] if own else bias_gradient(call, bias)
    return grad_query, grad_key, grad_value, None if bias is None else grad_bias


def bias_gradient(call: Call, bias):
    """The gradient of a bias that samples may share, in float32."""
    config = call.config_of(flash_backward_bias)
    tiles = config.blocks["BLOCK_Q"], config.blocks["BLOCK_K"]
    wide = bias.shape[2:]
    counts = [1 if size == 1 else -(-size // tile) for size, tile in zip(wide, tiles, strict=True)]
    some = (states_of(call.geometry, *tiles) != NONE).any(0).astype(np.int32)
    programs = math.prod((*bias.shape[:2], *counts))
    return call.run(
        flash_backward_bias,
        programs,
        (call.batch // len(bias), call.batch * call.shape.HEADS * some.size // programs),
        dict(rows=jnp.asarray(some)),
        dict(grad_bias=jax.ShapeDtypeStruct(bias.shape, jnp.float32)),
        config,
    )[0]


def attend_forward(static, query, key, value, bias, visible):
    """Attention -> (out [B, T, N, V], lse [B, T, N])."""
    out, lse = run_forward(static, query, key, value, bias, visible)
    # Kept in its unit: at 1e9, a product and its inverse would round by hundreds.
    return (out, online.rounded(lse.swapaxes(1, 2) * unit_of(static.scale, bias))), (query, key, value, bias, visible, out, lse)


def attend_backward(static, residuals, gradients):
    query, key, value, bias, visible, out, lse = residuals
    lse, delta, query = online.backward_rows(out, (lse.swapaxes(1, 2),), *gradients, visible.is_masked, query)
    lse, delta = (x.swapaxes(1, 2) for x in (lse, delta))
    *grads, grad_bias = run_backward(static, query, key, value, bias, lse, delta, gradients[0], visible)
    grad_bias = None if bias is None else grad_bias.astype(bias.dtype)
    return *grads, grad_bias, jax.tree.map(lambda _: None, visible)


@functools.cache
def attend(independent: str):
    """The operation; `independent`: the axes that a mesh may cut."""
    visible = Visible("b t", "b s", "b t", "b s", "b n t s")
    return operation(
        attend_forward, attend_backward, arrays=("b t n h", "b s n h", "b s n v", "b n t s", visible),
        outputs=("b t n v", "b t n"), saved=("b n t",), independent=independent, name=SAVED,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- the sizes


# BLOCK_Q, BLOCK_K, warps and stages: the largest that compile without spills; the first row that holds is taken.
ALWAYS = lambda x: True
TILES_OF_16_BITS = {
    "flash_forward": (
        # Products of 16 features are small, and a mask beside the test of a pattern takes all registers of four warps.
        (lambda x: (x.narrow or x.wide and x.blocks) and (x.wide or x.tiny and x.full), (64, 64, 8, 2)),
        (lambda x: x.narrow, (64, 64, 4, 2)),
        (lambda x: x.biased or x.wide and x.crowded or x.blocks or x.old, (128, 64, 8, 2)),
        (lambda x: x.wide and x.ragged, (128, 64, 8, 3)),
        (ALWAYS, (128, 128, 8, 3)),
    ),
    "flash_backward_query": (
        (lambda x: x.small and x.wide, (64, 64, 8, 2)),
        (lambda x: x.small, (64, 64, 4, 2)),
        (ALWAYS, (128, 64, 8, 2)),
    ),
    "flash_backward_key": (
        # Tests and a bias take registers: fewer queries at once, and fewer keys of wide heads.
        (lambda x: x.small and not (x.wide or x.full or x.ragged), (64, 64, 4, 2)),
        (lambda x: x.small and not (x.wide or x.full), (32, 64, 4, 2)),
        (lambda x: x.wide and (x.small or x.full or x.blocks), (32, 64, 8, 2)),
        (lambda x: x.small and (x.tested or x.ragged or x.biased), (32, 64, 8, 2)),
        (lambda x: x.small, (64, 64, 8, 2)),
        (lambda x: x.wide or x.tested or x.ragged or x.biased, (32, 128, 8, 2)),
        (ALWAYS, (64, 128, 8, 2)),
    ),
    "flash_backward_bias": ((ALWAYS, (64, 64, 8, 2)),),
}
# Three TF32 products keep six parts of each operand in registers, so tiles are small.
TILES_OF_FLOAT32 = {
    "flash_forward": (
        (lambda x: x.wide and x.biased and x.tested, (16, 32, 8, 1)),
        (lambda x: x.wide and x.blocks, (16, 16, 8, 1)),
        (lambda x: x.blocks, (32, 32, 8, 2)),
        (lambda x: x.wide, (32, 16, 8, 1)),
        (ALWAYS, (64, 32, 4, 2)),
    ),
    "flash_backward_query": (
        (lambda x: x.biased and (x.wide or not x.ragged), (16, 16, 8, 1)),
        (lambda x: x.full and x.tiny, (16, 16, 8, 1)),
        (lambda x: x.wide or x.full, (16, 32, 8, 1)),
        (lambda x: x.ragged, (32, 16, 8, 1)),
        (ALWAYS, (64, 16, 4, 2)),
    ),
    "flash_backward_key": (
        (lambda x: x.tiny, (32, 16, 8, 1)),
        (lambda x: x.wide or x.blocks and x.ragged or x.biased and x.crowded, (16, 16, 8, 1)),
        (ALWAYS, (16, 16, 4, 1)),
    ),
    "flash_backward_bias": (
        (lambda x: x.wide, (32, 32, 8, 1)),
        (ALWAYS, (16, 32, 4, 2)),
    ),
}


def tile_sizes(
    kernel: str, dtype, features: int, ragged: bool, biased: bool, crowded: bool, reach: int | None, block_size: int | None,
    mode: launch.Mode,
) -> tuning.Config:  # fmt: skip
    """The heuristic configuration of a kernel.

    Args:
        features: the larger of H and V, padded.
        ragged: whether they were fewer, so that loads are masked, which takes registers.
        biased: whether there is a bias, whose tiles take shared memory.
        crowded: whether a tile meets more than a band that is known beforehand and a bias, which takes registers.
        reach: keys that one query can see at most, where that is known.
        block_size: of a pattern, whose test takes registers.
    """
    if mode == "interpret":  # there a step costs the same whatever its size
        return tuning.Config({"BLOCK_Q": 512, "BLOCK_K": 512})
    blocks, old = block_size is not None, (gpu.capability() or 90) < 90
    # Tiles that stick out of a narrow band, or of a block, are wasted work.
    narrow = reach is not None and reach <= 512 or blocks and block_size % 128 != 0
    traits = types.SimpleNamespace(
        wide=features > 64, tiny=features <= 16, ragged=ragged, biased=biased, crowded=crowded, full=crowded or biased,
        tested=crowded and not blocks, blocks=blocks, narrow=narrow, old=old, small=narrow or old,
    )  # fmt: skip
    rows = (TILES_OF_FLOAT32 if dtype == jnp.float32 else TILES_OF_16_BITS)[kernel]
    query, key, warps, stages = next(sizes for holds, sizes in rows if holds(traits))
    return tuning.Config({"BLOCK_Q": query, "BLOCK_K": key}, warps, stages)
