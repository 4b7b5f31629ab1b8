"""One linear system of many inputs and outputs, its state matrix diagonal: S5's and the LRU's.

    x_t = a * x_{t-1} + B u_t,    y_t = Re(C x_t)
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Float, Int

from subquad.kernels import dispatch, precision, scan
from subquad.zoo.projection import in_pieces


def complex_of(planes) -> Complex[Array, "*shape"]:
    """Numbers whose real and imaginary parts are stored along the last axis."""
    return jax.lax.complex(*jnp.moveaxis(planes[...].astype(jnp.float32), -1, 0))


@precision.full
def driven(inputs: Float[Array, "*B D"], input_matrix: Complex[Array, "P D"]) -> Complex[Array, "*B P"]:
    """B u."""
    product = lambda matrix: jnp.einsum("...d,pd->...p", inputs.astype(jnp.float32), matrix)
    return jax.lax.complex(product(input_matrix.real), product(input_matrix.imag))


@precision.full
def read(states: Complex[Array, "*B P"], output_matrix: Complex[Array, "D P"]) -> Float[Array, "*B D"]:
    """Re(C x)."""
    product = lambda part, matrix: jnp.einsum("...p,dp->...d", part, matrix)
    return product(states.real, output_matrix.real) - product(states.imag, output_matrix.imag)


def respond(
    inputs: Float[Array, "B T D"], decay: Complex[Array, "P"], input_matrix: Complex[Array, "P D"],
    output_matrix: Complex[Array, "K D P"], segment_ids: Int[Array, "B T"] | None,
    implementation: dispatch.Implementation | None,
) -> Float[Array, "B T D"]:  # fmt: skip
    """y of every token from a state of 0 on; through a second C, where there is one, also of the system run backwards.

    Both directions hold the present token. A state begins at 0 in each run of equal `segment_ids`.
    """
    drive, states = in_pieces(lambda inputs: driven(inputs, input_matrix), inputs), []
    for direction in range(len(output_matrix)):
        decays = decay[None, None]
        if segment_ids is not None:
            steps = ((0, 0), (0, 1)) if direction else ((0, 0), (1, 0))
            goes_on = jnp.pad(segment_ids[:, 1:] == segment_ids[:, :-1], steps)
            decays = jnp.where(goes_on[..., None], decays, 0)
        states.append(scan.first_order(decays, drive, reverse=direction == 1, implementation=implementation)[0])

    def respond(*states):
        return sum(map(read, states, output_matrix)).astype(inputs.dtype)

    return in_pieces(respond, *states)


def respond_after(
    inputs: Float[Array, "B T D"], decay: Complex[Array, "P"], input_matrix: Complex[Array, "P D"],
    output_matrix: Complex[Array, "D P"], state: Float[Array, "B 2*P"], counts: Int[Array, "B"] | None,
    implementation: dispatch.Implementation | None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B 2*P"]]:  # fmt: skip
    """y of T more tokens from `state` on, and the state after the first `counts` of them; None: after all."""
    start = jax.lax.complex(*jnp.split(state, 2, axis=-1))
    states, last = scan.first_order(
        decay[None, None], driven(inputs, input_matrix), start, implementation=implementation
    )
    if counts is not None:
        at = jnp.maximum(counts - 1, 0)[:, None, None]
        last = jnp.where(counts[:, None] > 0, jnp.take_along_axis(states, at, axis=1)[:, 0], start)
    return read(states, output_matrix).astype(inputs.dtype), jnp.concatenate([last.real, last.imag], axis=-1)
