"""A recurrence over chunks of a sequence, and its derivative in little memory.

A time axis is axis 1 of arrays [B, T, N, X] and axis 2 of rows [B, N, T]. A step gets chunks [B, N, C, X] and [B, N, C],
in float32 whatever the dtype of the arrays.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from subquad.kernels import precision
from subquad.kernels.memory import bits, bits_dtype, numbers

# The weights inside a chunk cost as much as the chunk is long, a step of the loop most where it is a kernel launch.
CPU_CHUNK, ACCELERATOR_CHUNK = 64, 128


def chunk_size() -> int:
    return CPU_CHUNK if jax.default_backend() == "cpu" else ACCELERATOR_CHUNK


def scan(step: Callable, size: int, constants, state, arrays: dict, *, skip_unused: bool = False):
    """`state, outputs = step(constants, state, chunk)` for every chunk of the arrays, in their order.

    The forward pass keeps the state before each segment of about sqrt(T / size) chunks. The backward pass goes through
    the segments from the last to the first: it computes the states inside a segment again, then the derivative of every
    step from them. So about 2 sqrt(T / size) states are alive at any time, and of the time axis nothing but arguments.

    Args:
        step: (constants, state, chunk) -> (state, outputs [B, N, C, X]); a function of `jax.vjp`.
        size: the number of tokens in a chunk, at most.
        constants, state: pytrees of float32 arrays.
        arrays: by name; None stays None. The one named "query" gives the outputs its axes.
        skip_unused: take queries whose outputs have no gradient for 0 in the backward pass: they may be padding, which
            may hold anything.
    Returns: the state after the last chunk, and the outputs [B, T, N, X] in the dtype of arrays["value"].
    """
    length = arrays["query"].shape[1]
    segments, inside, size = divide(length, size)
    arrays = {name: pad(x, segments * inside * size) for name, x in arrays.items()}
    dtype = arrays["value"].dtype
    run = _differentiable(step, segments, inside, size, dtype, skip_unused)
    state, outputs = run(constants, state, arrays)
    return state, outputs[:, :length]


def divide(length: int, size: int) -> tuple[int, int, int]:
    """(segments, chunks in a segment, tokens in a chunk) for `length` tokens in equal chunks of at most `size`."""
    chunks = -(-length // size)
    inside = math.isqrt(chunks - 1) + 1
    segments = -(-chunks // inside)
    return segments, inside, -(-length // (segments * inside))


def _differentiable(step, segments, inside, size, dtype, skip_unused):
    chunks = segments * inside

    def chunk(arrays, i):
        return {name: take(x, i * size, size) for name, x in arrays.items()}

    def forward(constants, state, arrays):
        """(state, outputs), and the state before each segment."""
        _, like = jax.eval_shape(step, constants, state, chunk(arrays, 0))
        shape = like.shape[0], chunks * size, like.shape[1], like.shape[3]

        def body(i, carry):
            state, outputs, kept = carry
            # Slot j is overwritten until the first chunk of segment j; the slot past the last segment is never read.
            kept = store(kept, state, (i + inside - 1) // inside)
            state, part = step(constants, state, chunk(arrays, i))
            return state, put(outputs, part.astype(dtype), i * size), kept

        kept = jax.tree.map(lambda x: jnp.zeros((segments + 1, *x.shape), x.dtype), state)
        outputs = jnp.zeros(shape, bits_dtype(dtype))
        state, outputs, kept = loop(chunks, body, (state, outputs, kept))
        return (state, numbers(outputs, dtype)), kept

    def backward(saved, gradients):
        constants, arrays, kept = saved
        grad_state, grad_outputs = gradients

        def segment(j, carry):
            first = (segments - 1 - j) * inside

            def again(i, carry):
                state, states = carry
                states = store(states, state, i)
                return step(constants, state, chunk(arrays, first + i))[0], states

            start = load(kept, segments - 1 - j)
            _, states = loop(inside, again, (start, jax.tree.map(lambda x: jnp.zeros((inside, *x.shape), x.dtype), start)))

            def reverse(i, carry):
                grad_constants, grad_state, grad_arrays = carry
                i = inside - 1 - i
                parts, grad_part = chunk(arrays, first + i), take(grad_outputs, (first + i) * size, size)
                if skip_unused:
                    unused = (grad_part == 0).all(-1, keepdims=True)
                    parts["query"] = jnp.where(unused, 0, parts["query"])
                _, pull = jax.vjp(step, constants, load(states, i), parts)
                more, grad_state, grads = pull((grad_state, grad_part))
                grad_arrays = {
                    name: put(grad_arrays[name], grads[name].astype(arrays[name].dtype), (first + i) * size) for name in grads
                    if grads[name] is not None
                }  # fmt: skip
                return jax.tree.map(jnp.add, grad_constants, more), grad_state, grad_arrays

            return loop(inside, reverse, carry)

        grad_arrays = {name: jnp.zeros(x.shape, bits_dtype(x.dtype)) for name, x in arrays.items() if x is not None}
        carry = jax.tree.map(jnp.zeros_like, constants), hide_zeros(grad_state), grad_arrays
        grad_constants, grad_state, grad_arrays = loop(segments, segment, carry)
        grads = {name: None if x is None else numbers(grad_arrays[name], x.dtype) for name, x in arrays.items()}
        return grad_constants, grad_state, grads

    @jax.custom_vjp
    def run(constants, state, arrays):
        return forward(constants, state, arrays)[0]

    def run_forward(constants, state, arrays):
        outputs, kept = forward(constants, state, arrays)
        return outputs, (constants, arrays, kept)

    precision.define_passes(run, precision.full(run_forward), precision.full(backward))
    return precision.full(run)


def loop(count: int, body, carry):
    return body(0, carry) if count == 1 else jax.lax.fori_loop(0, count, body, carry)


def store(states, state, i):
    return jax.tree.map(lambda all, one: jax.lax.dynamic_update_index_in_dim(all, one, i, 0), states, state)


def load(states, i):
    return jax.tree.map(lambda all: jax.lax.dynamic_index_in_dim(all, i, 0, keepdims=False), states)


def take(x, start, size):
    """A chunk [B, N, C, X] of an array [B, T, N, X], or [B, N, C] of rows [B, N, T], in float32."""
    if x is None:
        return None
    if x.ndim == 3:
        return jax.lax.dynamic_slice_in_dim(x, start, size, 2)
    return numbers(jax.lax.dynamic_slice_in_dim(bits(x), start, size, 1), x.dtype).swapaxes(1, 2).astype(jnp.float32)


def put(x, part, start):
    """`x`, the bits of an array or of rows, with a chunk of numbers in its place."""
    if part.ndim == 3:
        return jax.lax.dynamic_update_slice_in_dim(x, part, start, 2)
    return jax.lax.dynamic_update_slice_in_dim(x, bits(part.swapaxes(1, 2)), start, 1)


def pad(x, length: int):
    """Zeros at the end of the time axis, up to `length`."""
    if x is None or x.shape[axis := 2 if x.ndim == 3 else 1] == length:
        return x
    return jnp.pad(x, [(0, length - n if i == axis else 0) for i, n in enumerate(x.shape)])


def hide_zeros(arrays):
    """The arrays, without XLA knowing that they are zeros where they are.

    In a sequence of one chunk the state is known, and one dot product of two that XLA gives to its library for CPUs then
    multiplies by whatever is in memory where the zeros should be (jaxlib 0.10 to 0.12).
    """
    return jax.tree.map(lambda x: x + 0.0 * jax.lax.broadcasted_iota(x.dtype, x.shape, x.ndim - 1), arrays)
