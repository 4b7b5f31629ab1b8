"""A recurrence over chunks of a sequence, and its derivative in little memory.

A time axis is axis 1 of arrays [B, T, N, X] and axis 2 of rows [B, N, T]. A step gets chunks [B, N, C, X] and [B, N, C],
in float32 whatever the dtype of the arrays.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from subquad.kernels import checks, precision
from subquad.kernels.padding import pad_to
from subquad.kernels.xla_cpu import from_uint_bits, hide_zeros, to_uint_bits, uint_bits_dtype, zeros_depending_on

# The weights inside a chunk cost as much as the chunk is long, a step of the loop most where it is a kernel launch. What the
# delta rule writes is solved for inside a chunk, which costs more.
CPU_CHUNK, CPU_DELTA_CHUNK, ACCELERATOR_CHUNK = 64, 32, 128
# Without the weights inside a chunk, larger ones cost nothing but memory.
BIDIRECTIONAL_CHUNK = 256
# At the end of a time axis: tokens that change no state. Of what is not named here, zeros.
PADDING = {"log_scale": -jnp.inf}


def chunk_size(is_delta: bool = False) -> int:
    if jax.default_backend() != "cpu":
        return ACCELERATOR_CHUNK
    return CPU_DELTA_CHUNK if is_delta else CPU_CHUNK


def scan(step: Callable, size: int, constants, state, arrays: dict, dtype, *, skip_unused: bool = False):
    """`state, outputs = step(constants, state, chunk)` for every chunk of the arrays, in their order.

    The forward pass keeps the state before each segment of about sqrt(T / size) chunks. The backward pass goes through
    the segments from the last to the first: it computes the states inside a segment again, then the derivative of every
    step from them. So about 2 sqrt(T / size) states are alive at any time, and of the time axis nothing but arguments.

    Args:
        step: (constants, state, chunk) -> (state, outputs [B, N, C, X]); a function of `jax.vjp`.
        size: the number of tokens in a chunk, at most.
        constants, state: pytrees of float32 arrays.
        arrays: by name, "query" among them; None stays None.
        dtype: of the outputs.
        skip_unused: the backward pass hides queries that may be padding, see `checks.may_be_padding`.
    Returns: the state after the last chunk, and the outputs [B, T, N, X].
    """
    length = arrays["query"].shape[1]
    segments, inside, size = divide(length, size)
    arrays = pad(arrays, segments * inside * size)
    if not jax.tree.leaves(state):
        segments, inside = 1, segments * inside
    run = _differentiable(step, segments, inside, size, dtype, skip_unused)
    state, outputs = run(constants, state, arrays)
    return state, outputs[:, :length]


def divide(length: int, size: int) -> tuple[int, int, int]:
    """(segments, chunks in a segment, tokens in a chunk) for `length` tokens in equal chunks of at most `size`."""
    chunks = -(-length // size)
    root = math.isqrt(chunks - 1) + 1
    # A divisor a little above the root needs no chunk more; else the last ones are shorter or padding.
    inside = next((n for n in range(root, 2 * root) if chunks % n == 0), root)
    segments = -(-chunks // inside)
    return segments, inside, -(-length // (segments * inside))


def pads(length: int, size: int) -> bool:
    """Whether chunks of at most `size` need tokens after the last of `length`."""
    segments, inside, size = divide(length, size)
    return segments * inside * size != length


def _differentiable(step, segments, inside, size, dtype, skip_unused):
    """(constants, state, arrays) -> (last state, outputs): `segments` times `inside` chunks of `size` tokens."""
    chunks = segments * inside
    chunk = lambda arrays, i: take_chunk(arrays, i, size)

    def forward(constants, state, arrays):
        """(state, outputs), and the state before each segment."""
        _, like = jax.eval_shape(step, constants, state, chunk(arrays, 0))
        shape = like.shape[0], chunks * size, like.shape[1], like.shape[3]

        def advance(i, carry):
            state, outputs, kept = carry
            # Slot j is overwritten until the first chunk of segment j; the slot past the last segment is never read.
            kept = store(kept, state, (i + inside - 1) // inside)
            state, part = step(constants, state, chunk(arrays, i))
            return state, put(outputs, part.astype(dtype), i * size), kept

        outputs = zeros_depending_on((constants, arrays), shape, uint_bits_dtype(dtype))
        state, outputs, kept = loop(chunks, advance, (state, outputs, room_for_states(state, segments + 1)))
        return (state, from_uint_bits(outputs, dtype)), kept

    def states_inside(constants, first_state, arrays, first):
        """The states before the chunks of a segment, computed again."""

        def advance(i, carry):
            state, states = carry
            state, _ = step(constants, state, chunk(arrays, first + i))
            return state, store(states, state, i + 1)

        states = store(room_for_states(first_state, inside), first_state, 0)
        return loop(inside - 1, advance, (first_state, states))[1] if jax.tree.leaves(first_state) else states

    def backward(saved, gradients):
        constants, arrays, kept = saved
        grad_state, grad_outputs = gradients

        def reverse_segment(j, carry):
            segment = segments - 1 - j
            states = states_inside(constants, load(kept, segment), arrays, segment * inside)

            def reverse_chunk(j, carry):
                grad_constants, grad_state, grad_arrays = carry
                i = inside - 1 - j
                place = segment * inside + i
                parts, grad_part = chunk(arrays, place), take(grad_outputs, place * size, size)
                if skip_unused:
                    hidden = checks.may_be_padding([parts["query"]], grad_part)
                    parts["query"] = jnp.where(hidden, 0, parts["query"])
                _, pull = jax.vjp(step, constants, load(states, i), parts)
                more, grad_state, grad_parts = pull((grad_state, grad_part))
                grad_arrays = put_chunk(grad_arrays, grad_parts, arrays, place, size)
                return jax.tree.map(jnp.add, grad_constants, more), grad_state, grad_arrays

            return loop(inside, reverse_chunk, carry)

        carry = jax.tree.map(jnp.zeros_like, constants), hide_zeros(grad_state), room_for(arrays, grad_outputs)
        grad_constants, grad_state, grad_arrays = loop(segments, reverse_segment, carry)
        return grad_constants, grad_state, as_arrays(grad_arrays, arrays)

    @jax.custom_vjp
    def run(constants, state, arrays):
        return forward(constants, state, arrays)[0]

    def run_forward(constants, state, arrays):
        outputs, kept = forward(constants, state, arrays)
        return outputs, (constants, arrays, kept)

    precision.define_passes(run, precision.full(run_forward, dtype), precision.full(backward, dtype))
    return precision.full(run, dtype)


def loop(count: int, body, carry):
    return carry if count == 0 else body(0, carry) if count == 1 else jax.lax.fori_loop(0, count, body, carry)


def room_for_states(state, count: int):
    return jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), state)


def store(states, state, i):
    return jax.tree.map(lambda all, one: jax.lax.dynamic_update_index_in_dim(all, one, i, 0), states, state)


def load(states, i):
    return jax.tree.map(lambda all: jax.lax.dynamic_index_in_dim(all, i, 0, keepdims=False), states)


def take_chunk(arrays: dict, i, size: int) -> dict:
    return {name: None if x is None else take(x, i * size, size) for name, x in arrays.items()}


def take(x, start, size):
    """A chunk [B, N, C, X] of an array [B, T, N, X], or [B, N, C] of rows [B, N, T], in float32."""
    if x.ndim == 3:
        return jax.lax.dynamic_slice_in_dim(x, start, size, 2)
    rows = from_uint_bits(jax.lax.dynamic_slice_in_dim(to_uint_bits(x), start, size, 1), x.dtype)
    return rows.swapaxes(1, 2).astype(jnp.float32)


def room_for(arrays: dict, after) -> dict:
    """The bits of zeros, for `put_chunk`; allocated once `after` is computed."""
    room = lambda x: zeros_depending_on(after, x.shape, uint_bits_dtype(x.dtype))
    return {name: None if x is None else room(x) for name, x in arrays.items()}


def put_chunk(bits: dict, parts: dict, like: dict, i, size: int) -> dict:
    """The bits of arrays in the dtypes of those in `like`, with parts of them in the place of chunk i."""
    place = lambda name, x: put(x, parts[name].astype(like[name].dtype), i * size)
    return {name: None if x is None else place(name, x) for name, x in bits.items()}


def as_arrays(bits: dict, like: dict) -> dict:
    return {name: None if x is None else from_uint_bits(bits[name], x.dtype) for name, x in like.items()}


def put(x, part, start):
    """`x`, the bits of an array or of rows, with a chunk of numbers in its place."""
    if part.ndim == 3:
        return jax.lax.dynamic_update_slice_in_dim(x, part, start, 2)
    return jax.lax.dynamic_update_slice_in_dim(x, to_uint_bits(part.swapaxes(1, 2)), start, 1)


def pad(arrays: dict, length: int) -> dict:
    """Tokens that change no state, at the end of every array, up to `length`."""

    def pad_one(name, x):
        axis = 2 if x.ndim == 3 else 1
        options = dict(mode="edge") if name == "segment" else dict(constant_values=PADDING.get(name, 0))
        return pad_to(x, axis, length, **options)

    return {name: None if x is None else pad_one(name, x) for name, x in arrays.items()}
