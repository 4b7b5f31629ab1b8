"""What the pattern layers share when they extend a sequence."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int


def in_chunks(
    attend: Callable[[Float[Array, "B C N H"], Int[Array, "B"]], Float[Array, "B C N H"]],
    query: Float[Array, "B T N H"],
    start: Int[Array, "B"],
    size: int,
) -> Float[Array, "B T N H"]:
    """`attend(chunk, positions of its first tokens)` over T tokens from positions `start`, at most `size` at a time.

    However long the input, one chunk spans few blocks, so what it sees is a part of the cache of known size.
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
