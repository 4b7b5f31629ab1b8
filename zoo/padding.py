"""Padding: the real tokens of each sample moved to the front of the sequence, and back to where they stood.

A mechanism that sees only sequences padded on the right counts real tokens in its positions, blocks and states, wherever the
padding stood and whatever it held.
"""

from typing import NamedTuple

import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int, Shaped

from subquad.kernels.axes import KeyMask


class RealFirst(NamedTuple):
    """The order in which each sample's real tokens come first, and its padding after them.

    Example:
        >>> order = real_first(jnp.array([[[[False, True, False, True]]]]), 1)
        >>> tokens = order.pack(jnp.array([[9.0, 1.0, 9.0, 2.0]]))
        >>> tokens.tolist(), order.unpack(tokens).tolist()
        ([[1.0, 2.0, 0.0, 0.0]], [[0.0, 1.0, 0.0, 2.0]])
    """

    source: Int[Array, "B T"]  # where the token at each place stood
    target: Int[Array, "B T"]  # where each token goes
    mask: Bool[Array, "B T"]  # True for the real tokens, which are the first ones of each sample

    def pack(self, tokens: Shaped[Array, "B T *features"]) -> Shaped[Array, "B T *features"]:
        """Real tokens first, then zeros: what padding held, NaN included, reaches neither results nor gradients."""
        return clear(_take(tokens, self.source), self.mask)

    def unpack(self, tokens: Shaped[Array, "B T *features"]) -> Shaped[Array, "B T *features"]:
        """Each token back where it stood."""
        return _take(tokens, self.target)

    def unpack_weights(self, weights: Float[Array, "B N T S"], of_queries: bool) -> Float[Array, "B N T S"]:
        """Weights of packed keys, and of packed queries, each where its token stood."""
        weights = jnp.moveaxis(self.unpack(jnp.moveaxis(weights, 3, 1)), 1, 3)
        return jnp.moveaxis(self.unpack(jnp.moveaxis(weights, 2, 1)), 1, 2) if of_queries else weights


def real_first(mask: Bool[Array, "#B 1 1 T"], batch_size: int) -> RealFirst:
    """The order that moves the tokens which a key-padding mask shows to the front; among themselves they keep their order."""
    is_real = jnp.broadcast_to(mask[:, 0, 0], (batch_size, mask.shape[-1]))
    count = is_real.sum(axis=1, keepdims=True, dtype=jnp.int32)
    before = jnp.cumsum(is_real, axis=1, dtype=jnp.int32)  # real tokens up to each token, itself counted
    position = jnp.arange(is_real.shape[1], dtype=jnp.int32)[None]
    target = jnp.where(is_real, before - 1, count + position - before)
    return RealFirst(jnp.argsort(~is_real, axis=1, stable=True), target, position < count)


def real(mask: KeyMask | None, tokens: Shaped[Array, "B T *features"]) -> Bool[Array, "B T"]:
    """Which tokens a key-padding mask shows."""
    return jnp.ones(tokens.shape[:2], bool) if mask is None else jnp.broadcast_to(mask[:, 0, 0], tokens.shape[:2])


def clear(tokens: Shaped[Array, "B T *features"] | None, is_kept: Bool[Array, "#B #T"]):
    """The tokens with 0 in place of those that are not kept; None stays None."""
    return None if tokens is None else jnp.where(_like(is_kept, tokens), tokens, jnp.zeros((), tokens.dtype))


def in_blocks(tokens, size: int):
    """[B, T, ...] as [B, I, C, ...]; what the last block lacks is 0 or False."""
    return rearrange(pad_end(tokens, -tokens.shape[1] % size), "b (i c) ... -> b i c ...", c=size)


def pad_end(tokens, count: int):
    """Tokens with so many more of 0 or False behind them."""
    return jnp.pad(tokens, ((0, 0), (0, count), *((0, 0),) * (tokens.ndim - 2)))


def _take(tokens, index):
    return jnp.take_along_axis(tokens, _like(index, tokens), axis=1, mode="promise_in_bounds")


def _like(array, tokens):
    """[B, T] as [B, T, 1, ...], with as many axes as `tokens`."""
    return array.reshape(*array.shape, *(1,) * (tokens.ndim - 2))


def any_key(mask: KeyMask | None, count: int) -> Bool[Array, "B 1 1 L"] | None:
    """The mask of `count` slots that gather from all keys: there is something in them where there is a key."""
    return None if mask is None else jnp.repeat(mask.any(-1, keepdims=True), count, axis=-1)
