"""The arguments of a fused kernel, and how its forward and its backward pass become one function."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from subquad.kernels import launch, precision

Features = Literal["given", "softmax", "relu"]


class Arrays(NamedTuple):
    """The operands of a call. With a projection, query and key are what the features are made of: H for M."""

    query: Float[Array, "B T N M"]
    key: Float[Array, "B S N M"]
    value: Float[Array, "B S N V"]
    scale: Float[Array, "B S N"] | None
    mask: Bool[Array, "_ S"] | None
    projection: Float[Array, "1 M H"] | None
    numerator: Float[Array, "B N M V"] | None  # the initial state
    denominator: Float[Array, "B N M"] | None
    largest: Float[Array, "B N"] | None


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything about a call that is not an array."""

    features: Features
    is_causal: bool
    eps: float
    mode: launch.Mode


def bind(query, key, value, scale, mask, projection, initial_state) -> Arrays:
    """The operands, from arguments that an operation has checked."""
    state = (None,) * 3 if initial_state is None else (x.astype(jnp.float32) for x in initial_state)
    return Arrays(
        query, key, value, scale, None if mask is None else mask[:, 0, 0], None if projection is None else projection[None],
        *state,
    )  # fmt: skip


def differentiable(forward: Callable, backward: Callable) -> Callable:
    """(plan, arrays) -> (outputs, state), with its own derivative.

    Args:
        forward: (plan, arrays) -> (outputs, state, residuals).
        backward: (plan, arrays, outputs, residuals, gradients of outputs and state) -> the gradients as `Arrays`; that of
            the mask is None.
    """

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def run(plan, arrays):
        return forward(plan, arrays)[:2]

    def run_forward(plan, arrays):
        outputs, state, residuals = forward(plan, arrays)
        return (outputs, state), (arrays, outputs, residuals)

    def run_backward(plan, saved, gradients):
        arrays, outputs, residuals = saved
        if arrays.mask is not None:
            # Queries may be padding, which holds anything: one whose output nobody used counts as 0.
            idle = (gradients[0] == 0).all(-1, keepdims=True)
            arrays, outputs = arrays._replace(query=jnp.where(idle, 0, arrays.query)), jnp.where(idle, 0, outputs)
        return (backward(plan, arrays, outputs, residuals, gradients),)

    precision.define_passes(run, run_forward, run_backward)
    return run
