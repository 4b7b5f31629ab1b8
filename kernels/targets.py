"""Named calls of the shapes that papers and peers publish times of: for benchmarks and the tuner on a GPU, too large for tests.

A name ends with its shape: softmax.attention/causal-2x16384x16x128 has B, T, N, H = 2, 16384, 16, 128.
"""

import functools

import jax.numpy as jnp

from subquad.kernels import linear, scan, softmax, strided
from subquad.kernels.specs import Spec

# (B, T, N, H): those of flash-linear-attention (the first and the third of its registry), tokamax's, and those in between.
ATTENTION = (
    (2, 16384, 16, 128), (1, 16384, 16, 128), (1, 16384, 16, 64), (1, 16384, 32, 64), (2, 8192, 16, 128), (4, 2048, 16, 128),
    (8, 1024, 8, 64), (32, 512, 16, 128),
)  # fmt: skip
SCANS = ((8, 16384, 1536),)  # (B, T, D), of accelerated-scan
CALLS = {
    "softmax.attention/full": softmax.attention,
    "softmax.attention/causal": functools.partial(softmax.attention, is_causal=True),
    "softmax.attention/window-256": functools.partial(softmax.attention, is_causal=True, window_size=255),
    "strided.attention/stride-128": functools.partial(strided.attention, stride=128, window_size=128, is_causal=True),
    "linear.attention/causal": functools.partial(linear.attention, is_causal=True),
}


def _draw(operation, shape, length, dtype, rng):
    """Of another length than the shape's where the reference needs a shorter one."""
    batch, _, heads, features = shape
    query, key, value = (jnp.asarray(rng.normal(size=(batch, length, heads, features)), dtype) for _ in range(3))
    if operation == "linear.attention":  # features that a map made
        query, key = abs(query), abs(key)
    return dict(query=query, key=key, value=value)


def _draw_scan(shape, length, dtype, rng):
    """Decays from 0.8 to 1."""
    tokens = shape[0], length, shape[2]
    decay, inputs = rng.uniform(0.8, 1, tokens), rng.normal(size=tokens)
    return dict(decay=jnp.asarray(decay, dtype), inputs=jnp.asarray(inputs, dtype))


def _target(name, shape, make, function):
    operation, variant = name.split("/")
    call = lambda arrays, implementation: function(**arrays, implementation=implementation)
    variant = f"{variant}-{'x'.join(map(str, shape))}"
    return Spec(operation, variant, make, call, make, lengths=(), bench_lengths=(shape[1],))


TARGETS = [
    *(
        _target(name, shape, functools.partial(_draw, name.split("/")[0], shape), function)
        for name, function in CALLS.items()
        for shape in ATTENTION
    ),
    *(_target("scan.first_order/real", shape, functools.partial(_draw_scan, shape), scan.first_order) for shape in SCANS),
]
