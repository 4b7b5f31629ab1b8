"""Heads as rows, each a sample of one head: every head puts its own tokens into buckets."""

import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float

from subquad.kernels.axes import KeyMask
from subquad.zoo import padding


def rows(heads: Float[Array, "B T N H"]) -> Float[Array, "BN T 1 H"]:
    return rearrange(heads, "b t n h -> (b n) t 1 h")


def unrows(rows: Float[Array, "BN T 1 H"], heads: int) -> Float[Array, "B T N H"]:
    return rearrange(rows, "(b n) t 1 h -> b t n h", n=heads)


def real_rows(mask: KeyMask | None, heads: Float[Array, "B T N H"]) -> Bool[Array, "BN T"]:
    """Which tokens of each row are real."""
    return jnp.repeat(padding.real(mask, heads), heads.shape[2], axis=0)
