"""The pieces of which strided attention is made when it extends a sequence: each attends to one set of cached keys.

A piece returns a list of (out [B, T, N, V], lse [B, T, N]), one per disjoint set of keys, for `softmax.merge`. `attend`
is `softmax.attention` that returns both. A piece serves T consecutive tokens at positions `at` of each sample, at most one
stride of them, and is given the whole cache, at the cost of what it reads of it.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int

from subquad.zoo.cache import pieces, places

Parts = list[tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]]
Attend = Callable[..., tuple[Array, Array]]


class Keys(NamedTuple):
    """Keys and values, slots being positions, and the heads that count. What is not there yet lies after every query."""

    key: Float[Array, "B S N H"]
    value: Float[Array, "B S N V"]
    heads: slice = slice(None)

    def of(self, heads: slice) -> "Keys":
        return self._replace(heads=heads)

    def read(self, take) -> tuple[Array, Array]:
        """Key and value of the tokens that `take` takes from an array [B, S, ...]."""
        return take(self.key)[..., self.heads, :], take(self.value)[..., self.heads, :]


def before(attend: Attend, query, key, value, at, of, gap: int) -> Parts:
    """Keys of row `of` that lies at least `gap` before the query's row `at`."""
    return [attend(query, key, value, is_causal=True, query_positions=at - gap, key_positions=of)]


def window(attend: Attend, query, cache: Keys, at: Int[Array, "B T"], size: int) -> Parts:
    room = cache.key.shape[1]
    reach = min(room, size + query.shape[1])
    first = jnp.clip(at[:, 0] - size, 0, room - reach)
    key, value = cache.read(lambda array: pieces(array, first, reach))
    of = places(first, reach)
    return [attend(query, key, value, window_size=(size, 0), query_positions=at, key_positions=of)]


def residues(attend: Attend, query, cache: Keys, at: Int[Array, "B T"], stride: int, gap: int) -> Parts:
    tokens, rows = query.shape[1], np.arange(-(-cache.key.shape[1] // stride))
    # The class of token u: what lies past the room counts as the last key, in a row that comes after the query's.
    of = at[..., None] % stride + (stride * rows)[None, None]
    take = jax.vmap(lambda array, of: jnp.take(array, of, axis=0, mode="clip"))
    key, value = cache.read(lambda array: rearrange(take(array, of), "b u i ... -> (b u) i ..."))
    own, row = rearrange(query, "b u n h -> (b u) 1 n h"), rearrange(at // stride, "b u -> (b u) 1")
    parts = before(attend, own, key, value, row, rows[None], gap)
    back = lambda array: rearrange(array, "(b u) 1 ... -> b u ...", u=tokens)
    return [(back(out), back(lse)) for out, lse in parts]


def block(attend: Attend, query, cache: Keys, at: Int[Array, "B T"], size: int, columns=None) -> Parts:
    heads, room = query.shape[2], cache.key.shape[1]
    reach = min(room, 2 * size)  # the tokens lie in at most two blocks
    first = jnp.clip(at[:, 0] // size * size, 0, room - reach)
    key, value = cache.read(lambda array: pieces(array, first, reach))
    of = places(first, reach)
    mask = None
    if columns is not None:
        mask = rearrange(jnp.asarray(column_mask(columns, heads, size))[:, of % size], "n b s -> b n 1 s")
    return [
        attend(query, key, value, mask=mask, is_causal=True, query_positions=at, key_positions=of,
               query_segment_ids=at // size, key_segment_ids=of // size)
    ]  # fmt: skip


def column_mask(columns: np.ndarray | None, heads: int, size: int) -> np.ndarray:
    """bool [N|1, size]: the columns of each head; all of them if None."""
    if columns is None:
        return np.ones((1, size), bool)
    return (np.arange(size) == columns[..., None]).any(1)


def summaries(attend: Attend, query, cache: Keys, at: Int[Array, "B T"], size: int, columns) -> Parts:
    """The summary columns, int [N, c], of the blocks before the query's block."""
    count = (cache.key.shape[1] - 1) // size  # the last block comes before no block
    if count == 0:
        return []
    of = np.arange(count).repeat(columns.shape[1])  # block of each column
    positions = np.tile(columns.T, (count, 1)) + size * of[:, None]  # of the columns of each head, [(I c), N]
    heads = np.arange(cache.key.shape[2])[cache.heads]
    key, value = cache.key[:, positions, heads], cache.value[:, positions, heads]
    return before(attend, query, key, value, at // size, of[None], 1)
