"""Depthwise convolution as a sum over all pairs of tokens: O(T^2) time and memory."""

import jax.numpy as jnp


def depthwise(inputs, kernel, state, is_causal):
    """See `convolution.depthwise`; a state of None is 0."""
    batch, length, features = inputs.shape
    width, groups = kernel.shape[-2:]
    before = 0 if state is None else width - 1
    tokens = inputs if state is None else jnp.concatenate([state.astype(inputs.dtype), inputs], axis=1)
    dtype = jnp.promote_types(jnp.result_type(inputs, kernel), jnp.float32)
    taps = jnp.broadcast_to(kernel, (batch, length, width, groups)).astype(dtype)
    taps = jnp.repeat(taps, features // groups, axis=3)

    ahead = 0 if is_causal else (width - 1) // 2
    at, of = jnp.arange(length)[:, None], jnp.arange(before + length)[None] - before
    tap = at + ahead - of  # [T, S]: which tap of a token weighs another
    inside = (tap >= 0) & (tap < width)
    weights = jnp.where(inside[..., None], taps[:, at, jnp.clip(tap, 0, width - 1)], 0)
    return jnp.einsum("btsd,bsd->btd", weights, tokens.astype(dtype), precision="highest").astype(inputs.dtype)
