"""The pieces of which strided attention is made when it extends a sequence: each attends to one set of cached keys.

A piece returns a list of (out [B, T, N, V], lse [B, T, N]), one per disjoint set of keys, for `softmax.merge`. `attend`
is `softmax.attention` that returns both. A piece serves T tokens from position `start` on, at most one stride of them,
and is given the whole cache, at the cost of what it reads of it.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from jaxtyping import Array, Bool, Float, Int

Parts = list[tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]]
Attend = Callable[..., tuple[Array, Array]]


class Keys(NamedTuple):
    """Keys and values, which of them are real, and the heads that count."""

    key: Float[Array, "B S N H"]
    value: Float[Array, "B S N V"]
    valid: Bool[Array, "B S"]
    heads: slice = slice(None)

    def of(self, heads: slice) -> "Keys":
        return self._replace(heads=heads)

    def read(self, take) -> tuple[Array, Array, Array]:
        """Key, value and valid of the tokens that `take` takes from an array [B, S, ...]."""
        return take(self.key)[..., self.heads, :], take(self.value)[..., self.heads, :], take(self.valid)


def mask_of(valid):
    return valid[:, None, None]


def before(attend: Attend, query, key, value, at, of, gap: int, mask) -> Parts:
    """Keys of row `of` that lies at least `gap` before the query's row `at`."""
    return [attend(query, key, value, mask=mask, is_causal=True, query_positions=at - gap, key_positions=of)]


def window(attend: Attend, query, cache: Keys, start, size: int) -> Parts:
    tokens, room = query.shape[1], cache.key.shape[1]
    reach = min(room, size + tokens)
    first = jnp.clip(start - size, 0, room - reach)
    key, value, valid = cache.read(lambda array: jax.lax.dynamic_slice_in_dim(array, first, reach, 1))
    at, of = start + jnp.arange(tokens)[None], first + jnp.arange(reach)[None]
    return [attend(query, key, value, mask=mask_of(valid), window_size=(size, 0), query_positions=at, key_positions=of)]


def residues(attend: Attend, query, cache: Keys, start, stride: int, gap: int) -> Parts:
    (batch, tokens), rows = query.shape[:2], np.arange(-(-cache.key.shape[1] // stride))
    at = start + jnp.arange(tokens)
    # The class of token u: what lies past the room counts as the last key, in a row that comes after the query's.
    of = at[:, None] % stride + stride * rows
    take = lambda array: rearrange(jnp.take(array, of, axis=1, mode="clip"), "b u i ... -> (b u) i ...")
    key, value, valid = cache.read(take)
    own, row = rearrange(query, "b u n h -> (b u) 1 n h"), repeat(at // stride, "u -> (b u) 1", b=batch)
    parts = before(attend, own, key, value, row, rows[None], gap, mask_of(valid))
    back = lambda array: rearrange(array, "(b u) 1 ... -> b u ...", u=tokens)
    return [(back(out), back(lse)) for out, lse in parts]


def block(attend: Attend, query, cache: Keys, start, size: int, columns=None) -> Parts:
    (tokens, heads), room = query.shape[1:3], cache.key.shape[1]
    reach = min(room, 2 * size)  # the tokens lie in at most two blocks
    first = jnp.clip(start // size * size, 0, room - reach)
    key, value, valid = cache.read(lambda array: jax.lax.dynamic_slice_in_dim(array, first, reach, 1))
    at, of = start + jnp.arange(tokens)[None], first + jnp.arange(reach)[None]
    is_column = jnp.asarray(column_mask(columns, heads, size))[:, of[0] % size]
    return [
        attend(query, key, value, mask=mask_of(valid) & is_column[None, :, None], is_causal=True,
               query_positions=at, key_positions=of, query_segment_ids=at // size, key_segment_ids=of // size)
    ]  # fmt: skip


def column_mask(columns: np.ndarray | None, heads: int, size: int) -> np.ndarray:
    """bool [N|1, size]: the columns of each head; all of them if None."""
    if columns is None:
        return np.ones((1, size), bool)
    return (np.arange(size) == columns[..., None]).any(1)


def summaries(attend: Attend, query, cache: Keys, at: Int[Array, "1 T"], size: int, columns) -> Parts:
    """The summary columns, int [N, c], of the blocks before the query's block `at`."""
    count = (cache.key.shape[1] - 1) // size  # the last block comes before no block
    if count == 0:
        return []
    of = np.arange(count).repeat(columns.shape[1])  # block of each column
    positions = np.tile(columns.T, (count, 1)) + size * of[:, None]  # of the columns of each head, [(I c), N]
    heads = np.arange(cache.key.shape[2])[cache.heads]
    key, value, valid = cache.key[:, positions, heads], cache.value[:, positions, heads], cache.valid[:, positions]
    return before(attend, query, key, value, at, of[None], 1, rearrange(valid, "b s n -> b n 1 s"))
