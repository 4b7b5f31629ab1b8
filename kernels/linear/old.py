"""A sequence chunk by chunk: arrays [B, T, N, ...] as chunks [B, N, C, ...] in float32, and rows [B, N, T] as [B, N, C]."""

import jax
import jax.numpy as jnp

from subquad.kernels.memory import bits, bits_dtype, numbers

# The weights inside a chunk cost as much as the chunk is long, a step of the loop most where it is a kernel launch.
CPU_CHUNK, ACCELERATOR_CHUNK = 64, 128
# Without the weights inside a chunk, larger ones cost nothing but memory.
BIDIRECTIONAL_CHUNK = 256


def chunk() -> int:
    return CPU_CHUNK if jax.default_backend() == "cpu" else ACCELERATOR_CHUNK


def sweep(length: int, chunk: int, step, carry, reverse: bool = False):
    """`carry` after step(carry, start, size) for all chunks; the last may be smaller."""
    steps = -(-length // chunk)
    chunk = -(-length // steps)
    whole, rest = divmod(length, chunk)
    if rest and reverse:
        carry = step(carry, whole * chunk, rest)
    if whole == 1:
        carry = step(carry, 0, chunk)
    else:
        place = (lambda i: (whole - 1 - i) * chunk) if reverse else (lambda i: i * chunk)
        carry = jax.lax.fori_loop(0, whole, lambda i, carry: step(carry, place(i), chunk), carry)
    if rest and not reverse:
        carry = step(carry, whole * chunk, rest)
    return carry


def take(x, start, size):
    """[B, N, C, ...] in float32 out of [B, T, N, ...]."""
    return numbers(jax.lax.dynamic_slice_in_dim(bits(x), start, size, 1), x.dtype).swapaxes(1, 2).astype(jnp.float32)


def empty(like):
    """The bits of zeros, for `put`."""
    return jnp.zeros(like.shape, bits_dtype(like.dtype))


def put(x, part, start, like):
    """`x`, the bits of an array [B, T, N, ...] of the dtype of `like`, with the chunk [B, N, C, ...]."""
    return jax.lax.dynamic_update_slice_in_dim(x, bits(part.swapaxes(1, 2).astype(like.dtype)), start, 1)


def take_rows(x, start, size):
    """[B, N, C] out of [B, N, T]."""
    return jax.lax.dynamic_slice_in_dim(x, start, size, 2)


def put_rows(x, part, start):
    return jax.lax.dynamic_update_slice_in_dim(x, part, start, 2)
