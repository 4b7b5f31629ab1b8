"""Batch and heads part by part: what is kept in float32, and in tiles, is then that of one part.

Parts are a pair of numbers: of the batch, and of the heads.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from subquad.kernels.memory import bits, bits_dtype, numbers

# Bytes of an array of one part in float32: on a CPU little beside the arguments, and enough for what each step costs anyway.
CPU_BYTES, ACCELERATOR_BYTES = 1 << 22, 1 << 28


def room(length: int, features: int) -> int:
    """How many samples times heads, of `length` tokens each, a part may hold."""
    return (CPU_BYTES if jax.default_backend() == "cpu" else ACCELERATOR_BYTES) // (4 * length * features)


def parts_of(batch: int, kv_heads: int, groups: int, room: int) -> tuple[int, int]:
    """The fewest parts of equal size that hold at most `room` samples times heads, or one head of keys of one sample."""
    room = max(1, room // groups)
    divisor = lambda size, most: next(parts for parts in range(1, size + 1) if size % parts == 0 and size // parts <= most)
    return divisor(batch, max(1, room // kv_heads)), divisor(kv_heads, room)


def corner(parts, shape, part, heads: int | None):
    """Where a part's samples, and its heads on axis `heads`, start in an array, and their shape; an axis of 1 is shared."""
    starts, shape = [0] * len(shape), list(shape)
    for axis, count, index in ((0, parts[0], part // parts[1]), (heads, parts[1], part % parts[1])):
        if axis is not None and shape[axis] > 1:
            shape[axis] //= count
            starts[axis] = index * shape[axis]
    return starts, shape


def share(parts, array, part, heads: int | None = 2):
    """What a part sees of an array."""
    if array is None or parts == (1, 1):
        return array
    return numbers(jax.lax.dynamic_slice(bits(array), *corner(parts, array.shape, part, heads)), array.dtype)


def part_by_part(parts, work, shapes, heads):
    """Arrays of these shapes with heads on these axes, from what `work(part)` returns of each part.

    In float32 parts may share an axis of 1: what they return is added.
    """
    if parts == (1, 1):
        return work(0)

    def put(whole, one, like, axis, *, part):
        starts, shape = corner(parts, like.shape, part, axis)
        one = bits(one.astype(like.dtype))
        if whole.dtype == like.dtype:  # else as bits, and then parts do not overlap
            one += jax.lax.dynamic_slice(whole, starts, shape)
        return jax.lax.dynamic_update_slice(whole, one, starts)

    def step(whole, part):
        return tuple(map(functools.partial(put, part=part), whole, work(part), shapes, heads)), None

    start = tuple(jnp.zeros(x.shape, bits_dtype(x.dtype)) for x in shapes)
    whole = jax.lax.scan(step, start, np.arange(parts[0] * parts[1]))[0]
    return tuple(numbers(x, like.dtype) for x, like in zip(whole, shapes, strict=True))
