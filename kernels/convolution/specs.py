"""Named calls of the long convolution. Taps are float32 whatever the dtype of the tokens, as state space models make them."""

import jax.numpy as jnp

from subquad.kernels import convolution
from subquad.kernels.specs import LENGTHS, Spec


def _make(taps=None, ahead=False, segments=False, size=(2, 3)):
    """`taps`: how many towards each side; None: as many as tokens."""

    def make(length, dtype, rng):
        batch, features = size
        draw = lambda: jnp.asarray(rng.normal(size=(features, taps or length)), jnp.float32)
        arrays = dict(inputs=jnp.asarray(rng.normal(size=(batch, length, features)), dtype), kernel=draw())
        arrays |= dict(anticausal=draw()) if ahead else {}
        ids = jnp.asarray((rng.random((batch, length)) < 0.1).cumsum(1) % 3, jnp.int32)
        return arrays | dict(segment_ids=ids) if segments else arrays

    return make


def _spec(variant, lengths=(63, 129), **options):
    def call(arrays, implementation):
        return convolution.convolve(**arrays, implementation=implementation)

    make, bench = _make(**options), _make(**options, size=(1, 256))
    return Spec("convolution.convolve", variant, make, call, bench, lengths, implementations=())


SPECS = [
    _spec("causal"),
    _spec("two-sided", LENGTHS, ahead=True),
    _spec("two-sided-short", (7, 63, 129), ahead=True, taps=37),
    _spec("causal-segments", (63,), segments=True),
    _spec("two-sided-short-segments", (129,), ahead=True, taps=37, segments=True),
]
