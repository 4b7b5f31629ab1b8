"""The selective scan, one step after the other."""

import jax
import jax.numpy as jnp

from subquad.kernels import precision


def start_and_breaks(inputs, diagonal, state, runs):
    """The state before the first step, wide, and where a run of tokens begins after the first [B, T]; None: nowhere."""
    wide = jnp.promote_types(inputs.dtype, jnp.float32)
    state = jnp.zeros((inputs.shape[0], *diagonal.shape), wide) if state is None else state.astype(wide)
    if runs is None:
        return state, None
    runs = jnp.broadcast_to(runs, inputs.shape[:2])
    return state, jnp.pad(runs[:, 1:] != runs[:, :-1], ((0, 0), (1, 0)))


def selective_scan(inputs, step, diagonal, input_matrix, output_matrix, state, runs):
    """See `ssm.selective_scan`."""
    state, breaks = start_and_breaks(inputs, diagonal, state, runs)
    outputs, state = steps(*map(precision.wide, (inputs, step, diagonal, input_matrix, output_matrix)), state, breaks)
    return outputs.astype(inputs.dtype), state


def steps(inputs, step, diagonal, input_matrix, output_matrix, state, breaks):
    """(outputs, the state after the last step) of arrays that are all wide."""

    def advance(state, now):
        u, step, into, out, is_break = now
        decay = jnp.exp(step[..., None] * diagonal)
        decay = decay if is_break is None else jnp.where(is_break[:, None, None], 0, decay)
        state = decay * state + (step * u)[..., None] * into[:, None]
        return state, (state * out[:, None]).sum(-1)

    tokens = jax.tree.map(lambda x: x.swapaxes(0, 1), (inputs, step, input_matrix, output_matrix, breaks))
    state, outputs = jax.lax.scan(advance, state, tokens)
    return outputs.swapaxes(0, 1), state
