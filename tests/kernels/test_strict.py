"""Every operation traces where JAX is told to raise at what promotes ranks or dtypes."""

import contextlib

import jax
import jax.numpy as jnp
import pytest

from subquad.kernels import launch, linear, lsh, softmax, specs, ssm

SPECS = specs.load()
LENGTH = 11  # of no other test: what was traced before under other rules would be taken as it is


def strict(stack):
    stack.enter_context(jax.numpy_rank_promotion("raise"))
    stack.enter_context(jax.numpy_dtype_promotion("strict"))


@pytest.mark.parametrize(
    ("implementation", "dtype"), [("xla", "float32"), ("xla", "bfloat16"), ("reference", "float32"), ("triton", "bfloat16")]
)
@pytest.mark.parametrize("name", SPECS)
def test_values_and_gradients_are_traced(name, implementation, dtype):
    spec = SPECS[name]
    if implementation == "triton" and "interpret" not in spec.implementations:
        pytest.skip(f"{name} has no 'triton'")
    inexact, rest = specs.split(spec.draw(LENGTH, dtype))
    with contextlib.ExitStack() as stack:
        if implementation == "triton":
            stack.enter_context(launch.recording())
        strict(stack)
        outputs = jax.eval_shape(specs.forward(spec, implementation, rest), inexact)
        # Both at once, and a gradient of what was compiled: the passes are then traced after the operation has returned.
        jax.eval_shape(specs.forward_backward(spec, implementation, rest), inexact, outputs)
        late = jax.jit(specs.forward(spec, implementation, rest))
        jax.eval_shape(lambda x, y: jax.vjp(late, x)[1](y), inexact, outputs)


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
