"""Softmax attention of new tokens to a cache, under a pattern, at the cost of the keys that it lets them see."""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int, Shaped

from subquad.kernels import precision, softmax
from subquad.kernels.patterns import Pattern
from subquad.zoo.cache import KVCache, places


@precision.promoting
def attend_to_cache(
    pattern: Pattern, query: Float[Array, "B T N H"], cache: KVCache, start: Int[Array, "B"], implementation
) -> Float[Array, "B T N V"]:
    """Attention of tokens at the positions from `start` on to cached keys, whose slots are positions.

    Args:
        pattern: which positions see which, causality included.
        cache: with the keys and values of the tokens themselves.
    """
    capacity, tokens = cache.key.shape[1], query.shape[1]
    size = pattern.chunk(capacity)
    if size is None:  # the new tokens may see all keys
        return softmax.attention(  # type: ignore[return-value]  # without the log-sum-exp
            query, cache.key.astype(query.dtype), cache.value.astype(query.dtype), pattern=pattern,
            query_positions=places(start, tokens), key_positions=jnp.arange(capacity)[None], implementation=implementation,
        )

    def chunk(query, start):
        heads = np.arange(pattern.heads)
        query_positions = places(start, query.shape[1])
        positions = pattern.key_positions(start[:, None], query.shape[1], capacity, heads[None])  # [B, heads, S]
        mask = pattern.allowed(query_positions[:, None, :, None], positions[:, :, None], heads[:, None, None])
        mask &= positions[:, :, None] >= 0
        key, value = (take(array, positions).astype(query.dtype) for array in cache[:2])
        if len(heads) == 1:
            return softmax.attention(query, key, value, mask=mask, implementation=implementation)
        # Keys of its own for each head: heads go into the batch.
        query = rearrange(query, "b t n h -> (b n) t 1 h")
        mask = rearrange(mask, "b n t s -> (b n) 1 t s")
        out = softmax.attention(query, key, value, mask=mask, implementation=implementation)
        return rearrange(out, "(b n) t 1 h -> b t n h", n=len(heads))

    return in_chunks(chunk, query, start, size)


def take(cached: Float[Array, "B S K H"], positions: Int[Array, "B N L"]):
    """The cached at some positions: [B, L, K, H] for those of all heads, [(B N), L, 1, H] for those of each."""
    if positions.shape[1] == 1:
        return jax.vmap(lambda array, at: jnp.take(array, at, axis=0, mode="clip"))(cached, positions[:, 0])
    by_head = jax.vmap(jax.vmap(lambda array, at: jnp.take(array, at, axis=0, mode="clip"), (1, 0)))
    return rearrange(by_head(cached, positions), "b n s h -> (b n) s 1 h")


def in_chunks(attend, query: Float[Array, "B T N H"], start: Int[Array, "B"], size: int) -> Shaped[Array, "B T N V"]:
    """`attend(chunk, position of its first token)` over T tokens from positions `start`, at most `size` at a time.

    However long the input, one chunk sees a part of the cache of known size.
    """
    tokens = query.shape[1]
    size = min(size, tokens)
    count = -(-tokens // size)
    if count == 1:
        return attend(query, start)
    query = jnp.pad(query, ((0, 0), (0, count * size - tokens), (0, 0), (0, 0)))
    chunks = rearrange(query, "b (c t) n h -> c b t n h", c=count)
    heads = jax.lax.map(lambda work: attend(*work), (chunks, start[None] + size * jnp.arange(count)[:, None]))
    return rearrange(heads, "c b t n h -> b (c t) n h")[:, :tokens]
