"""FNet against NumPy's transform, the matrices, Hugging Face's layer, and without what the padding holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad.zoo.dense.fnet import FNet, chirp_transform
from tests import oracle

FEATURES = 6


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def build(**options):
    return FNet(FEATURES, **options, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("length", [1, 2, 12])
@pytest.mark.parametrize("features", [1, 2, 5, FEATURES])
def test_the_formula(features, length, implementation):
    """Re(F_T F_D x); the order of the two does not matter, and there is nothing to learn."""
    layer, x = FNet(features, implementation=implementation, rngs=nnx.Rngs(0)), normal(2, length, features)
    assert not jax.tree.leaves(nnx.state(layer))
    of_tokens, of_features = (np.exp(-2j * np.pi * np.outer(range(n), range(n)) / n) for n in (length, features))
    np.testing.assert_allclose(layer(x), (of_tokens @ (x @ of_features)).real, atol=1e-5)
    np.testing.assert_allclose(layer(x), np.fft.fft2(x.swapaxes(1, 2)).swapaxes(1, 2).real, atol=1e-5)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_each_sample_has_the_transform_of_its_own_length(implementation):
    """With padding before, between and after its tokens, NaN there."""
    layer, length = build(implementation=implementation), 13
    is_real = np.random.default_rng(1).random((12, length)) < np.linspace(0, 1, 12)[:, None]
    x = np.where(is_real[..., None], normal(12, length, FEATURES), np.nan)
    y = jax.jit(lambda x, mask: layer(x, mask=mask))(x, is_real[:, None, None])
    assert np.isfinite(y).all()
    for ours, tokens, real in zip(y, x, is_real, strict=True):
        if real.any():
            np.testing.assert_allclose(ours[real], np.fft.fft2(tokens[real]).real, atol=2e-5)


def test_long_sequences_with_padding():
    """The chirp's angles are reduced in integers: their rounding would grow with the square of the length."""
    length, counts = 60_000, np.array([59_999, 47_000])
    x = normal(2, length, 1) * (np.arange(length) < counts[:, None])[..., None]
    y = jax.jit(chirp_transform)(jnp.asarray(x, jnp.complex64), jnp.asarray(counts))
    for ours, tokens, count in zip(y, x, counts, strict=True):
        want = np.fft.fft(tokens[:count].astype(np.float64), axis=0)
        assert np.abs(ours[:count] - want).max() < 2e-6 * np.abs(want).max()


def test_gradients_are_the_transposed_transform():
    x, mask = normal(2, 9, FEATURES), (np.arange(9) < np.array([[9], [5]]))[:, None, None]
    layer, cotangent = build(), normal(2, 9, FEATURES, seed=1) * mask[:, 0, 0, :, None]
    _, pull = jax.vjp(lambda x: layer(x, mask=jnp.asarray(mask)), jnp.asarray(x))
    for got, outer, count in zip(pull(jnp.asarray(cotangent))[0], cotangent, (9, 5), strict=True):
        # Re(F x) is symmetric in its two sides.
        np.testing.assert_allclose(got[:count], np.fft.fft2(outer[:count]).real, atol=1e-5)
        np.testing.assert_array_equal(got[count:], 0)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_oracle(implementation):
    """Hugging Face's FNetBasicFourierTransform."""
    layer = FNet(16, implementation=implementation, rngs=nnx.Rngs(0))
    oracle.compare("fnet", oracle.load("fnet_fourier"), lambda inputs, _: layer(inputs["x"]), tolerance=1e-6)


def test_a_map_may_follow():
    layer, plain, x = build(out_features=4), build(), normal(2, 7, FEATURES)
    np.testing.assert_allclose(layer(x), plain(x) @ layer.out.kernel[...] + layer.out.bias[...], rtol=1e-5, atol=1e-5)


def test_segments_are_refused_with_the_reason():
    with pytest.raises(ValueError, match="FNet does not support segment_ids: each of its outputs is a sum over all tokens"):
        build()(normal(2, 7, FEATURES), segment_ids=jnp.zeros(7, int))
