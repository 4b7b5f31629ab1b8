"""Dropout, of features and of weights: when it acts, and what it leaves."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from subquad.zoo.checks import check_stream, refuse
from subquad.zoo.linen import call_rngs


class Dropout(nnx.Dropout):
    """Flax's dropout of features, off to begin with.

    Args:
        owner: the class whose it is, for the error where a call draws without `rngs`.
        rate: probability of dropping a number.
        broadcast_dims: axes along which all are dropped together.
    """

    def __init__(self, owner: str, rate: float, *, broadcast_dims: tuple[int, ...] = ()):
        super().__init__(rate, broadcast_dims=broadcast_dims, deterministic=True)
        self.owner = owner

    def __call__(self, inputs, *, deterministic: bool | None = None, rngs: Any = None):
        if self.rate and not (self.deterministic if deterministic is None else deterministic):
            check_draws(self.owner, rngs)
        return super().__call__(inputs, deterministic=deterministic, rngs=rngs)


def draws(layer, deterministic: bool | None, rngs: nnx.Rngs | None) -> dict[str, Any]:
    """The key of a call's dropout as `dropout_rng`, or nothing where there is none.

    Args:
        layer: has `dropout_rate`, and `deterministic`, which `train()` and `eval()` set.
        deterministic, rngs: of the call.
    """
    if not layer.dropout_rate or (layer.deterministic if deterministic is None else deterministic):
        return {}
    return {"dropout_rng": key_of_call(type(layer).__name__, rngs)}


def key_of_call(owner: str, rngs: nnx.Rngs | None) -> Array:
    """A key for what a call draws, from its `rngs` or those of the Linen module around it; refuses a call without either."""
    return check_draws(owner, call_rngs(rngs, owner)).dropout()


def check_draws(owner: str, rngs: nnx.Rngs | None) -> nnx.Rngs:
    """Refuses a call that draws without `rngs`, or without their stream "dropout"."""
    if rngs is None:
        refuse(owner, "rngs", None, "be given where it draws", "Pass rngs=nnx.Rngs(dropout=seed), or deterministic=True.")
    check_stream(owner, rngs, "dropout")
    return rngs


def set_view(layer, deterministic: bool | None = None) -> None:
    """For `nnx.view`.

    Args:
        deterministic: if True, no dropout and no other draws in a call, where a layer has any; None: as it was.
    """
    if deterministic is not None and hasattr(layer, "deterministic"):
        layer.deterministic = deterministic


def drop(key, rate: float, weights: Float[Array, "*shape"], shape: tuple[int, ...] | None = None) -> Float[Array, "*shape"]:
    """Weights of which each is 0 with probability `rate`, and the others are so much larger; the same draws as Flax's.

    Args:
        key: of jax.random.
        shape: of the draws, where an axis of 1 drops all along it together; None: each weight has its own.
    """
    keep = jax.random.bernoulli(key, 1 - rate, weights.shape if shape is None else shape)
    return jnp.where(keep, weights / (1 - rate) if rate < 1 else 0.0, 0.0)
