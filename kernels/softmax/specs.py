"""The calls of `softmax.attention` that tests and benchmarks share."""

import functools

import jax.numpy as jnp

from subquad.kernels import softmax
from subquad.kernels.patterns import Band, Globals, InBlocks, Random
from subquad.kernels.specs import LENGTHS, Spec, over_heads


def draw(length, dtype, rng, *, batch=2, heads=3, kv_heads=None, features=16, values=None, keys=None):
    """Query, key and value of normal numbers."""
    keys, kv_heads = keys or length, kv_heads or heads
    normal = lambda *shape: jnp.asarray(rng.normal(size=(batch, *shape)), dtype)
    return dict(
        query=normal(length, heads, features),
        key=normal(keys, kv_heads, features),
        value=normal(keys, kv_heads, values or features),
    )


def bench(length, dtype, rng):
    return draw(length, dtype, rng, batch=1, heads=4, features=64)


def segmented(length, dtype, rng):
    """Grouped heads, other value features, packed segments, padding and more keys than queries."""
    keys = length + 5
    arrays = draw(length, dtype, rng, heads=4, kv_heads=2, features=24, values=40, keys=keys)
    segments = lambda size: jnp.asarray(rng.integers(0, 3, (2, size)).cumsum(1) * 3 // max(size, 1), jnp.int32)
    return arrays | dict(
        query_segment_ids=segments(length),
        key_segment_ids=segments(keys),
        mask=jnp.asarray(rng.random((2, 1, 1, keys)) < 0.8),
    )


def biased(length, dtype, rng):
    """A learned bias that all samples share."""
    bias = jnp.asarray(rng.normal(size=(1, 3, length, length)), dtype)
    return draw(length, dtype, rng) | dict(bias=bias, mask=jnp.asarray(rng.random((2, 1, length, length)) < 0.7))


def biased_bench(length, dtype, rng):
    return bench(length, dtype, rng) | dict(bias=jnp.asarray(rng.normal(size=(1, 4, length, length)), dtype))


def few_keys(length, dtype, rng):
    """Many queries, few keys, as low-rank attention has them; the log-sum-exp counts as well."""
    return draw(length, dtype, rng, keys=min(32, length))


def few_keys_bench(length, dtype, rng):
    return draw(length, dtype, rng, batch=1, heads=4, features=64, keys=256)


def call(return_lse=False, **options):
    def attend(arrays, implementation):
        return softmax.attention(**arrays, **options, return_lse=return_lse, implementation=implementation)

    return attend


# A window and global tokens, and random blocks of each head.
GLOBALS = Band(20, 9) | Globals(0, 3) | InBlocks(16, Random(2, 64, 0, 1, ~Band(1, 1)))

# Without the log-sum-exp, since cuDNN has none to give. At length 1 gradients are differences of equal numbers: left out.
PLAIN = dict(make_bench=bench, lengths=LENGTHS[1:], implementations=("cudnn", "triton", "interpret"))
SPECS = [
    Spec("softmax.attention", "full", draw, call(), **PLAIN),
    Spec("softmax.attention", "causal", draw, call(is_causal=True), **PLAIN),
    Spec("softmax.attention", "window", draw, call(window_size=(20, 9), return_lse=True), make_bench=bench),
    Spec("softmax.attention", "globals", draw, call(pattern=GLOBALS, return_lse=True), make_bench=bench, bench_lengths=()),
    Spec(
        "softmax.attention",
        "segments",
        segmented,
        call(is_causal=True, return_lse=True),
        lengths=LENGTHS[1:],
        bench_lengths=(),
    ),
    Spec("softmax.attention", "bias", biased, call(return_lse=True), make_bench=biased_bench, bench_lengths=(1024,)),
    Spec("softmax.attention", "few-keys", few_keys, call(return_lse=True), make_bench=few_keys_bench),
]


def grid_draw(head, length, dtype, rng, *, kv_heads=4, **more):
    arrays = draw(length, dtype, rng, heads=4, kv_heads=kv_heads, features=head)
    return arrays | {name: make(length, dtype, rng) for name, make in more.items()}


MORE = dict(
    mask=lambda length, dtype, rng: jnp.asarray(rng.random((2, 1, length, length)) < 0.7),
    bias=lambda length, dtype, rng: jnp.asarray(rng.normal(size=(1, 4, length, length)), dtype),
    query_segment_ids=lambda length, dtype, rng: jnp.zeros((2, length), jnp.int32),
    key_segment_ids=lambda length, dtype, rng: jnp.zeros((2, length), jnp.int32),
    query_positions=lambda length, dtype, rng: jnp.arange(length, dtype=jnp.int32)[None],
    key_positions=lambda length, dtype, rng: jnp.arange(length, dtype=jnp.int32)[None],
)


def over(kind, *names, kv_heads=4, **options):
    """A kind of call with these of `MORE`, at every size of a head."""
    more = {name: MORE[name] for name in names}
    make = functools.partial(grid_draw, kv_heads=kv_heads, **more)
    return over_heads("softmax.attention", kind, make, call(**options, return_lse=True), most=128)


GRID = [
    *over("everything", *MORE, kv_heads=2, window_size=(700, 700)),
    *over("plain"),
    *over("causal", is_causal=True),
    *over("mask", "mask"),
    *over("segments", "query_segment_ids", "key_segment_ids", is_causal=True),
    *over("bias", "bias", is_causal=True),
    *over("grouped", kv_heads=1, is_causal=True),
    *over("positions", "query_positions", "key_positions", is_causal=True),
    *over("window", "query_positions", "key_positions", window_size=(20, 9)),
]
