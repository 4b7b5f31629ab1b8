"""The dynamic convolution against its formula, token by token, its static case, and the authors' code."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad.zoo.convolution.dynamicconv import DynamicConv
from subquad.zoo.convolution.lightconv import LightConv
from tests import oracle
from tests.zoo import shortconv

FEATURES = 8


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def build(features=FEATURES, **options):
    return DynamicConv(features, **dict(num_heads=2, conv_width=4) | options, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("width", "use_glu"), [(1, True), (4, False), (11, True)])
def test_the_formula(width, use_glu, is_causal):
    layer, x = build(conv_width=width, use_glu=use_glu, is_causal=is_causal), normal(2, 9, FEATURES)
    taps = lambda gated: shortconv.softmax(np.einsum("tc,cjh->tjh", gated, shortconv.numbers(layer.convolution.query.kernel)))
    np.testing.assert_allclose(layer(x), [shortconv.definition(layer, sample, taps) for sample in x], atol=1e-5)


@pytest.mark.parametrize("is_causal", [False, True])
def test_one_constant_feature_makes_the_lightweight_convolution(is_causal):
    """A query matrix that reads only what is the same in every token gives every token the same taps."""
    layer, light = (kind(FEATURES, num_heads=2, conv_width=5, is_causal=is_causal, use_glu=False, rngs=nnx.Rngs(0))
                    for kind in (DynamicConv, LightConv))  # fmt: skip
    x = jnp.asarray(normal(2, 9, FEATURES)).at[..., 0].set(1.0)
    for one in (layer, light):
        nnx.update(one, nnx.state(shortconv.bare(one)))
    layer.convolution.query.kernel[...] = jnp.zeros((FEATURES, 5, 2)).at[0].set(light.convolution.taps[...])
    np.testing.assert_allclose(layer(x), light(x), atol=1e-6)


def test_dropout_drops_the_taps_of_each_token():
    layer = shortconv.bare(build(use_glu=False, conv_width=3, num_heads=FEATURES, is_causal=True, dropout_rate=0.4))
    layer.convolution.query.kernel[...] = jnp.zeros((FEATURES, 3, FEATURES))
    layer.train()
    ones = jnp.ones((4, 200, FEATURES))
    y = layer(ones, rngs=nnx.Rngs(dropout=0))[:, 2:]
    kept = np.asarray(y) * 0.6 * 3  # how many of three equal taps stay
    np.testing.assert_allclose(kept, np.round(kept), atol=1e-5)
    shares = [(np.round(kept) == number).mean() for number in range(4)]
    np.testing.assert_allclose(shares, [0.4**3, 3 * 0.6 * 0.4**2, 3 * 0.6**2 * 0.4, 0.6**3], atol=0.02)
    np.testing.assert_allclose(layer(ones, deterministic=True)[:, 2:], 1, rtol=1e-6)


@pytest.mark.parametrize("name", ["dynamicconv_bidir", "dynamicconv_causal"])
def test_oracle(name):
    """Fairseq's module."""
    peer = oracle.load(name)
    heads, width = peer.meta["cfg"]["heads"], peer.meta["cfg"]["kernel_size"]
    layer = shortconv.bare(build(use_glu=False, num_heads=heads, conv_width=width, is_causal="causal" in name))

    def run(inputs, w):
        ours = nnx.clone(layer)
        taps = w["weight_linear.weight"].reshape(heads, width, -1)
        ours.convolution.query.kernel[...] = jnp.flip(taps, 1).T  # their last tap weighs the latest token
        return ours(inputs["x"].swapaxes(0, 1)).swapaxes(0, 1)

    oracle.compare("dynamicconv", peer, run, of="mechanism")
