"""Named calls of `scan.first_order`."""

import jax.numpy as jnp
import numpy as np

from subquad.kernels import scan
from subquad.kernels.specs import Spec


def _make(is_complex=False, constant=False, shared=False, size=(2, 5)):
    def make(length, dtype, rng):
        """Moduli from 0.8 to 1: a memory of tens of steps, and no overflow at any length."""
        batch, features = size
        dtype = jnp.complex64 if is_complex else dtype
        shape = (1 if shared else batch, 1 if constant else length, features)
        draw = lambda *shape: rng.normal(size=shape) + (1j * rng.normal(size=shape) if is_complex else 0)
        decay = draw(*shape)
        return dict(
            decay=jnp.asarray(rng.uniform(0.8, 1, shape) * decay / np.abs(decay), dtype),
            inputs=jnp.asarray(draw(batch, length, features), dtype),
            initial_state=jnp.asarray(draw(batch, features), jnp.complex64 if is_complex else jnp.float32),
        )

    return make


def _spec(variant, reverse=False, **options):
    def call(arrays, implementation):
        return scan.first_order(**arrays, reverse=reverse, implementation=implementation)

    return Spec("scan.first_order", variant, _make(**options), call, make_bench=_make(**options, size=(1, 256)))


SPECS = [
    _spec("real"),
    _spec("real-reversed-shared", reverse=True, shared=True),
    _spec("real-constant", constant=True),
    _spec("complex", is_complex=True),
    _spec("complex-reversed-constant", reverse=True, is_complex=True, constant=True, shared=True),
]
