"""The specification of relative attention: dense, plain, O(T S) memory."""

import jax
import jax.numpy as jnp

from subquad.kernels import precision

SAVED = "relative.attention"  # see `softmax.reference`


@precision.full
def attention(query, key, value, relative_key, content_bias, position_bias, visible, scale):
    T, S = query.shape[1], key.shape[1]
    precise = jnp.promote_types(query.dtype, jnp.float32)
    q, k, v, r, u, w = (
        x.astype(precise) for x in (query, key, value, relative_key, content_bias, position_bias)
    )
    distance = (S - T + jnp.arange(T))[:, None] - jnp.arange(S)[None, :]
    seen = visible.pairs(None, query.shape[2]) & (distance >= 0)
    some = seen.any(-1, keepdims=True)
    q = jnp.where(some.swapaxes(1, 2), q, 0)  # 0 times NaN would be NaN in gradients

    content = jnp.einsum("btnh,bsnh->bnts", q + u, k)
    by_distance = jnp.einsum("btnh,rnh->bntr", q + w, r)
    position = jnp.take_along_axis(by_distance, jnp.maximum(distance, 0)[None, None], axis=-1)
    scores = jnp.where(seen, scale * (content + position), -jnp.inf)

    # A row that sees nothing has no maximum; it and its gradients are 0.
    weights = jax.nn.softmax(jnp.where(some, scores, 0.0), axis=-1)
    weights = jnp.where(some, weights, 0.0)
    return jnp.einsum("bnts,bsnv->btnv", weights, v).astype(value.dtype)
