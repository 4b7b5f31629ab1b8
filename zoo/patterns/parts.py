"""The pieces of which strided attention is made: each attends to one set of keys, none to a T x T array.

A piece returns a list of (out [B, T, N, V], lse [B, T, N]), one per disjoint set of keys, for `softmax.merge`. `attend`
is `softmax.attention` that returns both; `valid` is bool [B|1, S] or None. The `cached` pieces serve T tokens from
position `start` on, at most one stride of them, and see the whole cache at a cost of what they read of it.
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


def beyond(attend: Attend, query, keys: Keys, at, of, gap: int, is_causal: bool, mask=None) -> Parts:
    """Keys of row `of` that lies at least `gap` before the query's row `at`; if not causal, also those after it."""
    mask = mask_of(keys.valid) if mask is None else mask
    if gap == 0 and not is_causal:
        return [attend(query, keys.key, keys.value, mask=mask)]
    rows = dict(mask=mask, key_positions=of)
    parts = [attend(query, keys.key, keys.value, is_causal=True, query_positions=at - gap, **rows)]
    if not is_causal:
        parts.append(attend(query, keys.key, keys.value, window_size=(0, None), query_positions=at + gap, **rows))
    return parts


def window(attend: Attend, query, keys: Keys, size: int, is_causal: bool) -> Parts:
    """The keys at most `size` positions away."""
    sides = (size, 0 if is_causal else size)
    return [attend(query, keys.key, keys.value, mask=mask_of(keys.valid), window_size=sides)]


def window_cached(attend: Attend, query, cache: Keys, start, size: int) -> Parts:
    tokens, room = query.shape[1], cache.key.shape[1]
    reach = min(room, size + tokens)
    first = jnp.clip(start - size, 0, room - reach)
    seen = cache.map(lambda array: jax.lax.dynamic_slice_in_dim(array, first, reach, 1))
    at, of = start + jnp.arange(tokens)[None], first + jnp.arange(reach)[None]
    return [
        attend(query, seen.key, seen.value, mask=mask_of(seen.valid), window_size=(size, 0), query_positions=at,
               key_positions=of)
    ]  # fmt: skip


def residues(attend: Attend, query, keys: Keys, stride: int, gap: int, is_causal: bool) -> Parts:
    """The keys at a distance of m strides, m >= gap: one small attention for each remainder of the position."""
    tokens = query.shape[1]
    stride = min(stride, tokens)
    rows = -(-tokens // stride)
    if rows <= gap:
        return []

    def classes(array):
        return rearrange(pad(array, rows * stride), "b (i r) ... -> (b r) i ...", r=stride)

    at = np.arange(rows)[None]
    parts = beyond(attend, classes(query), keys.map(classes), at, at, gap, is_causal)
    back = lambda array: rearrange(array, "(b r) i ... -> b (i r) ...", r=stride)[:, :tokens]
    return [(back(out), back(lse)) for out, lse in parts]


def residues_cached(attend: Attend, query, cache: Keys, start, stride: int, gap: int) -> Parts:
    tokens, rows = query.shape[1], 1 + -(-cache.key.shape[1] // stride)

    def classes(array):
        # Token u of the query and the keys some strides before it make class u. One stride of nothing goes in front,
        # so that the first key of every class, which may come before start % stride, has a row.
        array = jnp.pad(array, ((0, 0), (stride, 0)) + ((0, 0),) * (array.ndim - 2))
        array = jax.lax.dynamic_slice_in_dim(pad(array, (rows + 1) * stride), start % stride, rows * stride, 1)
        return rearrange(rearrange(array, "b (i r) ... -> b i r ...", r=stride)[:, :, :tokens], "b i u ... -> (b u) i ...")

    own = rearrange(query, "b u n h -> (b u) 1 n h")
    parts = beyond(attend, own, cache.map(classes), (start // stride)[None, None] + 1, np.arange(rows)[None], gap, True)
    back = lambda array: rearrange(array, "(b u) 1 ... -> b u ...", u=tokens)
    return [(back(out), back(lse)) for out, lse in parts]


def block(attend: Attend, query, keys: Keys, size: int, is_causal: bool, columns=None) -> Parts:
    """The keys of the query's own block; only `columns` of it, int [N, c], where given."""
    tokens, heads = query.shape[1:3]
    is_column = column_mask(columns, heads, size)[:, :tokens]
    size = min(size, tokens)
    count = -(-tokens // size)
    blocks = lambda array: rearrange(pad(array, count * size), "b (i r) ... -> (b i) r ...", r=size)
    seen = keys.map(blocks)
    mask = mask_of(seen.valid) & is_column[None, :, None]
    out, lse = attend(blocks(query), seen.key, seen.value, mask=mask, is_causal=is_causal)
    back = lambda array: rearrange(array, "(b i) r ... -> b (i r) ...", i=count)[:, :tokens]
    return [(back(out), back(lse))]


def block_cached(attend: Attend, query, cache: Keys, start, size: int, columns=None) -> Parts:
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


def summaries(attend: Attend, query, keys: Keys, at: Int[Array, "1 T"], size: int, is_causal: bool, columns) -> Parts:
    """The summary columns, int [N, c], of the blocks before (or after) the query's block `at`."""
    room = keys.key.shape[1]
    # The last block comes before no block.
    count = (room - 1) // size if is_causal else -(-room // size)
    if count <= (0 if is_causal else 1):
        return []
    heads = np.arange(len(columns))

    def pick(array):  # [B, S, N, ...] -> [B, (I c), N, ...]
        array = rearrange(pad(array[:, : count * size], count * size), "b (i r) ... -> b i r ...", r=size)
        return rearrange(array[:, :, columns.T, heads], "b i c ... -> b (i c) ...")

    valid = pick(repeat(keys.valid, "b s -> b s n", n=len(heads)))
    seen = Keys(pick(keys.key), pick(keys.value), keys.valid)
    of = np.arange(count).repeat(columns.shape[1])[None]
    return beyond(attend, query, seen, at, of, 1, is_causal, mask=rearrange(valid, "b s n -> b n 1 s"))
