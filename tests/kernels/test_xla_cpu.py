"""Halves as bits: the same numbers, and no silent second derivative of zero."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subquad.kernels import linear, xla_cpu


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_bits_and_back(dtype):
    array = jnp.asarray([0.0, -1.5, jnp.inf, 3e-5], dtype)
    there = xla_cpu.to_uint_bits(array)
    assert there.dtype == xla_cpu.uint_bits_dtype(array.dtype)
    np.testing.assert_array_equal(xla_cpu.from_uint_bits(there, array.dtype), array)


def curvature(x, implementation):
    def loss(x):
        out = linear.attention(jnp.abs(x), jnp.abs(x) + 0.1, x, is_causal=True, implementation=implementation)
        return jnp.sum(out.astype(jnp.float32) ** 2)

    return jax.jit(jax.grad(lambda x: jnp.sum(jax.grad(loss)(x).astype(jnp.float32) ** 2)))(x)


def test_a_second_derivative_in_half_precision_is_refused_where_bits_are_moved():
    x = jax.random.normal(jax.random.key(0), (1, 9, 2, 4))
    want = curvature(x, "reference")
    most = float(jnp.abs(want).max())
    np.testing.assert_allclose(curvature(x, "xla"), want, atol=1e-4 * most)
    if not xla_cpu.MOVES_HALF_AS_FLOAT32:
        np.testing.assert_allclose(curvature(x.astype(jnp.bfloat16), "xla"), want, atol=0.05 * most)
        return
    with pytest.raises(NotImplementedError, match='order must be 1 in bfloat16 .* implementation="reference"'):
        curvature(x.astype(jnp.bfloat16), "xla")
    assert jnp.abs(curvature(x.astype(jnp.bfloat16), "reference")).max() > 0


def test_parts_come_together_where_they_lie():
    x, y = jnp.arange(24.0).reshape(2, 3, 4), jnp.arange(4, dtype=jnp.bfloat16)

    def function(x, y, nothing):
        assert x.shape == (2, 3, 2) and y.shape == (2,) and nothing is None
        return x * y.astype(x.dtype), None, y + 1

    product, nothing, more = xla_cpu.map_parts(function, 2, (x, y, None), (2, 0, 0), (2, 0, 0), after=x)
    np.testing.assert_array_equal(product, x * y.astype(x.dtype))
    np.testing.assert_array_equal(more, y + 1)
    assert nothing is None and more.dtype == jnp.bfloat16


@pytest.mark.parametrize("ends", [(3, 0), (0, 3)])
def test_zeros_depend_on_an_array_that_is_zero_at_its_ends(ends):
    def zeros(x):
        return xla_cpu.zeros_depending_on((jnp.arange(4), jnp.pad(x, ends)), (5, 2), jnp.bfloat16)

    zeros = jax.jit(zeros).trace(jnp.full(9, -jnp.nan)).lower().compile()
    assert "shift-right-logical" in zeros.as_text(), "XLA has found out that these are zeros, and makes them when it likes"
    np.testing.assert_array_equal(zeros(jnp.full(9, -jnp.nan)), jnp.zeros((5, 2)))
