"""Linear attention with decays on a GPU: two kernels, which are also their own derivative.

A sequence is cut into chunks of C tokens. S is the state before a chunk, S' that after it, and g the sum of log decays, g_0
before the chunk and g_c up to its token c (GLA, arXiv 2312.06635, section 4):

    linear_states    S' = exp(g_C - g_0) S + sum_s exp(g_C - g_s) k_s v_s^T                        from chunk to chunk
    linear_outputs   o_c = S^T exp(g_c - g_0) q_c + sum_{s <= c} (q_c^T exp(g_c - g_s) k_s) v_s    all chunks at once

The derivative is the same sums with other operands, where a gradient G of the state goes from the last chunk to the first:

    gradient of   query   key     value    state             of an output o of which do is the gradient
    (output)      q       k       v        S
    q             do      v       k        S^T
    k             v       do      q        G^T   reversed    G = sum_c q_c do_c^T of what comes after, by `linear_states`
    v             k       q       do       G     reversed

A normaliser is one more value, 1: its state is the sum of the keys, and its gradient one more column of do.

The delta rule writes other values (DeltaNet, arXiv 2406.06484, section 3). XLA solves what depends on keys alone, chunk by
chunk (`recurrence.delta_rule`): W and U, what a chunk reads of the state before it and writes without one. `linear_states`
then corrects the values by the state that it holds anyway, and all else takes them for the values; the gradient of a
correction acts on the gradient of the state:

    u = U - W S                                                                          what is written
    du = dU = (the gradient of v without G) + k G,   dW = -du S^T                        its gradient
    G' = exp(g_C - g_0) G + sum_c exp(g_c - g_0) q_c do_c^T - W^T du

Log decays are two arrays: `late` is g_0 and g_c as queries have it, `early` g_s as keys have it. They may have two parts, whose
differences are added: sums without rounding, or segments.

A decay per channel of the key stands inside of the products: of queries and keys, and where these are the values (the
gradients of q and k), of scores and values. exp(g_c - g_s) is then exp(g_c - g_b) exp(g_b - g_s), with a border b between c
and s, so that no factor exceeds 1 (the secondary chunks of GLA, section 4.3, with halves of halves down to one token):

    level l   pairs (c, s) whose highest different bit is l: neighbouring halves of 2^l tokens, with one border
              both factors are exp(-|g - g_b|), of one tile; a product of whole tiles, of which the pairs of the level count

Features of random projections, the running maximum of log scales and the sums of log decays are XLA's (`prepare` of a plan),
computed again in the backward pass.
"""

import dataclasses
import functools
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

SMALLEST = tl.constexpr(SMALLEST_DENOMINATOR)


class Shape(NamedTuple):
    """The constants of both kernels: query and key are [B, T, N, FEATURES], value [B, T, N, VALUES]."""

    HEADS: int
    FEATURES: int
    VALUES: int
    CHUNK: int
    REVERSED: bool  # from the last token to the first
    TRANSPOSED: bool  # features are the values, and states [VALUES, FEATURES]
    PARTS: int  # of a log decay; 0: nothing decays
    CHANNELS: int  # of a log decay: as many as features, VALUES where TRANSPOSED, or 1 for all
    LEVELS: int  # of halves of a chunk
    IS_CAUSAL: bool
    HAS_SUMS: bool  # whether there is a normaliser
    IS_DELTA: bool
    BF16: bool  # bfloat16 is multiplied as such, everything else as float32
    PRECISION: str


# --------------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def linear_states(
    key, value, last_value, written_key, erase, partial, late, early, words, first, first_sums,
    states, states_sums, last, last_sums, corrected,
    SHAPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """A block of the states S [B, N, chunks, FEATURES, VALUES] before the chunks, and of that after all of them; REVERSED of G,
    where query and do stand in the place of key and value.

    Sums z [B, N, chunks, FEATURES] are the states of a value of 1; REVERSED of `last_value` [B, N, T], the gradient of the
    normaliser. With the delta rule a block is as wide as the state, and keys and queries have their decays; `erase` is W,
    value U, `partial` du without G, and `corrected` u or du.
    """
    T, CHUNKS = tl.load(words), tl.load(words + 1)
    V_BLOCKS: tl.constexpr = (SHAPE.VALUES + BLOCK_V - 1) // BLOCK_V
    M_BLOCKS: tl.constexpr = (SHAPE.FEATURES + BLOCK_M - 1) // BLOCK_M
    program = tl.program_id(0)
    v_block, m_block = program % V_BLOCKS, (program // V_BLOCKS) % M_BLOCKS
    head = (program // (V_BLOCKS * M_BLOCKS)).to(tl.int64)
    m = m_block * BLOCK_M + tl.arange(0, BLOCK_M)
    v = v_block * BLOCK_V + tl.arange(0, BLOCK_V)
    channel = m if SHAPE.CHANNELS > 1 else tl.zeros((1,), tl.int32)
    S = load(state_of(first, head, m, v, SHAPE))
    z = tl.zeros((BLOCK_M,), tl.float32)
    if SHAPE.HAS_SUMS:
        z = load(row_of(first_sums, head, m, SHAPE.FEATURES))
    for step in range(CHUNKS):
        i = CHUNKS - 1 - step if SHAPE.REVERSED else step
        if SHAPE.IS_CAUSAL:
            store(state_of(states, head * CHUNKS + i, m, v, SHAPE), S)
            if SHAPE.HAS_SUMS and v_block == 0:
                store(row_of(states_sums, head * CHUNKS + i, m, SHAPE.FEATURES), z)
        g_late, g_early = log_decays_of(late, early, words, head, i, SHAPE)
        k = load(chunk_of(key, head, i, T, m, SHAPE.FEATURES, SHAPE))
        u = load(chunk_of(value, head, i, T, v, SHAPE.VALUES, SHAPE))
        if SHAPE.IS_DELTA:
            W = load(chunk_of(erase, head, i, T, m, SHAPE.FEATURES, SHAPE))
            if SHAPE.REVERSED:
                written = load(chunk_of(written_key, head, i, T, m, SHAPE.FEATURES, SHAPE))
                du = load(chunk_of(partial, head, i, T, v, SHAPE.VALUES, SHAPE)).to(tl.float32)
                du = dot(written, S, SHAPE, du)
                store(chunk_of(corrected, head, i, T, v, SHAPE.VALUES, SHAPE), du)
            else:
                u = u - dot(W, S, SHAPE)  # U - W S
                store(chunk_of(corrected, head, i, T, v, SHAPE.VALUES, SHAPE), u)
        elif SHAPE.PARTS > 0:
            k = k.to(tl.float32) * decay_of_tokens(g_late, g_early, channel, not SHAPE.REVERSED, SHAPE)
        if SHAPE.PARTS > 0:
            decay = tl.exp(log_decay(g_late, SHAPE.CHUNK, g_late, 0, channel, SHAPE))
            S *= decay[:, None]  # exp(g_C - g_0) S
            z *= decay
        if SHAPE.HAS_SUMS:
            token = i * SHAPE.CHUNK + tl.arange(0, SHAPE.CHUNK)
            one = load(row_of(last_value, head, token, T))[:, None] if SHAPE.REVERSED else 1.0
            z += tl.sum(k.to(tl.float32) * one, 0)
        S = dot(tl.trans(k), u, SHAPE, S)  # + sum_s k_s u_s^T
        if SHAPE.IS_DELTA and SHAPE.REVERSED:
            S -= dot(tl.trans(W), du, SHAPE)
    store(state_of(last, head, m, v, SHAPE), S)
    if SHAPE.HAS_SUMS and v_block == 0:
        store(row_of(last_sums, head, m, SHAPE.FEATURES), z)


@triton.jit
def linear_outputs(
    query, key, value, last_value, late, early, words, states, states_sums, partner, out, inverse, products,
    SHAPE: tl.constexpr, HAS_PARTNER: tl.constexpr, SCALE: tl.constexpr, EPS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """A chunk of outputs [B, T, N, VALUES], a block of its values; REVERSED or TRANSPOSED, of a gradient in the table above.

    Outputs are divided by the normaliser; `inverse` [B, N, T] is what they were multiplied by. Its gradient, `last_value`
    [B, N, T], is one more feature of do. `products` [B, N, blocks, T] are those of the gradient and `partner`.
    """
    T, CHUNKS = tl.load(words), tl.load(words + 1)
    IS_OUTPUT: tl.constexpr = not (SHAPE.REVERSED or SHAPE.TRANSPOSED)
    HAS_STATES: tl.constexpr = not SHAPE.IS_DELTA or IS_OUTPUT or SHAPE.TRANSPOSED  # else G is not known yet
    FEATURES_DECAY: tl.constexpr = SHAPE.CHANNELS > 1 and not SHAPE.TRANSPOSED
    VALUES_DECAY: tl.constexpr = SHAPE.CHANNELS > 1 and SHAPE.TRANSPOSED
    V_BLOCKS: tl.constexpr = (SHAPE.VALUES + BLOCK_V - 1) // BLOCK_V
    program = tl.program_id(0)
    v_block, i = program % V_BLOCKS, (program // V_BLOCKS) % CHUNKS
    head = (program // V_BLOCKS // CHUNKS).to(tl.int64)
    state = head * CHUNKS + i if SHAPE.IS_CAUSAL else head
    g_late, g_early = log_decays_of(late, early, words, head, i, SHAPE)
    token = i * SHAPE.CHUNK + tl.arange(0, SHAPE.CHUNK)
    v = v_block * BLOCK_V + tl.arange(0, BLOCK_V)
    o = tl.zeros((SHAPE.CHUNK, BLOCK_V), tl.float32)
    scores = tl.zeros((SHAPE.CHUNK, SHAPE.CHUNK), tl.float32)
    normaliser = tl.zeros((SHAPE.CHUNK,), tl.float32)
    for block in range(0, SHAPE.FEATURES, BLOCK_M):
        m = block + tl.arange(0, BLOCK_M)
        q = load(chunk_of(query, head, i, T, m, SHAPE.FEATURES, SHAPE))
        if SHAPE.IS_CAUSAL:
            k = load(chunk_of(key, head, i, T, m, SHAPE.FEATURES, SHAPE))
            if FEATURES_DECAY:
                scores = add_scores_of_channels(scores, q, k, g_late, m, SHAPE)
                q = q.to(tl.float32) * decay_of_tokens(g_late, g_early, m, SHAPE.REVERSED, SHAPE)
            else:
                scores = dot(q, tl.trans(k), SHAPE, scores)
        if HAS_STATES:
            o = dot(q, load(state_of(states, state, m, v, SHAPE)), SHAPE, o)
        if SHAPE.HAS_SUMS and IS_OUTPUT:
            z = load(row_of(states_sums, state, m, SHAPE.FEATURES))
            normaliser += tl.sum(q.to(tl.float32) * z[None, :], 1)
    if SHAPE.HAS_SUMS and SHAPE.TRANSPOSED:
        z = load(row_of(states_sums, state, v, SHAPE.VALUES))
        grad_normaliser = load(row_of(last_value, head, token, T))
        if SHAPE.REVERSED:
            o += z[None, :]
            scores += grad_normaliser[None, :]
        else:
            o += grad_normaliser[:, None] * z[None, :]
            scores += grad_normaliser[:, None]
    if SHAPE.PARTS > 0 and (SHAPE.IS_CAUSAL or SHAPE.REVERSED) and not FEATURES_DECAY:
        channel = v if VALUES_DECAY else tl.zeros((1,), tl.int32)
        decay = decay_of_tokens(g_late, g_early, channel, SHAPE.REVERSED, SHAPE)
        o *= decay  # exp(g_c - g_0) of heads, or of values
        normaliser *= tl.sum(decay, 1)
    if SHAPE.IS_CAUSAL:
        scores = masked_scores(scores, g_late, g_early, SHAPE)
        normaliser += tl.sum(scores, 1)
        u = load(chunk_of(value, head, i, T, v, SHAPE.VALUES, SHAPE))
        if VALUES_DECAY:
            o = add_values_of_channels(o, scores, u, g_late, v, SHAPE)
        else:
            o = dot(scores, u, SHAPE, o)
    o *= SCALE
    if SHAPE.HAS_SUMS and IS_OUTPUT:
        normaliser = normaliser * SCALE + EPS
        one_over = tl.where(tl.abs(normaliser) > SMALLEST, 1.0 / normaliser, 0.0)
        o *= one_over[:, None]
        if v_block == 0:
            store(row_of(inverse, head, token, T), one_over)
    if HAS_PARTNER:
        other = load(chunk_of(partner, head, i, T, v, SHAPE.VALUES, SHAPE))
        store(row_of(products, head * V_BLOCKS + v_block, token, T), tl.sum(o * other.to(tl.float32), 1))
    store(chunk_of(out, head, i, T, v, SHAPE.VALUES, SHAPE), o)


@triton.jit
def masked_scores(scores, g_late, g_early, SHAPE: tl.constexpr):
    """Scores [c, s] times exp(g_c - g_s), which they hold already where channels decay; 0 where c does not see s."""
    token = tl.arange(0, SHAPE.CHUNK)
    c, s = token[:, None], token[None, :]
    if SHAPE.REVERSED:
        c, s = s, c
    if SHAPE.PARTS > 0 and SHAPE.CHANNELS == 1:
        gap = log_decay(g_late, c + 1, g_early, s + 1, 0, SHAPE)
        scores *= tl.exp(tl.where(s <= c, gap, float("-inf")))
    else:
        scores = tl.where(s <= c, scores, 0.0)
    return scores


@triton.jit
def add_scores_of_channels(scores, q, k, g, channel, SHAPE: tl.constexpr):
    """scores + q_c^T exp(-|g_c - g_s|) k_s, of all pairs [c, s] of a chunk, level by level."""
    token = tl.arange(0, SHAPE.CHUNK)
    apart = token[:, None] ^ token[None, :]
    scores += tl.where(apart == 0, tl.sum(q.to(tl.float32) * k.to(tl.float32), 1)[:, None], 0.0)
    for level in range(SHAPE.LEVELS):
        decay = decay_to_border(g, level, channel, SHAPE)
        of_level = dot(q.to(tl.float32) * decay, tl.trans(k.to(tl.float32) * decay), SHAPE)
        scores += tl.where((apart >> level) == 1, of_level, 0.0)
    return scores


@triton.jit
def add_values_of_channels(o, scores, u, g, channel, SHAPE: tl.constexpr):
    """o + sum_s scores_cs exp(-|g_c - g_s|) u_s, where the channels of values decay, level by level."""
    token = tl.arange(0, SHAPE.CHUNK)
    apart = token[:, None] ^ token[None, :]
    o += tl.sum(tl.where(apart == 0, scores, 0.0), 1)[:, None] * u.to(tl.float32)
    for level in range(SHAPE.LEVELS):
        decay = decay_to_border(g, level, channel, SHAPE)
        of_level = tl.where((apart >> level) == 1, scores, 0.0)
        o += decay * dot(of_level, u.to(tl.float32) * decay, SHAPE)
    return o


@triton.jit
def decay_to_border(g, level, channel, SHAPE: tl.constexpr):
    """exp(-|g_c - g_b|) [C, channels], where b is the last token before the border of c's two halves of 2^level tokens."""
    c = tl.arange(0, SHAPE.CHUNK)
    border = ((c >> level) | 1) << level
    return tl.exp(-tl.abs(log_decay(g, c[:, None] + 1, g, border[:, None], channel[None, :], SHAPE)))


@triton.jit
def decay_of_tokens(g_late, g_early, channel, AFTER: tl.constexpr, SHAPE: tl.constexpr):
    """[C, channels]: exp(g_C - g_s) between tokens and the state AFTER their chunk, or exp(g_c - g_0), the state before it."""
    token, channel = 1 + tl.arange(0, SHAPE.CHUNK)[:, None], channel[None, :]
    if AFTER:
        gap = log_decay(g_late, SHAPE.CHUNK, g_early, token, channel, SHAPE)
    else:
        gap = log_decay(g_late, token, g_late, 0, channel, SHAPE)
    return tl.exp(gap)


@triton.jit
def log_decay(late, c, early, s, channel, SHAPE: tl.constexpr):
    """g_c - g_s: the sum of the differences of their parts. Features that only a block has decay as the last one does."""
    if SHAPE.CHANNELS > 1:
        channel = tl.minimum(channel, SHAPE.CHANNELS - 1)
    SIZE: tl.constexpr = SHAPE.PARTS * SHAPE.CHANNELS
    late, early = late + (c * SIZE + channel), early + (s * SIZE + channel)
    gap = tl.load(late) - tl.load(early)
    if SHAPE.PARTS == 2:
        gap += tl.load(late + SHAPE.CHANNELS) - tl.load(early + SHAPE.CHANNELS)
    return gap


@triton.jit
def log_decays_of(late, early, words, head, i, SHAPE: tl.constexpr):
    """Where g_0 of chunk i of a head stands in [B, N, chunks, C + 1, PARTS, CHANNELS]."""
    offset = (head * tl.load(words + 2) + i) * ((SHAPE.CHUNK + 1) * SHAPE.PARTS * SHAPE.CHANNELS)
    return late + offset, early + offset


@triton.jit
def dot(a, b, SHAPE: tl.constexpr, acc=None):
    """a b + acc."""
    dtype: tl.constexpr = tl.bfloat16 if SHAPE.BF16 else tl.float32
    return tl.dot(a.to(dtype), b.to(dtype), acc, input_precision=SHAPE.PRECISION)


# Blocks of arrays: pointers, and which of these elements exist.


@triton.jit
def chunk_of(array, head, i, T, feature, FEATURES: tl.constexpr, SHAPE: tl.constexpr):
    """[C, features] of chunk i of a head of [B, T, N, FEATURES]."""
    array = head_of(array, head // SHAPE.HEADS, head % SHAPE.HEADS, T, SHAPE.HEADS, FEATURES, False)
    first, row = i * SHAPE.CHUNK, tl.arange(0, SHAPE.CHUNK)[:, None]
    at = array + first.to(tl.int64) * (SHAPE.HEADS * FEATURES) + row * (SHAPE.HEADS * FEATURES) + feature[None, :]
    return at, (row < T - first) & (feature[None, :] < FEATURES)


@triton.jit
def state_of(states, n, m, v, SHAPE: tl.constexpr):
    """[m, v] of the n-th of states [.., FEATURES, VALUES]."""
    at = v[None, :] * SHAPE.FEATURES + m[:, None] if SHAPE.TRANSPOSED else m[:, None] * SHAPE.VALUES + v[None, :]
    return states + n * (SHAPE.FEATURES * SHAPE.VALUES) + at, (m < SHAPE.FEATURES)[:, None] & (v < SHAPE.VALUES)[None, :]


@triton.jit
def row_of(rows, n, i, LENGTH):
    """The elements i of the n-th of rows [.., LENGTH]."""
    return rows + n * LENGTH + i, i < LENGTH


@triton.jit
def load(block):
    at, exists = block
    return tl.load(at, mask=exists, other=0.0)


@triton.jit
def store(block, x):
    at, exists = block
    tl.store(at, x.to(at.dtype.element_ty), mask=exists)


# --------------------------------------------------------------------------------------------------------------- a call


class Operands(NamedTuple):
    """What the kernels take: features, and G = C + 1 log decays g_0 .. g_C of K chunks, in P parts for H = 1 or M channels."""

    query: Float[Array, "B T N M"]
    key: Float[Array, "B S N M"]
    value: Float[Array, "B S N V"]
    late: Float[Array, "B N K G P H"] | None
    early: Float[Array, "B N K G P H"] | None
    state: Float[Array, "B N M V"]
    sums: Float[Array, "B N M"] | None
    erase: Float[Array, "B T N M"] | None = None


class States(NamedTuple):
    """What `linear_states` makes: what the tokens of each chunk read, the last one, and what values were written."""

    read: Float[Array, "B N K M V"]  # `last` unless causal
    read_sums: Float[Array, "B N K M"]
    last: Float[Array, "B N M V"]
    last_sums: Float[Array, "B N M"]
    values: Float[Array, "B T N V"]  # with `partial` their gradient


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything about a call that is not an array.

    Args:
        prepare: (plan, arrays of the operation) -> (operands, the largest log scale or None): in XLA, differentiable.
        features: a name of `xla.FEATURES`.
        divides: by the normaliser.
        hides: whether tokens may be padding.
        differentiates: which log decays have a gradient, "late" or "early".
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


def chunk_states(plan: Plan, x: Operands, key, value, first, first_sums, *, is_reversed=False, last_value=None, partial=None):
    """Launches `linear_states`."""
    (batch, length, heads, features), values, is_delta = key.shape, value.shape[3], x.erase is not None
    config = configure(linear_states, plan, x, features, values)
    blocks = -(-features // config.blocks["BLOCK_M"]) * -(-values // config.blocks["BLOCK_V"])
    written_key = weighed(plan, x, x.key, True) if is_delta else None
    if is_delta:
        key = weighed(plan, x, key, False) if is_reversed else written_key
    inputs = dict(key=key, value=value, last_value=last_value, written_key=written_key, erase=x.erase, partial=partial)
    inputs |= log_decays_and_words(plan, x, length) | dict(first=first, first_sums=first_sums)
    chunks = -(-length // plan.chunk)
    outputs = dict(
        states=room(plan.is_causal, batch, heads, chunks, features, values, dtype=plan.dtype),
        states_sums=room(plan.is_causal and plan.divides, batch, heads, chunks, features),
        last=room(True, batch, heads, features, values), last_sums=room(plan.divides, batch, heads, features),
        corrected=room(is_delta, batch, length, heads, values, dtype=plan.dtype),
    )  # fmt: skip
    states, sums, last, last_sums, corrected = launch.call(
        linear_states, inputs, outputs, grid=batch * heads * blocks, config=config, mode=plan.mode,
        constants=dict(SHAPE=shape_of(plan, x, key, value, is_reversed)),
    )  # fmt: skip
    read = (states, sums) if plan.is_causal else (last, last_sums)
    return States(*read, last, last_sums, corrected if is_delta else value)


def chunk_outputs(plan: Plan, x: Operands, query, key, value, states: States | None, dtype, *, is_reversed=False,
                  is_transposed=False, last_value=None, partner=None):  # fmt: skip
    """Launches `linear_outputs`: (outputs or a gradient, what they were multiplied by, products with `partner`)."""
    (batch, length, heads, _), values = query.shape, value.shape[3]
    config = configure(linear_outputs, plan, x, query.shape[3], values)
    blocks = -(-values // config.blocks["BLOCK_V"])
    is_output = not (is_reversed or is_transposed)
    # What cancels in sums over time must not be rounded before: products of channels are made of float32.
    in_xla = partner is not None and has_channels(x)
    has_partner = partner is not None and not in_xla
    inputs = dict(query=query, key=key, value=value, last_value=last_value, **log_decays_and_words(plan, x, length))
    inputs |= dict(states=None, states_sums=None) if states is None else dict(states=states.read, states_sums=states.read_sums)
    outputs = dict(
        out=room(True, batch, length, heads, values, dtype=jnp.float32 if in_xla else dtype),
        inverse=room(is_output and plan.divides, batch, heads, length),
        products=room(has_partner, batch, heads, blocks, length),
    )  # fmt: skip
    constants = dict(
        SHAPE=shape_of(plan, x, query, value, is_reversed, is_transposed), HAS_PARTNER=has_partner,
        SCALE=plan.scale if is_output else 1.0, EPS=plan.eps,
    )  # fmt: skip
    out, inverse, products = launch.call(
        linear_outputs, inputs | dict(partner=partner if has_partner else None), outputs, constants=constants, config=config,
        grid=batch * heads * blocks * -(-length // plan.chunk), mode=plan.mode,
    )  # fmt: skip
    if in_xla:
        out, products = out.astype(dtype), out * partner
    return out, inverse, products


def room(exists, *shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape if exists else (1,), dtype)


def has_channels(x: Operands) -> bool:
    """Whether every channel has a decay of its own."""
    return x.late is not None and x.late.shape[5] > 1


def log_decays_and_words(plan: Plan, x: Operands, length: int) -> dict:
    """Log decays, and the run-time numbers of a launch: tokens, their chunks, and those that log decays have."""
    words = launch.words(length, -(-length // plan.chunk), 0 if x.late is None else x.late.shape[2])
    return dict(late=x.late, early=x.early, words=words)


def shape_of(plan: Plan, x: Operands, features, values, is_reversed: bool, is_transposed: bool = False) -> Shape:
    parts, channels = (0, 1) if x.late is None else x.late.shape[4:]
    return Shape(
        features.shape[2], features.shape[3], values.shape[3], plan.chunk, is_reversed, is_transposed, parts, channels,
        plan.chunk.bit_length() - 1, plan.is_causal, plan.divides, x.erase is not None, plan.bf16, plan.precision,
    )  # fmt: skip


def forward(plan: Plan, *arrays):
    """((outputs, last state, its sums, the largest log scale), what `backward` needs)."""
    x, largest = plan.prepare(plan, *arrays)
    S = chunk_states(plan, x, x.key, x.value, x.state, x.sums)
    out, inverse, _ = chunk_outputs(plan, x, x.query, x.key, S.values, S, arrays[2].dtype)
    if not plan.divides:
        return (out, S.last, None, largest), (arrays,)
    return (out, S.last, S.last_sums, largest), (arrays, out, inverse)


def backward(plan: Plan, residuals, cotangents):
    """The gradients of the operation's arrays: the launches of the table above."""
    arrays, *divided = residuals
    grad_out, grad_last, grad_last_sums, _ = cotangents
    if plan.hides:
        # Queries may be padding, which holds anything: one whose output nobody used counts as 0.
        idle = (grad_out == 0).all(-1, keepdims=True)
        arrays = jnp.where(idle, 0, arrays[0]), *arrays[1:]
    x, pull, _ = jax.vjp(functools.partial(plan.prepare, plan), *arrays, has_aux=True)
    do, grad_normaliser = plan.scale * grad_out.astype(jnp.float32), None
    if plan.divides:
        out, inverse = divided
        do *= inverse.swapaxes(1, 2)[..., None]
        out = jnp.where(idle, 0, out) if plan.hides else out
        grad_normaliser = -jnp.sum(do * out.astype(jnp.float32), -1).swapaxes(1, 2)
    do, partial = do.astype(plan.dtype), None
    S = chunk_states(plan, x, x.key, x.value, x.state, x.sums)
    if x.erase is not None:
        partial, *_ = chunk_outputs(plan, x, x.key, x.query, do, None, plan.dtype, is_reversed=True)
    G = chunk_states(
        plan, x, x.query, do, grad_last, grad_last_sums, is_reversed=True, last_value=grad_normaliser, partial=partial
    )
    partner = {name: x.query if name == "late" else x.key for name in plan.differentiates if x.late is not None}
    grad_query, _, query_products = chunk_outputs(
        plan, x, do, S.values, x.key, S, x.query.dtype, is_transposed=True, last_value=grad_normaliser,
        partner=partner.get("late"),
    )  # fmt: skip
    grad_key, _, key_products = chunk_outputs(
        plan, x, S.values, do, x.query, G, x.key.dtype, is_reversed=True, is_transposed=True, last_value=grad_normaliser,
        partner=partner.get("early"),
    )  # fmt: skip
    if x.erase is None:
        grad_value, *_ = chunk_outputs(plan, x, x.key, x.query, do, G, x.value.dtype, is_reversed=True)
        grad_erase = None
    else:
        grad_value, grad_erase = G.values, -through(S.read, G.values, plan.chunk).astype(x.erase.dtype)
    grad_late, grad_early = (None if g is None else jnp.zeros_like(g) for g in (x.late, x.early))
    if "late" in partner:
        grad_late = at_tokens(grad_late, query_products, at_ends(plan, S, G, has_channels(x)))
    if "early" in partner:
        grad_early = at_tokens(grad_early, -key_products)
    grad_sums = G.last_sums if plan.divides else None
    grads = pull(Operands(grad_query, grad_key, grad_value, grad_late, grad_early, G.last, grad_sums, grad_erase))
    return tuple(None if g is None or g.dtype == jax.dtypes.float0 else g for g in grads)


def at_ends(plan: Plan, S: States, G: States, by_channel: bool):
    """The gradient [B, N, chunks, H] of the log decays at the ends of chunks, by the states after them: <S', G'>."""
    following = lambda states, last: jnp.concatenate([states[:, :, 1:].astype(jnp.float32), last[:, :, None]], 2)
    ends = jnp.sum(following(S.read, S.last) * G.read.astype(jnp.float32), 4)
    if plan.divides:
        ends += following(S.read_sums, S.last_sums) * G.read_sums
    return ends if by_channel else ends.sum(3, keepdims=True)


def at_tokens(zeros, products, ends=0.0):
    """The gradient of log decays [B, N, K, C + 1, P, H], which is that of their last part.

    Args:
        products: of what they weigh with its gradient: [B, T, N, H], or their sums [B, N, blocks, T] where H = 1.
        ends: added at the ends of chunks.
    """
    batch, heads, chunks, places, _, channels = zeros.shape
    rows = products.sum(2)[..., None] if channels == 1 else products.swapaxes(1, 2)
    rows = jnp.pad(rows, [(0, 0), (0, 0), (0, chunks * (places - 1) - rows.shape[2]), (0, 0)])
    rows = rows.reshape(batch, heads, chunks, places - 1, channels).at[:, :, :, -1].add(ends)
    return zeros.at[:, :, :, 1:, -1].set(rows)


def weighed(plan: Plan, x: Operands, rows, is_key: bool):
    """Keys as the state after their chunk has them, or queries as they read the one before it: of the delta rule, whose kernel
    holds a whole state and has no registers left for that."""
    if x.late is None:
        return rows
    g = x.late
    gaps = g[:, :, :, -1:] - g[:, :, :, 1:] if is_key else g[:, :, :, 1:] - g[:, :, :, :1]
    factor = jnp.exp(gaps.sum(4)).reshape(*g.shape[:2], -1, g.shape[5])[:, :, : rows.shape[1]]
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
    """A plan's `prepare` for `linear.gated`: sums of log decays that start anew in every chunk."""
    g = parts = erase = None
    (batch, length, heads, _), cut = query.shape, lambda x: cut_chunks(x.astype(jnp.float32), plan.chunk)
    if log_decay is not None:
        parts, channels = recurrence.cumulate(cut(log_decay)), log_decay.shape[3]
        g = jnp.stack(parts, 3).reshape(batch, heads, -1, plan.chunk + 1, len(parts), channels)
        parts = parts if channels > 1 else [g[..., 0] for g in parts]
    if beta is not None:
        found = without_state(cut(key), cut(value), parts, cut(beta[..., None])[..., 0])
        joined = lambda x: x.reshape(batch, heads, -1, x.shape[3])[:, :, :length].swapaxes(1, 2).astype(plan.dtype)
        erase, value = map(joined, found)
    return Operands(query, key, value, g, g, state, sums, erase), None


@jax.checkpoint  # exponentials of every pair and channel are not kept for the derivative
@precision.full
def without_state(key, value, decay, beta):
    """W and U of the table above, for chunks [B, N, C, ...]."""
    solve = recurrence.delta_rule(key, decay, beta)
    return solve @ recurrence.decayed(key, decay), solve @ value


def with_running_maximum(plan: Plan, query, key, value, log_scale, segments, projection, state, sums, largest, _):
    """A plan's `prepare` for `linear.attention`: g is -c of a query, the largest r up to it, and -r of a key.

    c cancels in what is divided, and keeps all weights at most 1; it is a constant to every derivative.
    """
    (query, _), (key, own) = featured(plan, query, projection), featured(plan, key, projection)
    r = None if log_scale is None else as_rows(log_scale[..., 0])
    if own is not None:
        r = as_rows(own) if r is None else as_rows(own) + r
    if r is None:
        return Operands(query, key, value, None, None, state, sums), largest
    c = jnp.concatenate([largest[..., None], jax.lax.stop_gradient(r)], 2)
    if segments is not None:  # the state's is the first one
        segments = jnp.pad(segments[:, None].astype(jnp.float32), [(0, 0), (0, 0), (1, 0)])
    if plan.is_causal:
        c = running_maximum(c, segments)
    else:
        c = jnp.broadcast_to(c.max(2, keepdims=True), (*c.shape[:2], max(query.shape[1], key.shape[1]) + 1))
        before = jnp.exp(largest - finite(c[..., 0]))
        state, sums = state * before[..., None, None], sums * before[..., None]
    chunks = -(-(c.shape[2] - 1) // plan.chunk)

    def in_chunks(start, tokens, **options):
        """[B, N, K, C + 1], of [B, N, K] and of tokens [B, N, L] with padding."""
        tokens = jnp.pad(tokens, [(0, 0), (0, 0), (0, chunks * plan.chunk - tokens.shape[2])], **options)
        return jnp.concatenate([start[..., None], tokens.reshape(*start.shape, plan.chunk)], 3)

    # Where nothing was seen yet, of this segment, the state is 0 and infinitely far away.
    start = -c[..., : -1 : plan.chunk]
    parts = [(in_chunks(start, -finite(c[..., 1:]), mode="edge"), in_chunks(start, -r, constant_values=jnp.inf))]
    if segments is not None:
        segments = -FOREVER * jnp.broadcast_to(segments, c.shape)
        parts.insert(0, (in_chunks(segments[..., : -1 : plan.chunk], segments[..., 1:], mode="edge"),) * 2)
    late, early = (jnp.stack(g, 4)[..., None] for g in zip(*parts, strict=True))
    return Operands(query, key, value, late, early, state, sums), c[..., -1]


def featured(plan: Plan, inputs, projection):
    """(features, their own log scales or None)."""
    run = FEATURES[plan.features]
    if projection is None:
        return run(inputs, None)
    projection = projection.astype(jnp.float32)
    found, own = run(inputs, projection[0]) if len(projection) == 1 else jax.vmap(run)(inputs, projection)
    return found.astype(plan.dtype), own


# ------------------------------------------------------------------------------------------------------------- the sizes


def configure(kernel, plan: Plan, x: Operands, features: int, values: int) -> tuning.Config:
    best = heuristic(kernel, plan, x, padded(features), padded(values))
    sizes = dict(features=padded(features), values=padded(values), bf16=plan.bf16, precision=plan.precision, chunk=plan.chunk)
    return tuning.config(kernel.__name__, best, **sizes, channels=has_channels(x), delta=x.erase is not None)


def heuristic(kernel, plan: Plan, x: Operands, features: int, values: int) -> tuning.Config:
    """The largest blocks with which nothing overflows the registers of Hopper."""
    if plan.mode == "interpret":  # the cost there is per step, whatever its size
        return tuning.Config(dict(BLOCK_M=features, BLOCK_V=values))
    block_m, block_v, warps, stages = 64, 64, 4, 2
    if plan.precision == "tf32x3":  # three products keep both halves of both operands
        block_m, block_v, warps, stages = (32, 64, 8, 1) if kernel is linear_outputs else (32, 32, 8 if features > 32 else 4, 1)
        if kernel is linear_outputs:  # small blocks have too little work for more
            warps = 2 if values <= 16 else 4 if features <= 16 else warps
    if has_channels(x) and kernel is linear_outputs:  # decays are whole tiles
        block_m, warps = block_m // 2, 4 if plan.chunk == 16 else 8
    if x.erase is not None and kernel is linear_states:  # what is read of a state is a sum over its features
        block_m, block_v, warps, stages = features, block_v // 2, 8, 1
    return tuning.Config(dict(BLOCK_M=min(block_m, features), BLOCK_V=min(block_v, values)), warps, stages)
