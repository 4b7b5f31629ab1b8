"""Strided attention as dense attention under the mask that the pattern spells out."""

import jax.numpy as jnp

from subquad.kernels import softmax
from subquad.kernels.strided.pattern import Pattern, visible


def attention(query, key, value, valid, pattern: Pattern, scale: float):
    """Arguments as checked by `subquad.kernels.strided` -> (out [B, T, N, V], lse [B, T, N])."""
    mask = jnp.asarray(visible(pattern, query.shape[1]))[None]
    mask = mask if valid is None else mask & valid[:, None, None]
    return softmax.attention(query, key, value, mask=mask, scale=scale, return_lse=True, implementation="reference")
