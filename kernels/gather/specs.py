"""Named calls of attention to listed keys."""

import jax.numpy as jnp
import numpy as np

from subquad.kernels import gather
from subquad.kernels.softmax.specs import draw
from subquad.kernels.specs import Spec


def make(length, dtype, rng, *, most=9, block_size=1, lists=None, is_masked=False, **options):
    """Lists drawn with repetition, some of whose places are empty or out of range."""
    arrays = draw(length, dtype, rng, **options)
    keys, heads = arrays["key"].shape[1], lists or arrays["query"].shape[2]
    blocks = -(-length // block_size)
    arrays["indices"] = jnp.asarray(rng.integers(-1, keys + 1, (2, heads, blocks, most)), jnp.int32)
    if is_masked:
        arrays["mask"] = jnp.asarray(rng.random((2, 1, 1, keys)) < np.float32(0.7))
    return arrays


def make_bench(length, dtype, rng):
    """32 keys for each query."""
    arrays = draw(length, dtype, rng, batch=1, heads=4, features=64)
    return arrays | dict(indices=jnp.asarray(rng.integers(0, length, (1, 4, length, 32)), jnp.int32))


def make_blocks_bench(length, dtype, rng):
    """128 keys for each 16 queries."""
    arrays = draw(length, dtype, rng, batch=1, heads=4, features=64)
    return arrays | dict(indices=jnp.asarray(rng.integers(0, length, (1, 4, -(-length // 16), 128)), jnp.int32))


def call(**options):
    return lambda arrays, implementation: gather.attention(**arrays, **options, implementation=implementation)


def spec(variant, make, call, make_bench=None, lengths=(7, 129)):
    benches = {} if make_bench else dict(bench_lengths=())
    return Spec("gather.attention", variant, make, call, make_bench, lengths, implementations=(), **benches)


SPECS = [
    spec("each", make, call(return_lse=True), make_bench, (1, 7, 129)),
    spec(
        "each-causal-masked",
        lambda *a: make(*a, is_masked=True, heads=4, kv_heads=2, lists=1, values=5, keys=a[0] + 3),
        call(is_causal=True, return_lse=True), lengths=(63,),
    ),
    spec("blocks", lambda *a: make(*a, block_size=16, most=30), call(block_size=16), make_blocks_bench),
    spec(
        "blocks-counted-causal", lambda *a: make(*a, block_size=5, heads=4, kv_heads=2, lists=2, is_masked=True),
        call(block_size=5, is_causal=True, correct_duplicates=False), lengths=(63,),
    ),
]  # fmt: skip
