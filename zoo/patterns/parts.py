"""The pieces of which strided attention is made when it extends a sequence: each attends to one set of cached keys.

A piece returns a list of (out [B, T, N, V], lse [B, T, N]), one per disjoint set of keys, for `softmax.merge`. `attend`
is `softmax.attention` that returns both. A piece serves T tokens from position `start` on, at most one stride of them,
and sees the whole cache at a cost of what it reads of it.
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
    """Keys and values, and which of them are real."""

    key: Float[Array, "B S N H"]
    value: Float[Array, "B S N V"]
    valid: Bool[Array, "B S"]

    def map(self, function) -> "Keys":
        return Keys(*(function(array) for array in self))


def pad(array, length: int):
    """`array` [B, T, ...] with zeros (or False) at the end of T, up to `length`."""
    return jnp.pad(array, ((0, 0), (0, length - array.shape[1])) + ((0, 0),) * (array.ndim - 2))


def mask_of(valid):
    return valid[:, None, None]


def before(attend: Attend, query, keys: Keys, at, of, gap: int, mask) -> Parts:
    """Keys of row `of` that lies at least `gap` before the query's row `at`."""
    return [
        attend(query, keys.key, keys.value, mask=mask, is_causal=True, query_positions=at - gap, key_positions=of)
    ]


def window(attend: Attend, query, cache: Keys, start, size: int) -> Parts:
    tokens, room = query.shape[1], cache.key.shape[1]
    reach = min(room, size + tokens)
    first = jnp.clip(start - size, 0, room - reach)
    seen = cache.map(lambda array: jax.lax.dynamic_slice_in_dim(array, first, reach, 1))
    at, of = start + jnp.arange(tokens)[None], first + jnp.arange(reach)[None]
    return [
        attend(query, seen.key, seen.value, mask=mask_of(seen.valid), window_size=(size, 0), query_positions=at,
               key_positions=of)
    ]  # fmt: skip


def residues(attend: Attend, query, cache: Keys, start, stride: int, gap: int) -> Parts:
    tokens, rows = query.shape[1], 1 + -(-cache.key.shape[1] // stride)

    def classes(array):
        # Token u of the query and the keys some strides before it make class u. One stride of nothing goes in front,
        # so that the first key of every class, which may come before start % stride, has a row.
        array = jnp.pad(array, ((0, 0), (stride, 0)) + ((0, 0),) * (array.ndim - 2))
        array = jax.lax.dynamic_slice_in_dim(pad(array, (rows + 1) * stride), start % stride, rows * stride, 1)
        return rearrange(rearrange(array, "b (i r) ... -> b i r ...", r=stride)[:, :, :tokens], "b i u ... -> (b u) i ...")

    own = rearrange(query, "b u n h -> (b u) 1 n h")
    seen = cache.map(classes)
    at, of = (start // stride)[None, None] + 1, np.arange(rows)[None]
    parts = before(attend, own, seen, at, of, gap, mask_of(seen.valid))
    back = lambda array: rearrange(array, "(b u) 1 ... -> b u ...", u=tokens)
    return [(back(out), back(lse)) for out, lse in parts]


def block(attend: Attend, query, cache: Keys, start, size: int, columns=None) -> Parts:
    (tokens, heads), room = query.shape[1:3], cache.key.shape[1]
    reach = min(room, 2 * size)  # the tokens lie in at most two blocks
    first = jnp.clip(start // size * size, 0, room - reach)
    seen = cache.map(lambda array: jax.lax.dynamic_slice_in_dim(array, first, reach, 1))
    at, of = start + jnp.arange(tokens)[None], first + jnp.arange(reach)[None]
    is_column = jnp.asarray(column_mask(columns, heads, size))[:, of[0] % size]
    return [
        attend(query, seen.key, seen.value, mask=mask_of(seen.valid) & is_column[None, :, None], is_causal=True,
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
    heads = np.arange(len(columns))

    def pick(array):  # [B, S, N, ...] -> [B, (I c), N, ...]
        array = rearrange(array[:, : count * size], "b (i r) ... -> b i r ...", r=size)
        return rearrange(array[:, :, columns.T, heads], "b i c ... -> b (i c) ...")

    valid = pick(repeat(cache.valid, "b s -> b s n", n=len(heads)))
    seen = Keys(pick(cache.key), pick(cache.value), cache.valid)
    of = np.arange(count).repeat(columns.shape[1])[None]
    return before(attend, query, seen, at, of, 1, rearrange(valid, "b s n -> b n 1 s"))
