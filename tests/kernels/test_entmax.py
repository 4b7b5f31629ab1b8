"""alpha-entmax against sorting and finite differences in float64, at its limits, and what its attention costs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subquad.kernels import entmax, softmax
from subquad.kernels.entmax import threshold, xla

ALPHAS = (1.0, 1 + 1e-6, 1.01, 1.3, 1.5, 1.9, 2.0, 2.5, 4.0)


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def sparsemax(logits):
    """Martins and Astudillo, 2016, algorithm 1: by sorting."""
    ordered = -np.sort(-logits, axis=-1)
    sums, ranks = ordered.cumsum(-1), np.arange(1, logits.shape[-1] + 1)
    size = (1 + ranks * ordered > sums).sum(-1, keepdims=True)
    return np.maximum(logits - (np.take_along_axis(sums, size - 1, -1) - 1) / size, 0)


def entmax15(logits):
    """Peters et al., 2019, algorithm 2: by sorting."""
    halves = logits / 2
    ordered, ranks = -np.sort(-halves, axis=-1), np.arange(1, logits.shape[-1] + 1)
    mean, square = ordered.cumsum(-1) / ranks, (ordered**2).cumsum(-1) / ranks
    tau = mean - np.sqrt(np.maximum((1 - ranks * (square - mean**2)) / ranks, 0))
    size = (tau <= ordered).sum(-1, keepdims=True)
    return np.maximum(halves - np.take_along_axis(tau, size - 1, -1), 0) ** 2


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_against_sorting(implementation):
    """Also as an array, which takes the general path, and however large or equal the logits are."""
    for scale in (1e-3, 1.0, 30.0, 1e6):
        logits = scale * random(50, 40)
        logits[0], logits[1, :20] = 3.0, logits[1, 20:]
        for alpha, want in ((2.0, sparsemax(logits.astype(float))), (1.5, entmax15(logits.astype(float)))):
            for given in (alpha, jnp.full((50, 1), alpha)):
                got = jax.jit(entmax.entmax, static_argnames="implementation")(logits, given, implementation=implementation)
                np.testing.assert_allclose(got, want, atol=max(2e-6, 2e-7 * scale) if scale < 1e6 else 1e-6)


def test_softmax_is_the_limit():
    logits = 3 * random(20, 30)
    want = jax.nn.softmax(logits)
    for alpha in (1.0, jnp.ones(()), jnp.zeros(()), jnp.full((), 1 + 1e-7)):
        np.testing.assert_allclose(entmax.entmax(logits, alpha), want, rtol=3e-6, atol=1e-7)
    # What is left at 1 + 1e-3 is the difference between the maps, and no loss of digits.
    near = jnp.asarray(1 + 1e-3, jnp.float32)
    with jax.enable_x64(True):
        exact = entmax.entmax(jnp.asarray(logits, "float64"), jnp.asarray(near, "float64"), implementation="reference")
    np.testing.assert_allclose(entmax.entmax(logits, near), exact, rtol=1e-5, atol=1e-7)


def test_gradients_against_finite_differences():
    """Of logits and of alpha, in float64, for every alpha at once: one row of alphas, one of logits, one cotangent."""
    with jax.enable_x64(True):
        logits, cotangent = (jnp.asarray(2 * random(len(ALPHAS), 30, seed=i), "float64") for i in range(2))
        alphas, direction = jnp.asarray(ALPHAS)[:, None], jnp.asarray(random(len(ALPHAS), 30, seed=2), "float64")
        run = jax.jit(lambda z, a: jnp.sum(cotangent * entmax.entmax(z, a), -1))
        grad_logits, grad_alpha = jax.grad(lambda *x: run(*x).sum(), (0, 1))(logits, alphas)
        step = 1e-6
        got = (run(logits + step * direction, alphas) - run(logits - step * direction, alphas)) / (2 * step)
        np.testing.assert_allclose((grad_logits * direction).sum(-1), got, rtol=1e-6, atol=1e-8)
        # From the right at alpha = 1, by three points.
        got = (4 * run(logits, alphas + step) - 3 * run(logits, alphas) - run(logits, alphas + 2 * step)) / (2 * step)
        np.testing.assert_allclose(grad_alpha[:, 0], got, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(grad_logits.sum(-1), 0, atol=1e-12)  # rows of the Jacobian sum to 0


def test_the_slope_in_alpha_has_all_digits():
    y = -np.logspace(-3, 0.3, 60)
    for epsilon in (1e-8, 1e-4, 0.05, 0.3):
        with jax.enable_x64(True):
            want = threshold.slope_in_alpha(jnp.asarray(y), jnp.asarray(1 + epsilon))
        got = threshold.slope_in_alpha(jnp.asarray(y, "float32"), jnp.float32(1 + np.float32(epsilon)))
        np.testing.assert_allclose(got, want, rtol=1e-4 if epsilon == 1e-8 else 3e-5)
    np.testing.assert_array_equal(threshold.slope_in_alpha(jnp.float32([-1e20, -3e38]), jnp.float32(1)), 0)


def test_the_rest_of_a_batch_changes_no_row():
    """The search goes on for the slowest row, and leaves the others as they are."""
    logits = random(40, 30) * np.logspace(-2, 2, 40, dtype=np.float32)[:, None]
    logits[3], logits[4] = -np.inf, np.nan
    for alpha in (1.3, 2.0, 3.0):
        whole = entmax.entmax(logits, alpha)
        for row in (0, 20, 39):
            np.testing.assert_array_equal(whole[row], entmax.entmax(logits[row : row + 1], alpha)[0])
        assert not whole[3].any() and np.isnan(whole[4]).all()
        np.testing.assert_allclose(whole[5:].sum(-1), 1, atol=1e-5)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize(("alpha", "length"), [(1.5, 1 << 18), (2.0, 1 << 18), (3.0, 5000), (4.0, 512), (6.0, 3000)])
def test_many_nearly_equal_logits(alpha, length, implementation):
    """Largest weights whose power of alpha - 1 is less than float32's rounding of 1: all weights are chosen, in float64."""
    rng, epsilon = np.random.default_rng(0), alpha - 1
    p = rng.uniform(0.3, 1, length)
    p /= p.sum()
    logits = np.append((p**epsilon - p.max() ** epsilon) / epsilon, -np.inf).astype(np.float32)
    cotangent = rng.normal(size=length).astype(np.float32)
    for given in (alpha, jnp.full(1, alpha)):
        out, pull = jax.vjp(lambda *x: entmax.entmax(*x, implementation=implementation), logits, given)
        grad_logits, grad_alpha = pull(jnp.append(cotangent, 1))
        np.testing.assert_allclose(out, np.append(p, 0), rtol=1e-4)
        slope = p ** (1 - epsilon)
        centred = cotangent - (slope * cotangent).sum() / slope.sum()
        np.testing.assert_allclose(grad_logits, np.append(slope * centred, 0), rtol=1e-3, atol=1e-4 * slope.min())
    # Of the slope p l^2 (1 - exp(-v) - v) / v^2, l = log p and v = epsilon l, the middle term sums to 0.
    terms = p * (1 - epsilon * np.log(p)) / epsilon**2 * centred
    np.testing.assert_allclose(grad_alpha[0], terms.sum(), atol=1e-4 * abs(terms).sum())


def test_equal_logits_are_shared_equally():
    for alpha in (1.0, 1.5, 2.0, 4.0, 30.0, 1000.0):
        for given in (alpha, jnp.full((1, 1), alpha)):
            out, pull = jax.vjp(lambda z, a=given: entmax.entmax(z, a), jnp.full((2, 3000), 5.0))
            np.testing.assert_allclose(out, 1 / 3000, rtol=1e-5)
            np.testing.assert_array_equal(np.isfinite(pull(out)[0]), True)


@pytest.mark.parametrize("alpha", [1.0, np.float32(1.4)])
def test_attention_in_steps_is_attention_at_once(alpha, monkeypatch):
    """Values and gradients, at a length that no step divides, with T != S and positions that do not count from 0."""
    q, k, v = random(2, 23, 4, 8), random(2, 31, 2, 8, seed=1), random(2, 31, 2, 5, seed=2)
    positions = np.arange(23)[None] + 8
    alphas = jnp.full(4, alpha)

    @functools.partial(jax.jit, static_argnums=0)
    def run(implementation):
        call = lambda *x: entmax.attention(*x, is_causal=True, query_positions=positions, implementation=implementation)
        out, pull = jax.vjp(call, q, k, v, alphas)
        return out, *pull(out)

    want = run("reference")
    monkeypatch.setattr(xla, "CPU_BYTES", 4 * 8 * 31 * 5)
    for got, expected in zip(run("xla"), want, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=2e-5)
    if alpha == 1:
        expected = softmax.attention(q, k, v, is_causal=True, query_positions=positions)
        np.testing.assert_allclose(run("xla")[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("alpha", [1.0, 1.5, 1.7, None])
def test_second_derivatives(alpha):
    """Of the map and of attention: the threshold has a derivative of its own."""
    with jax.enable_x64(True):
        z, q, k, v = (jnp.asarray(random(*shape), "float64") for shape in ((5, 9), *3 * [(1, 6, 2, 4)]))

        def curvature(implementation):
            a = jnp.asarray([1.2, 1.6]) if alpha is None else alpha
            spread = lambda z, a: jnp.sum(entmax.entmax(z, a, implementation=implementation) ** 2)
            attend = lambda q, k, a: jnp.sum(entmax.attention(q, k, v, a, is_causal=True, implementation=implementation) ** 2)
            square = lambda grads: sum(jnp.sum(x**2) for x in grads)
            places = (0, 1) if alpha is None else (0,)
            of_map = jax.grad(lambda *x: square(jax.grad(spread, places)(*x)), places)(z, a if alpha else a[0])
            places = (0, 1, 2) if alpha is None else (0, 1)
            return of_map, jax.grad(lambda *x: square(jax.grad(attend, places)(*x)), places)(q, k, a)

        got, want = (jax.jit(curvature, static_argnums=0)(name) for name in ("xla", "reference"))
        for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-7, atol=1e-9 * float(abs(other).max()))


def test_a_row_that_sees_nothing_is_zero():
    q, k, v = (random(1, 6, 2, 4, seed=i) for i in range(3))
    mask = jnp.ones((1, 1, 6, 6), bool).at[:, :, 2].set(False)
    out, pull = jax.vjp(jax.jit(lambda *x: entmax.attention(*x, mask=mask)), q, k, v, jnp.full(2, 1.5))
    gradients = pull(jnp.ones_like(out))
    assert not out[:, 2].any() and out[:, 3].all() and not gradients[0][:, 2].any()
    assert all(np.isfinite(x).all() for x in gradients)


def test_memory_grows_with_the_tokens():
    """No array of queries by keys: twice the tokens take twice the memory."""

    def temporary(length):
        shapes = [jax.ShapeDtypeStruct((1, length, 2, 32), "float32")] * 3 + [jax.ShapeDtypeStruct((2,), "float32")]
        run = jax.grad(lambda *x: entmax.attention(*x, is_causal=True).sum(), (0, 1, 2, 3))
        return jax.jit(run).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    small, large = temporary(2048), temporary(4096)
    assert large < 2.1 * small and large < 0.5 * 4096**2 * 2 * 4


def test_what_is_refused():
    x = jnp.ones((2, 5, 4, 8))
    cases = [
        (entmax.entmax, "alpha must be finite and at least 1, got 0.5", ValueError, (x, 0.5), {}),
        (entmax.entmax, "alpha must be floating", TypeError, (x, jnp.ones((), int)), {}),
        (entmax.entmax, r"alpha must broadcast to \(2, 5, 4, 1\)", ValueError, (x, jnp.ones(8)), {}),
        (entmax.entmax, "axis must be one of the 4 axes", ValueError, (x, 1.5, 4), {}),
        (entmax.entmax, "logits must have at least one axis", ValueError, (x[:, :0],), {}),
        (entmax.entmax, "logits must be floating-point", TypeError, (x.astype(int),), {}),
        (entmax.attention, "alpha must be one number or one for each of 4 heads", ValueError, (x, x, x, jnp.ones(2)), {}),
        (entmax.attention, "query_positions must be None where is_causal is False", ValueError, (x, x, x),
         dict(query_positions=jnp.zeros((1, 5), int))),
        (entmax.attention, "key_positions must have shape", ValueError, (x, x, x),
         dict(key_positions=jnp.zeros((1, 4), int), is_causal=True)),
        (entmax.attention, "mask must have four axes", ValueError, (x, x, x), dict(mask=jnp.ones((2, 5), bool))),
        (entmax.attention, "mask must be boolean", TypeError, (x, x, x), dict(mask=jnp.ones((2, 1, 1, 5)))),
        (entmax.attention, "implementation='triton' does not exist", NotImplementedError, (x, x, x),
         dict(implementation="triton")),
    ]  # fmt: skip
    for function, message, kind, arrays, options in cases:
        with pytest.raises(kind, match=f"entmax.{function.__name__}: {message}"):
            function(*arrays, **options)
