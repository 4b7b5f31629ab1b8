"""Token shift: the token before each, which RWKV mixes it with, and forgetting attention its keys and values."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from subquad.zoo.positions import run_starts


def shift(
    inputs: Float[Array, "B T D"], segment_ids: Int[Array, "B T"] | None = None, recent: Float[Array, "B 1 D"] | None = None,
    counts: Int[Array, "B"] | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B 1 D"]]:  # fmt: skip
    """The token before each, 0 before the first one of a segment; and the last real token, in float32.

    Args:
        recent: the token before the first one. None: 0.
        counts: how many tokens of a sample are real, the first ones. None: all.
    """
    recent = jnp.zeros_like(inputs[:, :1]) if recent is None else recent.astype(inputs.dtype)
    both = jnp.concatenate([recent, inputs], axis=1)
    before = both[:, :-1]
    if segment_ids is not None:
        before = jnp.where(run_starts(segment_ids)[..., None], 0, before)
    last = both[:, -1:] if counts is None else jnp.take_along_axis(both, counts[:, None, None], axis=1)
    return before, last.astype(jnp.float32)
