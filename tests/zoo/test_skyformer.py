"""Skyformer: its formula, exact where all rows are landmarks; landmarks of real tokens, redraws, and the authors' code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad.zoo import masks
from subquad.zoo.dense.kernelized import gaussian_sums
from subquad.zoo.lowrank.skyformer import SkyformerAttention, take
from tests import oracle
from tests.assertions import assert_close

FEATURES, HEADS = 16, 2


def build(**options):
    return SkyformerAttention(HEADS, FEATURES, **{**dict(num_landmarks=6), **options}, rngs=nnx.Rngs(0))


def normal(*shape, seed=0, scale=1.0):
    return scale * jax.random.normal(jax.random.key(seed), shape)


def gaussian(x, y):
    """[B, N, T, H] and [B, N, S, H] -> [B, N, T, S], of inputs that are scaled already."""
    return jnp.exp(-0.5 * jnp.sum((x[:, :, :, None] - y[:, :, None]) ** 2, -1))


def own_start(a):
    return a.mT / (a.sum(-2, keepdims=True).max(-1, keepdims=True) * a.sum(-1, keepdims=True).max(-2, keepdims=True))


def dense(query, key, value, rows, scale, gamma, iterations, start, keep=None):
    """[B, N, T, H], with every matrix stored; rows [B, m, M] of the 2T of queries and keys, whose kernels m are summed."""
    keep = jnp.ones((len(query), 1, query.shape[2], 1)) if keep is None else keep
    both = scale * jnp.concatenate([query * keep, key * keep], 2)
    pick = lambda x, at: jax.vmap(lambda x, at: x[:, at])(x, at)
    columns = sum(gaussian(both, pick(both, rows[:, m])) for m in range(rows.shape[1]))
    between = sum(pick(columns, rows[:, m]) for m in range(rows.shape[1])) + gamma * jnp.eye(rows.shape[2])
    root = between.sum(-1) ** -0.5
    between = root[..., :, None] * between * root[..., None, :]
    inverse, eye = start(between), jnp.eye(rows.shape[2])
    for _ in range(iterations):
        product = between @ inverse
        inverse = inverse @ (13 * eye - product @ (15 * eye - product @ (7 * eye - product))) / 4
    inverse = root[..., :, None] * inverse * root[..., None, :]
    length = query.shape[2]
    return columns[:, :, :length] @ (inverse @ ((columns[:, :, length:] * keep).mT @ (value * keep)))


def rows_of(layer, batch, length):
    """Which rows of queries and keys, in one list, the layer's landmarks are."""
    half = layer.num_landmarks // 2
    rows = (layer.landmarks[...] * length).astype(int) + jnp.where(jnp.arange(layer.num_landmarks) < half, 0, length)
    return jnp.broadcast_to(rows, (batch, 1, layer.num_landmarks))


@pytest.mark.parametrize("landmarks", [6, 5])
def test_the_formula(landmarks):
    layer, x = build(num_landmarks=landmarks, gamma=0.2, num_iterations=4), normal(2, 17, FEATURES)
    query, key, value = (heads.swapaxes(1, 2) for heads in layer.project(x))
    heads = dense(query, key, value, rows_of(layer, 2, 17), 8**-0.25, 0.2, 4, own_start)
    np.testing.assert_allclose(layer(x), layer.out(heads.swapaxes(1, 2)), rtol=1e-4, atol=1e-5)


def test_all_rows_as_landmarks_are_the_kernel_itself():
    """Section 4.3: with gamma near 0 and a converged inverse, the block of the approximation is the block of the kernel."""
    layer, x = build(num_landmarks=14, gamma=1e-4, num_iterations=30), normal(2, 7, FEATURES, scale=3.0)
    layer.landmarks[...] = (jnp.arange(14) % 7 + 0.5) / 7
    query, key, value = layer.project(x)
    np.testing.assert_allclose(layer.attend(query, key, value, None), gaussian_sums(query, key, value), rtol=1e-2, atol=2e-3)


def test_landmarks_are_real_tokens():
    """A sample of 7 tokens has the outputs that it has alone, and no place is past its end."""
    layer, x = build(num_landmarks=9), normal(2, 12, FEATURES)
    y = layer(x, mask=masks.padding_mask(jnp.array([12, 7]), 12))
    np.testing.assert_allclose(y[1, :7], layer(x[1:, :7])[0], rtol=1e-4, atol=1e-5)
    tokens = jnp.broadcast_to(jnp.arange(12.0)[None, :, None, None], (2, 12, 1, 1))
    taken = take(tokens, jnp.asarray([0.0, 0.5, 1 - 2**-24]), jnp.array([12, 7]))[..., 0, 0]
    np.testing.assert_array_equal(taken, [[0, 6, 11], [0, 3, 6]])


def test_more_landmarks_are_nearer_to_the_kernel():
    query, key, value = (normal(2, 64, HEADS, 8, seed=seed) for seed in range(3))
    errors = []
    for count in (4, 32):
        layer = build(num_landmarks=count, gamma=1e-2, num_iterations=12)
        near = jax.jit(lambda *qkv, layer=layer: layer.attend(*qkv, None))(query, key, value)
        errors.append(float(jnp.abs(near - gaussian_sums(query, key, value)).mean()))
    assert errors[1] < 0.7 * errors[0]


def test_redraw_is_pure_and_moves_the_landmarks():
    layer, x = build(), normal(1, 9, FEATURES)
    y, before = layer(x), layer.landmarks[...]
    drawn = layer.redraw(nnx.Rngs(1))
    np.testing.assert_array_equal(layer.landmarks[...], before)
    assert drawn.shape == (6,) and ((drawn >= 0) & (drawn < 1)).all()
    layer.landmarks[...] = drawn
    assert jnp.abs(layer(x) - y).max() > 1e-4


@pytest.mark.parametrize("change,argument", [
    (dict(num_landmarks=0), "num_landmarks"), (dict(num_iterations=0), "num_iterations"), (dict(gamma=0.0), "gamma"),
    (dict(is_causal=True), "is_causal"),
])
def test_refusals(change, argument):
    with pytest.raises(ValueError, match=rf"SkyformerAttention(:| does not support) {argument}"):
        build(**change)


def test_oracle():
    """The authors' code. It sums two sketches, takes 32 for H, lets padding be tokens of 0, and starts the iteration from the
    whole batch: the file is held to the dense formula with all that, and the layer to the same formula without."""
    peer = oracle.load("skyformer")
    keep, rows = jnp.asarray(peer.constants["keep"])[:, None, :, None], jnp.asarray(peer.constants["sketch"].astype(int))
    whole = lambda a: a.mT / a.sum(-2).max()
    formula = lambda inputs, _: dense(*(inputs[name] for name in "qkv"), rows, 32**-0.25, 0.1, 6, whole, keep)
    oracle.compare("skyformer", peer, formula, of="mechanism")

    layer, swap = SkyformerAttention(2, 8, num_landmarks=5, rngs=nnx.Rngs(0)), lambda x: x.swapaxes(1, 2)
    ours = lambda inputs, _: swap(layer.attend(*(swap(inputs[name]) for name in "qkv"), None))
    single = rows_of(layer, 2, 20)
    wanted = lambda inputs, _: dense(*(inputs[name] for name in "qkv"), single, 4**-0.25, 0.1, 6, own_start)
    assert_close(*(oracle.outputs_and_gradients(peer, function) for function in (ours, wanted)), 2e-5)
