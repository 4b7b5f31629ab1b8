"""Linear attention with decays on a GPU: the two kernels, which are also their own derivative (`passes`).

A sequence is cut into chunks of C tokens. S is the state before a chunk, S' that after it, and g the sum of log decays, g_0
before the chunk and g_c up to its token c (GLA, arXiv 2312.06635, section 4):

    linear_states    S' = exp(g_C - g_0) S + sum_s exp(g_C - g_s) k_s v_s^T                        from chunk to chunk
    linear_outputs   o_c = S^T exp(g_c - g_0) q_c + sum_{s <= c} (q_c^T exp(g_c - g_s) k_s) v_s    all chunks at once

The delta rule writes other values (DeltaNet, arXiv 2406.06484, section 3): XLA solves what depends on keys alone, and
`linear_states` corrects them by the state that it holds anyway, u = U - W S.

Log decays are two arrays: `late` is g_0 and g_c as queries have it, `early` g_s as keys have it. They may have two parts, whose
differences are added: sums without rounding, or segments.

A decay per channel of the key stands inside of the products: of queries and keys, and where these are the values (the
gradients of q and k), of scores and values. exp(g_c - g_s) is then exp(g_c - g_b) exp(g_b - g_s), with a border b between c
and s, so that no factor exceeds 1 (the secondary chunks of GLA, section 4.3, with halves of halves down to one token):

    level l   pairs (c, s) whose highest different bit is l: neighbouring halves of 2^l tokens, with one border
              both factors are exp(-|g - g_b|), of one tile; a product of whole tiles, of which the pairs of the level count
"""

from typing import NamedTuple

import triton
import triton.language as tl

from subquad.kernels.flash.triton import head_of
from subquad.kernels.linear.reference import SMALLEST_DENOMINATOR

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
    differing = token[:, None] ^ token[None, :]
    scores += tl.where(differing == 0, tl.sum(q.to(tl.float32) * k.to(tl.float32), 1)[:, None], 0.0)
    for level in range(SHAPE.LEVELS):
        decay = decay_to_border(g, level, channel, SHAPE)
        of_level = dot(q.to(tl.float32) * decay, tl.trans(k.to(tl.float32) * decay), SHAPE)
        scores += tl.where((differing >> level) == 1, of_level, 0.0)
    return scores


@triton.jit
def add_values_of_channels(o, scores, u, g, channel, SHAPE: tl.constexpr):
    """o + sum_s scores_cs exp(-|g_c - g_s|) u_s, where the channels of values decay, level by level."""
    token = tl.arange(0, SHAPE.CHUNK)
    differing = token[:, None] ^ token[None, :]
    o += tl.sum(tl.where(differing == 0, scores, 0.0), 1)[:, None] * u.to(tl.float32)
    for level in range(SHAPE.LEVELS):
        decay = decay_to_border(g, level, channel, SHAPE)
        of_level = tl.where((differing >> level) == 1, scores, 0.0)
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
