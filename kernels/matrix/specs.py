"""Named calls of `matrix.pseudo_inverse` and `matrix.sinkhorn`; the length is the size M of the matrices."""

import jax.numpy as jnp
import numpy as np

from subquad.kernels import matrix
from subquad.kernels.specs import Spec

LENGTHS = (1, 7, 16, 63, 100)
BENCH_LENGTHS = (32, 64, 128)


def _make(kind, size=(1, 3)):
    def make(length, dtype, rng):
        values = rng.normal(size=(*size, length, length))
        if kind == "matrix":
            # Singular values from 1 to 3, so that what is compared is the iteration and not its input's rounding.
            values = 2 * np.eye(length) + values / np.sqrt(length)
        return {kind: jnp.asarray(values, dtype)}

    return make


def _spec(operation, variant, **options):
    def call(arrays, implementation):
        return getattr(matrix, operation)(**arrays, **options, implementation=implementation)

    kind = "matrix" if operation == "pseudo_inverse" else "logits"
    return Spec(
        f"matrix.{operation}", variant, _make(kind), call, make_bench=_make(kind, size=(1, 4)), lengths=LENGTHS,
        bench_lengths=BENCH_LENGTHS,
    )  # fmt: skip


SPECS = [
    _spec("pseudo_inverse", "six-iterations"),
    _spec("pseudo_inverse", "three-iterations", iterations=3),
    _spec("sinkhorn", "plain"),
    _spec("sinkhorn", "causal", is_causal=True, iterations=5),
]
