"""Named calls of the depthwise convolution. Taps have the dtype of the tokens."""

import jax.numpy as jnp
import numpy as np

from subquad.kernels import convolution
from subquad.kernels.specs import Spec


def _make(width, groups, features, batch=2, per_token=False, masked=False, segments=False, state=False):
    def make(length, dtype, rng):
        normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
        taps = (batch, length, width, groups) if per_token else (width, groups)
        arrays = dict(inputs=normal(batch, length, features), kernel=normal(*taps))
        if masked:
            arrays["mask"] = jnp.asarray(rng.random((batch, 1, 1, length)) < np.float32(0.7))
        if segments:
            arrays["segment_ids"] = jnp.asarray((rng.random((batch, length)) < 0.1).cumsum(1) % 3, jnp.int32)
        return arrays | dict(initial_state=normal(batch, width - 1, features)) if state else arrays

    return make


def _spec(variant, lengths, width, groups, bench=None, return_state=False, is_causal=True, **options):
    def call(arrays, implementation):
        return convolution.depthwise(
            **arrays, is_causal=is_causal, return_state=return_state, implementation=implementation
        )  # fmt: skip

    make = _make(width, groups, 6, state=return_state, **options)
    make_bench = _make(width, bench, 512, batch=1, state=return_state, **options) if bench else None
    lengths_bench = dict(bench_lengths=()) if bench is None else {}
    return Spec("convolution.depthwise", variant, make, call, make_bench, lengths, implementations=(), **lengths_bench)


SPECS = [
    _spec("causal", (1, 7, 129), 4, 6, bench=512, return_state=True),
    _spec("around-shared", (1, 63), 7, 2, is_causal=False, masked=True),
    _spec("per-token", (1, 7, 129), 5, 3, bench=16, per_token=True),
    _spec("per-token-around", (63,), 6, 3, per_token=True, masked=True, is_causal=False),
    _spec("around-segments", (63,), 7, 2, is_causal=False, segments=True),
    _spec("wide-masked", (7, 63), 40, 1, return_state=True, masked=True),
]
