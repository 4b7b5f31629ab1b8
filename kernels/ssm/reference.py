"""State space models by their definitions: every mode, every power, every matrix."""

import jax
import jax.numpy as jnp


def diagonal_kernel(log_decay, coefficients, length):
    powers = jnp.exp(log_decay[..., None] * jnp.arange(length))
    return 2 * jnp.einsum("...dp,dpl->...dl", coefficients, powers, precision="highest").real


def both(modes):
    """All modes: those given and their conjugates."""
    return jnp.concatenate([modes, modes.conj()], axis=-1)


def discretize_dplr(diagonal, low_rank, input_matrix, step):
    """Dense A_bar [D, 2P, 2P] and B_bar [D, 2P] of the bilinear discretisation (S4 eq. 3)."""
    diagonal, low_rank, input_matrix = both(diagonal), both(low_rank), both(input_matrix)
    matrix = jax.vmap(jnp.diag)(diagonal) - jnp.einsum("rdp,rdq->dpq", low_rank, low_rank.conj(), precision="highest")
    half = step[:, None, None] / 2 * matrix
    identity = jnp.eye(diagonal.shape[-1], dtype=half.dtype)
    decay = jnp.linalg.solve(identity - half, identity + half)
    return decay, jnp.linalg.solve(identity - half, (step[:, None] * input_matrix)[..., None])[..., 0]


def dplr_kernel(diagonal, low_rank, input_matrix, output_matrix, step, length):
    decay, start = discretize_dplr(diagonal, low_rank, input_matrix, step)

    def advance(state, _):
        return jnp.einsum("dpq,dq->dp", decay, state, precision="highest"), state

    _, states = jax.lax.scan(advance, start, length=length)
    return jnp.einsum("...dp,ldp->...dl", both(output_matrix), states, precision="highest").real


def _recur(inputs, decay, input_matrix, output_matrix, state):
    pairs = state.shape[-1] // 2

    def advance(state, token):
        state = jnp.einsum("dpq,bdq->bdp", decay, state, precision="highest") + input_matrix * token[..., None]
        return state, jnp.einsum("dp,bdp->bd", output_matrix, state, precision="highest").real

    state = both(state[..., :pairs] + 1j * state[..., pairs:])
    state, outputs = jax.lax.scan(advance, state, inputs.swapaxes(0, 1).astype(state.real.dtype))
    state = state[..., :pairs]
    return outputs.swapaxes(0, 1).astype(inputs.dtype), jnp.concatenate([state.real, state.imag], axis=-1)


def diagonal_scan(inputs, log_decay, input_matrix, output_matrix, state):
    is_complex = jnp.iscomplexobj(log_decay)
    decay, pairs = jnp.exp(log_decay), log_decay.shape[-1]

    def advance(state, token):
        state = decay * state + input_matrix * token[..., None]
        response = jnp.sum(output_matrix * state, axis=-1)
        return state, 2 * response.real if is_complex else response

    state = state[..., :pairs] + 1j * state[..., pairs:] if is_complex else state
    state, outputs = jax.lax.scan(advance, state, inputs.swapaxes(0, 1).astype(state.real.dtype))
    state = jnp.concatenate([state.real, state.imag], axis=-1) if is_complex else state
    return outputs.swapaxes(0, 1).astype(inputs.dtype), state


def dplr_recurrence(inputs, diagonal, low_rank, input_matrix, output_matrix, step, state):
    decay, input_matrix = discretize_dplr(diagonal, low_rank, input_matrix, step)
    return _recur(inputs, decay, input_matrix, both(output_matrix), state)
