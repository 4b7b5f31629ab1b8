"""The lightweight convolution against its formula, token by token, and the authors' code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad.zoo.convolution.lightconv import LightConv
from tests import oracle
from tests.zoo import shortconv

FEATURES = 8


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def build(features=FEATURES, **options):
    return LightConv(features, **dict(num_heads=2, conv_width=4) | options, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("width", "use_glu"), [(1, True), (4, True), (5, False), (11, True)])
def test_the_formula(width, use_glu, is_causal):
    """One tap, an even and an odd number, and more than tokens."""
    layer, x = build(conv_width=width, use_glu=use_glu, is_causal=is_causal), normal(2, 9, FEATURES)
    want = [shortconv.definition(layer, sample, lambda _: shortconv.softmax(shortconv.numbers(layer.convolution.taps)))
            for sample in x]  # fmt: skip
    np.testing.assert_allclose(layer(x), want, atol=1e-5)


def test_taps_sum_to_1_and_start_small():
    """A constant sequence of u is the mean of itself where the kernel lies inside; at the ends taps keep their share."""
    layer = shortconv.bare(build(use_glu=False, num_heads=4, conv_width=5))
    y = layer(jnp.ones((1, 9, FEATURES)))
    np.testing.assert_allclose(y[:, 2:-2], 1, rtol=1e-6)
    assert (y[:, :2] < 1).all() and (y[:, -2:] < 1).all()
    taps = build(512, num_heads=64, conv_width=31).convolution.taps[...]
    bound = (6 / (31 * 65)) ** 0.5
    assert np.abs(taps).max() <= bound and np.std(taps) == pytest.approx(bound / 3**0.5, rel=0.05)


def test_a_wide_kernel_begins_with_the_cached_inputs():
    """Chunks shorter than the kernel, of one token and of several, with padding between them."""
    layer, x = build(conv_width=7, is_causal=True), normal(2, 12, FEATURES)
    kept = np.ones((2, 12), bool)
    kept[0, 2] = kept[1, 4:7] = False
    cache, parts = layer.init_cache(2, 12), []
    step = jax.jit(lambda x, cache, mask: layer.extend(x, cache, mask=mask))
    for start, stop in ((0, 1), (1, 4), (4, 7), (7, 12)):
        out, cache = step(x[:, start:stop], cache, kept[:, None, None, start:stop])
        parts.append(out)
    for got, sample, at in zip(np.concatenate(parts, 1), x, kept, strict=True):
        np.testing.assert_allclose(got[at], layer(sample[at]), atol=1e-5)


def test_dropout_drops_taps():
    """Of each group its own, of all tokens and samples the same; what stays is larger, so that the mean is that of all."""
    layer = shortconv.bare(build(16, use_glu=False, num_heads=16, conv_width=3, is_causal=True, dropout_rate=0.4))
    impulse = jnp.zeros((2, 7, 16)).at[:, 2].set(1)
    plain = layer(impulse)
    layer.train()
    run = jax.jit(lambda key: layer(impulse, rngs=nnx.Rngs(dropout=key)))
    draws = np.stack([run(key) for key in jax.random.split(jax.random.key(0), 100)])
    dropped = np.isclose(draws[:, :, 2:5], 0)
    np.testing.assert_allclose(np.where(dropped, 0, draws[:, :, 2:5]), np.where(dropped, 0, plain[:, 2:5] / 0.6), rtol=1e-5)
    assert (dropped[:, 0] == dropped[:, 1]).all() and dropped.mean() == pytest.approx(0.4, abs=0.05)
    moved = layer(jnp.roll(impulse, 2, axis=1), rngs=nnx.Rngs(dropout=5))
    np.testing.assert_allclose(moved[:, 4:], layer(impulse, rngs=nnx.Rngs(dropout=5))[:, 2:5], atol=1e-6)
    np.testing.assert_array_equal(layer(impulse, deterministic=True), plain)
    with pytest.raises(ValueError, match="LightConv: rngs must be given where it draws"):
        layer(impulse)


@pytest.mark.parametrize(("options", "words"), [
    (dict(num_heads=3), "num_heads must divide the 8 features"), (dict(num_heads=0), "num_heads must be a positive integer"),
    (dict(conv_width=0), "conv_width must be a positive integer"),
    (dict(dropout_rate=1.5), r"dropout_rate must be a number in \[0, 1\]"),
])  # fmt: skip
def test_refusals(options, words):
    with pytest.raises(ValueError, match=f"LightConv: {words}"):
        build(**options)


@pytest.mark.parametrize("name", ["lightconv_causal", "lsra_lightconv_bidir", "lsra_lightconv_causal"])
def test_oracle(name):
    """Fairseq's module, and the one that the authors of Lite Transformer made of it, which adds a bias to the sums."""
    peer = oracle.load(name)
    heads, _, width = peer.weights["weight"].shape
    options = dict(num_heads=heads, conv_width=width, is_causal="causal" in name)
    layer = shortconv.bare(build(peer.inputs["x"].shape[-1], use_glu=False, **options))

    def run(inputs, w):
        ours = nnx.clone(layer)
        ours.convolution.taps[...] = jnp.flip(w["weight"][:, 0], 1).T  # their last tap weighs the latest token
        if "bias" in w:
            ours.out.bias[...] = w["bias"]
        return ours(inputs["x"].swapaxes(0, 1)).swapaxes(0, 1)

    oracle.compare("lightconv", peer, run, of="mechanism")
