"""With jax_enable_x64, a call with one argument of 64 bits is the call whose arguments all have 64 bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subquad.kernels import entmax, launch, linear, scan, specs

SPECS = specs.load()
FIRST = set({spec.operation: name for name, spec in reversed(SPECS.items())}.values())  # the first call of each operation

KEEPS = {"relative.attention": "value", "convolution.convolve": "inputs"}  # whose dtype their results have


def dtypes(tree):
    return [x.dtype for x in jax.tree.leaves(tree)]


def in_bits(x, bits):
    return jnp.asarray(x, f"complex{2 * bits}" if jnp.iscomplexobj(x) else f"float{bits}")


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("name", [pytest.param(x, marks=() if x in FIRST else pytest.mark.sample(5)) for x in SPECS])
def test_one_argument_of_another_width(name, implementation):
    """Each alone wide, then each alone narrow: results as of wide ones, gradients as their arguments."""
    spec = SPECS[name]
    with jax.enable_x64(True):
        inexact, rest = specs.split(spec.draw(7))
        forward = specs.forward(spec, implementation, rest)
        wide = dtypes(jax.eval_shape(forward, specs.widen(inexact)))
        # What a call makes its decays from before it calls the operation is rounded there.
        for one in () if len(inexact) == 1 else [key for key in inexact if key != "log_step"]:
            for its, others in ((64, 32), (32, 64)):
                mixed = {key: in_bits(x, its if key == one else others) for key, x in inexact.items()}
                outputs = jax.eval_shape(forward, mixed)
                kept = mixed[KEEPS[spec.operation]].dtype if spec.operation in KEEPS else None
                assert dtypes(outputs) == (wide if kept is None else [kept]), one
                _, gradients = jax.eval_shape(specs.forward_backward(spec, implementation, rest), mixed, outputs)
                assert dtypes(gradients) == dtypes(mixed), one


def test_the_narrow_ones_are_widened_and_no_wide_one_is_rounded():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
        q, k, v, decay, state = draw(1, 9, 2, 4), draw(1, 9, 2, 4), draw(1, 9, 2, 4), -abs(draw(1, 9, 2)), draw(1, 2, 4, 4)
        calls = [
            (lambda q, k, s: linear.gated(q, k, v, decay, initial_state=s), (q, k, state)),
            (lambda a, b, s: scan.first_order(a, b, s)[0], (decay, q[..., 0], state[..., 0, 0])),
            (lambda q, k, a: entmax.attention(q, k, v, a), (q, k, jnp.full(2, 1.3, jnp.float32))),
        ]
        for call, arrays in calls:
            want = call(*(x.astype(jnp.float64) for x in arrays))
            for i in range(3):
                got = call(*(x.astype(jnp.float64) if i == j else x for j, x in enumerate(arrays)))
                np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-14)


def test_without_x64_an_array_of_numpy_is_narrow():
    """Also for a kernel that declines float64: what is launched takes float32."""
    x = np.ones((1, 40, 2, 16))
    with launch.recording():
        shape = jax.eval_shape(lambda: linear.gated(x, x.astype(np.float32), jnp.ones(x.shape), implementation="triton"))
    assert shape.dtype == linear.gated(x, x, x).dtype == jnp.float32
