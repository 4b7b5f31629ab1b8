"""Iterations on small matrices: what they converge to, degenerate matrices, what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subquad.kernels import dispatch, matrix

IMPLEMENTATIONS = ["reference", "xla", pytest.param("interpret", marks=pytest.mark.interpret)]

pseudo_inverse = jax.jit(matrix.pseudo_inverse, static_argnames=("iterations", "implementation"))
sinkhorn = jax.jit(matrix.sinkhorn, static_argnames=("iterations", "is_causal", "implementation"))


def draw(size, seed=0, batch=2, heads=3):
    return np.random.default_rng(seed).normal(size=(batch, heads, size, size)).astype(np.float32)


def well_conditioned(size):
    return draw(size) / np.sqrt(size) + 2 * np.eye(size, dtype=np.float32)


@functools.partial(jax.jit, static_argnames=("function", "implementation"))
def gradient(function, x, *, implementation):
    """Of a cotangent of normal numbers."""
    outputs, pull = jax.vjp(functools.partial(function, implementation=implementation), x)
    return pull(jnp.asarray(np.random.default_rng(1).normal(size=outputs.shape), outputs.dtype))[0]


# The pseudo-inverse.


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("size", [1, 17])
def test_converges_to_the_inverse(size, implementation):
    x = well_conditioned(size)
    errors = []
    for iterations in (1, 4, 12):
        product = x @ np.asarray(pseudo_inverse(x, iterations=iterations, implementation=implementation))
        errors.append(np.abs(product - np.eye(size)).max())
    assert errors[2] < 1e-5 and (size == 1 or errors[0] > 3 * errors[1] > 9 * errors[2])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_of_a_singular_matrix_it_is_the_pseudo_inverse(implementation):
    left, right = (np.linalg.qr(draw(12, seed=seed))[0][..., :4] for seed in (0, 1))
    x = left * np.float32([1, 1.5, 2, 3]) @ right.swapaxes(2, 3)
    got = pseudo_inverse(x, iterations=8, implementation=implementation)
    want = np.linalg.pinv(x.astype(np.float64), rcond=1e-5)
    assert np.abs(got - want).max() < 2e-3 * np.abs(want).max()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_iteration_is_the_equation(implementation):
    """Equation 11 for the scalar 4: Z_0 = 4 / 16 is the inverse already; for diag(1, 4) it is not."""
    x = np.diag(np.float32([1, 4]))[None, None]
    z = 1 / 16 * np.float64([1, 4])
    a = np.float64([1, 4])
    want = z * (13 - a * z * (15 - a * z * (7 - a * z))) / 4
    got = pseudo_inverse(x, iterations=1, implementation=implementation)[0, 0]
    np.testing.assert_allclose(got, np.diag(want), rtol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("factor", [1e-15, 1e15])
def test_small_and_large_matrices(factor, implementation):
    x = well_conditioned(9)
    scaled = pseudo_inverse(x * np.float32(factor), implementation=implementation) * np.float32(factor)
    np.testing.assert_allclose(scaled, pseudo_inverse(x, implementation=implementation), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_zeros_have_the_inverse_and_the_gradient_zero(implementation):
    x = well_conditioned(5)
    x[0, 1] = 0
    got = pseudo_inverse(x, implementation=implementation)
    slope = gradient(matrix.pseudo_inverse, x, implementation=implementation)
    assert (got[0, 1] == 0).all() and (slope[0, 1] == 0).all()
    assert np.isfinite(got).all() and np.isfinite(slope).all() and np.abs(slope[0, 0]).max() > 0


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("function", [matrix.pseudo_inverse, matrix.sinkhorn])
def test_a_matrix_depends_on_no_other(function, implementation):
    """Nystromformer's own code takes the scale over the whole batch."""
    x = well_conditioned(6)
    loud = x.copy()
    loud[0, 0] *= 100
    run = jax.jit(functools.partial(function, implementation=implementation))
    np.testing.assert_array_equal(run(loud)[1], run(x)[1])
    np.testing.assert_array_equal(run(loud)[0, 1:], run(x)[0, 1:])


# Sinkhorn.


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_iteration_normalises_rows_then_columns(implementation):
    logits = draw(7)
    want = np.exp(logits.astype(np.float64))
    want /= want.sum(3, keepdims=True)
    want /= want.sum(2, keepdims=True)
    got = sinkhorn(logits, iterations=1, implementation=implementation)
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:])
def test_many_iterations_balance(implementation):
    logits = draw(7)
    balanced = sinkhorn(logits, iterations=40, implementation=implementation)
    np.testing.assert_allclose(balanced.sum(2), 1, rtol=1e-5)
    np.testing.assert_allclose(balanced.sum(3), 1, rtol=1e-4)
    np.testing.assert_allclose(sinkhorn(logits + 7, iterations=40, implementation=implementation), balanced, rtol=1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_of_one_pair_everything_is_one(implementation):
    logits = draw(1)
    np.testing.assert_array_equal(sinkhorn(logits, implementation=implementation), 1)
    np.testing.assert_allclose(gradient(matrix.sinkhorn, logits, implementation=implementation), 0, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_large_logits_make_a_permutation(implementation):
    """exp(1e4) is infinite, exp(-1e4) is 0, and nothing is either."""
    order = np.random.default_rng(2).permutation(20)
    logits = np.where(np.arange(20) == order[:, None], 1e4, -1e4).astype(np.float32)[None, None] + draw(20, batch=1, heads=1)
    got = sinkhorn(logits, implementation=implementation)[0, 0]
    np.testing.assert_allclose(got, np.eye(20)[order], atol=1e-5)
    assert np.isfinite(gradient(matrix.sinkhorn, logits, implementation=implementation)).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("fill", [-np.inf, np.finfo(np.float32).min, -1e30], ids=["infinity", "smallest", "-1e30"])
def test_forbidden_pairs(fill, implementation):
    """A row, a column and a whole matrix without an allowed pair: zeros, and no gradient."""
    logits = draw(9)
    logits[0, 0, 4] = logits[0, 1, :, 5] = logits[1, 2] = logits[1, 0, 2, 3] = fill
    forbidden = logits == np.float32(fill)
    got = sinkhorn(logits, implementation=implementation)
    slope = gradient(matrix.sinkhorn, logits, implementation=implementation)
    assert (got[forbidden] == 0).all() and (got[~forbidden] > 0).all()
    assert (slope[forbidden] == 0).all() and np.isfinite(slope).all() and np.abs(slope[~forbidden]).max() > 0


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_causal_leaves_out_what_lies_above_the_diagonal(implementation):
    logits = draw(8)
    got = sinkhorn(logits, is_causal=True, iterations=3, implementation=implementation)
    above = np.triu(np.ones((8, 8), bool), 1)
    assert (got[..., above] == 0).all()
    want = sinkhorn(np.where(above, -np.inf, logits), iterations=3, implementation=implementation)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(
        got, sinkhorn(np.where(above, np.nan, logits), is_causal=True, iterations=3, implementation=implementation)
    )


# Both.


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("function", [matrix.pseudo_inverse, matrix.sinkhorn])
def test_bfloat16_iterates_in_float32(function, implementation):
    x = jnp.asarray(well_conditioned(16), jnp.bfloat16)
    run = jax.jit(functools.partial(function, implementation=implementation))
    got, want = run(x), run(x.astype(jnp.float32))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, want.astype(jnp.bfloat16))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("function", [matrix.pseudo_inverse, matrix.sinkhorn])
def test_vmap_folds_into_the_batch(function, implementation):
    x = np.stack([well_conditioned(5), 2 * well_conditioned(5)], 1)
    run = jax.jit(functools.partial(function, iterations=2, implementation=implementation))
    got = jax.vmap(run, 1)(x)
    for i in range(2):
        np.testing.assert_allclose(got[i], run(x[:, i]), rtol=1e-6)


@pytest.mark.interpret
@pytest.mark.parametrize("function", [matrix.pseudo_inverse, matrix.sinkhorn])
def test_what_the_kernels_decline(function):
    with pytest.raises(dispatch.Declined, match="there are 129 rows in a matrix, and the kernels hold at most 128"):
        function(jnp.zeros((1, 1, 129, 129)), implementation="interpret")
    with jax.enable_x64(True), pytest.raises(dispatch.Declined, match="float64, and"):
        function(jnp.zeros((1, 1, 4, 4), jnp.float64), implementation="interpret")


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        (dict(shape=(2, 3, 3)), ValueError, r"must have shape \[B, N, M, M\].*got \(2, 3, 3\)"),
        (dict(shape=(1, 2, 3, 4)), ValueError, r"must have shape \[B, N, M, M\].*got \(1, 2, 3, 4\)"),
        (dict(shape=(1, 2, 0, 0)), ValueError, "every axis at least 1"),
        (dict(iterations=0), ValueError, "iterations must be an integer of at least 1, got 0"),
        (dict(dtype=jnp.int32), TypeError, "must be floating-point, got int32"),
        (dict(dtype=jnp.complex64), TypeError, "must be floating-point, got complex64"),
        (dict(implementation="x1a"), ValueError, "Did you mean 'xla'"),
        (dict(implementation="cudnn"), NotImplementedError, "'cudnn' does not exist for this operation"),
    ],
)
@pytest.mark.parametrize("function", [matrix.pseudo_inverse, matrix.sinkhorn])
def test_refusals(function, options, error, says):
    options = dict(options)
    x = jnp.ones(options.pop("shape", (1, 2, 3, 3)), options.pop("dtype", jnp.float32))
    with pytest.raises(error, match=f"matrix.{function.__name__}: .*{says}"):
        function(x, **options)
