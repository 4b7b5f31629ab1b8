"""Selective scans a chunk of the tokens at a time, with a backward pass that makes the states of a chunk again.

Inside of a chunk the states are a first-order recurrence of D x N features, whose forward and backward are `scan`'s.
"""

import jax
import jax.numpy as jnp

from subquad.kernels import precision
from subquad.kernels.operation import operation
from subquad.kernels.scan import xla as scan
from subquad.kernels.selective.reference import start_and_breaks
from subquad.kernels.xla_cpu import from_uint_bits, to_uint_bits, uint_bits_dtype, zeros_depending_on

# Bytes of the states of a chunk: on a CPU what a core keeps at hand. A chunk of fewer tokens than the least would make as
# many states between chunks as there are inputs.
CPU_BYTES, OTHER_BYTES = 1 << 22, 1 << 28
LEAST, MOST = 16, 256


def selective_scan(inputs, step, diagonal, input_matrix, output_matrix, state, runs):
    """See `ssm.selective_scan`."""
    state, breaks = start_and_breaks(inputs, diagonal, state, runs)
    is_cpu = jax.default_backend() == "cpu"
    static = CPU_BYTES if is_cpu else OTHER_BYTES, 1 if is_cpu else MOST
    return _scan(static, inputs, step, diagonal, input_matrix, output_matrix, state, breaks)


def _plan(room, inputs, state) -> tuple[int, int, int]:
    """Tokens of a chunk, how many whole chunks there are, and tokens of the ragged one before them."""
    chunk = min(inputs.shape[1], max(LEAST, min(MOST, room // (4 * state.size))))
    return chunk, *divmod(inputs.shape[1], chunk)


def _systems(inputs, step, diagonal, input_matrix, breaks):
    """(decays, what is added to the states) of a chunk, [B, c, D, N]."""
    decay = jnp.exp(step[..., None] * diagonal)
    decay = decay if breaks is None else jnp.where(breaks[..., None, None], 0, decay)
    return decay, (step * inputs)[..., None] * input_matrix[:, :, None]


def _forward(static, inputs, step, diagonal, input_matrix, output_matrix, state, breaks):
    room, walked = static
    chunk, whole, ragged = _plan(room, inputs, state)
    arrays, walk = (inputs, step, input_matrix, output_matrix, breaks), scan.walker(walked)

    def run(first, size, state, outputs):
        u, step, into, out, at = _cut(arrays, first, size)
        systems = _systems(u, step, precision.wide(diagonal), into, at)
        (states, last), _ = scan.forward(walk, False, *map(_flat, systems), state.reshape(len(state), -1))
        here = (states.reshape(*u.shape, -1) * out[:, :, None]).sum(-1)
        return last.reshape(state.shape), _put(outputs, here.astype(inputs.dtype), first)

    def advance(i, carry):
        state, outputs, before = carry
        before = jax.lax.dynamic_update_index_in_dim(before, state, i, 0)
        return *run(ragged + i * chunk, chunk, state, outputs), before

    start, outputs = state, _empty(inputs, inputs)
    if ragged:
        state, outputs = run(0, ragged, state, outputs)
    carry = state, outputs, jnp.zeros((whole, *state.shape), state.dtype)
    state, outputs, before = jax.lax.fori_loop(0, whole, advance, carry)
    saved = inputs, step, diagonal, input_matrix, output_matrix, start, breaks, before
    return (from_uint_bits(outputs, inputs.dtype), state), saved


def _backward(static, saved, cotangents):
    *arrays, start, breaks, before = saved
    inputs, step, diagonal, input_matrix, output_matrix = arrays
    (room, walked), (outer, d_state) = static, cotangents
    chunk, whole, ragged = _plan(room, inputs, start)
    walk, a = scan.walker(walked), precision.wide(diagonal)
    tokens = inputs, step, input_matrix, output_matrix

    def run(first, size, state, d_state, d_diagonal, gradients):
        u, step, into, out, at, outer_here = _cut((*tokens, breaks, outer), first, size)
        decay, drive = _systems(u, step, a, into, at)
        (states, _), kept = scan.forward(walk, False, _flat(decay), _flat(drive), state.reshape(len(state), -1))
        d_states = _flat(outer_here[..., None] * out[:, :, None])
        d_decay, d_drive, d_start = scan.backward(walk, False, kept, (d_states, d_state.reshape(len(state), -1)))
        states, d_drive = states.reshape(decay.shape), d_drive.reshape(decay.shape)
        d_exponent = d_decay.reshape(decay.shape) * decay
        d_added = (d_drive * into[:, :, None]).sum(-1)  # of step times u
        here = (
            step * d_added,
            (d_exponent * a).sum(-1) + u * d_added,
            (d_drive * (step * u)[..., None]).sum(2),
            (states * outer_here[..., None]).sum(2),
        )
        d_diagonal = d_diagonal + (d_exponent * step[..., None]).sum((0, 1))
        gradients = [_put(x, part.astype(like.dtype), first) for x, part, like in zip(gradients, here, tokens, strict=True)]
        return d_start.reshape(state.shape), d_diagonal, gradients

    def advance(i, carry):
        i = whole - 1 - i
        return run(ragged + i * chunk, chunk, jax.lax.dynamic_index_in_dim(before, i, 0, keepdims=False), *carry)

    carry = d_state, jnp.zeros_like(a), [_empty(x, outer) for x in tokens]
    carry = jax.lax.fori_loop(0, whole, advance, carry)
    if ragged:
        carry = run(0, ragged, start, *carry)
    d_state, d_diagonal, gradients = carry
    of_tokens = [from_uint_bits(x, like.dtype) for x, like in zip(gradients, tokens, strict=True)]
    return *of_tokens[:2], d_diagonal.astype(diagonal.dtype), *of_tokens[2:], d_state, None


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


def _flat(x):
    """[B, c, D, N] -> [B, c, D N]."""
    return x.reshape(*x.shape[:2], -1)


_scan = operation(
    _forward,
    _backward,
    arrays=("b t d", "b t d", "d n", "b t n", "b t n", "b d n", "b t"),
    outputs=("b t d", "b d n"),
    saved=("chunk b d n",),
    independent="b d",
)
