"""The explicit caches of `extend`: immutable pytrees that go in and come out; nothing hides in a module."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from subquad.kernels import linear, xla_cpu


class KVCache(NamedTuple):
    """Keys and values of each sample's real tokens so far: the token at position t in slot t of S."""

    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K V"]
    length: Int[Array, "B"]  # real tokens so far; more than S where they did not fit

    @classmethod
    def zeros(cls, batch_size: int, max_length: int, num_kv_heads: int, head_features: int, dtype) -> "KVCache":
        shape = (batch_size, max_length, num_kv_heads, head_features)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros(batch_size, jnp.int32))


def places(start: Int[Array, "*B"], length: int) -> Int[Array, "*B T"]:
    """The `length` places from each `start` on."""
    return start[..., None] + jax.lax.broadcasted_iota(start.dtype, (*start.shape, length), start.ndim)


def next_position(cache) -> Int[Array, "B"]:
    """The position of each sample's next token: how many real ones a cache has seen."""
    return cache.seen if hasattr(cache, "seen") else cache.length


def in_dtypes_of(before: Any, cache: Any) -> Any:
    """The cache in the dtypes that it had before, so that a loop can carry it whatever the layer computed in."""
    return jax.tree.map(lambda old, new: new.astype(old.dtype), before, cache)


def counts(tokens: Array, mask: Bool[Array, "B 1 1 T"] | None) -> Int[Array, "B"]:
    """How many of T new tokens [B, T, ...] are real in each sample: the first ones, as the shell of a layer hands them over."""
    if mask is None:
        return jnp.full(tokens.shape[0], tokens.shape[1], jnp.int32)
    return jnp.broadcast_to(mask.sum(axis=(1, 2, 3), dtype=jnp.int32), tokens.shape[0])


def first_real(tokens: Array, counts: Int[Array, "B"] | None) -> Bool[Array, "B 1 1 T"] | None:
    """The mask of the first `counts` of T new tokens [B, T, ...]; None: all."""
    return None if counts is None else (jnp.arange(tokens.shape[1])[None] < counts[:, None])[:, None, None]


def append(cache: KVCache, key: Float[Array, "B T K H"], value: Float[Array, "B T K V"], mask) -> KVCache:
    """The cache with each sample's real tokens of T more, the first ones; `mask` [B, 1, 1, T] or None (all real).

    Slots are positions, so there is nothing behind a real token that causality would not hide, and padding takes no slot.

    What does not fit is lost, and `poisoned` makes the outputs of such a sample NaN, now and later: the length is not known
    under `jit`, and a wrong answer must not look like one.
    """
    length = cache.length + counts(key, mask)
    return KVCache(write(cache.key, key, cache.length, mask), write(cache.value, value, cache.length, mask), length)


def write(cached, new, start: Int[Array, "B"], mask, axis: int = 1):
    """The cached array with the real ones of the new tokens written along `axis`, from `start` of each sample on.

    What stands in slots after them means nothing, as nothing sees these before a token is written there.
    """
    room, new = cached.shape[axis], new.astype(cached.dtype)
    if mask is not None:  # the padding after the real tokens may not fit where these do
        new = jax.lax.slice_in_dim(new, 0, min(room, new.shape[axis]), axis=axis)
        tokens, first = new.shape[axis], jnp.minimum(start, room - new.shape[axis])

        def moved(cached, new, first, start):
            old, at = jax.lax.dynamic_slice_in_dim(cached, first, tokens, axis - 1), jnp.arange(tokens) - (start - first)
            is_new = (at >= 0).reshape(-1, *(1,) * (new.ndim - axis))
            return jnp.where(is_new, jnp.take(new, at, axis=axis - 1, mode="clip"), old)

        new, start = jax.vmap(moved)(cached, new, first, start), first
    return xla_cpu.write_samples(cached, new, start, axis)


def poisoned(outputs: Float[Array, "B T *features"], cache) -> Float[Array, "B T *features"]:
    """The outputs, NaN for samples that have had more tokens than the cache has slots."""
    return jnp.where((cache.length > room(cache)).reshape(-1, *(1,) * (outputs.ndim - 1)), jnp.nan, outputs)


def room(cache) -> int:
    """How many tokens of a sample fit into a cache that has a length: as many as it has keys, unless it says otherwise."""
    return cache.room if hasattr(cache, "room") else cache.key.shape[1]


def pieces(tokens, start: Int[Array, "B"], size: int):
    """`size` tokens of [B, S, ...] from each sample's `start` on."""
    return jax.vmap(lambda tokens, start: jax.lax.dynamic_slice_in_dim(tokens, start, size))(tokens, start)


def last(tokens: Float[Array, "B S *features"], size: int, new: int, mask) -> Float[Array, "B size *features"]:
    """The last `size` real tokens of each sample, where `mask` [B, 1, 1, new] tells which of the last `new` are real."""
    before = tokens.shape[1] - new
    return tokens[:, before + new - size :] if mask is None else pieces(tokens, before - size + counts(tokens, mask), size)


class LinearCache(NamedTuple):
    """The sums of linear attention over all keys so far, in units of exp(log_max); their size does not grow with the tokens."""

    numerator: Float[Array, "B N M V"]  # of feature times value
    denominator: Float[Array, "B N M"]  # of features
    log_max: Float[Array, "B N"]  # largest log scale of a key so far; -inf before the first
    seen: Int[Array, "B"]  # real tokens so far: the position of the next one

    @classmethod
    def zeros(cls, batch_size: int, num_heads: int, features: int, value_features: int) -> "LinearCache":
        """Float32, as the sums are, whatever the dtype of the layer."""
        state = linear.empty_state(batch_size, num_heads, features, value_features)
        return cls(*state, jnp.zeros(batch_size, jnp.int32))


class GatedCache(NamedTuple):
    """The decaying sums of gated linear attention over all keys so far; their size does not grow with the tokens."""

    numerator: Float[Array, "B N M V"]  # of feature times value
    denominator: Float[Array, "B N M"]  # of features
    seen: Int[Array, "B"]  # real tokens so far: the position of the next one


class MatrixCache(NamedTuple):
    """The sum of each sample's keys times values so far, as it has decayed; its size does not grow with the tokens."""

    state: Float[Array, "B N M V"]  # float32, whatever the dtype of the layer
    seen: Int[Array, "B"]  # real tokens so far: the position of the next one

    @classmethod
    def zeros(cls, batch_size: int, num_heads: int, features: int, value_features: int) -> "MatrixCache":
        state = jnp.zeros((batch_size, num_heads, features, value_features), jnp.float32)
        return cls(state, jnp.zeros(batch_size, jnp.int32))


class SlotCache(NamedTuple):
    """Moving averages of each sample's keys and values so far, in M slots; their size does not grow with the tokens."""

    keys: Float[Array, "B N M H"]  # float32, whatever the dtype of the layer
    values: Float[Array, "B N M V"]
    seen: Int[Array, "B"]  # real tokens so far: the position of the next one


class EfficientCache(NamedTuple):
    """Averages of the values so far, one for each feature of the keys, and the logarithms of their weights' sums."""

    average: Float[Array, "B N H V"]
    log_sum: Float[Array, "B N H"]
    seen: Int[Array, "B"]  # real tokens so far: the position of the next one


class LunaCache(NamedTuple):
    """Sums over the tokens so far of their weight in each slot times their key, and times their value."""

    keys: Float[Array, "B N H L"]
    values: Float[Array, "B N L H"]
    seen: Int[Array, "B"]  # real tokens so far: the position of the next one


class MemoryCompressedCache(NamedTuple):
    """Compressed keys and values of each sample's blocks of C tokens so far, and those of its last, open block as they are."""

    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K V"]
    length: Int[Array, "B"]  # real tokens so far; more than S C where they did not fit
    open_key: Float[Array, "B C K H"]
    open_value: Float[Array, "B C K V"]

    @property
    def room(self) -> int:
        return self.key.shape[1] * self.open_key.shape[1]


class TransformerXLCache(NamedTuple):
    """The layer's inputs of each sample's last P = memory_length + segment_length - 1 real tokens, the newest last."""

    hidden: Float[Array, "B P D"]
    seen: Int[Array, "B"]  # real tokens so far: the position of the next one


class CompressiveCache(NamedTuple):
    """The layer's inputs of each sample's memory and then of its segment so far, and the compressed memory before these."""

    hidden: Float[Array, "B P D"]  # P = memory_length + segment_length - 1, of which those after the newest mean nothing
    compressed: Float[Array, "B C D"]  # the newest last
    seen: Int[Array, "B"]  # real tokens so far: the position of the next one


class StateCache(NamedTuple):
    """The state after each sample's last real token, in float32: the whole past, whatever its length."""

    state: Float[Array, "B *state"]  # of complex modes the real parts, then the imaginary parts, along the last axis


class RecurrentCache(NamedTuple):
    """The state after each sample's last real token, and what the tokens just before the next one gave a convolution."""

    state: Float[Array, "B *state"]  # float32, whatever the dtype of the layer, as `recent`
    recent: Float[Array, "B W D"]  # the newest last; 0 before the first token


class MLSTMCache(NamedTuple):
    """exp(-m) times the matrix memory and its normaliser after each sample's last real token, and what a convolution needs."""

    state: Float[Array, "B N M V"]  # float32, whatever the dtype of the layer, as all the others
    normalizer: Float[Array, "B N M"]
    largest: Float[Array, "B N"]  # m: no weight in the state exceeds 1; -inf before the first token
    recent: Float[Array, "B W R"]  # the newest last; 0 before the first token


class ReformerCache(NamedTuple):
    """Normalised keys, values and buckets of each sample's real tokens so far: the token at position t in slot t of S."""

    key: Float[Array, "B S N H"]
    value: Float[Array, "B S N V"]
    length: Int[Array, "B"]  # real tokens so far; more than S where they did not fit
    buckets: Int[Array, "B R S N"]  # of every round


class SinkhornCache(NamedTuple):
    """Keys and values of each sample's real tokens so far: the token at position t in slot t of S; and what sorts blocks."""

    key: Float[Array, "B S N H"]
    value: Float[Array, "B S N V"]
    length: Int[Array, "B"]  # real tokens so far; more than S where they did not fit
    total: Float[Array, "B D"]  # the sum of the inputs so far
    first: Float[Array, "B D"]  # that up to the first input of the open block
    columns: Float[Array, "B R N I"]  # logarithms of the sums of S's columns over the blocks before it, in each iteration


class RoutingCache(NamedTuple):
    """Keys and values of each sample's real tokens so far: the token at position t in slot t of S; and their clusters."""

    key: Float[Array, "B S N H"]
    value: Float[Array, "B S N V"]
    length: Int[Array, "B"]  # real tokens so far; more than S where they did not fit
    places: Int[Array, "B S N"]  # of tokens in the order of cluster and position, with gaps between clusters
    members: Int[Array, "B N C"]  # tokens of each cluster so far


class LocalCache(NamedTuple):
    """Keys and values of each sample's last W real tokens, the newest last."""

    key: Float[Array, "B W K H"]
    value: Float[Array, "B W K V"]
    seen: Int[Array, "B"]  # real tokens so far


class HTransformerCache(NamedTuple):
    """Keys and values of each sample's real tokens so far, by position, and their means over groups, level after level."""

    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K V"]
    length: Int[Array, "B"]  # real tokens so far; more than S where they did not fit
    coarse_key: Float[Array, "B G K H+2"]  # S // 2, then S // 4, ...; with the logarithm of the tokens of a group in two parts
    coarse_value: Float[Array, "B G K V"]


class LongformerCache(NamedTuple):
    """Local keys and values of each sample's real tokens so far, and global ones of its G global tokens, by position."""

    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K V"]
    length: Int[Array, "B"]  # real tokens so far; more than S where they did not fit
    global_key: Float[Array, "B G K H"]
    global_value: Float[Array, "B G K V"]
