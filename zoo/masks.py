"""Masks: functions of positions, lengths and segments. True = attend, as in Flax.

A mask broadcasts to [B, N, T, S]. Combine masks with `&`.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def padding_mask(lengths: Int[Array, "*B"], length: int) -> Bool[Array, "*B 1 1 S"]:
    """The key-padding mask of sequences padded on the right: True for the first `lengths[b]` of `length` keys.

    Example:
        >>> padding_mask(jnp.array([1, 3]), 3)[:, 0, 0].tolist()
        [[True, False, False], [True, True, True]]
    """
    return jnp.arange(length) < jnp.asarray(lengths)[..., None, None, None]


def causal_mask(query_positions: Int[Array, "*B T"], key_positions: Int[Array, "*B S"]) -> Bool[Array, "*B 1 T S"]:
    """True where the key's position is not after the query's."""
    return (key_positions[..., None, :] <= query_positions[..., :, None])[..., None, :, :]


def window_mask(
    query_positions: Int[Array, "*B T"], key_positions: Int[Array, "*B S"], window_size: int | tuple[int, int]
) -> Bool[Array, "*B 1 T S"]:
    """True where query - left <= key <= query + right; `window_size` is (left, right), or one number for both."""
    left, right = (window_size, window_size) if isinstance(window_size, int) else window_size
    distance = key_positions[..., None, :] - query_positions[..., :, None]
    return ((-left <= distance) & (distance <= right))[..., None, :, :]


def segment_mask(query_segment_ids: Int[Array, "*B T"], key_segment_ids: Int[Array, "*B S"]) -> Bool[Array, "*B 1 T S"]:
    """True where query and key belong to the same packed segment."""
    return (query_segment_ids[..., :, None] == key_segment_ids[..., None, :])[..., None, :, :]
