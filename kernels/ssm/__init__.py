"""Linear state space models: their discretisation, their convolution kernels and their recurrences.

    x'(t) = A x(t) + B u(t),    y(t) = C x(t),    one system with one input and one output per feature

The systems are real and their modes come in conjugate pairs, so every function takes one mode of each pair: P complex
numbers stand for a state of 2P, and a sum over all modes is twice the real part of the sum over these. A is diagonal, or
diagonal plus low rank, A = diag(Lambda) - sum_r P_r P_r^*, where P_r holds one entry per mode and its conjugate for the
other of the pair.
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Float, Inexact

from subquad.kernels import checks, dispatch, precision
from subquad.kernels.selective import selective_scan
from subquad.kernels.ssm import reference, xla

__all__ = [
    "Discretization",
    "diagonal_kernel",
    "diagonal_scan",
    "discretize",
    "dplr_kernel",
    "dplr_recurrence",
    "selective_scan",
]

Discretization = Literal["bilinear", "zoh"]
DISCRETIZATIONS = get_args(Discretization)


DIAGONAL_KERNEL = {"xla": xla.diagonal_kernel, "reference": reference.diagonal_kernel}
DPLR_KERNEL = {"xla": xla.dplr_kernel, "reference": reference.dplr_kernel}
DIAGONAL_SCAN = dispatch.implementations("diagonal_scan", xla, reference)
DPLR_RECURRENCE = dispatch.implementations("dplr_recurrence", xla, reference)


@precision.promoting
def discretize(
    diagonal: Complex[Array, "D P"], step: Float[Array, "D"] | Float[Array, "D P"], method: Discretization = "zoh"
) -> tuple[Complex[Array, "D P"], Complex[Array, "D P"]]:
    """Discretises diagonal systems.

        zoh:       A_bar = exp(step A),                        B_bar = A^-1 (A_bar - 1) B
        bilinear:  A_bar = (1 + step A / 2) / (1 - step A / 2),  B_bar = step / (1 - step A / 2) B

    Args:
        diagonal: A, with negative real parts.
        step: the step of each feature [D], or of each of its modes [D, P].
        method: "zoh" or "bilinear".
    Returns: (log A_bar, B_bar / B), each [D, P]. The logarithm, because powers of A_bar are exponentials of its multiples.
    Raises:
        TypeError: arrays of integers.
        ValueError: unknown method; the shapes do not fit.
    Numerics: by expm1 and log1p, so a small step loses no digits.
    Source: Gu et al., On the Parameterization and Initialization of Diagonal State Space Models, NeurIPS 2022,
        arXiv 2206.11893, section 3.
    """
    if method not in DISCRETIZATIONS:
        raise ValueError(
            f"discretize: method must be a known name, got {method!r}. {dispatch.nearest(method, DISCRETIZATIONS)}"
        )
    _check_modes("discretize", diagonal=diagonal)
    checks.floating("discretize", step=step)
    if jnp.shape(step) not in (diagonal.shape[:1], diagonal.shape):
        raise ValueError(
            f"discretize: step must have shape [D] = {diagonal.shape[:1]} or [D, P] = {diagonal.shape}, got {jnp.shape(step)}. "
            "Give every feature its own."
        )
    step = step if step.ndim == 2 else step[:, None]
    scaled = step * diagonal
    if method == "zoh":
        return scaled, jnp.expm1(scaled) / diagonal
    half = scaled / 2
    # log((1 + h) / (1 - h)): the modulus by log1p, because it is close to 1 and its distance from 1 is the decay.
    log_modulus = 0.5 * jnp.log1p(4 * half.real / _square(1 - half))
    phase = jnp.arctan2(2 * half.imag, 1 - _square(half))
    return log_modulus + 1j * phase, step / (1 - half)


def _square(values):
    """|z|^2, differentiable at 0."""
    return values.real**2 + values.imag**2


def diagonal_kernel(
    log_decay: Complex[Array, "D P"],
    coefficients: Complex[Array, "*K D P"],
    length: int,
    *,
    implementation: dispatch.Implementation | None = None,
) -> Float[Array, "*K D L"]:
    """The convolution kernel of diagonal systems, a product with a Vandermonde matrix.

        K_l = 2 Re sum_p coefficients_p exp(l log_decay_p),    0 <= l < L,    coefficients = C B_bar

    Cost: time O(D P L), memory O(D (P sqrt(L) + L)): l = c l1 + l2, so D P (L / c + c) complex exponentials and one real
    matrix product per feature.

    Args:
        log_decay: log A_bar [D, P], real parts negative; -inf forgets everything before.
        coefficients: C times B_bar, [*K, D, P]; leading axes are several outputs of the same states.
        length: L >= 1.
        implementation: "xla" on every device, or "reference", which stores D P L numbers; None: "xla".
    Returns: [*K, D, L] in float32.
    Raises:
        TypeError: arrays of integers.
        ValueError: the shapes do not fit, length is no integer of at least 1.
    Numerics: agrees with float64 to 1e-5 of the largest tap.
    Source: Gu et al., arXiv 2206.11893, section 3.
    """
    _check_length("diagonal_kernel", length)
    _check_modes("diagonal_kernel", log_decay=log_decay)
    _check_outputs("diagonal_kernel", "coefficients", coefficients, log_decay)
    log_decay = _finite(log_decay)
    return dispatch.run("ssm.diagonal_kernel", DIAGONAL_KERNEL, implementation, log_decay, coefficients, int(length))


def dplr_kernel(
    diagonal: Complex[Array, "D P"],
    low_rank: Complex[Array, "R D P"],
    input_matrix: Complex[Array, "D P"],
    output_matrix: Complex[Array, "*K D P"],
    step: Float[Array, "D"],
    length: int,
    *,
    implementation: dispatch.Implementation | None = None,
) -> Float[Array, "*K D L"]:
    """The convolution kernel of diagonal-plus-low-rank systems under the bilinear discretisation.

        K_l = C A_bar^l B_bar,    0 <= l < L                                                             (S4 eq. 5)

    "xla" takes l = c l1 + l2 with c ~ sqrt(L), and multiplies the rows C A_bar^(c l1) by the columns A_bar^l2 B_bar. The
    columns double with every squaring of A_bar, the rows go on by A_bar^c. The paper takes a generating function at L roots
    of unity, by Cauchy sums over the modes, Woodbury's identity and an inverse FFT (appendix C.3): the same taps, from a
    matrix C (I - A_bar^L) that it trains for one length. Here `output_matrix` is C itself, whatever the length, and modes
    that hardly decay, whose poles are close to those roots, keep their digits.

    Cost: time O(D P (L + P sqrt(L) + P^2 log L)), memory O(D (L + P sqrt(L))).

    Args:
        diagonal: Lambda [D, P], real parts negative.
        low_rank: the R columns of the low-rank part [R, D, P].
        input_matrix: B [D, P].
        output_matrix: C [*K, D, P]; leading axes are several outputs of the same states.
        step: [D].
        length: L >= 1, odd or even.
        implementation: "xla" on every device, or "reference", which multiplies by the dense A_bar L times; None: "xla".
    Returns: [*K, D, L] in float32.
    Raises:
        TypeError: arrays of integers.
        ValueError: the shapes do not fit, length is no integer of at least 1.
    Numerics: agrees with float64 to 2e-5 of the largest tap for steps from 1e-4 to 1e-1 and lengths to 4096.
    Source: Gu et al., arXiv 2111.00396, theorem 3 and appendix C.
    """
    _check_length("dplr_kernel", length)
    _check_modes("dplr_kernel", diagonal=diagonal, input_matrix=input_matrix)
    _check_low_rank("dplr_kernel", low_rank, step, diagonal)
    _check_outputs("dplr_kernel", "output_matrix", output_matrix, diagonal)
    system = diagonal, low_rank, input_matrix, output_matrix, step
    return dispatch.run("ssm.dplr_kernel", DPLR_KERNEL, implementation, *system, int(length))


def diagonal_scan(
    inputs: Float[Array, "B T D"],
    log_decay: Inexact[Array, "D P"],
    input_matrix: Inexact[Array, "D P"],
    output_matrix: Inexact[Array, "D P"],
    initial_state: Float[Array, "B D S"] | None = None,
    *,
    is_reversed: bool = False,
    return_state: bool = False,
    implementation: dispatch.Implementation | None = None,
) -> Float[Array, "B T D"] | tuple[Float[Array, "B T D"], Float[Array, "B D S"]]:
    """T >= 1 steps of diagonal systems, in chunks: a convolution whose kernel is never formed.

        x_t = A_bar x_{t-1} + B_bar u_t,    y_t = 2 Re(C x_t),  or C x_t where the modes are real         (S4 eq. 3)

    Complex modes are one of each conjugate pair (S4D, DSS, S5's modes one feature at a time); real modes stand for
    themselves (moving averages, as Mega's). Within a chunk of C tokens the outputs are a Toeplitz matrix times the inputs;
    between chunks only the state goes on.

    Cost: time O(B T D (C + P)), C = 16 to 64; memory O(B T D), and O(B T D P / C) in the backward pass, of which "xla"
        holds some features at a time. An extended token O(B D P).

    Args:
        inputs: u [B, T, D].
        log_decay: log A_bar [D, P], real parts negative; complex or real. -inf forgets everything before.
        input_matrix: B_bar [D, P], complex or real as log_decay is.
        output_matrix: C [D, P], likewise.
        initial_state: x before the first step, float32: real parts then imaginary parts [B, D, 2P], or [B, D, P] where the
            modes are real; None: 0.
        is_reversed: run from the last token to the first; the states are then those after the last and before the first.
        return_state: also return the state after the last step.
        implementation: "triton" keeps the states of up to 64 samples in registers, a feature in each program; "xla" takes
            batched matrix products; "reference" steps token by token.
    Returns: y [B, T, D] in the dtype of `inputs`; with return_state also the state in float32.
    Raises:
        TypeError: real and complex modes together, arrays of integers.
        ValueError: the shapes do not fit.
        NotImplementedError: "triton" and "interpret" take float32, bfloat16 and float16 inputs only.
    Numerics: tables, sums and states in float32; agrees with float64 to 1e-5 of the largest output.
    Example:
        >>> import jax.numpy as jnp
        >>> half, one = jnp.full((1, 1), jnp.log(0.5)), jnp.ones((1, 1))
        >>> diagonal_scan(jnp.array([[[8.0], [0.0], [0.0]]]), half, one, one)[0, :, 0].round(3).tolist()
        [8.0, 4.0, 2.0]

    Source: Gu et al., arXiv 2111.00396, eq. 3; Gu et al., arXiv 2206.11893; the chunks are ours.
    """
    modes = dict(log_decay=log_decay, input_matrix=input_matrix, output_matrix=output_matrix)
    _check_modes("diagonal_scan", **modes)
    _check_one_kind("diagonal_scan", **modes)
    state = _start("diagonal_scan", inputs, initial_state, log_decay)
    log_decay = _finite(log_decay)
    inputs = jnp.flip(inputs, axis=1) if is_reversed else inputs
    outputs, state = dispatch.run(
        "ssm.diagonal_scan", DIAGONAL_SCAN, implementation, inputs, log_decay, input_matrix, output_matrix, state
    )
    outputs = jnp.flip(outputs, axis=1) if is_reversed else outputs
    return (outputs, state) if return_state else outputs


def dplr_recurrence(
    inputs: Float[Array, "B T D"],
    diagonal: Complex[Array, "D P"],
    low_rank: Complex[Array, "R D P"],
    input_matrix: Complex[Array, "D P"],
    output_matrix: Complex[Array, "D P"],
    step: Float[Array, "D"],
    state: Float[Array, "B D 2*P"] | None = None,
    *,
    implementation: dispatch.Implementation | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B D 2*P"]]:
    """T >= 1 steps of diagonal-plus-low-rank systems under the bilinear discretisation.

        x_t = 2 (I - step A / 2)^-1 (x_{t-1} + step B u_t / 2) - x_{t-1},    y_t = C x_t              (S4 eq. 3)

    which is A_bar x_{t-1} + B_bar u_t. The inverse is diagonal plus low rank (S4 appendix C.2), so no P x P matrix is made.

    Cost: time O(B T D P R) in T sequential steps, memory O(B D (T + P)). Reverse-mode differentiation stores the T
    states; differentiate the convolution instead.

    Args:
        inputs: u [B, T, D].
        diagonal, low_rank, input_matrix, step: as in `dplr_kernel`.
        output_matrix: C [D, P].
        state: x before the first step, real parts then imaginary parts [B, D, 2P]; None: 0.
        implementation: "triton" keeps the state in registers; "xla"; "reference" steps with the dense A_bar. The gradient of
            "triton" is that of "xla".
    Returns: (y [B, T, D] in the dtype of `inputs`, the state after the last step in float32).
    Raises:
        TypeError: a system that is not complex, arrays of integers.
        ValueError: the shapes do not fit.
    """
    modes = dict(diagonal=diagonal, input_matrix=input_matrix, output_matrix=output_matrix)
    _check_modes("dplr_recurrence", **modes)
    _check_low_rank("dplr_recurrence", low_rank, step, diagonal)
    for name, array in dict(modes, low_rank=low_rank).items():
        if not jnp.iscomplexobj(array):
            raise TypeError(f"dplr_recurrence: {name} must be complex, got {array.dtype}. Give one mode of each pair.")
    state = _start("dplr_recurrence", inputs, state, diagonal)
    system = diagonal, low_rank, input_matrix, output_matrix, step
    return dispatch.run("ssm.dplr_recurrence", DPLR_RECURRENCE, implementation, inputs, *system, state)


def _finite(log_decay):
    """-inf as a number whose exponential is 0, too: its multiple of no steps is 0, and no NaN."""
    bounded = jnp.maximum(log_decay.real, -1e4)
    return jax.lax.complex(bounded, log_decay.imag) if jnp.iscomplexobj(log_decay) else bounded


def _check_length(owner, length):
    checks.at_least(owner, "length", length, 1, "Ask for the taps that the sequence needs.")


def _check_modes(owner, **arrays):
    """Every array is [D, P] as the first."""
    checks.inexact(owner, **arrays)
    sizes = {}
    for name, array in arrays.items():
        checks.shape(owner, name, array, "D P", "Give one number per feature and conjugate pair of modes.", **sizes)
        sizes = dict(zip("DP", array.shape, strict=True))



def _check_outputs(owner, name, array, modes):
    """Some outputs of the same states, [*K, D, P]."""
    checks.inexact(owner, **{name: array})
    if array.shape[-2:] != modes.shape:
        raise ValueError(
            f"{owner}: {name} must end in the axes [D, P] = {modes.shape}, got {array.shape}. "
            "Give one number per feature and conjugate pair of modes."
        )


def _check_low_rank(owner, low_rank, step, modes):
    checks.inexact(owner, low_rank=low_rank)
    checks.floating(owner, step=step)
    features, pairs = modes.shape
    checks.shape(owner, "low_rank", low_rank, "R D P", "Of rank one it is low_rank[None].", D=features, P=pairs)
    checks.shape(owner, "step", step, "D", "Give every feature its own.", D=features)


def _check_one_kind(owner, **modes):
    """All are complex, or all are real."""
    first, *_ = modes.values()
    for name, array in modes.items():
        if jnp.iscomplexobj(array) != jnp.iscomplexobj(first):
            raise TypeError(
                f"{owner}: {name} must be {'complex' if jnp.iscomplexobj(first) else 'real'} as the decays are, "
                f"got {array.dtype}. Take its .real, or use .astype(jnp.complex64)."
            )


def _start(owner, inputs, state, modes):
    """The state before the first step, after the checks that both recurrences share."""
    checks.floating(owner, inputs=inputs, state=state)
    features, pairs = modes.shape
    checks.shape(owner, "inputs", inputs, "B T D", "Give inputs one feature per system.", D=features)
    batch, size = len(inputs), 2 * pairs if jnp.iscomplexobj(modes) else pairs
    checks.shape(owner, "state", state, "B D S", "Start from None.", B=batch, D=features, S=size)
    precise = jnp.promote_types(modes.real.dtype, jnp.float32)
    if state is None:
        return jnp.zeros((batch, features, size), precise)
    return state.astype(jnp.promote_types(state.dtype, precise))
