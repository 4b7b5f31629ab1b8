"""Named calls of alpha-entmax."""

import jax.numpy as jnp
import numpy as np

from subquad.kernels import entmax
from subquad.kernels.softmax.specs import bench, draw
from subquad.kernels.specs import Spec

# A token alone has one weight, of 1, whatever the logits: a gradient of 0, of which no error is a fraction.
LENGTHS = (7, 129)


def make(length, dtype, rng, is_masked=False, alphas=None, **options):
    arrays = draw(length, dtype, rng, features=8, **options)
    if is_masked:
        arrays["mask"] = jnp.asarray(rng.random((2, 1, length, arrays["key"].shape[1])) < np.float32(0.6))
    return arrays if alphas is None else arrays | dict(alpha=jnp.asarray(alphas, jnp.float32))


def make_bench(length, dtype, rng):
    return bench(length, dtype, rng) | dict(alpha=jnp.asarray([1.2, 1.4, 1.6, 1.8], jnp.float32))


def make_logits(length, dtype, rng, size=(2, 3)):
    return dict(logits=jnp.asarray(2 * rng.normal(size=(size[0], length, size[1])), dtype))


def make_rows(length, dtype, rng):
    return make_logits(length, dtype, rng) | dict(alpha=jnp.asarray([[[1.0, 1.3, 1.9]]], jnp.float32))


def attend(**options):
    return lambda arrays, implementation: entmax.attention(**arrays, **options, implementation=implementation)


def spread(**options):
    return lambda arrays, implementation: entmax.entmax(**arrays, axis=1, **options, implementation=implementation)


FEW = dict(implementations=(), bench_lengths=())
SPECS = [
    Spec("entmax.attention", "plain", make, attend(), bench, LENGTHS, implementations=()),
    Spec(
        "entmax.attention", "alphas-causal", lambda *a: make(*a, alphas=[1.1, 1.5, 1.9]), attend(is_causal=True),
        make_bench, LENGTHS, implementations=(),
    ),
    Spec(
        "entmax.attention", "sparsemax-masked",
        lambda *a: make(*a, is_masked=True, heads=4, kv_heads=2, keys=a[0] + 3, values=5), attend(alpha=2.0),
        lengths=(63,), **FEW,
    ),
    Spec("entmax.entmax", "plain", make_logits, spread(), lengths=(63,), **FEW),
    Spec("entmax.entmax", "alphas", make_rows, spread(), lengths=(63,), **FEW),
]  # fmt: skip
