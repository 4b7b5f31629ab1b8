"""Decays of Mamba-2's kind, of each head or of each channel of its keys."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from subquad.kernels import precision
from subquad.zoo.gated.decay import step_bias
from subquad.zoo.projection import in_pieces

STEPS = 1e-3, 0.1  # between which softplus(d) starts, evenly in its logarithm


class Decay(nnx.Module):
    """log a_t = -exp(A) softplus(l_t + d) of logits l: A is a number for each head, d one for each logit.

    Args:
        shape: of a token's logits, (N,) or (N, M).
        rates: between which exp(A) starts, evenly.
        param_dtype: of A and d.
    """

    def __init__(
        self, shape: tuple[int, ...], *, rates: tuple[float, float], param_dtype: Any = jnp.float32, rngs: nnx.Rngs
    ):
        rate = jax.random.uniform(rngs.params(), shape[:1], jnp.float32, *rates)
        self.log_rate = nnx.Param(jnp.log(rate).astype(param_dtype))
        self.step_bias = nnx.Param(step_bias(rngs, shape, *STEPS).astype(param_dtype))

    def __call__(self, logits: Float[Array, "B T *shape"]) -> Float[Array, "B T *shape"]:
        """log a, wide."""
        return in_pieces(self.of_tokens, logits)

    @precision.promoting
    def of_tokens(self, logits: Float[Array, "T *shape"]) -> Float[Array, "T *shape"]:
        rate = jnp.exp(precision.wide(self.log_rate[...])).reshape(-1, *(1,) * (logits.ndim - 2))
        return -rate * nnx.softplus(precision.wide(logits) + self.step_bias[...])
