"""Selective scans a chunk of the tokens at a time, with a backward pass that makes the states of a chunk again.

On a CPU a chunk is one step after the other. An accelerator pays for every step, so there it is a first-order recurrence of
D x N features, by a tree; on a GPU Triton's kernels walk along it.
"""

import functools

import jax
import jax.numpy as jnp

from subquad.kernels import precision
from subquad.kernels.operation import operation
from subquad.kernels.scan import xla as scan
from subquad.kernels.selective.reference import start_and_breaks, steps
from subquad.kernels.xla_cpu import from_uint_bits, to_uint_bits, uint_bits_dtype, zeros_depending_on

# Bytes of the states of a chunk: on a CPU what a core keeps at hand. A chunk of fewer tokens than the least would make as
# many states between chunks as there are inputs.
CPU_BYTES, OTHER_BYTES = 1 << 22, 1 << 28
LEAST, MOST = 16, 256


def selective_scan(inputs, step, diagonal, input_matrix, output_matrix, state, runs):
    """See `ssm.selective_scan`."""
    state, breaks = start_and_breaks(inputs, diagonal, state, runs)
    walk, room = (steps, CPU_BYTES) if jax.default_backend() == "cpu" else (tree, OTHER_BYTES)
    return in_chunks((walk, LEAST, MOST, room), inputs, step, diagonal, input_matrix, output_matrix, state, breaks)


def tree(inputs, step, diagonal, input_matrix, output_matrix, state, breaks):
    """`steps` all at once: every decay and state is in memory."""
    decay = jnp.exp(step[..., None] * diagonal)
    decay = decay if breaks is None else jnp.where(breaks[..., None, None], 0, decay)
    drive = (step * inputs)[..., None] * input_matrix[:, :, None]
    flat = lambda x: x.reshape(*x.shape[:-2], -1)
    states, last = _recurrence(*map(flat, (decay, drive, state)))
    return (states.reshape(drive.shape) * output_matrix[:, :, None]).sum(-1), last.reshape(state.shape)


_walk = functools.partial(scan.chunks, MOST)


@jax.custom_vjp
def _recurrence(decay, drive, state):
    return _walk(decay, drive, state, False, False)


precision.define_passes(
    _recurrence, functools.partial(scan.forward, _walk, False), functools.partial(scan.backward, _walk, False)
)


def _plan(least, most, room, inputs, state) -> tuple[int, int, int]:
    """Tokens of a chunk, how many whole chunks there are, and tokens of the ragged one before them.

    `room`: for the states of a chunk, where it has more tokens than the `least`.
    """
    chunk = min(inputs.shape[1], max(least, min(most, room // (4 * state.size))))
    return chunk, *divmod(inputs.shape[1], chunk)


def _forward(static, inputs, step, diagonal, input_matrix, output_matrix, state, breaks):
    (walk, *limits), start = static, state
    chunk, whole, ragged = _plan(*limits, inputs, state)

    def run(first, size, state, outputs):
        u, step_, into, out, at = _cut((inputs, step, input_matrix, output_matrix, breaks), first, size)
        here, state = walk(u, step_, precision.wide(diagonal), into, out, state, at)
        return state, _put(outputs, here.astype(inputs.dtype), first)

    def advance(i, carry):
        state, outputs, before = carry
        before = jax.lax.dynamic_update_index_in_dim(before, state, i, 0)
        return *run(ragged + i * chunk, chunk, state, outputs), before

    outputs = _empty(inputs, inputs)
    if ragged:
        state, outputs = run(0, ragged, state, outputs)
    carry = state, outputs, jnp.zeros((whole, *state.shape), state.dtype)
    state, outputs, before = jax.lax.fori_loop(0, whole, advance, carry)
    saved = inputs, step, diagonal, input_matrix, output_matrix, start, breaks, before
    return (from_uint_bits(outputs, inputs.dtype), state), saved


def _backward(static, saved, cotangents):
    inputs, step, diagonal, input_matrix, output_matrix, start, breaks, before = saved
    (walk, *limits), (outer, grad_state) = static, cotangents
    chunk, whole, ragged = _plan(*limits, inputs, start)
    tokens = inputs, step, input_matrix, output_matrix

    def run(first, size, state, grad_state, grad_diagonal, grads):
        u, step, into, out, at, outer_here = _cut((*tokens, breaks, outer), first, size)
        again = lambda u, step, diagonal, into, out, state: walk(u, step, diagonal, into, out, state, at)
        _, pull = jax.vjp(again, u, step, precision.wide(diagonal), into, out, state)
        of_u, of_step, of_diagonal, of_into, of_out, grad_state = pull((outer_here, grad_state))
        here = of_u, of_step, of_into, of_out
        grads = [_put(x, part.astype(like.dtype), first) for x, part, like in zip(grads, here, tokens, strict=True)]
        return grad_state, grad_diagonal + of_diagonal, grads

    def advance(i, carry):
        i = whole - 1 - i
        return run(ragged + i * chunk, chunk, jax.lax.dynamic_index_in_dim(before, i, 0, keepdims=False), *carry)

    carry = grad_state, jnp.zeros_like(precision.wide(diagonal)), [_empty(x, outer) for x in tokens]
    carry = jax.lax.fori_loop(0, whole, advance, carry)
    if ragged:
        carry = run(0, ragged, start, *carry)
    grad_state, grad_diagonal, grads = carry
    grads = [from_uint_bits(x, like.dtype) for x, like in zip(grads, tokens, strict=True)]
    return *grads[:2], grad_diagonal.astype(diagonal.dtype), *grads[2:], grad_state, None


def _cut(arrays, first, size):
    """Some tokens of each array; floating-point numbers wide."""

    def cut(x):
        part = from_uint_bits(jax.lax.dynamic_slice_in_dim(to_uint_bits(x), first, size, 1), x.dtype)
        return part if x.dtype == bool else precision.wide(part)

    return [None if x is None else cut(x) for x in arrays]


def _put(whole, part, first):
    return jax.lax.dynamic_update_slice_in_dim(whole, to_uint_bits(part), first, 1)


def _empty(like, after):
    return zeros_depending_on(after, like.shape, uint_bits_dtype(like.dtype))


in_chunks = operation(
    _forward,
    _backward,
    arrays=("b t d", "b t d", "d n", "b t n", "b t n", "b d n", "b t"),
    outputs=("b t d", "b d n"),
    saved=("chunk b d n",),
    independent="b d",
)
