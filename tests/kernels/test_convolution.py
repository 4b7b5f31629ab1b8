"""Long convolution against a float64 sum, and what it costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subquad.kernels.convolution import convolve, xla

IMPLEMENTATIONS = ("xla", "reference")
by_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def direct(inputs, kernel, anticausal, runs=None):
    """The definition, one pair of tokens at a time, in float64; `runs` [T]: which of them each token belongs to."""
    outputs = np.zeros(inputs.shape)
    for t in range(inputs.shape[1]):
        for s in range(inputs.shape[1]):
            if runs is not None and runs[s] != runs[t]:
                continue
            if 0 <= t - s < kernel.shape[1]:
                outputs[:, t] += kernel[:, t - s].astype(float) * inputs[:, s]
            if anticausal is not None and 0 <= s - t - 1 < anticausal.shape[1]:
                outputs[:, t] += anticausal[:, s - t - 1].astype(float) * inputs[:, s]
    return outputs


@pytest.mark.sample(2)
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


@pytest.mark.sample(2)
@by_implementation
@pytest.mark.parametrize("two_sided", [False, True], ids=["causal", "two-sided"])
@pytest.mark.parametrize("length,taps", [(1, 1), (2, 2), (23, 23), (64, 5), (37, 60)])
def test_runs_of_equal_ids_do_not_see_each_other(implementation, two_sided, length, taps):
    inputs, kernel = random(2, length, 3), random(3, taps, seed=1)
    anticausal = jnp.asarray(random(3, taps, seed=2)) if two_sided else None
    is_first = np.random.default_rng(3).random((2, length)) < 0.15
    is_first[:, 0] = True
    ids = jnp.asarray(is_first.cumsum(1) % 2)  # an id comes again in later runs
    y = convolve(inputs, kernel, anticausal, ids, implementation=implementation)
    for sample in range(2):
        runs = is_first[sample].cumsum()
        expected = direct(inputs[sample : sample + 1], kernel, anticausal, runs)
        np.testing.assert_allclose(y[sample : sample + 1], expected, atol=2e-5)


def test_nothing_reaches_another_run():
    """Not even rounding: the run beside is as it was to the last bit, whatever stands here."""
    inputs, kernel, ids = random(1, 21, 3), random(3, 21, seed=1), jnp.asarray([0] * 6 + [1] * 8 + [0] * 7)[None]
    run = lambda x: convolve(x, kernel, kernel, ids)
    loud = run(inputs.copy() * np.where(np.asarray(ids)[0] == 1, 1e20, 1)[:, None].astype(np.float32))
    np.testing.assert_array_equal(loud[:, ids[0] == 0], run(inputs)[:, ids[0] == 0])
    gradient = jax.grad(lambda x: run(x)[:, :14].sum())(inputs)
    assert not gradient[:, 14:].any() and gradient[:, :14].all()
    np.testing.assert_allclose(convolve(inputs, kernel, kernel, 0 * ids), convolve(inputs, kernel, kernel), atol=2e-5)


@pytest.mark.parametrize("length,taps,ahead", [(1, 1, None), (29, 40, None), (29, 12, 29)])
def test_gradients_of_segments(length, taps, ahead):
    arguments = [random(2, length, 6), random(6, taps, seed=1)]
    arguments += [] if ahead is None else [random(6, ahead, seed=2)]
    ids, weights = jnp.asarray(np.arange(length) // 6)[None], random(2, length, 6, seed=3)

    def gradients(implementation):
        run = lambda x, k, a=None: convolve(x, k, a, ids, implementation=implementation)
        return jax.grad(lambda *a: jnp.sum(weights * jnp.sin(run(*a))), argnums=range(len(arguments)))(*arguments)

    for ours, expected in zip(gradients("xla"), gradients("reference"), strict=True):
        np.testing.assert_allclose(ours, expected, atol=5e-5)


def test_the_present_token_counts_once():
    impulse = jnp.zeros((1, 7, 1)).at[0, 3].set(1.0)
    y = convolve(impulse, jnp.array([[1.0, 2.0, 3.0]]), jnp.array([[10.0, 20.0]]))
    np.testing.assert_allclose(y[0, :, 0], [0, 20, 10, 1, 2, 3, 0], atol=1e-5)


@pytest.mark.parametrize("features,ids", [(12, None), (13, None), (12, np.arange(50)[None] // 8)])  # 13 is prime
def test_groups_change_nothing(monkeypatch, features, ids):
    inputs, kernel, anticausal = random(2, 50, features), random(features, 50, seed=1), random(features, 50, seed=2)
    loss = lambda *a: jnp.sum(convolve(*a, ids) ** 2)
    run = lambda: jax.value_and_grad(loss, argnums=(0, 1, 2))(inputs, kernel, anticausal)
    whole = run()
    monkeypatch.setattr(xla, "CPU_BYTES", 2500)
    assert xla._circle_and_groups(2500, inputs, kernel, anticausal, None)[1] > 1
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


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("axes", [(0, 0), (0, None), (None, 0)])
def test_vmap(axes, segments):
    many = random(3, 2, 20, 4), random(3, 4, 20, seed=1)
    arrays = [x if axis == 0 else x[0] for x, axis in zip(many, axes, strict=True)]
    ids = jnp.asarray(np.arange(20) // 7)[None] if segments else None
    loss = lambda *x: jnp.sum(convolve(*x, None, ids) ** 2)
    mapped = jax.vmap(jax.grad(loss, argnums=(0, 1)), axes)(*arrays)
    for i in range(3):
        one = [x if axis is None else x[i] for x, axis in zip(arrays, axes, strict=True)]
        for ours, expected in zip(mapped, jax.grad(loss, argnums=(0, 1))(*one), strict=True):
            np.testing.assert_allclose(ours[i], expected, rtol=1e-5, atol=1e-4)


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


def test_bad_input_is_named():
    inputs, kernel = jnp.ones((1, 5, 3)), jnp.ones((3, 5))
    with pytest.raises(ValueError, match="convolve: inputs must have shape"):
        convolve(inputs[0], kernel)
    with pytest.raises(ValueError, match="convolve: kernel must have shape \\[D, L\\] = \\[3, L\\]"):
        convolve(inputs, kernel[:2])
    with pytest.raises(ValueError, match="convolve: anticausal must have shape"):
        convolve(inputs, kernel, kernel[:, :0])
    with pytest.raises(ValueError, match=r"convolve: segment_ids must have shape \(1, 5\)"):
        convolve(inputs, kernel, segment_ids=jnp.zeros(5, int))
    with pytest.raises(TypeError, match="convolve: segment_ids must be integers"):
        convolve(inputs, kernel, segment_ids=jnp.zeros((1, 5)))
    with pytest.raises(NotImplementedError, match="'triton' does not exist for this operation"):
        convolve(inputs, kernel, implementation="triton")
    with pytest.raises(ValueError, match="implementation"):
        convolve(inputs, kernel, implementation="fft")
