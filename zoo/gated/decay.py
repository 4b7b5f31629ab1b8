"""How fast the state of a gated layer fades."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from subquad.zoo.positions import run_starts


def with_segments(
    log_decay: Float[Array, "B T *heads"], segment_ids: Int[Array, "B T"] | None
) -> Float[Array, "B T *heads"]:
    """The logarithm of a decay, which forgets everything where another segment begins than that of the token before."""
    if segment_ids is None:
        return log_decay
    return jnp.where(run_starts(segment_ids).reshape(*segment_ids.shape, *(1,) * (log_decay.ndim - 2)), -jnp.inf, log_decay)
