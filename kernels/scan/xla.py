"""First-order recurrences without copies: a loop that reads and writes its step in place, or a tree inside of chunks.

On a CPU a step is one short fused loop, and a tree does log T times the work. An accelerator pays for every step of a loop,
so there the loop runs over chunks. The backward pass is the same recurrence the other way round, written by hand: autodiff
would keep what it does not need.
"""

import functools

import jax
import jax.numpy as jnp

from subquad.kernels import precision
from subquad.kernels.operation import operation
from subquad.kernels.scan.reference import AXES

CHUNK = 256


def first_order(decay, inputs, start, reverse):
    """See `scan.first_order`."""
    return _scan((reverse, 1 if jax.default_backend() == "cpu" else CHUNK), decay, inputs, start)


def forward(walk, reverse, decay, inputs, start):
    """The states and the last one, and what `backward` needs.

    Args:
        walk: (decay, inputs, start, reverse, shifted) -> (states [B, T, D], the last one [B, D]); `shifted`: each step takes
            the decay of the step taken before it, and the first one 1.
    """
    outputs = walk(decay, inputs, start, reverse, False)
    return outputs, (decay, start, outputs[0])


def backward(walk, reverse, saved, cotangents):
    """With s for the step after t: g_t = dh_t + a_s g_s, db_t = g_t, da_t = g_t h_{t-1}.

    Complex numbers need no conjugates: JAX's cotangents are conjugated already.
    """
    decay, start, states = saved
    gradient, last = walk(decay, *cotangents, not reverse, True)
    before = precision.wide(states)
    before = [before[:, 1:], start[:, None]] if reverse else [start[:, None], before[:, :-1]]
    grad_decay = precision.wide(gradient) * jnp.concatenate(before, 1)
    shared = tuple(axis for axis in (0, 1) if decay.shape[axis] == 1)
    grad_decay = grad_decay.sum(shared, keepdims=True) if shared else grad_decay
    return grad_decay.astype(decay.dtype), gradient, precision.wide(decay[:, -1 if reverse else 0]) * last


def _walk(chunk):
    return _steps if chunk == 1 else functools.partial(chunks, chunk)


_scan = operation(
    lambda static, *arrays: forward(_walk(static[1]), static[0], *arrays),
    lambda static, *saved: backward(_walk(static[1]), static[0], *saved),
    **AXES,
)


def _steps(decay, inputs, start, reverse, shifted):
    length = inputs.shape[1]

    def at(x, t):  # the step t [B, D]; of a constant its only one
        return precision.wide(jax.lax.dynamic_index_in_dim(x, t if x.shape[1] > 1 else 0, 1, keepdims=False))

    def step(i, carry):
        state, states = carry
        t = length - 1 - i if reverse else i
        if shifted:
            now = jnp.where(i == 0, 1, at(decay, jnp.clip(t + 1 if reverse else t - 1, 0, length - 1)))
        else:
            now = at(decay, t)
        state = now * state + at(inputs, t)
        return state, jax.lax.dynamic_update_index_in_dim(states, state.astype(states.dtype), t, 1)

    state, states = jax.lax.fori_loop(0, length, step, (start, jnp.zeros_like(inputs)))
    return states, state


def chunks(chunk, decay, inputs, start, reverse, shifted):
    """A tree of log2(chunk) levels inside of each chunk, the state from one to the next; the ragged chunk is the first."""
    length = inputs.shape[1]
    chunk = min(chunk, length)
    ragged = length % chunk
    if shifted:
        ones, decay = jnp.ones_like(decay[:, :1]), jnp.broadcast_to(decay, (decay.shape[0], *inputs.shape[1:]))
        decay = jnp.concatenate([decay[:, 1:], ones] if reverse else [ones, decay[:, :-1]], 1)

    def combine(first, second):
        return first[0] * second[0], second[0] * first[1] + second[1]

    def run(first, size, carry):
        state, states = carry
        first = length - size - first if reverse else first
        cut = lambda x: jax.lax.dynamic_slice_in_dim(x, first, size, 1) if x.shape[1] > 1 else x.repeat(size, 1)
        steps = precision.wide(cut(decay)), precision.wide(cut(inputs))
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
