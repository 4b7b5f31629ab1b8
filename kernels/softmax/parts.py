"""Batch and heads part by part: what is kept in float32, and in tiles, is then that of one part.

Parts are three numbers: of the batch, of the columns and of the heads.
"""

import functools
import math

import jax
import numpy as np

from subquad.kernels.xla_cpu import from_uint_bits, to_uint_bits, uint_bits_dtype, zeros_depending_on

# Bytes of an array of one part in float32: on a CPU little beside the arguments, and enough to hide the overhead of a step.
CPU_BYTES, ACCELERATOR_BYTES = 1 << 20, 1 << 28


def most_sequences(length: int, features: int) -> int:
    """How many samples times heads, of `length` tokens each, a part may hold."""
    return (CPU_BYTES if jax.default_backend() == "cpu" else ACCELERATOR_BYTES) // (4 * length * features)


def parts_of(batch: int, columns: int, kv_heads: int, groups: int, most: int) -> tuple[int, int, int]:
    """The fewest parts of equal size that hold at most `most` sequences times heads, or one head of keys of one sequence."""
    most = max(1, most // groups)
    divisor = lambda size, share: next(parts for parts in range(1, size + 1) if size % parts == 0 and size // parts <= share)
    samples = divisor(batch, max(1, most // (kv_heads * columns)))
    return samples, divisor(columns, max(1, most // kv_heads)), divisor(kv_heads, most)


def place_of_part(parts, shape, part, heads: int | None):
    """Where a part's samples and columns, and its heads on axis `heads`, start in an array, and their shape.

    An axis of 1 is shared.
    """
    starts, shape = [0] * len(shape), list(shape)
    indices = part // (parts[1] * parts[2]), part // parts[2] % parts[1], part % parts[2]
    for axis, count, index in zip((0, 2, heads), parts, indices, strict=True):
        if axis is not None and shape[axis] > 1:
            shape[axis] //= count
            starts[axis] = index * shape[axis]
    return starts, shape


def share(parts, array, part, heads: int | None = 3):
    """What a part has of an array [B, T, C, ...]."""
    if array is None or parts == (1, 1, 1):
        return array
    place = place_of_part(parts, array.shape, part, heads)
    return from_uint_bits(jax.lax.dynamic_slice(to_uint_bits(array), *place), array.dtype)


def part_by_part(parts, work, shapes, heads, after, before=None):
    """Arrays of these shapes with heads on these axes, from what `work(part)` returns of each part.

    In float32 parts may share an axis of 1: what they return is added.

    Args:
        after: what must be computed before the arrays are allocated.
        before: what the results are added to; None, or None in it: nothing.
    """
    before = [None] * len(shapes) if before is None else before[: len(shapes)]
    plus = lambda x, y: y if x is None else x + y
    if parts == (1, 1, 1):
        return [plus(x, y.astype(like.dtype)) for x, y, like in zip(before, work(0), shapes, strict=True)]

    def put(whole, one, like, axis, *, part):
        starts, shape = place_of_part(parts, like.shape, part, axis)
        one = to_uint_bits(one.astype(like.dtype))
        if whole.dtype == like.dtype:  # else as bits, and then parts do not overlap
            one += jax.lax.dynamic_slice(whole, starts, shape)
        return jax.lax.dynamic_update_slice(whole, one, starts)

    def step(whole, part):
        return tuple(map(functools.partial(put, part=part), whole, work(part), shapes, heads)), None

    zeros = [zeros_depending_on(after, x.shape, uint_bits_dtype(x.dtype)) for x in shapes]
    start = tuple(x if y is None or y.dtype != x.dtype else y for x, y in zip(zeros, before, strict=True))
    whole = jax.lax.scan(step, start, np.arange(math.prod(parts)))[0]
    whole = [from_uint_bits(x, like.dtype) for x, like in zip(whole, shapes, strict=True)]
    added = [None if x is None or x.dtype == zero.dtype else x for x, zero in zip(before, zeros, strict=True)]
    return [plus(x, y) for x, y in zip(added, whole, strict=True)]
