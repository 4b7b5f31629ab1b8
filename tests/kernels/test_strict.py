"""Every operation traces where JAX is told to raise at what promotes ranks or dtypes."""

import contextlib

import jax
import jax.numpy as jnp
import pytest

from subquad.kernels import launch, linear, lsh, softmax, specs, ssm

SPECS = specs.load()
FIRST = set({spec.operation: name for name, spec in reversed(SPECS.items())}.values())  # the first call of each operation
KINDS = (("xla", "float32"), ("xla", "bfloat16"), ("reference", "float32"), ("triton", "bfloat16"))
LENGTH = 11  # of no other test: what was traced before under other rules would be taken as it is


def strict(stack):
    stack.enter_context(jax.numpy_rank_promotion("raise"))
    stack.enter_context(jax.numpy_dtype_promotion("strict"))


def cases():
    """Calls with an implementation and a dtype; of all but the first of each operation a sample of the half precision."""
    for name, spec in SPECS.items():
        for implementation, dtype in KINDS:
            if implementation != "triton" or "interpret" in spec.implementations:
                is_sampled = dtype == "bfloat16" and name not in FIRST
                marks = pytest.mark.sample(2) if is_sampled else ()
                yield pytest.param(name, implementation, dtype, marks=marks, id=f"{name}-{implementation}-{dtype}")


@pytest.mark.parametrize(("name", "implementation", "dtype"), list(cases()))
def test_values_and_gradients_are_traced(name, implementation, dtype):
    spec = SPECS[name]
    inexact, rest = specs.split(spec.draw(LENGTH, dtype))
    forward = specs.forward(spec, implementation, rest)

    def pulled(function, inexact):
        outputs, pull = jax.vjp(function, inexact)
        return outputs, pull(outputs)

    with contextlib.ExitStack() as stack:
        if implementation == "triton":
            stack.enter_context(launch.recording())
        strict(stack)
        jax.eval_shape(lambda x: pulled(forward, x), inexact)
        if name in FIRST:  # of what was compiled: the passes are then traced after the operation has returned
            jax.eval_shape(lambda x: pulled(jax.jit(forward), x), inexact)


def test_a_system_is_discretised():
    with contextlib.ExitStack() as stack:
        strict(stack)
        for method in ("bilinear", "zoh"):
            jax.eval_shape(lambda x, step, m=method: ssm.discretize(x, step, m), -jnp.ones((2, 3), complex), jnp.ones(2))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_functions_that_choose_no_implementation(dtype):
    x, lse, projection = jnp.ones((1, LENGTH, 2, 4), dtype), jnp.zeros((1, LENGTH, 2)), jnp.ones((3, 4))
    calls = [
        lambda x, lse: softmax.merge([x, x], [lse, lse]),
        lambda x, _: linear.softmax_features(x, projection),
        lambda x, _: linear.relu_features(x, projection),
        lambda x, _: lsh.normalize(x),
    ]
    with contextlib.ExitStack() as stack:
        strict(stack)
        for call in calls:
            jax.eval_shape(lambda x, y, call=call: (lambda out, pull: pull(out))(*jax.vjp(call, x, y)), x, lse)


def test_what_a_caller_mixes_is_still_refused():
    """The rules are the caller's own where arguments meet."""
    x = jnp.ones((1, LENGTH, 1, 4))
    with contextlib.ExitStack() as stack, pytest.raises(Exception, match="promotion"):
        strict(stack)
        jax.eval_shape(lambda x: softmax.attention(x, x.astype(jnp.bfloat16), x), x)
