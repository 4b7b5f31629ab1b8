"""First-order recurrences without copies: a loop that reads and writes its step in place, or a tree inside of chunks.

On a CPU a step is one short fused loop, and a tree does log T times the work. An accelerator pays for every step of a loop,
so there the loop runs over chunks. The backward pass is the same recurrence the other way round, written by hand: autodiff
would keep what it does not need. Complex numbers need no conjugates there: JAX's cotangents are conjugated already.
"""

import jax
import jax.numpy as jnp

from subquad.kernels.operation import operation
from subquad.kernels.scan.reference import AXES

CHUNK = 256


def first_order(decay, inputs, start, reverse):
    """See `scan.first_order`."""
    return _scan((reverse, 1 if jax.default_backend() == "cpu" else CHUNK), decay, inputs, start)


def _forward(static, decay, inputs, start):
    reverse, chunk = static
    if chunk == 1:
        outputs = _steps(decay, inputs, start, reverse)
    else:
        outputs = _chunks(decay, inputs, start, reverse, chunk)
    return outputs, (decay, start, outputs[0])


def _backward(static, saved, cotangents):
    reverse, chunk = static
    if chunk == 1:
        return _adjoint_steps(*saved, *cotangents, reverse)
    return _adjoint_chunks(*saved, *cotangents, reverse, chunk)


_scan = operation(_forward, _backward, **AXES)


def _widen(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


# --------------------------------------------------------------------------------------------------------- step by step


def _at(x, t):
    """The step t [B, D]; of a constant its only one."""
    return _widen(jax.lax.dynamic_index_in_dim(x, t if x.shape[1] > 1 else 0, 1, keepdims=False))


def _put(x, values, t):
    return jax.lax.dynamic_update_index_in_dim(x, values.astype(x.dtype), t, 1)


def _steps(decay, inputs, start, reverse):
    length = inputs.shape[1]

    def step(i, carry):
        state, states = carry
        t = length - 1 - i if reverse else i
        state = _at(decay, t) * state + _at(inputs, t)
        return state, _put(states, state, t)

    state, states = jax.lax.fori_loop(0, length, step, (start, jnp.zeros_like(inputs)))
    return states, state


def _adjoint_steps(decay, start, states, d_states, d_final, reverse):
    """With s for the step after t: g_t = dh_t + a_s g_s, db_t = g_t, da_t = g_t h_{t-1}."""
    length = states.shape[1]
    is_constant, is_shared = decay.shape[1] == 1, decay.shape[0] == 1

    def step(i, carry):
        incoming, d_inputs, d_decay = carry
        t = i if reverse else length - 1 - i
        gradient = incoming + _at(d_states, t)
        before = _at(states, jnp.clip(t + 1 if reverse else t - 1, 0, length - 1))
        change = gradient * jnp.where(i == length - 1, start, before)
        if is_shared:
            change = change.sum(0, keepdims=True)
        d_decay = d_decay + change if is_constant else _put(d_decay, change, t)
        return _at(decay, t) * gradient, _put(d_inputs, gradient, t), d_decay

    zero = jnp.zeros_like(_widen(decay[:, 0])) if is_constant else jnp.zeros_like(decay)
    carry = (d_final, jnp.zeros_like(states), zero)
    d_start, d_inputs, d_decay = jax.lax.fori_loop(0, length, step, carry)
    return d_decay.reshape(decay.shape).astype(decay.dtype), d_inputs, d_start


# ------------------------------------------------------------------------------------------------------ chunk by chunk


def _chunks(decay, inputs, start, reverse, chunk):
    """A tree of log2(chunk) levels inside of each chunk, the state from one to the next; the ragged chunk is the first."""
    length = inputs.shape[1]
    chunk = min(chunk, length)
    ragged = length % chunk

    def combine(first, second):
        return first[0] * second[0], second[0] * first[1] + second[1]

    def run(first, size, carry):
        state, states = carry
        first = length - size - first if reverse else first
        cut = lambda x: jax.lax.dynamic_slice_in_dim(x, first, size, 1) if x.shape[1] > 1 else x.repeat(size, 1)
        steps = _widen(cut(decay)), _widen(cut(inputs))
        products, sums = jax.lax.associative_scan(combine, steps, reverse=reverse, axis=1)
        here = products * state[:, None] + sums
        states = jax.lax.dynamic_update_slice_in_dim(states, here.astype(states.dtype), first, 1)
        return here[:, 0 if reverse else -1], states

    carry = (start, jnp.zeros_like(inputs))
    if ragged:
        carry = run(0, ragged, carry)
    step = lambda i, carry: run(ragged + i * chunk, chunk, carry)
    state, states = jax.lax.fori_loop(0, length // chunk, step, carry)
    return states, state


def _adjoint_chunks(decay, start, states, d_states, d_final, reverse, chunk):
    """As `_adjoint_steps`, by `_chunks` with the decay of the step after."""
    a = jnp.broadcast_to(_widen(decay), (decay.shape[0], *states.shape[1:]))
    first = slice(-1, None) if reverse else slice(0, 1)
    to_next = lambda x, end: jnp.concatenate([end, x[:, :-1]] if reverse else [x[:, 1:], end], 1)
    to_previous = lambda x, end: jnp.concatenate([x[:, 1:], end] if reverse else [end, x[:, :-1]], 1)
    gradient, _ = _chunks(to_next(a, jnp.ones_like(a[:, :1])), _widen(d_states), d_final, not reverse, chunk)
    d_decay = gradient * to_previous(_widen(states), start[:, None])
    for axis in (0, 1):
        if decay.shape[axis] == 1:
            d_decay = d_decay.sum(axis, keepdims=True)
    d_start = (a[:, first] * gradient[:, first])[:, 0]
    return d_decay.astype(decay.dtype), gradient.astype(states.dtype), d_start
