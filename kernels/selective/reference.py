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
    breaks = jnp.zeros(inputs.shape[:2], bool) if breaks is None else breaks

    def advance(state, now):
        u, step, into, out, is_break = now
        decay = jnp.where(is_break[:, None, None], 0, jnp.exp(step[..., None] * precision.wide(diagonal)))
        state = decay * state + (step * u)[..., None] * into[:, None]
        return state, (state * out[:, None]).sum(-1)

    tokens = [precision.wide(x).swapaxes(0, 1) for x in (inputs, step, input_matrix, output_matrix)]
    state, outputs = jax.lax.scan(advance, state, (*tokens, breaks.swapaxes(0, 1)))
    return outputs.swapaxes(0, 1).astype(inputs.dtype), state
