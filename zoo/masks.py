"""Masks: functions of positions, lengths and segments. True = attend, as in Flax.

A mask broadcasts to [B, N, T, S]. Combine masks with `&`. Positions and segments [T] hold for all samples: [1, 1, T, S].
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int


def padding_mask(lengths: Int[Array, "*B"], length: int) -> Bool[Array, "*B 1 1 S"]:
    """The key-padding mask of sequences padded on the right: True for the first `lengths[b]` of `length` keys.

    Example:
        >>> padding_mask(jnp.array([1, 3]), 3)[:, 0, 0].tolist()
        [[True, False, False], [True, True, True]]
    """
    lengths = signed(lengths)[..., None, None, None]
    return jax.lax.broadcasted_iota(lengths.dtype, (*lengths.shape[:-1], length), lengths.ndim - 1) < lengths


def causal_mask(query_positions: Int[Array, "*B T"], key_positions: Int[Array, "*B S"]) -> Bool[Array, "... 1 T S"]:
    """True where the key's position is not after the query's."""
    query, key = pairs(query_positions, key_positions)
    return key <= query


def window_mask(
    query_positions: Int[Array, "*B T"], key_positions: Int[Array, "*B S"], window_size: int | tuple[int, int]
) -> Bool[Array, "... 1 T S"]:
    """True where query - left <= key <= query + right; `window_size` is (left, right), or one number for both."""
    left, right = (window_size, window_size) if isinstance(window_size, int | np.integer) else window_size
    query, key = pairs(query_positions, key_positions)
    return (-left <= key - query) & (key - query <= right)


def segment_mask(query_segment_ids: Int[Array, "*B T"], key_segment_ids: Int[Array, "*B S"]) -> Bool[Array, "... 1 T S"]:
    """True where query and key belong to the same packed segment."""
    query, key = pairs(query_segment_ids, key_segment_ids)
    return query == key


def pairs(query: Int[Array, "*B T"], key: Int[Array, "*B S"]) -> tuple[Int[Array, "... 1 T 1"], Int[Array, "... 1 1 S"]]:
    """Arrays that broadcast to all pairs of a query and a key, with an axis of heads; one sample's have a batch axis of 1."""
    return jnp.atleast_2d(signed(query))[..., None, :, None], jnp.atleast_2d(signed(key))[..., None, None, :]


def signed(numbers: Int[Array, "*B"]) -> Int[Array, "*B"]:
    """Positions, lengths or segments as integers of 32 bits at least and with a sign, so that no difference wraps around."""
    numbers = jnp.asarray(numbers)
    if numbers.dtype == jnp.uint64:  # which would be promoted to floating-point numbers
        return numbers.astype(jnp.int64)
    return numbers.astype(jnp.promote_types(numbers.dtype, jnp.int32))
