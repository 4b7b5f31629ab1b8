"""The recurrence of linear attention over one chunk of a sequence: S_t = decay_t S_{t-1} + k_t v_t^T, o_t = q_t^T S_t.

B batch, N heads, C tokens of a chunk, M features of query and key, V of value; c a token, s a token before it.
g   cumulative log decay: before the chunk's first token and after each token, so C + 1 of them
e   a log decay between two of these places, g_c - g_s <= 0: only such differences are exponentiated, never one g
"""

import jax
import jax.numpy as jnp

from subquad.kernels import precision
from subquad.kernels.padding import pad_to

# exp of less is 0 in float32.
SMALLEST_LOG_DECAY = -104.0
# Multiples of it are summed without rounding: a chunk of 128 stays below 2^24 of them.
UNIT = 2.0**-10
# A channel that has decayed by no more is one factor of a product: exp of it, and of minus it, lose no digits.
SLOW = 32.0
# Scores of so few tokens are computed pair by pair where a channel has decayed by more.
DIRECT = 8
# Rows of a triangular matrix that are substituted one by one.
SUBSTITUTED = 8


def advance(states, query, key, values, decay=None, beta=None):
    """One chunk of the recurrence, for several values at once: the normaliser is that of value 1 beside that of v.

    Args:
        states: a tuple of [B, N, M, V], before the chunk.
        query, key: [B, N, C, M]. values: a tuple of [B, N, C, V], one for each state.
        decay: None, or the parts of g, each [B, N, C + 1] (a decay per head) or [B, N, C + 1, M] (per channel).
        beta: None, or [B, N, C]: with it value v_t becomes beta_t (v_t - (decay_t S_{t-1})^T k_t), the delta rule.
    Returns: the states after the chunk, and the outputs, a tuple of [B, N, C, V].
    """
    if beta is not None:
        values = corrections(states, key, values, decay, beta)
    weights = scores(query, key, decay)
    outputs = tuple(read(query, state, decay) + weights @ value for state, value in zip(states, values, strict=True))
    states = tuple(whole_chunk(state, decay) + write(key, value, decay) for state, value in zip(states, values, strict=True))
    return states, outputs


def advance_after_reading(bonus, states, query, key, values, decay=None, beta=None):
    """`advance`, where a token reads the states of the token before it, and of what it brings itself the bonus [N, M].

    That is what the token before would read with this one's query.
    """
    first = tuple(query[:, :, :1] @ state for state in states)
    states, outputs = advance(states, next_ones(query, 2), key, values, decay, beta)
    own = own_score(bonus[:, None], query, key)
    outputs = [after_first(*both, 2) for both in zip(first, outputs, strict=True)]
    return states, tuple(x + own * value for x, value in zip(outputs, values, strict=True))


def advance_erasing(states, query, key, values, decay, reader, eraser):
    """`advance`, where what a `reader` finds in the states before its token is taken away under its `eraser`, [B, N, C, M]."""
    of_state, of_values = erase_rule(reader, eraser, key, decay)
    of_keys, of_erasers = scores(query, key, decay), scores(query, eraser, decay)
    after, outputs = [], []
    for state, value in zip(states, values, strict=True):
        x = of_state @ state + of_values @ value  # r_t^T S_{t-1}
        outputs.append(read(query, state, decay) + of_keys @ value - of_erasers @ x)
        after.append(whole_chunk(state, decay) + write(key, value, decay) - write(eraser, x, decay))
    return tuple(after), tuple(outputs)


@precision.full
def erase_rule(reader, eraser, key, decay):
    """What readers find, x = X S + Y v, of the state S before the chunk and of values: X [B, N, C, M] and Y [B, N, C, C].

    x_t = r_t^T S_{t-1} depends on the x of the tokens before: (I + L) x = what readers find of S and of values, with L the
    scores of readers with the erasers before them.
    """
    later = next_ones(reader, 2)
    before = lambda keys: after_first(jnp.zeros_like(keys[:, :, :1] @ keys.mT), scores(later, keys, decay), 2)
    solve = inverse_of_unit_lower(before(eraser))
    return solve @ after_first(reader[:, :, :1], decayed(later, decay), 2), solve @ before(key)


def own_score(bonus, query, key):
    """What a token reads of itself: q^T diag(bonus) k, [..., 1]."""
    return jnp.sum(query * (bonus * key), -1, keepdims=True)


def next_ones(query, axis):
    """Of each token the next one's query, 0 of the last."""
    widths = [(0, int(i == axis)) for i in range(query.ndim)]
    return jnp.pad(jax.lax.slice_in_dim(query, 1, None, axis=axis), widths)


def after_first(first, outputs, axis):
    """The first token's outputs, then those that tokens have read for the next one."""
    return jnp.concatenate([first, jax.lax.slice_in_dim(outputs, 0, -1, axis=axis)], axis)


def corrections(states, key, values, decay, beta):
    """The values that the delta rule writes, u_t = beta_t (v_t - k_t^T decay_t S_{t-1}): [B, N, C, V]."""
    solve = delta_rule(key, decay, beta)
    return tuple(solve @ (value - read(key, state, decay)) for state, value in zip(states, values, strict=True))


@precision.full
def delta_rule(key, decay, beta):
    """The matrices [B, N, C, C] that turn what keys should read, less what they read of the state before, into what is written.

    S_{t-1} holds the u_s of the tokens before: (I + L) u = beta (v - (decayed k)^T S), L = beta times the scores of keys
    with keys before them (the UT transform; Yang et al., 2024, arXiv 2406.06484, section 3).
    """
    lower = beta[..., None] * jnp.tril(scores(key, key, decay), -1)
    return inverse_of_unit_lower(lower) * beta[..., None, :]


def inverse_of_unit_lower(lower):
    """(I + L)^-1 for a strictly lower triangular L [..., C, C]: forward substitution in the smallest blocks, then halves.

    As exact as substitution. (Powers of L, whose product is the inverse, too, overflow where many keys are alike; XLA's
    triangular solve takes more than ten times as long on a CPU.)
    """
    size = lower.shape[-1]
    if size <= SUBSTITUTED:
        rows = [jnp.broadcast_to(row, (*lower.shape[:-2], size)) for row in jnp.eye(size, dtype=lower.dtype)]
        for i in range(1, size):
            rows[i] = rows[i] - sum(lower[..., i, j, None] * rows[j] for j in range(i))
        return jnp.stack(rows, -2)
    half = 1 << (size - 1).bit_length() - 1
    lower = jnp.pad(lower, [(0, 0)] * (lower.ndim - 2) + [(0, 2 * half - size)] * 2)
    inside = inverse_of_unit_lower(jnp.stack([lower[..., :half, :half], lower[..., half:, half:]], -3))
    first, second = inside[..., 0, :, :], inside[..., 1, :, :]
    return lower_blocks(first, -second @ lower[..., half:, :half] @ first, second)[..., :size, :size]


def lower_blocks(first, across, second):
    """[[first, 0], [across, second]]."""
    rows = jnp.concatenate([first, jnp.zeros_like(first)], -1), jnp.concatenate([across, second], -1)
    return jnp.concatenate(rows, -2)


def scores(query, key, decay):
    """q_c^T exp(g_c - g_s) k_s for s <= c, else 0: [B, N, C, C]."""
    visible = jnp.tri(query.shape[2], dtype=bool)
    if decay is None:
        return jnp.where(visible, query @ key.mT, 0)
    if decay[0].ndim == 4:
        return channel_scores(query, key, [g[:, :, 1:] for g in decay])
    gap = sum(g[..., 1:, None] - g[..., None, 1:] for g in decay)
    return jnp.exp(jnp.where(visible, gap, -jnp.inf)) * (query @ key.mT)


def channel_scores(query, key, decay):
    """`scores` where each channel has its own decay: decay [..., C, M] after each token.

    exp(g_c - g_s) = exp(g_c - g_1) exp(g_1 - g_s): a product of matrices, as long as a channel of s has decayed slowly since
    the first token. What has not is added in smaller blocks, and adds 0 where there is no such channel: so what a token
    sees depends on no token after it, to the last bit, though what is computed does.
    """
    distance = exponent(decay, [g[..., :1, :] for g in decay])
    is_slow = distance >= -SLOW
    near = jnp.where(is_slow, key * jnp.exp(jnp.minimum(-distance, SLOW)), 0)
    slow = jnp.where(jnp.tri(query.shape[-2], dtype=bool), (query * jnp.exp(distance)) @ near.mT, 0)
    in_parts = jax.checkpoint(pairwise_scores if query.shape[-2] <= DIRECT else scores_of_halves)
    return slow + jax.lax.cond(
        jnp.all(is_slow), lambda *_: jnp.zeros_like(slow), in_parts, query, jnp.where(is_slow, 0, key), decay
    )


def pairwise_scores(query, key, decay):
    """An exponential for each pair and channel."""
    gap = exponent([g[..., :, None, :] for g in decay], [g[..., None, :, :] for g in decay])
    visible = jnp.tri(query.shape[-2], dtype=bool)[..., None]
    return jnp.sum(query[..., :, None, :] * key[..., None, :, :] * jnp.exp(jnp.where(visible, gap, -jnp.inf)), -1)


def scores_of_halves(query, key, decay):
    """exp(g_c - g_s) = exp(g_c - g_b) exp(g_b - g_s) with b on the border between s and c: neither factor exceeds 1.

    Halves of halves find a border for every pair of blocks (the secondary chunks of GLA, arXiv 2312.06635, section 4.3).
    """
    size = query.shape[-2]
    half = 1 << (size - 1).bit_length() - 1
    query, key = pad_to(query, -2, 2 * half), pad_to(key, -2, 2 * half)
    decay = [pad_to(g, -2, 2 * half, mode="edge") for g in decay]
    halves = lambda x: x.reshape(*x.shape[:-2], 2, half, x.shape[-1])
    query, key, decay = halves(query), halves(key), [halves(g) for g in decay]
    border = [g[..., :1, -1:, :] for g in decay]  # after the last token of the first half
    late = query[..., 1, :, :] * exp_gap([g[..., 1:, :, :] for g in decay], border)[..., 0, :, :]
    early = key[..., 0, :, :] * exp_gap(border, [g[..., :1, :, :] for g in decay])[..., 0, :, :]
    inside = channel_scores(query, key, decay)
    return lower_blocks(inside[..., 0, :, :], late @ early.mT, inside[..., 1, :, :])[..., :size, :size]


def read(query, state, decay):
    """q_c^T exp(g_c) S, with the state before the chunk: [B, N, C, V]."""
    return decayed(query, decay) @ state


def decayed(query, decay):
    """q_c exp(g_c), as it reads the state before the chunk."""
    if decay is None:
        return query
    factor = exp_gap([g[:, :, 1:] for g in decay], [g[:, :, :1] for g in decay])
    return query * (factor[..., None] if factor.ndim == 3 else factor)


def write(key, value, decay=None):
    """What the chunk adds to the state at its end, sum_s exp(g_C - g_s) k_s v_s^T: [B, N, M, V]."""
    if decay is not None:
        factor = exp_gap([g[:, :, -1:] for g in decay], [g[:, :, 1:] for g in decay])
        key, value = (key, value * factor[..., None]) if factor.ndim == 3 else (key * factor, value)
    # XLA on a CPU transposes the left operand: the smaller one.
    return key.mT @ value if key.shape[-1] <= value.shape[-1] else (value.mT @ key).mT


def whole_chunk(state, decay):
    """The state [B, N, M, V] with the decay from the start of the chunk to its end."""
    if decay is None:
        return state
    factor = exp_gap([g[:, :, -1:] for g in decay], [g[:, :, :1] for g in decay])
    return state * (factor[..., None] if factor.ndim == 3 else factor.mT)


def exponent(late, early):
    """The log decay between two places, of the parts of their g."""
    return sum(x - y for x, y in zip(late, early, strict=True))


def exp_gap(late, early):
    return jnp.exp(exponent(late, early))


def cumulate(log_decay):
    """g of a chunk [B, N, C] or [B, N, C, M], in two parts whose differences have no rounding of large sums.

    A log decay of -1e4 or -inf, which resets the state, counts as -104, whose exponential is 0, too. In one float32 a few
    of them would cost the tokens after them all small digits. The first part holds multiples of 2^-10, which are summed
    exactly, the second what is left of each.
    """
    log_decay = jnp.maximum(log_decay, SMALLEST_LOG_DECAY)
    coarse = UNIT * jnp.round(jax.lax.stop_gradient(log_decay) / UNIT)
    pad = lambda x: jnp.pad(x, [(0, 0), (0, 0), (1, 0)] + [(0, 0)] * (x.ndim - 3))
    return [jnp.cumsum(pad(coarse), 2), running_sum(pad(log_decay - coarse), pad(log_decay <= SMALLEST_LOG_DECAY))]


@jax.custom_vjp
def running_sum(x, forgets):
    """The sums of x [B, N, C] or [B, N, C, M] along C, whose gradient stops at the next token that forgets.

    The whole gradient of what is beyond it is 0, but as a sum it is 0 to rounding only: then a segment would move another's.
    """
    return jnp.cumsum(x, 2)


def running_sum_backward(forgets, gradient):
    size = gradient.shape[2]
    sums = jax.lax.cumsum(gradient, 2, reverse=True)
    at = jnp.arange(size).reshape(size, *(1,) * (gradient.ndim - 3))
    stops = jax.lax.cummin(jnp.where(forgets, at, size), axis=2, reverse=True)  # the first from each token on
    widths = [(0, 0), (0, 0), (0, 1)] + [(0, 0)] * (gradient.ndim - 3)
    after = jnp.pad(stops, widths, constant_values=size)[:, :, 1:]
    beyond = jnp.take_along_axis(jnp.pad(sums, widths), after, axis=2, mode="promise_in_bounds")
    return sums - beyond, None


precision.define_passes(running_sum, lambda x, forgets: (jnp.cumsum(x, 2), forgets), running_sum_backward)
