"""Linear attention with decays on a GPU: two kernels, which are also their own derivative.

    write   the states before the chunks, S' = decay S + sum_s k_s v_s^T, from chunk to chunk
    read    all chunks at once: q_c^T S + sum_s (q_c . k_s) v_s, over the tokens s of the chunk that c sees

With every product times exp of the log decay in between. The derivative is the same sums with other operands, where a gradient
of the state goes from the last chunk to the first:

    gradient of   left    right   values   state              of an output o of which g is the gradient
    (output)      query   key     value    S
    query         g       value   key      S^T
    key           value   g       query    G^T   reversed     G: sum_c q_c g_c^T of what comes after, by `write` reversed
    value         key     query   g        G     reversed

A normaliser is one more value, 1: its state is the sum of the keys, and its gradient one more column of g.

The delta rule writes other values. XLA solves what depends on keys alone, chunk by chunk (`recurrence.delta_rule`): W and U,
what a chunk reads of the state before it and writes without one. `write` then corrects the values by the state that it holds
anyway, and all else takes them for the values; the gradient of a correction acts on the gradient of the state:

    u = U - W S                                     what is written
    du = (what `read` makes of g without G) + k G   its gradient, also that of U; that of W is -du S^T
    G' = decay G + sum_c q_c g_c^T - W^T du

Decays are coordinates of places on the time axis. `late` is that of each token, as queries have it, `early` that of its key,
and `start` that of the state before each chunk; a product of what a query and a key hold counts exp(late_c - early_s). They
may have two parts, whose differences are added: sums of log decays without rounding, or segments. None: nothing decays.

A decay per channel of the key belongs to the axis of states that features have, so it stands inside of the products: of rows
with a state or with each other where they are queries and keys, and of scores with queries or keys where these are the values.
exp(late_c - early_s) is then a product, exp(late_c - border) exp(border - early_s), with a border between c and s, so that no
factor exceeds 1 (the secondary chunks of GLA, arXiv 2312.06635, section 4.3, with halves of halves down to one token):

    level l   pairs (c, s) whose highest different bit is l: neighbouring halves of 2^l tokens, with one border
              both factors are exp(-|g - border|), of one tile; a product of whole tiles, of which the pairs of the level count

Features of random projections, the running maximum of log scales and the sums of log decays are XLA's (`prepare` of a plan),
computed again in the backward pass.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jaxtyping import Array, Float

from subquad.kernels import launch, precision, tuning
from subquad.kernels.flash.triton import head_of, padded
from subquad.kernels.linear import recurrence
from subquad.kernels.linear.reference import SMALLEST_DENOMINATOR, divide, finite, normalized, repeated
from subquad.kernels.linear.xla import FEATURES, FOREVER, as_rows, first_state, running_maximum, visible_scale, with_ones
from subquad.kernels.operation import operation


class Shape(NamedTuple):
    """The constants of both kernels in one launch. left and right are [B, T, N, WIDTH], values [B, T, N, COLUMNS]."""

    HEADS: int
    WIDTH: int
    COLUMNS: int
    CHUNK: int
    REVERSED: bool  # from the last token to the first
    PARTS: int  # of a coordinate; 0: nothing decays
    CHANNELS: int  # of a coordinate: WIDTH, COLUMNS where features are the values, or 1 for all
    LEVELS: int  # of halves of a chunk
    IS_CAUSAL: bool
    HAS_SUMS: bool  # whether there is a normaliser
    IS_DELTA: bool  # whether values are corrected by the state
    BF16: bool  # bfloat16 is multiplied as such, everything else as float32
    PRECISION: str


# --------------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def linear_write(
    left, values, last_value, right, erase, partial, late, early, start, words, first, first_sums,
    states, states_sums, last, last_sums, corrected,
    SHAPE: tl.constexpr, HAS_LAST_VALUE: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The states [B, N, chunks, WIDTH, COLUMNS] on which the chunks build, and that after all: one block of them.

    Their sums [B, N, chunks, WIDTH] are the states of a value of 1, or of `last_value`. With the delta rule a block is as wide
    as the state, `left` and `right` are weighed before, and values are `corrected` by what `erase` reads; reversed, this is
    their gradient, from its `partial` sums.
    """
    T, CHUNKS, places = tl.load(words), tl.load(words + 1), tl.load(words + 2)
    ACROSS: tl.constexpr = (SHAPE.COLUMNS + BLOCK_C - 1) // BLOCK_C
    DOWN: tl.constexpr = (SHAPE.WIDTH + BLOCK_W - 1) // BLOCK_W
    program = tl.program_id(0)
    block = program % ACROSS
    head = (program // (ACROSS * DOWN)).to(tl.int64)
    b, n = head // SHAPE.HEADS, head % SHAPE.HEADS
    width = (program // ACROSS) % DOWN * BLOCK_W + tl.arange(0, BLOCK_W)
    column = block * BLOCK_C + tl.arange(0, BLOCK_C)
    left = head_of(left, b, n, T, SHAPE.HEADS, SHAPE.WIDTH, False)
    values = head_of(values, b, n, T, SHAPE.HEADS, SHAPE.COLUMNS, False)
    if SHAPE.IS_DELTA:
        right = head_of(right, b, n, T, SHAPE.HEADS, SHAPE.WIDTH, False)
        erase = head_of(erase, b, n, T, SHAPE.HEADS, SHAPE.WIDTH, False)
        partial = head_of(partial, b, n, T, SHAPE.HEADS, SHAPE.COLUMNS, False)
        corrected = head_of(corrected, b, n, T, SHAPE.HEADS, SHAPE.COLUMNS, False)
    late += head * places * (SHAPE.PARTS * SHAPE.CHANNELS)
    early += head * places * (SHAPE.PARTS * SHAPE.CHANNELS)
    start += head * (places // SHAPE.CHUNK) * (SHAPE.PARTS * SHAPE.CHANNELS)
    inside = (width < SHAPE.WIDTH)[:, None] & (column < SHAPE.COLUMNS)[None, :]
    place = width[:, None] * SHAPE.COLUMNS + column[None, :]
    state = tl.load(first + head * (SHAPE.WIDTH * SHAPE.COLUMNS) + place, mask=inside, other=0.0)
    sums = tl.zeros((BLOCK_W,), tl.float32)
    channel = tl.zeros((1,), tl.int32)
    if SHAPE.CHANNELS > 1:
        channel = tl.minimum(width, SHAPE.WIDTH - 1)
    if SHAPE.HAS_SUMS:
        sums = tl.load(first_sums + head * SHAPE.WIDTH + width, mask=width < SHAPE.WIDTH, other=0.0)
    for step in range(CHUNKS):
        i = CHUNKS - 1 - step if SHAPE.REVERSED else step
        if SHAPE.IS_CAUSAL:
            here = head * CHUNKS + i
            at = states + here * (SHAPE.WIDTH * SHAPE.COLUMNS) + place
            tl.store(at, state.to(states.dtype.element_ty), mask=inside)
            if SHAPE.HAS_SUMS and block == 0:
                tl.store(states_sums + here * SHAPE.WIDTH + width, sums, mask=width < SHAPE.WIDTH)
        rows = load_tile(left, i * SHAPE.CHUNK, T, width, SHAPE.HEADS, SHAPE.WIDTH, SHAPE.CHUNK)
        what = load_tile(values, i * SHAPE.CHUNK, T, column, SHAPE.HEADS, SHAPE.COLUMNS, SHAPE.CHUNK)
        token = i * SHAPE.CHUNK + tl.arange(0, SHAPE.CHUNK)
        if SHAPE.IS_DELTA:
            erased = operand(load_tile(erase, i * SHAPE.CHUNK, T, width, SHAPE.HEADS, SHAPE.WIDTH, SHAPE.CHUNK), SHAPE)
            if SHAPE.REVERSED:
                keys = load_tile(right, i * SHAPE.CHUNK, T, width, SHAPE.HEADS, SHAPE.WIDTH, SHAPE.CHUNK)
                change = load_tile(partial, i * SHAPE.CHUNK, T, column, SHAPE.HEADS, SHAPE.COLUMNS, SHAPE.CHUNK).to(tl.float32)
                change = tl.dot(operand(keys, SHAPE), operand(state, SHAPE), change, input_precision=SHAPE.PRECISION)
            else:
                change = what - tl.dot(erased, operand(state, SHAPE), input_precision=SHAPE.PRECISION)
                what = change
            at, exists = tile_of(corrected, i * SHAPE.CHUNK, T, column, SHAPE.HEADS, SHAPE.COLUMNS, SHAPE.CHUNK)
            tl.store(at, change.to(corrected.dtype.element_ty), mask=exists)
        if SHAPE.PARTS > 0:
            if not SHAPE.IS_DELTA:
                weight = weights_of(late, early, start, token[:, None], i, places, channel[None, :], not SHAPE.REVERSED, SHAPE)
                rows = rows.to(tl.float32) * weight
            decay = tl.exp(gap(late, (i + 1) * SHAPE.CHUNK - 1, places, start, i, places // SHAPE.CHUNK, channel, SHAPE))
            state *= decay[:, None]
            sums *= decay
        if SHAPE.HAS_SUMS:
            more = tl.full((SHAPE.CHUNK,), 1.0, tl.float32)
            if HAS_LAST_VALUE:
                more = tl.load(last_value + head * T + token, mask=token < T, other=0.0)
            sums += tl.sum(rows.to(tl.float32) * more[:, None], 0)
        state = tl.dot(tl.trans(operand(rows, SHAPE)), operand(what, SHAPE), state, input_precision=SHAPE.PRECISION)
        if SHAPE.IS_DELTA and SHAPE.REVERSED:
            state -= tl.dot(tl.trans(erased), operand(change, SHAPE), input_precision=SHAPE.PRECISION)
    tl.store(last + head * (SHAPE.WIDTH * SHAPE.COLUMNS) + place, state, mask=inside)
    if SHAPE.HAS_SUMS and block == 0:
        tl.store(last_sums + head * SHAPE.WIDTH + width, sums, mask=width < SHAPE.WIDTH)


@triton.jit
def linear_read(
    left, right, values, last_value, late, early, start, words, states, states_sums, partner, out, inverse, products,
    SHAPE: tl.constexpr, HAS_STATES: tl.constexpr, IS_TRANSPOSED: tl.constexpr, DIVIDES: tl.constexpr,
    LAST_VALUE_OF: tl.constexpr, HAS_PARTNER: tl.constexpr, SCALE: tl.constexpr, EPS: tl.constexpr, SMALLEST: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A block of columns of one chunk of `out` [B, T, N, COLUMNS].

    DIVIDES: by the normaliser; `inverse` [B, N, T] is then what was multiplied by. LAST_VALUE_OF: "left" or "right" has one
    column more, `last_value` [B, N, T], the other has 1 there. `products` [B, N, blocks, T] are those of out and `partner`.
    """
    T, CHUNKS, places = tl.load(words), tl.load(words + 1), tl.load(words + 2)
    BLOCKS: tl.constexpr = (SHAPE.COLUMNS + BLOCK_C - 1) // BLOCK_C
    CHUNK: tl.constexpr = SHAPE.CHUNK
    DECAYS_ROWS: tl.constexpr = SHAPE.CHANNELS > 1 and not IS_TRANSPOSED
    DECAYS_COLUMNS: tl.constexpr = SHAPE.CHANNELS > 1 and IS_TRANSPOSED
    program = tl.program_id(0)
    block, chunk = program % BLOCKS, (program // BLOCKS) % CHUNKS
    head = (program // BLOCKS // CHUNKS).to(tl.int64)
    b, n = head // SHAPE.HEADS, head % SHAPE.HEADS
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    column = block * BLOCK_C + tl.arange(0, BLOCK_C)
    left = head_of(left, b, n, T, SHAPE.HEADS, SHAPE.WIDTH, False)
    late += head * places * (SHAPE.PARTS * SHAPE.CHANNELS)
    early += head * places * (SHAPE.PARTS * SHAPE.CHANNELS)
    start += head * (places // SHAPE.CHUNK) * (SHAPE.PARTS * SHAPE.CHANNELS)
    here = head
    if SHAPE.IS_CAUSAL:
        right = head_of(right, b, n, T, SHAPE.HEADS, SHAPE.WIDTH, False)
        values = head_of(values, b, n, T, SHAPE.HEADS, SHAPE.COLUMNS, False)
        here = head * CHUNKS + chunk
    states += here * (SHAPE.WIDTH * SHAPE.COLUMNS)
    row = tl.arange(0, CHUNK)
    if SHAPE.REVERSED:
        visible = row[:, None] <= row[None, :]
    else:
        visible = row[:, None] >= row[None, :]
    apart = row[:, None] ^ row[None, :]
    result = tl.zeros((CHUNK, BLOCK_C), tl.float32)
    scores = tl.zeros((CHUNK, CHUNK), tl.float32)
    total = tl.zeros((CHUNK,), tl.float32)
    for first in range(0, SHAPE.WIDTH, BLOCK_W):
        width = first + tl.arange(0, BLOCK_W)
        rows = load_tile(left, chunk * CHUNK, T, width, SHAPE.HEADS, SHAPE.WIDTH, CHUNK)
        if SHAPE.IS_CAUSAL:
            others = load_tile(right, chunk * CHUNK, T, width, SHAPE.HEADS, SHAPE.WIDTH, CHUNK)
            if DECAYS_ROWS:
                channel = tl.minimum(width, SHAPE.WIDTH - 1)[None, :]
                own = tl.sum(rows.to(tl.float32) * others.to(tl.float32), 1)
                scores += tl.where(apart == 0, own[:, None], 0.0)
                for level in range(SHAPE.LEVELS):
                    factor = to_border(late, row, chunk, level, places, channel, SHAPE)
                    one = operand(rows.to(tl.float32) * factor, SHAPE)
                    other = tl.trans(operand(others.to(tl.float32) * factor, SHAPE))
                    product = tl.dot(one, other, input_precision=SHAPE.PRECISION)
                    scores += tl.where((apart >> level) == 1, product, 0.0)
                weight = weights_of(late, early, start, token[:, None], chunk, places, channel, SHAPE.REVERSED, SHAPE)
                rows = rows.to(tl.float32) * weight
            else:
                others = tl.trans(operand(others, SHAPE))
                scores = tl.dot(operand(rows, SHAPE), others, scores, input_precision=SHAPE.PRECISION)
        if HAS_STATES:
            if IS_TRANSPOSED:
                place = column[None, :] * SHAPE.WIDTH + width[:, None]
            else:
                place = width[:, None] * SHAPE.COLUMNS + column[None, :]
            inside = (width < SHAPE.WIDTH)[:, None] & (column < SHAPE.COLUMNS)[None, :]
            state = operand(tl.load(states + place, mask=inside, other=0.0), SHAPE)
            result = tl.dot(operand(rows, SHAPE), state, result, input_precision=SHAPE.PRECISION)
        if DIVIDES:
            sums = tl.load(states_sums + here * SHAPE.WIDTH + width, mask=width < SHAPE.WIDTH, other=0.0)
            total += tl.sum(rows.to(tl.float32) * sums[None, :], 1)
    if LAST_VALUE_OF != "":
        more = tl.load(last_value + head * T + token, mask=token < T, other=0.0)
        sums = tl.load(states_sums + here * SHAPE.COLUMNS + column, mask=column < SHAPE.COLUMNS, other=0.0)
        if LAST_VALUE_OF == "left":
            result += more[:, None] * sums[None, :]
            scores += more[:, None]
        else:
            result += sums[None, :]
            scores += more[None, :]
    channel = tl.zeros((1,), tl.int32)[None, :]
    if DECAYS_COLUMNS:
        channel = tl.minimum(column, SHAPE.COLUMNS - 1)[None, :]
    if SHAPE.PARTS > 0 and (SHAPE.IS_CAUSAL or SHAPE.REVERSED) and not DECAYS_ROWS:
        weight = weights_of(late, early, start, token[:, None], chunk, places, channel, SHAPE.REVERSED, SHAPE)
        result *= weight
        if DIVIDES:
            total *= tl.sum(weight, 1)
    if SHAPE.IS_CAUSAL:
        if SHAPE.PARTS > 0 and SHAPE.CHANNELS == 1:
            if SHAPE.REVERSED:
                decay = gap(late, token[None, :], places, early, token[:, None], places, 0, SHAPE)
            else:
                decay = gap(late, token[:, None], places, early, token[None, :], places, 0, SHAPE)
            scores *= tl.exp(tl.where(visible, decay, float("-inf")))
        else:
            scores = tl.where(visible, scores, 0.0)
        total += tl.sum(scores, 1)
        what = load_tile(values, chunk * CHUNK, T, column, SHAPE.HEADS, SHAPE.COLUMNS, CHUNK)
        if DECAYS_COLUMNS:
            result += tl.sum(tl.where(apart == 0, scores, 0.0), 1)[:, None] * what.to(tl.float32)
            for level in range(SHAPE.LEVELS):
                factor = to_border(late, row, chunk, level, places, channel, SHAPE)
                some = operand(tl.where((apart >> level) == 1, scores, 0.0), SHAPE)
                product = tl.dot(some, operand(what.to(tl.float32) * factor, SHAPE), input_precision=SHAPE.PRECISION)
                result += factor * product
        else:
            result = tl.dot(operand(scores, SHAPE), operand(what, SHAPE), result, input_precision=SHAPE.PRECISION)
    result *= SCALE
    if DIVIDES:
        total = total * SCALE + EPS
        one_over = tl.where(tl.abs(total) > SMALLEST, 1.0 / total, 0.0)
        result *= one_over[:, None]
        if block == 0:
            tl.store(inverse + head * T + token, one_over, mask=token < T)
    if HAS_PARTNER:
        partner = head_of(partner, b, n, T, SHAPE.HEADS, SHAPE.COLUMNS, False)
        other = load_tile(partner, chunk * CHUNK, T, column, SHAPE.HEADS, SHAPE.COLUMNS, CHUNK)
        at = products + (head * BLOCKS + block) * T + token
        tl.store(at, tl.sum(result * other.to(tl.float32), 1), mask=token < T)
    out = head_of(out, b, n, T, SHAPE.HEADS, SHAPE.COLUMNS, False)
    at, inside = tile_of(out, chunk * CHUNK, T, column, SHAPE.HEADS, SHAPE.COLUMNS, CHUNK)
    tl.store(at, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def weights_of(late, early, start, token, chunk, places, channel, OF_KEYS: tl.constexpr, SHAPE: tl.constexpr):
    """exp of the log decay from each key to the state after the chunk, or from the state before it to each query."""
    if OF_KEYS:
        result = gap(late, (chunk + 1) * SHAPE.CHUNK - 1, places, early, token, places, channel, SHAPE)
    else:
        result = gap(late, token, places, start, chunk, places // SHAPE.CHUNK, channel, SHAPE)
    return tl.exp(result)


@triton.jit
def to_border(late, row, chunk, level, places, channel, SHAPE: tl.constexpr):
    """exp of the log decay between each token of a chunk and the border of its two halves of 2^level tokens."""
    token = chunk * SHAPE.CHUNK + row
    border = ((token >> level) | 1) << level
    return tl.exp(-tl.abs(gap(late, token[:, None], places, late, border[:, None] - 1, places, channel, SHAPE)))


@triton.jit
def gap(late, i, late_step, early, j, early_step, channel, SHAPE: tl.constexpr):
    """The log decay between two places, whose second parts lie a step behind the first ones."""
    i, j = i * SHAPE.CHANNELS + channel, j * SHAPE.CHANNELS + channel
    result = tl.load(late + i) - tl.load(early + j)
    if SHAPE.PARTS == 2:
        result += tl.load(late + late_step * SHAPE.CHANNELS + i) - tl.load(early + early_step * SHAPE.CHANNELS + j)
    return result


@triton.jit
def tile_of(array, first, T, column, HEADS: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """Pointers to [CHUNK, columns] of one head of [T, HEADS, WIDTH], and which of these elements exist."""
    row = tl.arange(0, CHUNK)[:, None]
    at = array + first.to(tl.int64) * (HEADS * WIDTH) + row * (HEADS * WIDTH) + column[None, :]
    return at, (row < T - first) & (column[None, :] < WIDTH)


@triton.jit
def load_tile(array, first, T, column, HEADS: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    at, inside = tile_of(array, first, T, column, HEADS, WIDTH, CHUNK)
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def operand(x, SHAPE: tl.constexpr):
    """What goes into a matrix product."""
    return x.to(tl.bfloat16) if SHAPE.BF16 else x.to(tl.float32)


# --------------------------------------------------------------------------------------------------------------- a call


class Operands(NamedTuple):
    """What the kernels take: features, and coordinates on the time axis of L places in K chunks, for H = 1 or M channels."""

    query: Float[Array, "B T N M"]
    key: Float[Array, "B S N M"]
    value: Float[Array, "B S N V"]
    late: Float[Array, "B N P L H"] | None
    early: Float[Array, "B N P L H"] | None
    start: Float[Array, "B N P K H"] | None
    state: Float[Array, "B N M V"]
    sums: Float[Array, "B N M"] | None
    erase: Float[Array, "B T N M"] | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything about a call that is not an array.

    Args:
        prepare: (plan, arrays of the operation) -> (operands, the largest log scale or None): in XLA, differentiable.
        features: a name of `xla.FEATURES`.
        divides: by the normaliser.
        hides: whether tokens may be padding.
        differentiates: which coordinates have a gradient, "late" or "early".
    """

    prepare: Callable
    features: str
    is_causal: bool
    divides: bool
    hides: bool
    differentiates: tuple[str, ...]
    scale: float
    eps: float
    chunk: int
    bf16: bool
    precision: str
    mode: launch.Mode

    @property
    def dtype(self):
        """Of what is multiplied; float16 has neither the range of the sums nor that of the features."""
        return jnp.bfloat16 if self.bf16 else jnp.float32


def write(plan: Plan, x: Operands, is_reversed: bool, left, values, last_value, first, first_sums, partial=None):
    """(states before the chunks, if causal, and their sums, the last state, and its sums, the values that were written, or with
    `partial` their gradient): see `linear_write`."""
    (batch, length, heads, width), columns = left.shape, values.shape[3]
    config = configure(linear_write, plan, x, width, columns)
    chunks = -(-length // plan.chunk)
    blocks = math.prod(-(-size // config.blocks[name]) for name, size in (("BLOCK_W", width), ("BLOCK_C", columns)))
    outputs = dict(
        states=room(plan.is_causal, batch, heads, chunks, width, columns, dtype=plan.dtype),
        states_sums=room(plan.is_causal and plan.divides, batch, heads, chunks, width),
        last=room(True, batch, heads, width, columns), last_sums=room(plan.divides, batch, heads, width),
        corrected=room(x.erase is not None, batch, length, heads, columns, dtype=plan.dtype),
    )  # fmt: skip
    right = None
    if x.erase is not None:
        right = weighed(plan, x, x.key, True)
        left = weighed(plan, x, left, False) if is_reversed else right
    inputs = dict(left=left, values=values, last_value=last_value, right=right, erase=x.erase, partial=partial)
    inputs |= dict(late=x.late, early=x.early, start=x.start)
    inputs |= dict(words=words_of(plan, x, length), first=first, first_sums=first_sums)
    constants = dict(SHAPE=shape_of(plan, x, is_reversed, left, values), HAS_LAST_VALUE=last_value is not None)
    *found, corrected = launch.call(
        linear_write, inputs, outputs, grid=batch * heads * blocks, constants=constants, config=config, mode=plan.mode
    )
    return *found, values if x.erase is None else corrected


def read(plan: Plan, x: Operands, is_reversed: bool, left, right, values, states, sums, *, dtype, is_output=False,
         is_transposed=False, last_value=None, last_value_of="", partner=None):  # fmt: skip
    """(out, what it was multiplied by, its products with `partner` [B, N, blocks, T]): see `linear_read`."""
    (batch, length, heads, width), columns = left.shape, values.shape[3]
    config = configure(linear_read, plan, x, width, columns)
    blocks = -(-columns // config.blocks["BLOCK_C"])
    divides = is_output and plan.divides
    outputs = dict(
        out=room(True, batch, length, heads, columns, dtype=dtype), inverse=room(divides, batch, heads, length),
        products=room(partner is not None, batch, heads, blocks, length),
    )  # fmt: skip
    inputs = dict(left=left, right=right, values=values, last_value=last_value, late=x.late, early=x.early, start=x.start)
    inputs |= dict(words=words_of(plan, x, length), states=states, states_sums=sums, partner=partner)
    constants = dict(
        SHAPE=shape_of(plan, x, is_reversed, left, values), HAS_STATES=states is not None, IS_TRANSPOSED=is_transposed,
        DIVIDES=divides, LAST_VALUE_OF=last_value_of if plan.divides else "", HAS_PARTNER=partner is not None,
        SCALE=plan.scale if is_output else 1.0, EPS=plan.eps, SMALLEST=SMALLEST_DENOMINATOR,
    )  # fmt: skip
    grid = batch * heads * blocks * -(-length // plan.chunk)
    return launch.call(linear_read, inputs, outputs, grid=grid, constants=constants, config=config, mode=plan.mode)


def room(exists, *shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape if exists else (1,), dtype)


def has_channels(x: Operands) -> bool:
    """Whether every channel has a decay of its own."""
    return x.late is not None and x.late.shape[4] > 1


def words_of(plan: Plan, x: Operands, length: int):
    """The run-time numbers of a launch: tokens, their chunks, and places on the time axis."""
    return launch.words(length, -(-length // plan.chunk), 0 if x.late is None else x.late.shape[3])


def shape_of(plan: Plan, x: Operands, is_reversed: bool, left, values) -> Shape:
    parts, channels = (0, 1) if x.late is None else (x.late.shape[2], x.late.shape[4])
    return Shape(
        left.shape[2], left.shape[3], values.shape[3], plan.chunk, is_reversed, parts, channels, plan.chunk.bit_length() - 1,
        plan.is_causal, plan.divides, x.erase is not None, plan.bf16, plan.precision,
    )  # fmt: skip


def forward(plan: Plan, *arrays):
    """((outputs, last state, its sums, the largest log scale), what `backward` needs)."""
    x, largest = plan.prepare(plan, *arrays)
    states, sums, last, last_sums, values = write(plan, x, False, x.key, x.value, None, x.state, x.sums)
    if not plan.is_causal:
        states, sums = last, last_sums
    out, inverse, _ = read(
        plan, x, False, x.query, x.key, values, states, sums, dtype=arrays[2].dtype, is_output=True
    )
    if not plan.divides:
        return (out, last, None, largest), (arrays,)
    return (out, last, last_sums, largest), (arrays, out, inverse)


def backward(plan: Plan, residuals, cotangents):
    """The gradients of the operation's arrays: the launches of the table above."""
    arrays, *divided = residuals
    grad_out, grad_last, grad_last_sums, _ = cotangents
    if plan.hides:
        # Queries may be padding, which holds anything: one whose output nobody used counts as 0.
        idle = (grad_out == 0).all(-1, keepdims=True)
        arrays = jnp.where(idle, 0, arrays[0]), *arrays[1:]
    x, pull, _ = jax.vjp(functools.partial(plan.prepare, plan), *arrays, has_aux=True)
    wide, tail = plan.scale * grad_out.astype(jnp.float32), None
    if plan.divides:
        out, inverse = divided
        wide *= inverse.swapaxes(1, 2)[..., None]
        out = jnp.where(idle, 0, out) if plan.hides else out
        tail = -jnp.sum(wide * out.astype(jnp.float32), -1).swapaxes(1, 2)  # the gradient of the sum that divides
    grad = wide.astype(plan.dtype)
    states, sums, last, last_sums, values = write(plan, x, False, x.key, x.value, None, x.state, x.sums)
    partial = None
    if x.erase is not None:
        partial, *_ = read(plan, x, True, x.key, x.query, grad, None, None, dtype=plan.dtype)
    after, after_sums, grad_state, grad_sums, of_value = write(
        plan, x, True, x.query, grad, tail, grad_last, grad_last_sums, partial
    )
    has = {name: name in plan.differentiates and x.late is not None for name in ("late", "early")}
    by_channel, ends = has_channels(x), None
    if has["late"]:
        # A state is in units of the last coordinate of its chunk.
        ends = jnp.sum(following(states, last) * after.astype(jnp.float32), 4)
        if plan.divides:
            ends += following(sums, last_sums) * after_sums
        ends = ends if by_channel else ends.sum(3, keepdims=True)
    if not plan.is_causal:
        states, sums, after, after_sums = last, last_sums, grad_state, grad_sums
    whole = lambda y: jnp.float32 if by_channel else y.dtype
    of_query, _, at_query = read(
        plan, x, False, grad, values, x.key, states, sums, dtype=whole(x.query), is_transposed=True, last_value=tail,
        last_value_of="left", partner=x.query if has["late"] and not by_channel else None,
    )  # fmt: skip
    of_key, _, at_key = read(
        plan, x, True, values, grad, x.query, after, after_sums, dtype=whole(x.key), is_transposed=True, last_value=tail,
        last_value_of="right", partner=x.key if has["early"] and not by_channel else None,
    )  # fmt: skip
    if by_channel:
        # What cancels in sums over time must not be rounded before.
        at_query, at_key = of_query * x.query, of_key * x.key
        of_query, of_key = of_query.astype(x.query.dtype), of_key.astype(x.key.dtype)
    if x.erase is None:
        of_erase, (of_value, *_) = None, read(plan, x, True, x.key, x.query, grad, after, None, dtype=x.value.dtype)
    else:
        of_erase = -through(states, of_value, plan.chunk).astype(x.erase.dtype)
    of_late = at_coordinates(x.late, at_query, ends, plan.chunk) if has["late"] else zeros_like(x.late)
    of_early = at_coordinates(x.early, -at_key, None, plan.chunk) if has["early"] else zeros_like(x.early)
    start, sums = zeros_like(x.start), grad_sums if plan.divides else None
    grads = pull(Operands(of_query, of_key, of_value, of_late, of_early, start, grad_state, sums, of_erase))
    return tuple(None if g is None or g.dtype == jax.dtypes.float0 else g for g in grads)


def weighed(plan: Plan, x: Operands, rows, is_key: bool):
    """Keys as the state after their chunk has them, or queries as they read the one before it."""
    if x.late is None:
        return rows
    late = x.late.reshape(*x.late.shape[:3], -1, plan.chunk, x.late.shape[4])
    gaps = late[..., -1:, :] - late if is_key else late - x.start[..., None, :]
    factor = jnp.exp(gaps.sum(2)).reshape(*late.shape[:2], -1, late.shape[5])[:, :, : rows.shape[1]]
    return (rows * factor.swapaxes(1, 2)).astype(plan.dtype)


@precision.full
def through(states, values, chunk: int):
    """The products [B, T, N, M] of values [B, T, N, V] with the states before their chunks."""
    rows = cut_chunks(values, chunk)
    rows = jnp.einsum("bkcv,bkmv->bkcm", rows, states.reshape(*rows.shape[:2], *states.shape[3:]))
    return rows.reshape(*states.shape[:2], -1, rows.shape[3])[:, :, : values.shape[1]].swapaxes(1, 2)


def cut_chunks(x, chunk: int):
    """[B, T, N, X] as [B, N K, C, X], with zeros at the end."""
    batch, length, heads, width = x.shape
    chunks = -(-length // chunk)
    x = jnp.pad(x.swapaxes(1, 2), [(0, 0), (0, 0), (0, chunks * chunk - length), (0, 0)])
    return x.reshape(batch, heads * chunks, chunk, width)


def following(states, last):
    """The states after the chunks, from those before them."""
    return jnp.concatenate([states[:, :, 1:].astype(jnp.float32), last[:, :, None]], 2)


def at_coordinates(like, products, ends, chunk: int):
    """The gradient of coordinates [B, N, P, L, H], which is that of their last part.

    Args:
        products: of the gradient of what they weigh with itself: [B, T, N, H], or their sums [B, N, blocks, T] where H = 1.
        ends: [B, N, chunks, H], the same of the states after the chunks.
    """
    rows = products.sum(2)[..., None] if like.shape[4] == 1 else products.swapaxes(1, 2)
    rows = jnp.pad(rows, [(0, 0), (0, 0), (0, like.shape[3] - rows.shape[2]), (0, 0)])
    if ends is not None:
        rows = rows.at[:, :, chunk - 1 :: chunk].add(ends)
    return jnp.zeros_like(like).at[:, :, -1].set(rows)


def zeros_like(x):
    return None if x is None else jnp.zeros_like(x)


# Tokens whose random features are in memory at once.
PIECE = 2048
# Of query, key, value, log scales or decays, segments, projection; of the state: itself, its sums, the largest log scale; beta.
ARRAYS = ("b t n h", "b s n h", "b s n v", "b s n k", "b s", "b m h", "b n m v", "b n m", "b n", "b s n")
OUTPUTS = ("b t n v", "b n m v", "b n m", "b n")
SHARED = [[5]]  # may be one for all samples
run_sums = operation(forward, backward, arrays=ARRAYS, outputs=OUTPUTS, shared=SHARED)
run_means = operation(forward, backward, arrays=ARRAYS, outputs=OUTPUTS, saved=("b n t",), shared=SHARED)


# ---------------------------------------------------------------------------------------------------- the operations


def attention(query, key, value, key_log_scale, mask, segments, is_causal, initial_state, eps, *, mode):
    """See `linear.attention`; returns the outputs and the state after the last key."""
    return attend("given", is_causal, eps, query, key, value, None, key_log_scale, mask, segments, initial_state, mode)


def random_feature_attention(query, key, value, projection, kernel, mask, segments, is_causal, initial_state, *, mode):
    """See `linear.random_feature_attention`; returns the outputs and the state after the last key."""
    return attend(kernel, is_causal, 0.0, query, key, value, projection[None], None, mask, segments, initial_state, mode)


def attend(features, is_causal, eps, query, key, value, projection, key_log_scale, mask, segments, initial_state, mode):
    log_scale = visible_scale(features, key, key_log_scale, mask, segments, initial_state)
    stabilizes = log_scale is not None or features == "softmax"
    matrix = None if projection is None else projection[0]
    (state, sums), largest = first_state(query, value, matrix, initial_state, stabilizes)
    plan = plan_of(
        (query, key, value), mode, prepare=with_running_maximum, features=features, is_causal=is_causal, divides=True,
        hides=mask is not None, differentiates=("early",) if key_log_scale is not None else (), scale=1.0, eps=float(eps),
    )  # fmt: skip

    if segments is not None and not is_causal:
        return in_segments(plan, query, key, value, log_scale, segments, projection, state, sums, largest)

    def run(query, key, value, log_scale, segments, state):
        log_scale = None if log_scale is None else log_scale[..., None]
        out, *state = run_means(plan, query, key, value, log_scale, segments, projection, *state, None)
        return out, tuple(state)

    if projection is not None and max(query.shape[1], key.shape[1]) > PIECE:
        log_scale = jnp.zeros(key.shape[:3], jnp.float32) if log_scale is None else log_scale
        run = functools.partial(causal_in_pieces if is_causal else bidirectional_in_pieces, run)
    return run(query, key, value, log_scale, segments, (state, sums[..., 0], largest))


def in_segments(plan: Plan, query, key, value, log_scale, segments, projection, state, sums, largest):
    """Bidirectional attention: the keys of a segment up to each query, then those after it, by the same sums from the end,
    where each token has the key of the one before it. A state forgets everything between two segments; the log scales of each
    are relative to its largest, so that nothing else decays."""
    if projection is not None and query.shape[1] > PIECE:
        raise launch.Declined(f"random features in segments have a kernel up to {PIECE} tokens only, unless causal.")
    (query, _), (key, own) = featured(plan, query, projection), featured(plan, key, projection)
    r = as_rows(log_scale) if own is None else as_rows(log_scale) + as_rows(own)
    ids = jnp.pad(segments[:, None].astype(jnp.float32), [(0, 0), (0, 0), (1, 0)])  # the state's is the first one
    c = running_maximum(jnp.concatenate([largest[..., None], jax.lax.stop_gradient(r)], 2), ids)
    c = jnp.flip(running_maximum(jnp.flip(c, 2), jnp.flip(ids, 2)), 2)
    weight = jnp.exp(r - finite(c[..., 1:])).swapaxes(1, 2)[..., None]
    before = jnp.exp(largest - finite(c[..., 0]))[..., None, None]
    values, width = with_one_more(weight * value, weight), value.shape[3]
    state = with_one_more(state, sums) * before
    causal = dataclasses.replace(
        plan, prepare=with_decay, features="given", is_causal=True, divides=False, differentiates=(), eps=0.0
    )

    def add(query, key, values, is_new, state):
        log_decay = jnp.broadcast_to(jnp.where(is_new, -jnp.inf, 0.0), (*query.shape[:3], 1))
        return run_sums(causal, query, key, values, log_decay, None, None, state, None, None, None)[:2]

    is_new = lambda ids: jnp.pad(ids[:, 1:] != ids[:, :-1], [(0, 0), (1, 0)])[..., None, None]
    flip = lambda x: jnp.flip(x, 1)
    shift = lambda x: jnp.pad(x, [(0, 0), (1, 0), (0, 0), (0, 0)])[:, :-1]
    past, last = add(query, key, values, is_new(segments), state)
    is_last = is_new(flip(segments))
    future, _ = add(flip(query), shift(flip(key)), jnp.where(is_last, 0, shift(flip(values))), is_last, jnp.zeros_like(state))
    both = past + flip(future)
    out = divide(both[..., :width], both[..., width], plan.eps).astype(value.dtype)
    return out, (last[..., :width], last[..., width], c[..., -1])


def with_one_more(values, other):
    """[..., V + 16] of values [..., V] and another one [..., 1]: rows of V + 1 would lie on no boundary for wide loads."""
    x = jnp.concatenate([values, other], -1).astype(jnp.float32)
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 15)])


def causal_in_pieces(run, query, key, value, log_scale, segments, state):
    """`run` for one piece of the sequence after another, so that only the features of one are in memory."""

    def step(carry, piece):
        state, segment = carry
        *piece, segments = piece
        if segments is not None:  # a state is of segment 0
            segments, segment = segments - segment[:, None], segments[:, -1]
        out, state = run(*piece, segments, state)
        return (state, segment), out

    segment = None if segments is None else segments[:, 0]
    pieces = *map(cut, (query, key, value)), cut(log_scale, constant_values=-jnp.inf), cut(segments, mode="edge")
    (state, _), out = jax.lax.scan(step, (state, segment), pieces)
    return joined(out, query.shape[1]), state


def bidirectional_in_pieces(run, query, key, value, log_scale, segments, state):
    """As `causal_in_pieces`, first for the keys, then for the queries, which add a key that none sees."""
    pieces = *map(cut, (key, value)), cut(log_scale, constant_values=-jnp.inf)
    add = lambda state, piece: (run(query[:, :1], *piece, None, state)[1], None)
    state, _ = jax.lax.scan(add, state, pieces)
    hidden = key[:, :1], value[:, :1], jnp.full_like(log_scale[:, :1], -jnp.inf)
    out = jax.lax.map(lambda piece: run(piece, *hidden, None, state)[0], cut(query))
    return joined(out, query.shape[1]), state


def cut(x, **options):
    """[B, T, ...] as pieces [P, B, T / P, ...] of PIECE tokens at most, padded at the end."""
    if x is None:
        return None
    length = x.shape[1]
    count = -(-length // PIECE)
    size = -(-length // count)
    x = jnp.pad(x, [(0, 0), (0, count * size - length), *[(0, 0)] * (x.ndim - 2)], **options)
    return jnp.moveaxis(x.reshape(len(x), count, size, *x.shape[2:]), 1, 0)


def joined(pieces, length: int):
    """The inverse of `cut`."""
    x = jnp.moveaxis(pieces, 0, 1)
    return x.reshape(len(x), -1, *x.shape[3:])[:, :length]


def gated(query, key, value, log_decay, beta, bonus, floor, erase, initial_state, normalize, scale, *, mode):
    """See `linear.gated`; returns the outputs and the state after the last token."""
    if erase is not None:
        raise launch.Declined("erase must be None, got some. The other implementations have it.")
    dtype = value.dtype
    query, key, value = repeated(initial_state.shape[1], 2, query, key, value)
    if log_decay is not None and log_decay.ndim == 3:
        log_decay = log_decay[..., None]
    if normalize and (beta is not None or bonus is not None or floor is not None):
        # A sum of keys that is corrected, too, is one of the values; and a kernel divides by nothing else than the sum.
        value, width = with_one_more(*with_ones(value)), value.shape[3]
        state = with_one_more(initial_state[..., :-1], initial_state[..., -1:])
        out, state = gated(query, key, value, log_decay, beta, bonus, None, None, state, False, scale, mode=mode)
        return normalized(out[..., :width], out[..., width : width + 1], floor).astype(dtype), state[..., : width + 1]
    if bonus is not None:
        later = recurrence.next_ones(query, 1)
        out, state = gated(later, key, value, log_decay, beta, None, None, None, initial_state, False, scale, mode=mode)
        wide_query, wide_key, wide_value = map(precision.wide, (query, key, value))
        first = precision.full(jnp.matmul)(wide_query[:, 0, :, None], initial_state).swapaxes(1, 2)
        own = recurrence.own_score(precision.wide(bonus), wide_query, wide_key) * wide_value
        return (recurrence.after_first(scale * first, precision.wide(out), 1) + scale * own).astype(dtype), state
    plan = plan_of(
        (query, key, value), mode, prepare=with_decay, features="given", is_causal=True, divides=normalize, hides=False,
        differentiates=("late", "early"), scale=scale, eps=0.0, is_delta=beta is not None,
    )  # fmt: skip
    state, sums = (initial_state[..., :-1], initial_state[..., -1]) if normalize else (initial_state, None)
    run = run_means if normalize else run_sums
    out, state, sums, _ = run(plan, query, key, value, log_decay, None, None, state.astype(jnp.float32), sums, None, beta)
    return out, jnp.concatenate([state, sums[..., None]], -1) if normalize else state


def plan_of(arrays, mode, is_delta=False, **options) -> Plan:
    dtypes = {x.dtype.name for x in arrays}
    if not dtypes <= set(launch.FLOATS):
        raise launch.Declined("the kernels take float32, bfloat16 and float16 only.")
    bf16, length = dtypes == {"bfloat16"}, max(x.shape[1] for x in arrays)
    most = 32 if "float32" in dtypes and mode == "triton" else 64
    # float16 has the digits of TF32.
    precision = launch.dot_precision(jnp.float32 if "float32" in dtypes else jnp.float16)
    if is_delta and mode == "triton":  # where the tiles of a chunk are as wide as the state
        width, size = padded(arrays[0].shape[3]), 8192 if bf16 else 2048 if precision == "tf32x3" else 4096
        most = min(most, size // width)
        if most < 16:
            raise launch.Declined(f"the delta rule takes heads of at most {size // 16} features in this dtype, got {width}.")
    return Plan(chunk=min(most, padded(length)), bf16=bf16, precision=precision, mode=mode, **options)


def with_decay(plan: Plan, query, key, value, log_decay, segments, projection, state, sums, largest, beta):
    """A plan's `prepare` for `linear.gated`: coordinates are sums of log decays, and start anew in every chunk."""
    late = start = parts = erase = None
    (batch, length, heads, _), chunks = query.shape, -(-query.shape[1] // plan.chunk)
    cut = lambda x: cut_chunks(x.astype(jnp.float32), plan.chunk)
    if log_decay is not None:
        channels = log_decay.shape[3]
        parts = recurrence.cumulate(cut(log_decay))
        late = jnp.stack([g[:, :, 1:].reshape(batch, heads, -1, channels) for g in parts], 2)
        start = jnp.zeros((batch, heads, 2, chunks, channels), jnp.float32)
        parts = parts if channels > 1 else [g[..., 0] for g in parts]
    if beta is not None:
        found = without_state(cut(key), cut(value), parts, cut(beta[..., None])[..., 0])
        joined = lambda x: x.reshape(batch, heads, -1, x.shape[3])[:, :, :length].swapaxes(1, 2).astype(plan.dtype)
        erase, value = map(joined, found)
    return Operands(query, key, value, late, late, start, state, sums, erase), None


@jax.checkpoint  # exponentials of every pair and channel are not kept for the derivative
@precision.full
def without_state(key, value, decay, beta):
    """W and U of the table above, for chunks [B, N, C, ...]."""
    solve = recurrence.delta_rule(key, decay, beta)
    return solve @ recurrence.decayed(key, decay), solve @ value


def with_running_maximum(plan: Plan, query, key, value, log_scale, segments, projection, state, sums, largest, _):
    """A plan's `prepare` for `linear.attention`: with r of a key and c the largest up to a token, coordinates are -c and -r.

    c cancels in what is divided, and keeps all weights at most 1; it is a constant to every derivative.
    """
    (query, _), (key, own) = featured(plan, query, projection), featured(plan, key, projection)
    r = None if log_scale is None else as_rows(log_scale[..., 0])
    if own is not None:
        r = as_rows(own) if r is None else as_rows(own) + r
    if r is None:
        return Operands(query, key, value, None, None, None, state, sums), largest
    c = jnp.concatenate([largest[..., None], jax.lax.stop_gradient(r)], 2)
    if segments is not None:  # the state's is the first one
        segments = jnp.pad(segments[:, None].astype(jnp.float32), [(0, 0), (0, 0), (1, 0)])
    if plan.is_causal:
        c = running_maximum(c, segments)
    else:
        c = jnp.broadcast_to(c.max(2, keepdims=True), (*c.shape[:2], max(query.shape[1], key.shape[1]) + 1))
        before = jnp.exp(largest - finite(c[..., 0]))
        state, sums = state * before[..., None, None], sums * before[..., None]
    places = -(-(c.shape[2] - 1) // plan.chunk) * plan.chunk
    fill = lambda x, **options: jnp.pad(x, [(0, 0), (0, 0), (0, places - x.shape[2])], **options)
    # Where nothing was seen yet, of this segment, the state is 0 and infinitely far away.
    parts = [(fill(-finite(c[..., 1:]), mode="edge"), fill(-r, constant_values=jnp.inf), -c[..., : -1 : plan.chunk])]
    if segments is not None:
        segments = -FOREVER * jnp.broadcast_to(segments, c.shape)
        late = fill(segments[..., 1:], mode="edge")
        parts.insert(0, (late, late, segments[..., : -1 : plan.chunk]))
    late, early, start = (jnp.stack(x, 2)[..., None] for x in zip(*parts, strict=True))
    return Operands(query, key, value, late, early, start, state, sums), c[..., -1]


def featured(plan: Plan, inputs, projection):
    """(features, their own log scales or None)."""
    run = FEATURES[plan.features]
    if projection is None:
        return run(inputs, None)
    projection = projection.astype(jnp.float32)
    found, own = run(inputs, projection[0]) if len(projection) == 1 else jax.vmap(run)(inputs, projection)
    return found.astype(plan.dtype), own


# ------------------------------------------------------------------------------------------------------------- the sizes


def configure(kernel, plan: Plan, x: Operands, width: int, columns: int) -> tuning.Config:
    best = heuristic(kernel, plan, x, padded(width), padded(columns))
    sizes = dict(width=padded(width), columns=padded(columns), bf16=plan.bf16, precision=plan.precision, chunk=plan.chunk)
    return tuning.config(kernel.__name__, best, **sizes, channels=has_channels(x), delta=x.erase is not None)


def heuristic(kernel, plan: Plan, x: Operands, width: int, columns: int) -> tuning.Config:
    """The largest blocks with which nothing overflows the registers of Hopper."""
    if plan.mode == "interpret":  # the cost there is per step, whatever its size
        return tuning.Config(dict(BLOCK_W=width, BLOCK_C=columns))
    block_w, block_c, warps, stages = 64, 64, 4, 2
    if plan.precision == "tf32x3":  # three products keep both halves of both operands
        block_w, block_c, warps, stages = (32, 64, 8, 1) if kernel is linear_read else (32, 32, 8 if width > 32 else 4, 1)
        if kernel is linear_read:  # small blocks have too little work for more
            warps = 2 if columns <= 16 else 4 if width <= 16 else warps
    if has_channels(x) and kernel is linear_read:  # decays are whole tiles
        block_w, warps = block_w // 2, 4 if plan.chunk == 16 else 8
    if x.erase is not None and kernel is linear_write:  # what is read of a state is a sum over its width
        block_w, block_c, warps, stages = width, block_c // 2, 8, 1
    return tuning.Config(dict(BLOCK_W=min(block_w, width), BLOCK_C=min(block_c, columns)), warps, stages)
