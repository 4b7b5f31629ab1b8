"""Where a token stands: its position among the real ones, and encodings as functions of integer positions."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from subquad.zoo.masks import signed


def positions_of_real(
    tokens: Int[Array, "B T"], mask: Bool[Array, "B T"] | None = None, segment_ids: Int[Array, "B T"] | None = None
) -> Int[Array, "#B T"]:
    """Where each token stands among the real ones of its segment; padding stands where the real token before it does.

    Args:
        tokens: only their shape counts.
        mask: True = a real token; None: all are. Padding before the first real token stands at -1.
        segment_ids: positions start from 0 again wherever a real token's segment is not that of the real token before it.
    """
    if mask is None and segment_ids is None:
        return jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    if mask is None:
        mask = jnp.ones(tokens.shape, bool)
    count = jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1
    if segment_ids is None:
        return count
    at = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], mask.shape)
    latest = jax.lax.cummax(jnp.where(mask, at, -1), axis=1)
    previous = jnp.pad(latest[:, :-1], ((0, 0), (1, 0)), constant_values=-1)  # the real token before this one
    same = segment_ids == jnp.take_along_axis(segment_ids, jnp.maximum(previous, 0), axis=1)
    starts = mask & ~((previous >= 0) & same)
    return count - jax.lax.cummax(jnp.where(starts, count, 0), axis=1)


def run_starts(segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """Where another segment begins than that of the token before."""
    return jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))


def sinusoidal(positions: Int[Array, "*B T"], features: int) -> Float[Array, "*B T D"]:
    """Sines in the first half of the features, cosines in the second, at wavelengths 2 pi to 20,000 pi.

        e_{t,i} = sin(t / 10000^{2i/D}),  e_{t,D/2+i} = cos(t / 10000^{2i/D})

    Args:
        positions: integer positions.
        features: even number of features D.
    Raises: ValueError: features is odd.
    Source: Vaswani et al., Attention Is All You Need, 2017, arXiv 1706.03762, section 3.5.
    """
    if features % 2:
        raise ValueError(f"sinusoidal: features must be even, got {features}. Use one feature more.")
    angle = _angles(positions[..., None], 10000.0, features)
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def rotary(inputs: Float[Array, "*B T N H"], positions: Int[Array, "*#B T"], base: float) -> Float[Array, "*B T N H"]:
    """Rotates each pair of features (i, i + H/2) by the angle position / base^{2i/H}.

    The scalar product of a rotated query and a rotated key then depends on the distance of their positions alone.

    Args:
        inputs: queries or keys; H even.
        positions: integer positions of the tokens.
        base: the longest wavelength in units of 2 pi tokens, usually 10000; positive.
    Raises: ValueError: H is odd.
    Source: Su et al., RoFormer, 2021, arXiv 2104.09864, eq. 34.
    """
    features = inputs.shape[-1]
    if features % 2:
        raise ValueError(f"rotary: the head features must be even, got {features}. Choose qkv_features accordingly.")
    angle = _angles(positions[..., None, None], base, features)
    angle = jnp.expand_dims(angle, tuple(range(inputs.ndim - angle.ndim)))
    first, second = jnp.split(inputs.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(inputs.dtype)


def _angles(positions: Int[Array, "*B 1"], base: float, features: int) -> Float[Array, "*B D2"]:
    """position / base^{2i/D} for i = 0..D/2-1."""
    frequency = base ** (-jnp.arange(0, features, 2) / features)
    return positions.astype(frequency.dtype) * jnp.expand_dims(frequency, tuple(range(positions.ndim - 1)))


def alibi_slopes(num_heads: int) -> Float[Array, "N"]:
    """How fast each head's attention fades with distance: 2^{-8 n / N} for n = 1..N.

    Where N is no power of two, the slopes of the power below come first, then every other slope of the power above, as
    in the authors' code.

    Raises: ValueError: num_heads is less than 1.
    """
    if num_heads < 1:
        raise ValueError(f"alibi_slopes: num_heads must be at least 1, got {num_heads}. Count the query heads.")
    power = 1 << (num_heads.bit_length() - 1)
    below = jnp.arange(1, power + 1) / power
    between = jnp.arange(1, 2 * (num_heads - power), 2) / (2 * power)
    return 2.0 ** (-8 * jnp.concatenate([below, between]))


def alibi(
    query_positions: Int[Array, "*B T"], key_positions: Int[Array, "*B S"], num_heads: int
) -> Float[Array, "*B N T S"]:
    """Attention with linear biases: adds -slope_n |t - s| to the score of query t and key s in head n.

    The paper is causal, where the distance is t - s; beyond it the bias is the same on both sides. The array is as
    large as the scores.

    Args:
        query_positions, key_positions: integer positions of the tokens.
        num_heads: query heads N.
    Source: Press et al., Train Short, Test Long, ICLR 2022, arXiv 2108.12409.
    """
    query, key = signed(query_positions)[..., :, None], signed(key_positions)[..., None, :]
    distance = jnp.abs(query - key)[..., None, :, :]
    slopes = jnp.expand_dims(alibi_slopes(num_heads)[:, None, None], tuple(range(distance.ndim - 3)))
    return -slopes * distance.astype(slopes.dtype)
