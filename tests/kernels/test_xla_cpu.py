"""Halves as bits: the same numbers, and no silent second derivative of zero; arrays laid as asked."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange

from subquad.kernels import linear, xla_cpu
from subquad.lra.bench import measure


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


def test_a_second_derivative_in_half_precision_is_refused():
    x = jax.random.normal(jax.random.key(0), (1, 9, 2, 4))
    want = curvature(x, "reference")
    np.testing.assert_allclose(curvature(x, "xla"), want, atol=1e-4 * float(jnp.abs(want).max()))
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


def turn(x):
    return rearrange(x, "b (j s) k h -> j b k h s", j=8)


def test_what_is_laid_is_copied_once():
    def temporary(turn):
        def loop(x):
            tiles = turn(x)
            return jax.lax.scan(lambda carry, i: (carry + tiles[i], None), jnp.zeros(tiles.shape[1:]), jnp.arange(4))[0]

        return measure.memory(loop, jax.ShapeDtypeStruct((1, 1024, 4, 64), "float32")).temporary

    size = 1024 * 4 * 64 * 4
    assert temporary(turn) > 2 * size  # else nobody needs `laid`
    assert temporary(lambda x: xla_cpu.row_major(turn(x))) < 1.1 * size


def test_laid_is_the_identity_under_every_transformation():
    function = lambda x: xla_cpu.row_major(turn(x))
    x = jax.random.normal(jax.random.key(0), (2, 8, 3, 4))
    want = turn(x)
    np.testing.assert_array_equal(function(x), want)
    np.testing.assert_array_equal(jax.jit(function)(x), want)
    np.testing.assert_array_equal(jax.jit(jax.vmap(function, 2, 2))(jnp.stack([x, 2 * x], 2))[:, :, 1], 2 * want)
    np.testing.assert_array_equal(jax.grad(lambda x: jnp.sum(function(x) * want))(x), x)
    exported = jax.export.export(jax.jit(function), platforms=("cpu", "cuda", "tpu"))(x)
    np.testing.assert_array_equal(exported.call(x), want)


SHARED = """
import jax
from subquad.kernels import xla_cpu
mesh = jax.make_mesh((1, 2), ("one", "two"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
x = jax.ShapeDtypeStruct((2, 16, 4), "float32", sharding=jax.sharding.NamedSharding(mesh, jax.P("two")))
turn = lambda x: xla_cpu.row_major(x.swapaxes(1, 2)) * 2
part = lambda axes, spec: jax.shard_map(turn, mesh=mesh, in_specs=spec, out_specs=spec, axis_names=axes, check_vma=False)
for function in (turn, part({"one"}, jax.P()), part({"one", "two"}, jax.P("two"))):
    text = jax.jit(function).lower(x).compile().as_text()
    assert "f32[1,4,16]" in text and "gather" not in text, text
"""


def test_what_several_devices_share_is_not_gathered():
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", SHARED], capture_output=True, text=True, env={**os.environ, **flags})
    assert done.returncode == 0, done.stderr[-3000:]
