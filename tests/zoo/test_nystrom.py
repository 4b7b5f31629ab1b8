"""Nystromformer: the formula, its identities, landmarks of real tokens, and peers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad import zoo
from subquad.zoo import masks
from subquad.zoo.lowrank.nystrom import NystromAttention, segment_means
from tests import oracle
from tests.assertions import assert_close

FEATURES, HEADS = 16, 2


def normal(*shape, seed=0, scale=1.0):
    return scale * jax.random.normal(jax.random.key(seed), shape)


def build(**options):
    return NystromAttention(HEADS, FEATURES, **{**dict(num_landmarks=5, conv_width=None), **options}, rngs=nnx.Rngs(0))


def softmax_layer(layer):
    dense = zoo.SoftmaxAttention(HEADS, FEATURES, rngs=nnx.Rngs(1))
    nnx.update(dense, {name: nnx.state(getattr(layer, name)) for name in ("query", "key", "value", "out")})
    return dense


# Landmarks.


@pytest.mark.parametrize("length,count", [(12, 4), (13, 4), (23, 5), (5, 5), (3, 5), (1, 4), (9, 1)])
def test_landmarks_are_means_of_near_equal_segments(length, count):
    x = normal(1, length, HEADS, 3)
    means, exists = segment_means(x, None, count)
    parts = np.array_split(np.arange(length), min(count, length))
    # Every token in one segment, in order; lengths differ by one at most, as those of `array_split`, in another order.
    borders = [-(-m * length // len(parts)) for m in range(len(parts) + 1)]
    for m, (start, stop) in enumerate(zip(borders, borders[1:], strict=False)):
        assert stop - start in {len(part) for part in parts}
        np.testing.assert_allclose(means[0, m], x[0, start:stop].mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(exists[0], np.arange(count) < length)
    np.testing.assert_array_equal(means[0, len(parts) :], 0)


def test_landmarks_are_of_real_tokens_only():
    """A sample of 7 tokens has the landmarks that it has alone, whatever stands behind them."""
    x, mask = normal(2, 12, HEADS, 3), masks.padding_mask(jnp.array([12, 7]), 12)
    means, exists = segment_means(x, mask, 9)
    for row, length in ((0, 12), (1, 7)):
        alone, alone_exists = segment_means(x[row : row + 1, :length], None, 9)
        np.testing.assert_allclose(means[row], alone[0], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(exists[row], alone_exists[0])


# The layer.


def dense(query, key, value, landmarks, iterations, start, taps=None):
    """Of equal segments and no padding, [B, T, N, H], with every matrix stored."""
    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
    means = lambda x: x.reshape(*x.shape[:2], landmarks, -1, x.shape[3]).mean(3)
    weights = lambda q, k: jax.nn.softmax(q @ k.mT * query.shape[-1] ** -0.5, -1)
    from_all, between = weights(query, means(key)), weights(means(query), means(key))
    inverse, eye = start(between), jnp.eye(landmarks)
    for _ in range(iterations):
        product = between @ inverse
        inverse = inverse @ (13 * eye - product @ (15 * eye - product @ (7 * eye - product))) / 4
    outputs = from_all @ inverse @ (weights(means(query), key) @ value)
    if taps is not None:  # correlation around each token, [N, W] taps
        half = taps.shape[1] // 2
        padded = jnp.pad(value, [(0, 0), (0, 0), (half, half), (0, 0)])
        outputs += sum(taps[:, j, None, None] * padded[:, :, j : j + value.shape[2]] for j in range(taps.shape[1]))
    return outputs.swapaxes(1, 2)


def own_start(between):
    norms = between.sum(-2, keepdims=True).max(-1, keepdims=True) * between.sum(-1, keepdims=True).max(-2, keepdims=True)
    return between.mT / norms


@pytest.mark.parametrize("width", [None, 5])
def test_the_formula(width):
    layer = build(conv_width=width)
    x = normal(2, 20, FEATURES)
    taps = None if width is None else layer.taps[...].T[:, ::-1]  # a convolution is a correlation with the taps reversed
    heads = dense(*layer.project(x), 5, 6, own_start, taps)
    np.testing.assert_allclose(layer(x), layer.out(heads), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [12, 7])
def test_as_many_landmarks_as_tokens_are_softmax(length):
    """A A^+ A = A, once the iteration has converged; of fewer tokens, too."""
    layer, x = build(num_landmarks=12, num_iterations=20), normal(2, length, FEATURES, scale=3.0)
    np.testing.assert_allclose(layer(x), softmax_layer(layer)(x), rtol=1e-3, atol=2e-4)


def test_weights_sum_to_one():
    """A^+ of a matrix whose rows sum to 1 has rows that do: the output of equal values is that value."""
    layer = build(num_iterations=12)
    query, key = normal(1, 23, HEADS, 8, seed=1), normal(1, 23, HEADS, 8, seed=2)
    np.testing.assert_allclose(layer.attend(query, key, jnp.full_like(key, 3.0), None), 3.0, rtol=1e-3)


def test_more_landmarks_are_nearer_to_softmax():
    x = normal(2, 64, FEATURES, scale=0.5)
    layers = [build(num_landmarks=m, num_iterations=12) for m in (1, 8, 32)]
    errors = [float(jnp.abs(layer(x) - softmax_layer(layer)(x)).mean()) for layer in layers]
    assert errors[2] < errors[1] < errors[0]


def test_the_convolution_is_of_real_tokens_where_they_are_neighbours():
    layer, x = build(conv_width=3), normal(1, 9, FEATURES)
    mask = jnp.asarray([1, 0, 1, 1, 0, 1, 1, 1, 0], bool)
    np.testing.assert_allclose(layer(x, mask=mask[None, None, None])[:, mask], layer(x[:, mask]), rtol=1e-4, atol=1e-5)


def test_rotation_comes_before_the_means():
    layer, x = build(num_landmarks=12, num_iterations=20, rotary_base=20.0), normal(2, 12, FEATURES, scale=3.0)
    dense = softmax_layer(layer)
    dense.rotary_base = 20.0
    np.testing.assert_allclose(layer(x), dense(x), rtol=1e-3, atol=3e-4)


@pytest.mark.parametrize("change,argument", [
    (dict(num_landmarks=0), "num_landmarks"), (dict(num_iterations=0), "num_iterations"), (dict(conv_width=0), "conv_width"),
    (dict(is_causal=True), "is_causal"),
])
def test_refusals(change, argument):
    with pytest.raises(ValueError, match=rf"NystromAttention(:| does not support) {argument}"):
        build(**change)


def test_segments_are_refused_with_the_reason():
    with pytest.raises(ValueError, match="NystromAttention does not support segment_ids: .*mean over a part of the whole"):
        build()(normal(2, 7, FEATURES), segment_ids=jnp.zeros(7, int))


# Peers. Both start the iteration from a maximum over the whole batch, which six steps do not forget: the files are held to the
# dense formula above with that start, and the layer to the same formula with its own. So are all gradients.


def filled(layer, weights):
    """The layer with a peer's weights, whose linear maps may be one and whose taps are reversed."""
    own = dict(weights)
    if "to_qkv.weight" in own:
        maps = jnp.split(own.pop("to_qkv.weight"), 3)
        own |= {f"{name}.weight": w for name, w in zip(("query", "key", "value"), maps, strict=True)}
    own["taps"] = own.pop("conv.weight" if "conv.weight" in own else "res_conv.weight")[:, 0, ::-1, 0].T
    return oracle.holding(layer, own, {"to_out.0": "out"})


PEERS = {
    "nystrom_hf_conv": lambda a: a.mT / a.sum(-2).max(),
    "nystrom_hf_conv3": lambda a: a.mT / a.sum(-2).max(),
    "nystrom_lucid": lambda a: a.mT / (a.sum(-1).max() * a.sum(-2).max()),
}


@pytest.mark.parametrize("name", PEERS)
def test_oracle(name):
    peer = oracle.load(name)
    landmarks = peer.meta["cfg"]["num_landmarks"]
    (width,) = (weight.shape[2] for key, weight in peer.weights.items() if key.endswith("conv.weight"))
    layer = build(num_landmarks=landmarks, conv_width=width)

    def run(inputs, weights, mechanism):
        held, x = filled(layer, weights), inputs["x"]
        heads = mechanism(held, *held.project(x))
        return held.out(heads) if "to_out.0.weight" in weights else heads.reshape(x.shape)

    def formula(start):
        mechanism = lambda held, *heads: dense(*heads, landmarks, 6, start, held.taps[...].T[:, ::-1])
        return functools.partial(run, mechanism=mechanism)

    oracle.compare("nystrom", peer, formula(PEERS[name]), of="mechanism")
    attend = functools.partial(run, mechanism=lambda held, *heads: held.attend(*heads, None))
    ours, wanted = (oracle.outputs_and_gradients(peer, function) for function in (attend, formula(own_start)))
    assert_close(ours, wanted, 2e-5)
