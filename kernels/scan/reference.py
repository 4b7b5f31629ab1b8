"""The first-order recurrence, one step after the other."""

import jax
import jax.numpy as jnp

# Of `operation`: decay, inputs and state, then states and the last of them.
AXES = dict(arrays=("b t d", "b t d", "b d"), outputs=("b t d", "b d"), independent="b d", shared=[[0]])


def first_order(decay, inputs, start, reverse):
    """See `scan.first_order`."""
    wide = jnp.promote_types(inputs.dtype, jnp.float32)
    decay = jnp.broadcast_to(decay, inputs.shape)

    def step(state, now):
        state = now[0] * state + now[1]
        return state, state

    steps = decay.swapaxes(0, 1).astype(wide), inputs.swapaxes(0, 1).astype(wide)
    final, states = jax.lax.scan(step, start.astype(wide), steps, reverse=reverse)
    return states.swapaxes(0, 1).astype(inputs.dtype), final
