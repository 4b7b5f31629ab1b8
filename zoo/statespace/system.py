"""Trainable linear systems, one per feature: the parameters of state space layers, and their two ways to run."""

import functools
import math
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from flax import nnx
from jaxtyping import Array, Float, Int

from subquad.kernels import convolution, dispatch, ssm
from subquad.zoo.cache import pieces
from subquad.zoo.checks import check_divides, check_steps, check_word, refuse
from subquad.zoo.statespace import hippo

Mode = Literal["dplr", "diagonal"]
MODES = get_args(Mode)


def check_system(owner: str, features: int, state_size: int, mode, init, discretization, num_ssm: int, dt_min, dt_max):
    """Refuses the options of a `StateSpace` that do not go together, in the name of the layer that was given them."""
    if state_size % 2:
        refuse(owner, "state_size", state_size, "be even", "Modes come in conjugate pairs.")
    check_divides(owner, f"in_features = {features}", features, num_ssm=num_ssm)
    words = (("mode", mode, MODES), ("init", init, hippo.INITS), ("discretization", discretization, ssm.DISCRETIZATIONS))
    for name, word, known in words:
        check_word(owner, name, word, known)
    if mode == "dplr" and init != "legs":
        refuse(owner, "init", repr(init), "be 'legs' when mode is 'dplr'", "Use mode='diagonal'.")
    if mode == "dplr" and discretization != "bilinear":
        refuse(owner, "discretization", repr(discretization), "be 'bilinear' when mode is 'dplr'", "Use mode='diagonal'.")
    check_steps(owner, dt_min, dt_max)


class StateSpace(nnx.Module):
    """The systems x' = A x + B u, y = C x of D features, discretised: x_t = A_bar x_{t-1} + B_bar u_t, y_t = C x_t.

    A = diag(-exp(log_decay) + i frequency) - low_rank low_rank^*, so it is stable whatever is learned. Complex numbers are
    stored as real and imaginary parts, and one mode of each conjugate pair stands for both.

    Args:
        features: D.
        num_outputs: how many C, and so kernels, a system has.
        state_size, mode, init, discretization, num_ssm, dt_min, dt_max: see `S4`.
        rngs: `rngs.params()` draws C and the steps.
    """

    def __init__(
        self,
        features: int,
        *,
        num_outputs: int,
        state_size: int,
        mode: Mode,
        init: hippo.Init,
        discretization: ssm.Discretization,
        num_ssm: int,
        dt_min: float,
        dt_max: float,
        param_dtype: Any = jnp.float32,
        implementation: dispatch.Implementation | None = None,
        rngs: nnx.Rngs,
    ):
        self.features, self.mode, self.discretization = features, mode, discretization
        self.implementation = implementation
        modes = hippo.legs_modes(state_size) if mode == "dplr" else hippo.diagonal_modes(init, state_size)

        def shared(values):  # a row for each of num_ssm
            return nnx.Param(jnp.asarray(np.stack([values] * num_ssm), param_dtype))

        def planes(values):
            return shared(np.stack([values.real, values.imag], axis=-1))

        self.log_decay = shared(np.log(-modes.diagonal.real))  # [num_ssm, P/2]
        self.frequency = shared(modes.diagonal.imag)
        self.input_matrix = planes(modes.input_matrix)  # [num_ssm, P/2, 2]
        self.low_rank = planes(modes.low_rank) if mode == "dplr" else None
        # Complex normal numbers of variance 1.
        output_matrix = jax.random.normal(rngs.params(), (num_outputs, features, state_size // 2, 2), jnp.float32) / np.sqrt(2)
        self.output_matrix = nnx.Param(output_matrix.astype(param_dtype))
        log_step = jax.random.uniform(rngs.params(), (features,), jnp.float32, np.log(dt_min), np.log(dt_max))
        self.log_step = nnx.Param(log_step.astype(param_dtype))

    def _system(self):
        """Lambda, P (or None), B [D, P/2], C [num_outputs, D, P/2] and the steps [D], in float32 and complex64."""

        def read(param):
            return param[...].astype(jnp.float32)

        def modes(real, imag):
            values = jax.lax.complex(real, imag)
            return repeat(values, "... s p -> ... (v s) p", v=self.features // values.shape[-2])

        diagonal = modes(-jnp.exp(read(self.log_decay)), read(self.frequency))
        low_rank, input_matrix, output_matrix = (
            None if param is None else modes(*jnp.moveaxis(read(param), -1, 0))
            for param in (self.low_rank, self.input_matrix, self.output_matrix)
        )
        return diagonal, low_rank, input_matrix, output_matrix, jnp.exp(read(self.log_step))

    def kernel(self, length: int) -> Float[Array, "K D L"]:
        """C A_bar^l B_bar for 0 <= l < length, of every C: the response to an impulse."""
        diagonal, low_rank, input_matrix, output_matrix, step = self._system()
        if self.mode == "dplr":
            system = diagonal, low_rank[None], input_matrix, output_matrix, step
            return ssm.dplr_kernel(*system, length, implementation=self.implementation)
        log_decay, scale = ssm.discretize(diagonal, step, self.discretization)
        coefficients = output_matrix * input_matrix * scale
        return ssm.diagonal_kernel(log_decay, coefficients, length, implementation=self.implementation)

    def respond(
        self, inputs: Float[Array, "B T D"], segment_ids: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T D"]:
        """C x of every token: through the first C from the past, through the second from the tokens after the present one.

        Diagonal systems run in chunks and make no kernel of length T; others convolve, and so does what has segments: by XLA.
        """
        if self.mode == "dplr" or segment_ids is not None:
            past, *ahead = self.kernel(inputs.shape[1])
            return convolution.convolve(
                inputs, past, ahead[0] if ahead else None, segment_ids, implementation=self.implementation
            )
        return in_directions(functools.partial(self._scan, inputs), len(self.output_matrix[...]))

    def recur(self, inputs: Float[Array, "B T D"], state: Float[Array, "B D P"], counts: Int[Array, "B"] | None = None):
        """T more inputs from `state` on, through the first C -> (responses [B, T, D], state).

        `counts` is how many of them each sample has, the first ones: the state is that after these, and the responses to
        the others mean nothing. It costs sqrt(T) steps more. None: all.
        """
        return recur(self._advance, inputs, state, counts)

    def _advance(self, inputs, state):
        if self.mode == "diagonal":
            return self._scan(inputs, 0, initial_state=state, return_state=True)
        diagonal, low_rank, input_matrix, output_matrix, step = self._system()
        system = diagonal, low_rank[None], input_matrix, output_matrix[0], step
        return ssm.dplr_recurrence(inputs, *system, state, implementation=self.implementation)

    def _scan(self, inputs, which, **options):
        """The diagonal scan through one C."""
        diagonal, _, input_matrix, output_matrix, step = self._system()
        log_decay, scale = ssm.discretize(diagonal, step, self.discretization)
        system = log_decay, input_matrix * scale, output_matrix[which]
        return ssm.diagonal_scan(inputs, *system, implementation=self.implementation, **options)


def in_directions(scan, count: int) -> Float[Array, "B T D"]:
    """scan(0) of the past; where there is a second direction, also scan(1, is_reversed=True) of what is after the present."""
    responses = scan(0)
    return responses if count == 1 else responses + jnp.pad(scan(1, is_reversed=True)[:, 1:], ((0, 0), (0, 1), (0, 0)))


def recur(advance, inputs: Float[Array, "B T D"], state: Float[Array, "B D P"], counts: Int[Array, "B"] | None):
    """`advance(inputs, state)` -> (responses, state) of samples that have so many of the inputs: see `StateSpace.recur`."""
    if counts is None:
        return advance(inputs, state)

    def walk(parts, state, taken):  # of parts [n, B, c, D], the first `taken` [B] of which move the state that is kept

        def step(states, work):
            running, kept = states
            part, i = work
            responses, running = advance(part, running)
            return (running, jnp.where((i < taken)[:, None, None], running, kept)), responses

        (_, kept), responses = jax.lax.scan(step, (state, state), (parts, jnp.arange(len(parts))))
        return rearrange(responses, "n b c d -> b (n c) d"), kept

    # A sample's last state is after whole parts of c tokens, and then after some tokens of the next part.
    length = inputs.shape[1]
    size = math.isqrt(length)
    padded = jnp.pad(inputs, ((0, 0), (0, -length % size), (0, 0)))
    responses, state = walk(rearrange(padded, "b (n c) d -> n b c d", c=size), state, counts // size)
    if size > 1:
        rest = pieces(padded, counts // size * size, size)
        _, state = walk(rearrange(rest, "b n d -> n b 1 d"), state, counts % size)
    return responses[:, :length], state
