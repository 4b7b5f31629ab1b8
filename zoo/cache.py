"""The explicit caches of `extend`: immutable pytrees that go in and come out; nothing hides in a module."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class KVCache(NamedTuple):
    """Keys and values of all tokens so far, in slots 0..length-1 of S."""

    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K V"]
    valid: Bool[Array, "B S"]  # False: empty, or a padding token
    length: Int[Array, ""]

    @classmethod
    def zeros(cls, batch_size: int, max_length: int, num_kv_heads: int, head_features: int, dtype) -> "KVCache":
        shape = (batch_size, max_length, num_kv_heads, head_features)
        valid = jnp.zeros((batch_size, max_length), bool)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), valid, jnp.zeros((), jnp.int32))


def append(cache: KVCache, key: Float[Array, "B T K H"], value: Float[Array, "B T K V"], valid) -> KVCache:
    """The cache with T more tokens; `valid` [B, T] or None (all real).

    Raises: ValueError: the tokens do not fit. Under `jit` the length is not known, so there a cache that overflows
        turns to NaN instead: a wrong answer must not look like one.
    """
    tokens, room = key.shape[1], cache.key.shape[1]
    full = cache.length + tokens > room
    traced = isinstance(full, jax.core.Tracer)
    if tokens > room or (not traced and full):
        taken = "an unknown number" if traced else int(cache.length)
        raise ValueError(
            f"extend: cache must have room for {tokens} more tokens, got {taken} of {room} taken. "
            "Call init_cache with a larger max_length."
        )
    if valid is None:
        valid = jnp.ones(key.shape[:2], bool)
    slot = cache.length

    def write(old, new):
        new = jnp.where(full, jnp.nan, new.astype(old.dtype)) if old.dtype != bool else new
        return jax.lax.dynamic_update_slice_in_dim(old, new, slot, axis=1)

    return KVCache(
        write(cache.key, key), write(cache.value, value), write(cache.valid, valid), cache.length + tokens
    )


class PerformerCache(NamedTuple):
    """The sums over all keys so far, in units of exp(log_max); their size does not grow with the tokens."""

    numerator: Float[Array, "B N M V"]  # of feature times value
    denominator: Float[Array, "B N M"]  # of features
    log_max: Float[Array, "B N"]  # largest log scale of a key so far; -inf before the first


class TransformerXLCache(NamedTuple):
    """The layer's inputs of the last P = memory_length + segment_length - 1 tokens, the newest last."""

    hidden: Float[Array, "B P D"]
    valid: Bool[Array, "B P"]  # False: before the first token, or a padding token
    position: Int[Array, ""]  # of the next token in its segment, 0..segment_length-1


class S4Cache(NamedTuple):
    """The states of all systems after the last token, in float32: the whole past, whatever its length."""

    state: Float[Array, "B D P"]  # real parts of the modes, then imaginary parts


class ReformerCache(NamedTuple):
    """Normalised keys, values and buckets of all tokens so far, in slots 0..length-1 of S."""

    key: Float[Array, "B S N H"]
    value: Float[Array, "B S N V"]
    valid: Bool[Array, "B S"]  # False: empty, or a padding token
    length: Int[Array, ""]
    buckets: Int[Array, "B R S N"]  # of every round


class LocalCache(NamedTuple):
    """Keys and values of the last W tokens, the newest last."""

    key: Float[Array, "B W K H"]
    value: Float[Array, "B W K V"]
    valid: Bool[Array, "B W"]  # False: before the first token, or a padding token
