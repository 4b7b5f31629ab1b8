"""Attention of each token to blocks of keys that it has chosen, the same work for each whatever it chose."""

from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from subquad.kernels import gather, precision, softmax
from subquad.kernels.patterns import CAUSAL, SameBlock
from subquad.zoo.cache import places
from subquad.zoo.extending import in_chunks
from subquad.zoo.projection import in_rows


@precision.promoting
def best(scores: Float[Array, "*B T M"], own: Int[Array, "*#B T"], number: int, always=()) -> Int[Array, "*B T P"]:
    """The `number` blocks before the own one of each token with the largest scores, of equal ones the earlier; -1: none.

    Args:
        scores: of M blocks.
        own: the block of each token.
        always: functions of (block, own) -> bool: blocks that are taken before all others.
    """
    block, own = jnp.arange(scores.shape[-1]), own[..., None]
    for is_taken in always:
        scores = jnp.where(is_taken(block, own), jnp.inf, scores)
    scores, chosen = jax.lax.top_k(jnp.where(block < own, scores, -jnp.inf), min(max(number, 1), scores.shape[-1]))
    return jnp.where((scores > -jnp.inf) & (number > 0), chosen, -1)


def chosen(choose, query: Float[Array, "B T N H"], size: int) -> Int[Array, "B J T P"]:
    """The blocks of a whole sequence, `size` queries at a time; `choose` as in `attend_to_listed`."""
    of_chunk = lambda query, start: choose(query, places(start, query.shape[1])).swapaxes(1, 2)
    return in_chunks(of_chunk, query, jnp.zeros(len(query), jnp.int32), size).swapaxes(1, 2)


def attend_to_blocks(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K V"],
    blocks: Int[Array, "B J T P"],
    size: int,
    implementation,
) -> Float[Array, "B T N V"]:
    """Attention of every token to its own block, causally, and to P blocks before it.

    Pairs of a token and a block are sorted by block, and the tokens of each block filled up to whole tiles of `size`, so that a
    tile reads one block, and all of it.

    Args:
        blocks: of heads (J = N) or of groups of heads that share a key (J = K); -1: no block.
    """
    batch, length, kv_heads, _ = key.shape
    blocks = rearrange(blocks, "b (k j) t p -> (b k) j t p", k=kv_heads)
    query = rearrange(query, "b t (k j g) h -> (b k) j t g h", k=kv_heads, j=blocks.shape[1])
    key, value = (rearrange(x, "b t k h -> (b k) t 1 h") for x in (key, value))
    run = lambda query, key, value, blocks: of_rows(query, key, value, blocks, size, implementation)
    heads = in_rows(run, query, key, value, blocks)
    return rearrange(heads, "(b k) j t g v -> b t (k j g) v", b=batch)


@precision.promoting
def of_rows(query, key, value, blocks, size: int, implementation):
    """As above, of queries [R, J, T, G, H], keys and values [R, T, 1, H], and blocks [R, J, T, P]."""
    _, lists, length, picks = blocks.shape
    flat = lambda x: rearrange(x, "r j t g h -> r t (j g) h")
    near: Any = softmax.attention(
        flat(query), key, value, pattern=SameBlock(size) & CAUSAL, return_lse=True, implementation=implementation
    )
    near = [rearrange(x, "r t (j g) ... -> r j t g ...", j=lists) for x in near]
    if length <= size or not picks:
        return near[0]
    tile, at = jax.vmap(jax.vmap(lambda x: tiles(x, -(-length // size), size)))(rearrange(blocks, "r j t p -> r j (t p)"))
    # What stands at each place of the tiles: a token, or none.
    token = jnp.broadcast_to(jnp.arange(length * picks) // picks, at.shape)
    write = lambda places, token: jnp.full(tile.shape[2] * size, length).at[places].set(token, mode="drop")
    token = jax.vmap(jax.vmap(write))(at, token)
    read = jax.vmap(jax.vmap(lambda x, at: jnp.take(x, at, axis=0, mode="fill", fill_value=0)))
    within = tile[..., None] * size + jnp.arange(size)
    listed = jnp.where((tile[..., None] >= 0) & (within < length), within, -1)
    out, lse = gather.attention(
        flat(read(query, token)), key, value, listed, block_size=size, correct_duplicates=False, return_lse=True,
        implementation=implementation,
    )  # fmt: skip
    out, lse = (rearrange(x, "r t (j g) ... -> r j t g ...", j=lists) for x in (out, lse))
    out = rearrange(read(out, at), "r j (t p) g v -> p r j t g v", p=picks)
    lse = jax.vmap(jax.vmap(lambda x, at: jnp.take(x, at, axis=0, mode="fill", fill_value=-jnp.inf)))(lse, at)
    lse = rearrange(lse, "r j (t p) g -> p r j t g", p=picks)
    fold = lambda x: rearrange(x, "r j t g ... -> r (j t) g ...")
    merged = softmax.merge([fold(near[0]), *map(fold, out)], [fold(near[1]), *map(fold, lse)])[0]
    return rearrange(merged, "r (j t) g v -> r j t g v", j=lists).astype(value.dtype)


def tiles(block: Int[Array, "L"], number: int, size: int) -> tuple[Int[Array, "I"], Int[Array, "L"]]:
    """The block of each tile, and the place of each item in the tiles; items of a block fill tiles of their own.

    Args:
        block: of each item, below `number`; -1: none, whose place is past the end.
    """
    count = -(-len(block) // size) + number
    key = jnp.where(block < 0, number, block)
    order = jnp.argsort(key, stable=True)
    members = jnp.zeros(number + 1, jnp.int32).at[key].add(1)
    of_block = -(-members[:number] // size)
    first = jnp.cumsum(of_block) - of_block
    rank = jnp.zeros(len(block), jnp.int32).at[order].set(jnp.arange(len(block), dtype=jnp.int32))
    rank -= (jnp.cumsum(members) - members)[key]
    at = jnp.where(block < 0, count * size, size * jnp.append(first, 0)[key] + rank)
    tile = jnp.arange(count)
    holder = jnp.searchsorted(first + of_block, tile, side="right")
    return jnp.where(holder < number, holder, -1), at


@precision.promoting
def attend_to_listed(
    query: Float[Array, "B T N H"], key: Float[Array, "B S K H"], value: Float[Array, "B S K V"], start, choose, size: int,
    implementation,
) -> Float[Array, "B T N V"]:
    """The same for tokens at the positions from `start` on, of keys at those from 0 on: each reads its own list.

    Args:
        choose: (queries [B, t, N, H], their positions [B, t]) -> blocks [B, J, t, P].
    """

    def of_chunk(query, start):
        at = places(start, query.shape[1])
        blocks = choose(query, at)
        own = jnp.broadcast_to((at // size)[:, None, :, None], (*blocks.shape[:3], 1))
        within = jnp.concatenate([own, blocks], axis=3)[..., None]
        listed = jnp.where(within >= 0, within * size + jnp.arange(size), -1)
        return gather.attention(
            query, key, value, listed.reshape(*listed.shape[:3], -1), is_causal=True, query_positions=at,
            correct_duplicates=False, implementation=implementation,
        )

    return in_chunks(of_chunk, query, start, size)
