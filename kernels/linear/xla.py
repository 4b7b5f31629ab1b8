"""Linear attention in linear memory: one pair of sums, or a scan over chunks of queries and keys."""

import math

import jax
import jax.numpy as jnp
from einops import rearrange

from subquad.kernels.linear.reference import divide, finite

CHUNK = 128


def attention(query, key, value, key_log_scale, mask, is_causal, initial_state, eps):
    """See `linear.attention`; returns the outputs and the state after the last key."""
    scale = jnp.zeros(key.shape[:3]) if key_log_scale is None else key_log_scale.astype(jnp.float32)
    if mask is not None:
        # Zeros as well as a weight of 0: 0 times the NaN of a padding token would be NaN.
        real = mask[:, 0, 0, :, None]
        scale = jnp.where(real, scale, -jnp.inf)
        key, value = jnp.where(real[..., None], key, 0), jnp.where(real[..., None], value, 0)
    if initial_state is None:
        shape = (key.shape[0], key.shape[2], key.shape[3])
        initial_state = jnp.zeros((*shape, value.shape[-1])), jnp.zeros(shape), jnp.full(shape[:2], -jnp.inf)
    run = _causal if is_causal else _bidirectional
    outputs, state = run(query, key, value, scale, initial_state, eps)
    return outputs.astype(value.dtype), state


def _bidirectional(query, key, value, scale, state, eps):
    query, key, value, scale = (
        rearrange(x, "b t n ... -> b n t ...").astype(jnp.float32) for x in (query, key, value, scale)
    )
    state = _add(state, key, value, scale)
    denominator = jnp.einsum("bntm,bnm->bnt", query, state[1])
    return rearrange(divide(query @ state[0], denominator, eps), "b n t v -> b t n v"), state


def _causal(query, key, value, scale, state, eps):
    length = query.shape[1]
    steps = math.ceil(length / CHUNK)
    chunk = math.ceil(length / steps)
    padding = steps * chunk - length

    def split(x, fill=0.0):
        x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2), constant_values=fill)
        return rearrange(x, "b (i c) n ... -> i b n c ...", i=steps)

    # Recomputed in the backward pass: of a chunk only the state before it is kept, not its C x C weights.
    @jax.checkpoint
    def step(state, chunk):
        query, key, value, scale = (x.astype(jnp.float32) for x in chunk)
        numerator, denominator, before = state
        largest = jnp.maximum(jax.lax.cummax(scale, axis=2), before[..., None])
        largest = finite(jax.lax.stop_gradient(largest))
        scores = jnp.where(visible, scale[:, :, None, :] - largest[..., None], -jnp.inf)
        weights = jnp.exp(scores) * (query @ key.swapaxes(2, 3))
        past = query * jnp.exp(before[..., None] - largest)[..., None]
        outputs = divide(
            weights @ value + past @ numerator,
            weights.sum(-1) + jnp.einsum("bntm,bnm->bnt", past, denominator),
            eps,
        )
        return _add(state, key, value, scale), outputs

    visible = jnp.tri(chunk, dtype=bool)
    state, outputs = jax.lax.scan(step, state, (split(query), split(key), split(value), split(scale, -jnp.inf)))
    return rearrange(outputs, "i b n c v -> b (i c) n v")[:, :length], state


def _add(state, key, value, scale):
    """The state after the keys [B, N, S, M] with their values and log scales, rescaled to the new maximum."""
    numerator, denominator, before = state
    last = jax.lax.stop_gradient(jnp.maximum(scale.max(-1), before))
    weights = jnp.exp(scale - finite(last)[..., None])
    decay = jnp.exp(before - finite(last))
    numerator = decay[..., None, None] * numerator + key.swapaxes(2, 3) @ (weights[..., None] * value)
    denominator = decay[..., None] * denominator + jnp.einsum("bnsm,bns->bnm", key, weights)
    return numerator, denominator, last
