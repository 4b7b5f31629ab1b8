"""The online softmax: one tile of logits after another, with the running maximum and sum of each row.

Shared by every operation that visits attention tile by tile. Logits are float32 with -inf where a key is not seen; any
batch axes `...` come first.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class State(NamedTuple):
    """What a row remembers of the tiles so far."""

    maximum: Float[Array, "... T"]
    normaliser: Float[Array, "... T"]  # sum of exp(logit - maximum)
    accumulator: Float[Array, "... T V"]  # sum of exp(logit - maximum) value


def start(rows: tuple[int, ...], features: int, dtype=jnp.float32) -> State:
    """The state of rows that have seen nothing."""
    return State(jnp.full(rows, -jnp.inf, dtype), jnp.zeros(rows, dtype), jnp.zeros((*rows, features), dtype))


def update(state: State, logits: Float[Array, "... T S"], weigh) -> State:
    """The state after one more tile; `weigh` maps weights [..., T, S] to their sum of values [..., T, V]."""
    maximum = jnp.maximum(state.maximum, logits.max(-1))
    # A row that has seen nothing has maximum -inf, and -inf - -inf is not 0.
    shift = jnp.where(jnp.isneginf(maximum), 0.0, maximum)
    weights = jnp.exp(logits - shift[..., None])
    decay = jnp.exp(state.maximum - shift)
    normaliser = state.normaliser * decay + weights.sum(-1)
    return State(maximum, normaliser, state.accumulator * decay[..., None] + weigh(weights))


def finish(state: State) -> tuple[Float[Array, "... T V"], Float[Array, "... T"]]:
    """Outputs and log-sum-exp; 0 and -inf for rows that have seen nothing."""
    empty = state.normaliser == 0
    normaliser = jnp.where(empty, 1.0, state.normaliser)
    lse = jnp.where(empty, -jnp.inf, state.maximum + jnp.log(normaliser))
    return state.accumulator / normaliser[..., None], lse


def residue(out, lse, grad_out, grad_lse):
    """What the backward pass needs of each row, in float32: (log-sum-exp, shift of the logits' gradient).

    With weights p = exp(logits - lse) the gradient of the logits is p * (grad_out . value - shift), where
    shift = grad_out . out - grad_lse. An empty row gets lse = +inf, so that its weights are 0 and never NaN.
    """
    empty = jnp.isneginf(lse)
    # A product is much faster on a CPU than a sum over the last axis.
    options = dict(preferred_element_type=lse.dtype, precision=jax.lax.Precision.HIGHEST)
    shift = jnp.einsum("...v,...v->...", grad_out, out, **options) - grad_lse
    return jnp.where(empty, jnp.inf, lse), jnp.where(empty, 0.0, shift)
