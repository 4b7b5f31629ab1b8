"""Selective scans: diagonal recurrences whose steps, and whose input and output matrices, every token chooses."""

from jaxtyping import Array, Float, Int

from subquad.kernels import checks, dispatch
from subquad.kernels.selective import reference, xla

__all__ = ["selective_scan"]

OWNER = "ssm.selective_scan"
IMPLEMENTATIONS = dispatch.implementations("selective_scan", xla, reference)


def selective_scan(
    inputs: Float[Array, "B T D"],
    step: Float[Array, "B T D"],
    diagonal: Float[Array, "D N"],
    input_matrix: Float[Array, "B T N"],
    output_matrix: Float[Array, "B T N"],
    initial_state: Float[Array, "B D N"] | None = None,
    *,
    segment_ids: Int[Array, "#B T"] | None = None,
    return_state: bool = False,
    implementation: dispatch.Implementation | None = None,
) -> Float[Array, "B T D"] | tuple[Float[Array, "B T D"], Float[Array, "B D N"]]:
    """T >= 1 steps of N states of each feature, whose systems every token makes.

        h_t = exp(step_t A) * h_{t-1} + step_t u_t B_t,    y_t = sum_n C_tn h_tn                       (Mamba, algorithm 2)

    A step of 0 leaves the state as it is: so padding passes. The N states of all T tokens are never in memory: the backward
    pass makes those of a chunk again from the state before it.

    Cost: time O(B T D N), T steps deep, or T / C log C in chunks of C <= 256 tokens on an accelerator; memory
        O(B T (D + N) + B D N (C + T / C)), the backward pass included. Triton's kernels keep a chunk's states in registers, and
        for the backward pass three for every 8 tokens in memory: 768 MiB, or O(B D N sqrt(T)) where that is more. One extended
        token O(B D N).

    Args:
        inputs: u [B, T, D].
        step: how long each token's step is [B, T, D], at least 0.
        diagonal: A [D, N], negative.
        input_matrix, output_matrix: B and C of every token [B, T, N], shared by its features.
        initial_state: h before the first step, float32; None: 0.
        segment_ids: int [B, T] or [1, T], for sequences packed one after the other: the state begins at 0 where they change.
            The first token goes on from `initial_state`. None: all one run.
        return_state: also return the state after the last step.
        implementation: None takes the best that can run here.
    Returns: y [B, T, D] in the dtype of `inputs`; with return_state also the state [B, D, N] in float32.
    Raises:
        TypeError: arrays of integers or complex numbers; segment_ids that are not integers.
        ValueError: the shapes do not fit.
        NotImplementedError: an implementation that does not exist here or declines the call: Triton's kernels hold at most 256
            states of a feature.
    Numerics: decays, states and sums in float32; agrees with the reference to 1e-5.
    Example:
        >>> import jax.numpy as jnp
        >>> one, half = jnp.ones((1, 3, 1)), jnp.log(jnp.full((1, 1), 0.5))
        >>> selective_scan(jnp.array([[[8.0], [0.0], [0.0]]]), one, half, one, one)[0, :, 0].round(3).tolist()
        [8.0, 4.0, 2.0]

    Source: Gu and Dao, Mamba: Linear-Time Sequence Modeling with Selective State Spaces, 2023, arXiv 2312.00752, section 3.
    """
    floating = dict(step=step, diagonal=diagonal, input_matrix=input_matrix, output_matrix=output_matrix)
    checks.floating(OWNER, inputs=inputs, **floating, initial_state=initial_state)
    checks.shape(OWNER, "inputs", inputs, "B T D", "Flatten the batch.")
    batch, length, features = inputs.shape
    checks.shape(OWNER, "step", step, "B T D", "Give every feature of every token its own.", B=batch, T=length, D=features)
    checks.shape(OWNER, "diagonal", diagonal, "D N", "Give every feature its states.", D=features)
    sizes = dict(B=batch, T=length, N=diagonal.shape[1])
    for name in ("input_matrix", "output_matrix"):
        checks.shape(OWNER, name, floating[name], "B T N", "Give one number for each token and state.", **sizes)
    instead = "Pass the final state of the call before, or None."
    checks.shape(OWNER, "initial_state", initial_state, "B D N", instead, B=batch, D=features, N=sizes["N"])
    runs = checks.runs(OWNER, segment_ids, batch, length)
    outputs, state = dispatch.run(OWNER, IMPLEMENTATIONS, implementation, inputs, *floating.values(), initial_state, runs)
    return (outputs, state) if return_state else outputs
