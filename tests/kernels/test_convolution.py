"""Long convolution against a float64 sum, and what it costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subquad.kernels import machine_code, specs
from subquad.kernels.convolution import convolve, xla

IMPLEMENTATIONS = ("xla", "reference")
by_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def direct(inputs, kernel, anticausal):
    """The definition, one pair of tokens at a time, in float64."""
    outputs = np.zeros(inputs.shape)
    for t in range(inputs.shape[1]):
        for s in range(inputs.shape[1]):
            if 0 <= t - s < kernel.shape[1]:
                outputs[:, t] += kernel[:, t - s].astype(float) * inputs[:, s]
            if anticausal is not None and 0 <= s - t - 1 < anticausal.shape[1]:
                outputs[:, t] += anticausal[:, s - t - 1].astype(float) * inputs[:, s]
    return outputs


@by_implementation
@pytest.mark.parametrize("two_sided", [False, True], ids=["causal", "two-sided"])
@pytest.mark.parametrize("length,taps,ahead", [(1, 1, 1), (7, 7, 7), (63, 63, 63), (64, 5, 1), (100, 130, 170), (101, 1, 60)])
def test_against_the_direct_sum(implementation, two_sided, length, taps, ahead):
    inputs, kernel = random(2, length, 3), random(3, taps, seed=1)
    anticausal = random(3, ahead, seed=2) if two_sided else None
    y = convolve(inputs, kernel, anticausal, implementation=implementation)
    np.testing.assert_allclose(y, direct(inputs, kernel, anticausal), atol=2e-5)


@pytest.mark.parametrize("length,taps,ahead", [(1, 1, 1), (33, 33, 33), (40, 9, 50)])
def test_gradients(length, taps, ahead):
    arguments = random(2, length, 6), random(6, taps, seed=1), random(6, ahead, seed=2)
    weights = random(2, length, 6, seed=3)

    def gradients(implementation):
        loss = lambda *a: jnp.sum(weights * jnp.sin(convolve(*a, implementation=implementation)))
        return jax.grad(loss, argnums=(0, 1, 2))(*arguments)

    for ours, expected in zip(gradients("xla"), gradients("reference"), strict=True):
        np.testing.assert_allclose(ours, expected, atol=5e-5)


def test_the_present_token_counts_once():
    impulse = jnp.zeros((1, 7, 1)).at[0, 3].set(1.0)
    y = convolve(impulse, jnp.array([[1.0, 2.0, 3.0]]), jnp.array([[10.0, 20.0]]))
    np.testing.assert_allclose(y[0, :, 0], [0, 20, 10, 1, 2, 3, 0], atol=1e-5)


@pytest.mark.parametrize("features", [12, 13])  # 13: no divisor but itself
def test_groups_change_nothing(monkeypatch, features):
    inputs, kernel, anticausal = random(2, 50, features), random(features, 50, seed=1), random(features, 50, seed=2)
    loss = lambda *a: jnp.sum(convolve(*a) ** 2)
    run = lambda: jax.value_and_grad(loss, argnums=(0, 1, 2))(inputs, kernel, anticausal)
    whole = run()
    monkeypatch.setattr(xla, "CPU_BYTES", 2500)
    assert xla._circle_and_groups(2500, inputs, kernel, anticausal)[1] > 1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4), run(), whole)


def test_fast_length_is_the_smallest_even_product_of_2_3_5():
    def smooth(n):
        for prime in (2, 3, 5):
            while n % prime == 0:
                n //= prime
        return n == 1

    for length in [*range(1, 300), 4095, 4096, 4097, 8191]:
        expected = next(n for n in range(length, 2 * length + 2) if n % 2 == 0 and smooth(n))
        assert xla.fast_length(length) == expected, length


@by_implementation
def test_bfloat16(implementation):
    inputs, kernel = random(2, 60, 3), random(3, 60, seed=1)
    low = jnp.asarray(inputs, jnp.bfloat16)
    y = convolve(low, kernel, implementation=implementation)
    assert y.dtype == jnp.bfloat16
    exact = direct(np.asarray(low, np.float32), kernel, None)
    np.testing.assert_allclose(y.astype(jnp.float32), exact, rtol=1e-2, atol=1e-4)
    gradient = jax.grad(lambda u: convolve(u, kernel, implementation=implementation).astype(jnp.float32).sum())(low)
    assert gradient.dtype == jnp.bfloat16


def test_a_loud_future_stirs_only_rounding():
    inputs, kernel = random(1, 64, 4), random(4, 64, seed=1)
    loud = inputs.copy()
    loud[:, 40] *= 1e3
    change = np.abs(convolve(loud, kernel) - convolve(inputs, kernel))[:, :40]
    assert change.max() < 4 * np.finfo(np.float32).eps * np.abs(loud).max() * np.abs(kernel).sum(1).max()


def test_vmap():
    inputs, kernel = random(3, 2, 20, 4), random(3, 4, 20, seed=1)
    y = jax.vmap(convolve)(inputs, kernel)
    np.testing.assert_allclose(y, [convolve(u, k) for u, k in zip(inputs, kernel, strict=True)], atol=1e-5)


def test_memory_stays_a_few_times_the_inputs():
    def temporary(length, step):
        shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((8, length, 64), (64, length), (64, length))]
        return jax.jit(step).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    gradient = jax.grad(lambda *a: jnp.sum(convolve(*a) ** 2), argnums=(0, 1, 2))
    for step, limit in ((convolve, 3.5), (gradient, 6.0)):
        used = temporary(4096, step)
        # Spectra of the inputs alone would be twice the inputs, those of the backward twice that again.
        assert used < limit * 8 * 4096 * 64 * 4
        assert used < 2.2 * temporary(2048, step)


@pytest.mark.aot
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_machine_code(dtype):
    """No spills; tensor cores, and float32 taps multiplied as such or as two of 16 bits."""
    launches = specs.launches(specs.find("convolution.convolve/two-sided"), dtype)
    assert len(launches) == 2  # forward and back; the gradient of the taps
    for launched in launches:
        compiled = machine_code.compile(launched, "sm_90")
        assert compiled.fits and compiled.stack == 0 and compiled.transposes == 0, compiled
        assert compiled.tensor_core > 0 and not compiled.float64, compiled
        assert compiled.precisions <= {"tf32x3"}, compiled


def test_bad_input_is_named():
    inputs, kernel = jnp.ones((1, 5, 3)), jnp.ones((3, 5))
    with pytest.raises(ValueError, match="convolve: inputs must have shape"):
        convolve(inputs[0], kernel)
    with pytest.raises(ValueError, match="convolve: kernel must have shape \\[3, L\\]"):
        convolve(inputs, kernel[:2])
    with pytest.raises(ValueError, match="convolve: anticausal must have shape"):
        convolve(inputs, kernel, kernel[:, :0])
    with pytest.raises(NotImplementedError, match="triton"):
        convolve(inputs, kernel, implementation="triton")
    with pytest.raises(ValueError, match="implementation"):
        convolve(inputs, kernel, implementation="fft")
