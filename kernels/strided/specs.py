"""Calls of strided attention for the tests, the ahead-of-time table, the tuner and the benchmarks."""

import jax.numpy as jnp
import numpy as np

from subquad.kernels import strided
from subquad.kernels.specs import Spec, over_heads


def drawing(batch=2, heads=2, features=16, values=16, padding=False, segments=False):
    """A `make`: query, key and value, and optionally a key mask with holes and one empty sample, and segments."""

    def make(length, dtype, rng):
        wide = lambda size: jnp.asarray(rng.normal(size=(batch, length, heads, size)), dtype)
        arrays = dict(query=wide(features), key=wide(features), value=wide(values))
        if padding:
            empty = np.arange(batch)[:, None, None, None] == 0
            arrays["mask"] = jnp.asarray((rng.random((batch, 1, 1, length)) < 0.7) & ~empty)
        if segments:
            arrays["segment_ids"] = jnp.asarray((rng.random((batch, length)) < 0.1).cumsum(1), jnp.int32)
        return arrays

    return make


def calling(function, **options):
    """A `call` that returns the outputs and the log-sum-exp, finite also for rows that see nothing."""

    def call(arrays, implementation):
        out, lse = function(**arrays, **options, return_lse=True, implementation=implementation)
        return out, jnp.where(jnp.isneginf(lse), 0, lse)

    return call


BENCH = drawing(1, 4, 64, 64)
LAST = np.arange(120, 128)[None]
SHORT = (1, 7, 63, 129)


def spec(function, variant, make, lengths=SHORT, make_bench=None, **options):
    benches = {} if make_bench else dict(bench_lengths=())
    return Spec(f"strided.{function.__name__}", variant, make, calling(function, **options), make_bench, lengths, **benches)


attention, fixed, THREE = strided.attention, strided.fixed, np.array([[22, 23], [1, 20], [0, 23]])
SPECS = [
    spec(attention, "causal", drawing(1), (*SHORT, 100, 500), stride=5, window_size=5, is_causal=True),
    spec(attention, "padding", drawing(heads=1, values=5, padding=True), stride=6, window_size=9),
    spec(attention, "steps-only", drawing(1, features=40), (7, 63), stride=3, window_size=None, is_causal=True),
    spec(attention, "segments", drawing(segments=True), (63,), stride=6, window_size=9),
    spec(attention, "stride-128", drawing(1, 1), (129,), BENCH, stride=128, window_size=128, is_causal=True),
    spec(strided.dilated, "padding", drawing(heads=1, padding=True), (7, 63), dilation=3, window_size=(2, 4)),
    spec(
        fixed, "causal", drawing(heads=3, padding=True), (*SHORT, 100, 500), block_size=24, columns=THREE, is_causal=True
    ),
    spec(fixed, "columns-only", drawing(1), block_size=16, columns=np.array([[3, 14, 15]]), own_block=False),
    spec(
        fixed, "segments", drawing(padding=True, segments=True), (63,), block_size=12, columns=np.array([[10, 11], [0, 11]]),
        is_causal=True,
    ),
    spec(fixed, "block-128", drawing(1, 1), (300,), BENCH, block_size=128, columns=LAST, is_causal=True),
]  # fmt: skip


def over(kind, function, padding=False, **options):
    """A kind of call at every size of a head."""
    make = lambda head, *rest: drawing(2, 2, head, head, padding)(*rest)
    return over_heads(f"strided.{function.__name__}", kind, make, calling(function, **options), most=128)


GRID = [
    *over("mask", attention, True, stride=128, window_size=128),
    *over("mask-causal", fixed, True, block_size=128, columns=LAST, is_causal=True),
    *over("plain", attention, stride=128, window_size=128, is_causal=True),
    *over("steps-only", attention, stride=5, window_size=None, is_causal=True),
    *over("plain", fixed, block_size=128, columns=LAST),
    *over("columns-only", fixed, block_size=128, columns=LAST, own_block=False),
]
