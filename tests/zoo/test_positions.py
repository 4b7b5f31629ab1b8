"""Position encodings: the papers' formulas and what they are for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad import zoo
from subquad.kernels import softmax
from subquad.zoo import masks, positions

AT = jnp.array([0, 1, 5, 300])


def test_sinusoids_are_the_formula():
    table = positions.sinusoidal(AT, 6)
    expected = np.array([
        [f(t / 10000 ** (2 * i / 6)) for f in (np.sin, np.cos) for i in range(3)] for t in np.asarray(AT)
    ])  # fmt: skip
    np.testing.assert_allclose(table, expected, atol=1e-4)
    np.testing.assert_array_equal(positions.sinusoidal(jnp.stack([AT, AT]), 6)[1], table)


def test_products_of_sinusoids_depend_on_the_distance():
    table = positions.sinusoidal(jnp.arange(40), 16)
    product = table @ table.T
    for distance in (0, 3, 17):
        diagonal = jnp.diagonal(product, distance)
        np.testing.assert_allclose(diagonal, diagonal[0] * jnp.ones_like(diagonal), atol=1e-4)


def test_rotary_is_a_complex_rotation():
    x = jax.random.normal(jax.random.key(0), (2, 4, 3, 6))
    rotated = positions.rotary(x, jnp.stack([AT, AT]), 100.0)
    angle = np.asarray(AT)[:, None, None] * 100.0 ** (-np.arange(3) / 3)
    expected = np.asarray(x[..., :3] + 1j * x[..., 3:]) * np.exp(1j * angle)
    np.testing.assert_allclose(rotated, np.concatenate([expected.real, expected.imag], -1), atol=1e-4)
    np.testing.assert_array_equal(rotated[:, 0], x[:, 0])
    half = positions.rotary(x.astype(jnp.bfloat16), AT, 100.0)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), rotated, atol=0.05)


def test_rotated_scores_depend_on_the_distance():
    q, k = jax.random.normal(jax.random.key(1), (2, 1, 5, 2, 8))
    at = jnp.array([0, 2, 3, 9, 20])
    score = lambda shift: jnp.einsum(
        "btnh,bsnh->bnts", positions.rotary(q, at + shift, 1e4), positions.rotary(k, at + shift, 1e4)
    )
    np.testing.assert_allclose(score(37), score(0), atol=1e-4)
    assert jnp.abs(positions.rotary(q, at, 1e4) - q)[:, 1:].max() > 0.1


def test_alibi_slopes_of_the_paper():
    np.testing.assert_allclose(positions.alibi_slopes(8), 2.0 ** -np.arange(1, 9), rtol=1e-6)
    np.testing.assert_allclose(positions.alibi_slopes(16)[:3], 2.0 ** np.array([-0.5, -1, -1.5]), rtol=1e-6)
    # Six heads: the four of N = 4, then the first and third of N = 8.
    np.testing.assert_allclose(positions.alibi_slopes(6), [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3], rtol=1e-6)
    assert positions.alibi_slopes(1).shape == (1,)


def test_alibi_takes_distance_times_slope_from_the_score():
    bias = positions.alibi(jnp.array([[4, 7]]), jnp.array([[4, 0, 9]]), 2)
    assert bias.shape == (1, 2, 2, 3)
    np.testing.assert_allclose(bias[0, 0], -np.array([[0, 4, 5], [3, 7, 2]]) / 16)
    np.testing.assert_allclose(bias[0, 1], -np.array([[0, 4, 5], [3, 7, 2]]) / 256)


def test_alibi_fades_with_distance_in_attention():
    """Where all contents are alike, a key weighs exp(-slope distance)."""
    at, ones = jnp.arange(4)[None], jnp.ones((1, 4, 1, 2))
    out = softmax.attention(ones, ones, jnp.eye(4)[None, :, None], bias=positions.alibi(at, at, 1), is_causal=True)
    weights = np.tril(np.exp(-(np.arange(4)[:, None] - np.arange(4)) / 256))
    np.testing.assert_allclose(out[0, :, 0], weights / weights.sum(1, keepdims=True), atol=1e-6)


def test_refusals():
    with pytest.raises(ValueError, match="sinusoidal: features must be even, got 5"):
        positions.sinusoidal(AT, 5)
    with pytest.raises(ValueError, match="rotary: the head features must be even, got 3"):
        positions.rotary(jnp.ones((1, 4, 2, 3)), AT, 1e4)
    with pytest.raises(ValueError, match="alibi_slopes: num_heads must be at least 1, got 0"):
        positions.alibi_slopes(0)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "uint32"])
def test_no_difference_of_small_or_unsigned_integers_wraps_around(dtype):
    assert masks.padding_mask(jnp.array([100], dtype), 300).sum() == 100
    at = np.arange(6)
    small = jnp.asarray(at, dtype)
    np.testing.assert_array_equal(masks.window_mask(small, small, 2), masks.window_mask(at, at, 2))
    np.testing.assert_array_equal(positions.alibi(small, small, 2), positions.alibi(at, at, 2))
    layer = zoo.SoftmaxAttention(2, 16, is_causal=True, rotary_base=100.0, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 6, 16))
    np.testing.assert_array_equal(layer(x, positions=small), layer(x, positions=jnp.asarray(at)))
    with jax.enable_x64(True):
        assert masks.signed(np.array([2**40], np.uint64)).dtype == jnp.int64
