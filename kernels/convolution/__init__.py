"""Long convolution: every feature has a filter of its own, as long as the sequence."""

from jaxtyping import Array, Float, Int

from subquad.kernels import checks, dispatch
from subquad.kernels.convolution import reference, xla
from subquad.kernels.depthwise import depthwise

__all__ = ["convolve", "depthwise"]

IMPLEMENTATIONS = {"xla": xla.convolve, "reference": reference.convolve}


def convolve(
    inputs: Float[Array, "B T D"],
    kernel: Float[Array, "D L"],
    anticausal: Float[Array, "D L2"] | None = None,
    segment_ids: Int[Array, "#B T"] | None = None,
    *,
    implementation: dispatch.Implementation | None = None,
) -> Float[Array, "B T D"]:
    """Convolves each feature along the sequence, to the past and, if asked, to the future.

        y_t = sum_{j >= 0} kernel_j u_{t-j}  +  sum_{j >= 0} anticausal_j u_{t+1+j}

    Tokens before the first and after the last count as 0. The present token belongs to `kernel` alone: the first tap of
    `anticausal` weighs the next token. With `segment_ids` both sums end where the run of equal ids around t ends.

    Cost: time O(B D n log n), memory O(n D), for n >= T + L - 1; with segments O(B D T log^2 T); the reference O(T^2) each.

    Args:
        inputs: u, [B, T, D].
        kernel: causal taps [D, L]; L may differ from T. Taps past T - 1 touch nothing.
        anticausal: taps towards the future [D, L2]; None: a causal convolution.
        segment_ids: int [B, T] or [1, T], for sequences packed one after the other: tokens of different runs of equal ids do
            not see each other. "xla" halves the sequence again and again: what goes from the left half of a block to the
            right one belongs to the run across the middle, so it is one convolution between two masks. None: all one run.
        implementation: "xla" by FFT, on every device; "reference" by the direct sum; None: "xla".
    Returns: y [B, T, D] in the dtype of `inputs`.
    Raises:
        TypeError: arrays of integers or complex numbers; segment_ids that are not integers.
        ValueError: the shapes do not fit; an axis of 0.
        NotImplementedError: an implementation that this operation does not have.
    Numerics: float32 inside. The FFT mixes the rounding of all positions: a feature's outputs are right to a few float32
        ulps of its largest input times the sum of its taps, so a large future token stirs that rounding in the past, and
        nothing more. The reference does not mix, nor does "xla" mix segments.
    Example:
        >>> import jax.numpy as jnp
        >>> convolve(jnp.ones((1, 3, 1)), jnp.ones((1, 2)))[0, :, 0].round(3).tolist()
        [1.0, 2.0, 2.0]

    Source: Gu et al., Efficiently Modeling Long Sequences with Structured State Spaces, ICLR 2022, arXiv 2111.00396,
        eqs. 4-5.
    """
    checks.floating("convolve", inputs=inputs, kernel=kernel, anticausal=anticausal)
    checks.shape("convolve", "inputs", inputs, "B T D", "Flatten the batch.")
    for name, taps in (("kernel", kernel), ("anticausal", anticausal)):
        checks.shape("convolve", name, taps, "D L", "Give each feature of the inputs one row of taps.", D=inputs.shape[2])
    runs = checks.runs("convolve", segment_ids, *inputs.shape[:2])
    dtype = inputs.dtype  # also where a wide kernel, made of positions, is met in 64 bits
    return dispatch.run("convolution.convolve", IMPLEMENTATIONS, implementation, inputs, kernel, anticausal, runs).astype(dtype)
