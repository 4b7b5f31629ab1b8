"""Attention to listed keys as the formula says it: how often each query sees each key, [B, N, T, S]."""

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
    weights, lse = online.counted(logits, counts)
    return jnp.einsum("bnts,bsnv->btnv", weights, value).astype(query.dtype), jnp.swapaxes(lse, 1, 2)
