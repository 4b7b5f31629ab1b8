"""First-order linear recurrences, real and complex, one per sample and feature."""

import jax.numpy as jnp
from jaxtyping import Array, Inexact

from subquad.kernels import checks, dispatch, precision
from subquad.kernels.scan import reference, xla

__all__ = ["first_order"]

OWNER = "scan.first_order"
IMPLEMENTATIONS = dispatch.implementations("first_order", xla, reference)


def first_order(
    decay: Inexact[Array, "_ _ D"],
    inputs: Inexact[Array, "B T D"],
    initial_state: Inexact[Array, "B D"] | None = None,
    *,
    reverse: bool = False,
    implementation: dispatch.Implementation | None = None,
) -> tuple[Inexact[Array, "B T D"], Inexact[Array, "B D"]]:
    """Runs a first-order linear recurrence along the sequence.

        h_t = a_t h_{t-1} + b_t,    t = 0 .. T - 1,          h_{-1} = initial_state
        h_t = a_t h_{t+1} + b_t,    t = T - 1 .. 0,          h_T = initial_state           (reverse)

    Cost: time O(B T D), memory O(B T D) for the states themselves and O(B D) beside them; the backward pass is the same
        recurrence in the other direction. One extended token O(B D): call it with T = 1 and the last state.

    Args:
        decay: a, real or complex. Its first two axes are those of `inputs` or 1: [B, T, D], or constant in time
            [1, 1, D] and [B, 1, D], or shared by the batch [1, T, D].
        inputs: b [B, T, D], real or complex.
        initial_state: the state before the first step [B, D]; None: 0.
        reverse: run from the last token to the first.
        implementation: None takes the best that can run here.
    Returns: (h [B, T, D] in the dtype of `inputs`, the state after the last step [B, D] in float32). If any argument is
        complex, both are complex64.
    Raises:
        ValueError: shapes that do not fit.
        TypeError: integers.
        NotImplementedError: an implementation that does not exist here or declines the call.
    Numerics: the state is float32 (complex: two float32 planes) whatever the inputs are; the gradient of `decay` uses the
        states and their gradients as returned, rounded to the dtype of `inputs`. |a| > 1 is allowed and grows as it must.
    Example:
        >>> decay, inputs = jnp.full((1, 1, 1), 0.5), jnp.ones((1, 4, 1))
        >>> states, last = first_order(decay, inputs)
        >>> states[0, :, 0].tolist(), last.tolist()
        ([1.0, 1.5, 1.75, 1.875], [[1.875]])

    Source: Blelloch, Prefix Sums and Their Applications, 1990, section 1.4; Smith et al., Simplified State Space Layers for
        Sequence Modeling, ICLR 2023, arXiv 2208.04933, section 2.2 and appendix H (constant and varying decay).
    """
    checks.shape(OWNER, "inputs", inputs, "B T D", "Flatten the batch axes.")
    batch, length, features = inputs.shape
    checks.shape(
        OWNER, "decay", decay, "B T D", "Give a decay that is constant in time one step.",
        B=(batch, 1), T=(length, 1), D=features,
    )  # fmt: skip
    instead = "Pass the final state of the call before, or None."
    checks.shape(OWNER, "initial_state", initial_state, "B D", instead, B=batch, D=features)
    checks.inexact(OWNER, decay=decay, inputs=inputs, initial_state=initial_state)
    if initial_state is None:
        initial_state = jnp.zeros((batch, features), jnp.float32)
    decay, inputs, initial_state = precision.matched((decay, inputs, initial_state))
    dtypes = [array.dtype for array in (decay, inputs, initial_state)]
    is_wide = inputs.real.dtype == jnp.float64
    state_dtype = jnp.float64 if is_wide else jnp.float32
    if any(jnp.issubdtype(dtype, jnp.complexfloating) for dtype in dtypes):
        state_dtype = jnp.complex128 if is_wide else jnp.complex64
        decay, inputs = decay.astype(state_dtype), inputs.astype(state_dtype)
    initial_state = initial_state.astype(state_dtype)
    return dispatch.run(OWNER, IMPLEMENTATIONS, implementation, decay, inputs, initial_state, reverse)
