"""Softmax attention as the formula says it: every logit at once."""

import jax
import jax.numpy as jnp

from subquad.kernels import precision
from subquad.kernels.softmax import online

# What the backward passes of the other implementations need beside the arguments bears this name, so that a caller who
# recomputes the arguments can keep it: jax.checkpoint(policy=jax.checkpoint_policies.save_only_these_names(SAVED)).
SAVED = "softmax.attention"


@precision.full
def attention(query, key, value, bias, visible, pattern, scale: float):
    """Arguments as checked by `subquad.kernels.softmax.attention` -> (out [B, T, N, V], maximum, log(normaliser))."""
    precise = jnp.promote_types(query.dtype, jnp.float32)
    heads, groups = query.shape[2], query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x.astype(precise), groups, axis=2) for x in (key, value))
    seen = visible.pairs(pattern, heads)
    query = jnp.where(seen.any(-1).swapaxes(1, 2)[..., None], query, 0)  # 0 times NaN would be NaN in gradients
    logits = online.rounded(scale * jnp.einsum("btnh,bsnh->bnts", query.astype(precise), key))
    if bias is not None:
        logits += bias.astype(precise)
    logits = jnp.where(seen, logits, -jnp.inf)
    maximum = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    empty = jnp.isneginf(maximum)
    # A row that sees nothing gives 0, and constants in place of its logits keep -inf - -inf out of the gradient.
    logits = jnp.where(empty, 0.0, logits)
    weights = jnp.where(empty, 0.0, jnp.exp(logits - jnp.where(empty, 0.0, maximum)))
    normaliser = weights.sum(-1, keepdims=True)
    out = jnp.einsum("bnts,bsnv->btnv", weights / jnp.where(empty, 1.0, normaliser), value)
    rows = lambda x: jnp.swapaxes(x[..., 0], 1, 2)
    return out.astype(query.dtype), rows(maximum), rows(jnp.log(jnp.where(empty, 1.0, normaliser)))
