"""Softmax attention of few queries to many keys, as a step of generation has it: keys and values are read once, where they lie.

Keys [S, K, H] are K matrices whose rows are not contiguous: a product for each head transposes them first, which takes up to
ten times as long as reading them. All heads side by side, [S, K H], are one contiguous matrix. A query then has its features at
its own head and 0 at the others: K times the multiplications, of very few queries.
"""

import jax.numpy as jnp
from einops import rearrange

from subquad.kernels.softmax import online
from subquad.kernels.softmax.sets import KeySet

# Queries times heads up to which the multiplications by 0 take less time than to transpose the keys; and how many times more
# keys there are at least. Measured on one core, float32: one query of 8 heads of 32 features takes 0.55 (1K keys) to 0.07
# (16K) of the tiles' time, of 16 heads of 64 features 0.15 (1K) and 0.1 (4K); 8 queries of 8 heads 1.1 (1K) and 0.3 (4K).
MOST_ROWS, LEAST_KEYS = 64, 8


def are_few(queries: int, heads: int, keys: int) -> bool:
    """Whether one matrix of all heads is the faster way."""
    return queries * heads <= MOST_ROWS and LEAST_KEYS * queries <= keys


def attend(one: KeySet, scale: float, query, key, value, bias, dtype):
    """Attention to one set of keys: out [B, T, N, V] in a dtype, maximum and log(normaliser) [B, T, N]."""
    queries, heads, kv_heads = *query.shape[1:3], key.shape[2]
    precise = jnp.promote_types(query.dtype, jnp.float32)
    beside = lambda x: rearrange(x, "b s k h -> b s (k h)")
    rows = rearrange(query, "b t (k g) h -> b k g t h", k=kv_heads)
    rows = jnp.einsum("bkgth,kl->bkgtlh", rows, jnp.eye(kv_heads, dtype=query.dtype))  # 0 at the other heads
    rows = rearrange(rows, "b k g t l h -> b (k g t) (l h)")
    products = jnp.einsum("bmc,bsc->bms", rows, beside(key), preferred_element_type=precise)
    logits = online.rounded(scale * rearrange(products, "b (n t) s -> b n t s", n=heads))
    logits = logits if bias is None else logits + bias
    logits = jnp.where(one.visible.pairs(one.pattern, heads), logits, -jnp.inf)

    def weigh(weights):
        weights = rearrange(weights, "b n t s -> b (n t) s").astype(value.dtype)
        sums = jnp.einsum("bms,bsc->bmc", weights, beside(value), preferred_element_type=precise)
        sums = rearrange(sums, "b (k g t) (l v) -> b k g t l v", k=kv_heads, l=kv_heads, t=queries)
        return rearrange(jnp.einsum("bkgtkv->bkgtv", sums), "b k g t v -> b (k g) t v")  # of their own head

    state = online.update(online.start(logits.shape[:-1], value.shape[3], precise), logits, weigh)
    out, *sums = (x.swapaxes(1, 2) for x in online.finish(state))
    return out.astype(dtype), *sums
