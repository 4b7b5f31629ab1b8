"""Hyena against its formula, spelt out as sums over tokens, and the authors' code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad.kernels import convolution
from subquad.zoo.convolution.hyena import Hyena, convolved_from
from tests import oracle

FEATURES, LONGEST = 3, 12


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def build(**options):
    small = dict(max_length=LONGEST, filter_features=5, num_bands=2, frequency=1.0)
    return Hyena(FEATURES, **small | options, rngs=nnx.Rngs(0))


def moved(layer):
    """The layer with no parameter where it started."""
    for seed, (_, variable) in enumerate(nnx.to_flat_state(nnx.state(layer, nnx.Param))):
        variable[...] += 0.3 * normal(*variable.shape, seed=seed)
    return layer


def filters_by_hand(layer, shift) -> np.ndarray:
    """h [L, D, N]: window times network of each position."""
    positions = np.arange(LONGEST)
    waves = np.linspace(1e-4, layer.num_bands - 1, layer.num_bands)
    z = np.exp(-2j * np.pi / LONGEST * positions[:, None] * waves)
    x = np.concatenate([positions[:, None] / (LONGEST - 1), z.real, z.imag], axis=1)
    x = np.sin(layer.frequency[...] * (x @ layer.first_kernel[...] + layer.first_bias[...]))
    for kernel, bias in zip(layer.inner_kernel[...], layer.inner_bias[...], strict=True):
        x = np.sin(layer.frequency[...] * (x @ kernel + bias))
    h = np.einsum("lw,wdn->ldn", x, layer.last_kernel[...])
    # At 0.3 to 1.5 of the length windows have fallen to a hundredth, in steps from feature to feature.
    rates = np.linspace(np.log(100) / 1.5, np.log(100) / 0.3, h[0].size).reshape(h[0].shape)
    return h * (np.exp(-rates * (positions / (LONGEST - 1))[:, None, None]) + shift)


@pytest.mark.parametrize("options", [dict(shift=0.2), dict(order=3, conv_width=2), dict(order=1, num_inner=1)], ids=str)
def test_the_formula(options):
    layer, x = moved(build(**options)), np.float64(normal(2, 9, FEATURES))
    order, width = options.get("order", 2), options.get("conv_width", 3)
    linear = lambda module, x: x @ np.float64(module.kernel[...]) + np.float64(module.bias[...])
    projected, taps = linear(layer.input, x), np.float64(layer.short.taps[...])
    u = np.stack([sum(taps[j] * projected[:, t - j] for j in range(width) if t >= j) for t in range(9)], 1)
    *gates, z = np.split(u + layer.short.bias[...], order + 1, axis=-1)
    h, skip = filters_by_hand(layer, options.get("shift", 0.0)), layer.skip[...]
    for n, gate in enumerate(gates):
        long = np.stack([sum(h[t - s, :, n] * z[:, s] for s in range(t + 1)) for t in range(9)], 1)
        z = gate * (long + skip[:, n] * z)
    np.testing.assert_allclose(layer(jnp.float32(x)), linear(layer.out, z), rtol=1e-4, atol=1e-4)


def test_a_filter_of_zeros_leaves_gates_and_the_released_layer_has_no_first():
    """h = 0 and d = 1: the outputs are products of a token's own. h^1 = 0 and d^1 = 1: those of `convolve_values=False`."""
    layer, x = build(conv_width=1), jnp.asarray(normal(2, 9, FEATURES))
    released = build(conv_width=1, convolve_values=False)
    layer.last_kernel[:, :, 0], layer.skip[:, 0] = jnp.zeros((5, FEATURES)), jnp.ones(FEATURES)
    for name in ("input", "out"):
        setattr(released, name, getattr(layer, name))
    released.short.taps[...], released.last_kernel[...] = layer.short.taps[...], layer.last_kernel[..., 1:]
    released.first_kernel[...], released.inner_kernel[...] = layer.first_kernel[...], layer.inner_kernel[...]
    released.skip[...] = layer.skip[..., 1:]
    # The windows of one filter are other numbers than those of the second of two.
    released.filter = lambda hidden, n: Hyena.filter(layer, hidden, 1)
    np.testing.assert_allclose(jax.jit(lambda x: layer(x))(x), jax.jit(lambda x: Hyena.respond(released, x, None, None))(x)
                               @ layer.out.kernel[...], atol=1e-5)
    layer.last_kernel[...], layer.skip[...] = jnp.zeros((5, FEATURES, 2)), jnp.ones((FEATURES, 2))
    first, second, v = np.split(layer.input(x) * layer.short.taps[0], 3, axis=-1)
    np.testing.assert_allclose(layer(x), (first * second * v) @ layer.out.kernel[...], atol=1e-5)


def test_a_longer_call_has_the_same_filters():
    """They are tied to max_length, and stretch with it."""
    layer, longer = build(), build(max_length=2 * LONGEST - 1)
    at = lambda layer, length: np.asarray(layer.filter(layer.hidden(length), 0))
    np.testing.assert_allclose(at(layer, 5), at(layer, LONGEST)[:, :5], atol=1e-6)
    window = lambda layer, length: np.asarray(layer.filter(jnp.ones((length, 5)), 0))
    np.testing.assert_allclose(window(longer, 2 * LONGEST - 1)[:, ::2], window(layer, LONGEST), rtol=1e-5)


def test_rounding_is_in_proportion_to_the_largest_token():
    """What `convolution.convolve` says of an FFT: of a layer of order 1, by ulps of a loud future token."""
    layer, x = build(order=1), jnp.asarray(normal(1, 11, FEATURES))
    run = jax.jit(lambda x: layer(x))
    change = jnp.abs(run(x.at[:, 10].multiply(1e4))[:, :10] - run(x)[:, :10]).max()
    assert change < 1e4 * 1e-6
    exact = build(order=1, implementation="reference")
    run = jax.jit(lambda x: exact(x))
    np.testing.assert_allclose(run(x.at[:, 10].multiply(1e4))[:, :10], run(x)[:, :10], atol=1e-6)


def test_refusals():
    layer = build()
    with pytest.raises(ValueError, match="Hyena: inputs_q must be at most the layer's max_length = 12 tokens, got 13 tokens"):
        layer(jnp.ones((1, 13, FEATURES)))
    with pytest.raises(ValueError, match="Hyena: max_length must be at most the layer's max_length = 12 tokens, got 13 tokens"):
        layer.init_cache(1, 13)
    with pytest.raises(ValueError, match="Hyena: convolve_values must be True with order 1"):
        build(order=1, convolve_values=False)


class Learned(Hyena):
    """With the features of the positions as numbers that are given, as the authors learn them."""

    def encoding(self, length):
        return self.given[:length]


@pytest.mark.parametrize("order", [2, 3])
def test_oracle(order):
    """The released operator: no convolution before the first gate, which is its last part, and gates in reverse."""
    peer = oracle.load(f"hyena_order{order}")
    cfg = peer.meta["cfg"]
    features, longest, width = cfg["d_model"], cfg["l_max"], cfg["filter_order"]
    layer = Learned(
        features, max_length=longest, order=order, convolve_values=False, conv_width=cfg["short_filter_order"],
        filter_features=width, num_bands=(cfg["emb_dim"] - 1) // 2, frequency=cfg["w"], rngs=nnx.Rngs(0),
    )  # fmt: skip

    def run(inputs, w):
        ours = nnx.clone(layer)
        turned = lambda x: x.reshape(order + 1, features, -1)[jnp.asarray([*range(order - 1, -1, -1), order])].reshape(x.shape)
        ours.input.kernel[...], ours.input.bias[...] = turned(w["in_proj.weight"]).T, turned(w["in_proj.bias"])
        ours.short.taps[...] = jnp.flip(turned(w["short_filter.weight"])[:, 0].T, 0)  # its last tap weighs the present token
        ours.short.bias[...] = turned(w["short_filter.bias"])
        ours.out.kernel[...], ours.out.bias[...] = w["out_proj.weight"].T, w["out_proj.bias"]
        network = lambda name: w[f"filter_fn.implicit_filter.{name}"]
        ours.frequency[...] = network("1.freq")[0]
        ours.first_kernel[...], ours.first_bias[...] = network("0.weight").T, network("0.bias")
        ours.inner_kernel[...] = jnp.stack([network(f"{n}.weight").T for n in (2, 4)])
        ours.inner_bias[...] = jnp.stack([network(f"{n}.bias") for n in (2, 4)])
        ours.last_kernel[...] = network("6.weight").T.reshape(width, features, order - 1)
        ours.skip[...] = w["filter_fn.bias"].reshape(features, order - 1)
        ours.given = nnx.Variable(w["filter_fn.pos_emb.z"][0])
        return ours(inputs["x"])

    oracle.compare("hyena", peer, run)


def test_convolved_from_is_a_part_of_the_convolution():
    """Of one token, by the sum; of more, by the FFT."""
    past, taps, start = jnp.asarray(normal(2, 9, FEATURES)), jnp.asarray(normal(FEATURES, 9, seed=1)), jnp.asarray([2, 5])
    whole = convolution.convolve(past, taps)
    for tokens in (1, 4):
        expected = jnp.stack([x[at : at + tokens] for x, at in zip(whole, start, strict=True)])
        np.testing.assert_allclose(convolved_from(start, tokens, past, taps, None), expected, atol=1e-5)
