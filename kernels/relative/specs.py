"""Calls of relative attention for tests and benchmarks. The length is that of the queries."""

import jax.numpy as jnp
import numpy as np

from subquad.kernels import relative
from subquad.kernels.specs import Spec, over_heads


def arrays(length, memory, heads, features, values, dtype, rng, batch=2):
    B, T, S = batch, length, length + memory
    shapes = dict(
        query=(B, T, heads, features), key=(B, S, heads, features), value=(B, S, heads, values),
        relative_key=(S + 3, heads, features), content_bias=(heads, features), position_bias=(heads, features),
    )  # fmt: skip
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}


def call(arrays, implementation):
    return relative.attention(**arrays, implementation=implementation)


def segment(length, dtype, rng):
    return arrays(length, 0, 3, 16, 16, dtype, rng, batch=1)


def memory(length, dtype, rng):
    """A memory that ends anywhere in a tile; features that are no power of two; values of other features than keys."""
    return arrays(length, 45, 1, 20, 24, dtype, rng)


def padding(length, dtype, rng):
    """Key padding and packed segments as the layer passes them, with a sample that sees nothing at first."""
    drawn = arrays(length, 31, 2, 16, 16, dtype, rng)
    mask = rng.random((2, 1, 1, length + 31)) > 0.3
    mask[0, ..., : 31 + length // 2] = False
    segments = jnp.asarray(np.sort(rng.integers(0, 3, (2, length + 31)), 1), jnp.int32)
    return {**drawn, "mask": jnp.asarray(mask), "query_segment_ids": segments[:, 31:], "key_segment_ids": segments}


def pairwise(length, dtype, rng):
    """A mask of every head's own, and rows that see nothing."""
    drawn = arrays(length, 17, 2, 16, 16, dtype, rng)
    mask = rng.random((1, 2, length, length + 17)) > 0.6
    mask[:, :, ::5] = False
    return {**drawn, "mask": jnp.asarray(mask)}


def bench(length, dtype, rng):
    return arrays(length, 0, 4, 64, 64, dtype, rng, batch=1)


def bench_memory(length, dtype, rng):
    return arrays(length, length, 4, 64, 64, dtype, rng, batch=1)


SPECS = [
    Spec("relative.attention", "segment", segment, call, make_bench=bench),
    Spec("relative.attention", "memory", memory, call, make_bench=bench_memory),
    Spec("relative.attention", "padding", padding, call, bench_lengths=()),
    Spec("relative.attention", "pairwise", pairwise, call, lengths=(7, 63, 129), bench_lengths=()),
]


def over(kind, shape=None):
    """A kind of call at every size of a head, with a mask of the shape that `shape` makes of (length of queries, of keys)."""

    def make(head, length, dtype, rng):
        drawn = arrays(length, 45, 2, head, head, dtype, rng)
        return drawn if shape is None else drawn | dict(mask=jnp.asarray(rng.random(shape(length, length + 45)) < 0.8))

    return over_heads("relative.attention", kind, make, call, most=128)


GRID = [
    *over("pairwise", lambda T, S: (1, 2, T, S)),
    *over("plain"),
    *over("mask", lambda T, S: (2, 1, 1, S)),
]
