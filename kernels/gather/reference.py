"""Attention to listed keys as the formula says it: how often each query sees each key, [B, N, T, S]."""

import jax
import jax.numpy as jnp

from subquad.kernels import precision
from subquad.kernels.softmax import online


@precision.full
def attention(query, key, value, indices, block_size, mask, positions, correct_duplicates, scale):
    """Arguments as checked by `gather.attention` -> (out [B, T, N, V], lse [B, T, N])."""
    (_, length, heads, _), keys = query.shape, key.shape[1]
    precise = jnp.promote_types(query.dtype, jnp.float32)
    key, value = (jnp.repeat(x.astype(precise), heads // key.shape[2], axis=2) for x in (key, value))
    counts = sum(indices[..., i, None] == jnp.arange(keys) for i in range(indices.shape[3]))
    counts = jnp.minimum(counts, 1) if correct_duplicates else counts
    counts = jnp.repeat(counts, block_size, axis=2)[:, :, :length]
    counts = jnp.repeat(counts, heads // counts.shape[1], axis=1)
    if mask is not None:
        counts = jnp.where(mask, counts, 0)
    if positions is not None:
        counts = jnp.where(positions[1][:, None, None, :] <= positions[0][:, None, :, None], counts, 0)
    logits = online.rounded(scale * jnp.einsum("btnh,bsnh->bnts", query.astype(precise), key))
    largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True, where=counts > 0, initial=-jnp.inf))
    largest = jnp.where(jnp.isneginf(largest), 0, largest)
    weights = counts * jnp.exp(jnp.where(counts > 0, logits - largest, 0))
    total = weights.sum(-1, keepdims=True)
    safe = jnp.where(total > 0, total, 1)
    out = jnp.einsum("bnts,bsnv->btnv", weights / safe, value)
    lse = jnp.where(total > 0, largest + jnp.log(safe), -jnp.inf)
    return out.astype(query.dtype), jnp.swapaxes(lse[..., 0], 1, 2)
