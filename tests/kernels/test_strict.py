"""Every operation traces where JAX promotes nothing: neither ranks nor dtypes."""

import contextlib

import jax
import pytest

from subquad.kernels import launch, specs

SPECS = specs.load()


@contextlib.contextmanager
def strict():
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


def trace(spec, implementation, length, dtype):
    """Values and gradients, without what was traced before under other rules."""
    arrays = spec.draw(length, dtype)
    inexact, rest = specs.split(arrays)
    jax.clear_caches()
    with launch.recording() if implementation == "triton" else contextlib.nullcontext(), strict():
        outputs = jax.eval_shape(specs.forward(spec, implementation, rest), inexact)
        return jax.eval_shape(specs.forward_backward(spec, implementation, rest), inexact, outputs)


@pytest.mark.parametrize("implementation", ["xla", "reference", "triton"])
@pytest.mark.parametrize("name", SPECS)
def test_nothing_is_promoted(name, implementation):
    spec = SPECS[name]
    if implementation == "triton" and "interpret" not in spec.implementations:
        pytest.skip(f"{name} has no 'triton'")
    trace(spec, implementation, next(length for length in spec.lengths if length > 1), "float32")
