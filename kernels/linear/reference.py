"""Linear attention as the specification says it: the recurrence, one token at a time, and the T x S weights, in float32."""

import jax
import jax.numpy as jnp

from subquad.kernels import precision
from subquad.kernels.linear.features import relu_features, softmax_features

# A denominator below this counts as 0: its reciprocal and the gradients through it stay inside float32.
SMALLEST_DENOMINATOR = 1e-30


@precision.full
def gated(query, key, value, log_decay, beta, bonus, floor, erase, initial_state, normalize, scale):
    """See `linear.gated`; returns the outputs and the state after the last token."""
    dtype = value.dtype
    wide = lambda x: None if x is None else precision.wide(x)
    query, key, value = repeated(initial_state.shape[1], 2, query, key, value)
    query, key, value, log_decay, beta, bonus, floor = map(wide, (query, key, value, log_decay, beta, bonus, floor))
    erase = None if erase is None else tuple(map(wide, erase))
    if normalize:
        value = jnp.concatenate([value, jnp.ones_like(value[..., :1])], -1)
    if log_decay is None:
        log_decay = jnp.zeros(key.shape[:3], key.dtype)
    if log_decay.ndim == 3:
        log_decay = log_decay[..., None]  # one for all channels

    def step(state, token):
        query, key, value, log_decay, beta, erase = token  # [B, N, ...]
        erased = 0 if erase is None else erase[1][..., None] * jnp.einsum("bnm,bnmv->bnv", erase[0], state)[..., None, :]
        seen = None if bonus is None else state + (bonus * key)[..., None] * value[..., None, :]
        state = jnp.exp(log_decay)[..., None] * state - erased
        if beta is not None:
            value = beta[..., None] * (value - jnp.einsum("bnm,bnmv->bnv", key, state))
        state = state + key[..., :, None] * value[..., None, :]
        return state, jnp.einsum("bnm,bnmv->bnv", scale * query, state if seen is None else seen)

    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (query, key, value, log_decay, beta, erase))
    state, outputs = jax.lax.scan(step, initial_state.astype(query.dtype), tokens)
    outputs = jnp.moveaxis(outputs, 0, 1)
    if normalize:
        outputs = normalized(outputs[..., :-1], outputs[..., -1:], floor)
    return outputs.astype(dtype), state


@precision.full
def attention(query, key, value, key_log_scale, mask, segments, is_causal, initial_state, eps):
    """See `linear.attention`; returns the outputs and the state after the last key."""
    dtype = value.dtype
    query, key, value = (precision.wide(x) for x in (query, key, value))
    scale = jnp.zeros(key.shape[:3], key.dtype) if key_log_scale is None else key_log_scale.astype(key.dtype)
    if mask is not None:
        scale = jnp.where(mask[:, 0, 0, :, None], scale, -jnp.inf)
    scale = scale.swapaxes(1, 2)  # [B, N, S]
    before = jnp.full(scale.shape[:2], -jnp.inf, scale.dtype) if initial_state is None else initial_state[2]
    visible = jnp.tri(query.shape[1], dtype=bool) if is_causal else jnp.ones((query.shape[1], key.shape[1]), bool)
    segments = jnp.zeros((1, 1), jnp.int32) if segments is None else segments
    visible = visible & (segments[:, None, :, None] == segments[:, None, None, :])
    # What came before belongs to the first segment, and what is left to the last.
    first, last = (segments[:, None] == segments[:, None, at : at + 1 or None] for at in (0, -1))

    scores = jnp.where(visible, scale[:, :, None], -jnp.inf)  # [B, N, T, S]
    past = jnp.where(first, before[:, :, None], -jnp.inf)  # [B, N, T | 1]
    largest = finite(jax.lax.stop_gradient(jnp.maximum(scores.max(-1), past)))
    weights = jnp.exp(scores - largest[..., None]) * jnp.einsum("btnm,bsnm->bnts", query, key)
    numerator, denominator = jnp.einsum("bnts,bsnv->btnv", weights, value), weights.sum(-1).swapaxes(1, 2)
    if initial_state is not None:
        past = query * jnp.exp(past - largest).swapaxes(1, 2)[..., None]
        numerator += jnp.einsum("btnm,bnmv->btnv", past, initial_state[0])
        denominator += jnp.einsum("btnm,bnm->btn", past, initial_state[1])

    scale, before = jnp.where(last, scale, -jnp.inf), jnp.where(last[..., 0], before, -jnp.inf)
    last = jax.lax.stop_gradient(jnp.maximum(scale.max(-1), before))
    decayed = key * jnp.exp(scale - finite(last)[..., None]).swapaxes(1, 2)[..., None]
    state = jnp.einsum("bsnm,bsnv->bnmv", decayed, value), decayed.sum(1), last
    if initial_state is not None:
        decay = jnp.exp(before - finite(last))[..., None]
        state = state[0] + decay[..., None] * initial_state[0], state[1] + decay * initial_state[1], last
    return divide(numerator, denominator, eps).astype(dtype), state


def random_feature_attention(query, key, value, projection, kernel, mask, segments, is_causal, initial_state):
    """See `linear.random_feature_attention`; returns the outputs and the state after the last key."""
    projection, scale = precision.wide(projection), None
    if kernel == "softmax":
        query, _ = softmax_features(query, projection)  # a query's scale cancels
        key, scale = softmax_features(key, projection)
    else:
        query, key = relu_features(query, projection), relu_features(key, projection)
    return attention(query, key, value, scale, mask, segments, is_causal, initial_state, 0.0)


def repeated(heads: int, axis: int, *arrays):
    """The arrays with that many heads, of which neighbours are the same where there are fewer."""
    return tuple(x if x.shape[axis] == heads else jnp.repeat(x, heads // x.shape[axis], axis) for x in arrays)


def finite(largest):
    """The maximum with 0 where it is that of nothing, so that exp(-inf - it) is 0 and not NaN."""
    return jnp.where(jnp.isneginf(largest), 0, largest)


def divide(numerator, denominator, eps):
    """numerator [..., V] / (denominator [...] + eps)."""
    return normalized(numerator, (denominator + eps)[..., None])


def normalized(outputs, denominator, floor=None):
    """outputs [..., V] / denominator [..., 1], and 0 with a zero gradient where that is nothing.

    With a floor [...] they are divided by max(|denominator|, floor).
    """
    if floor is not None:
        denominator = jnp.maximum(jnp.abs(denominator), floor[..., None])
    divides = jnp.abs(denominator) > SMALLEST_DENOMINATOR
    return jnp.where(divides, outputs, 0) / jnp.where(divides, denominator, 1)
