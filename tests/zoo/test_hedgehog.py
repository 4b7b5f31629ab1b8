"""Hedgehog: its weights, exponentials of any size, and the loss that makes them those of softmax."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad import zoo
from subquad.zoo.kernelized import hedgehog
from subquad.zoo.kernelized.hedgehog import HedgehogAttention

FEATURES, HEADS, LENGTH = 16, 4, 11


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def build(**options):
    """A layer with feature maps off the identity; two heads of keys."""
    layer = HedgehogAttention(HEADS, FEATURES, num_kv_heads=2, **options, rngs=nnx.Rngs(0))
    for seed, name in enumerate(("query_map", "key_map", "query_shift", "key_shift")):
        variable = getattr(layer, name)
        variable[...] += 0.3 * normal(*variable.shape, seed=seed)
    return layer


def softmax(logits):
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def weights_of(layer, x, teacher=False):
    """The weights of all pairs, [B, N, T, S], in float64: those of the layer, or of softmax attention."""
    query, key = (np.asarray(heads, np.float64) for heads in layer.project(jnp.asarray(x))[:2])
    visible = np.tri(x.shape[1], dtype=bool) | (not layer.is_causal)
    if teacher:
        logits = np.einsum("btnh,bsnh->bnts", query, key.repeat(2, axis=2)) / np.sqrt(FEATURES / HEADS)
        return softmax(np.where(visible, logits, -1e9))
    phis = []
    for heads, maps, shift in ((query, layer.query_map, layer.query_shift), (key, layer.key_map, layer.key_shift)):
        z = np.einsum("btnh,nhm->btnm", heads, np.float64(maps[...])) + np.float64(shift[...])
        both = np.concatenate([z, -z], axis=-1)
        phis.append(softmax(both) if layer.activation == "softmax" else np.exp(both))
    weights = np.where(visible, np.einsum("btnm,bsnm->bnts", phis[0], phis[1].repeat(2, axis=2)), 0)
    return weights / weights.sum(-1, keepdims=True)


@pytest.mark.parametrize(("activation", "is_causal"), [("softmax", False), ("softmax", True), ("exp", True)])
def test_the_formula(activation, is_causal):
    layer, x = build(activation=activation, is_causal=is_causal), normal(2, LENGTH, FEATURES)
    value = np.asarray(layer.value(jnp.asarray(x))).repeat(2, axis=2)
    heads = np.einsum("bnts,bsnh->btnh", weights_of(layer, x), value)
    np.testing.assert_allclose(layer(x), layer.out(jnp.asarray(heads, jnp.float32)), rtol=1e-4, atol=1e-5)


def test_exponentials_of_any_size():
    """exp(200) is no float32: the loudest key takes all, and nothing is NaN, forward or backward."""
    layer, x = build(activation="exp", is_causal=True), normal(1, 5, FEATURES)
    layer.key_map[...] *= 200

    @jax.jit
    def run(x):
        outputs, pull = jax.vjp(lambda x: layer(x), x)
        return outputs, pull(outputs)[0]

    outputs, gradient = run(x)
    assert jnp.isfinite(outputs).all() and jnp.isfinite(gradient).all()


@pytest.mark.parametrize(("activation", "is_causal"), [("softmax", False), ("exp", True)])
def test_the_loss(activation, is_causal, monkeypatch):
    """All weights at once against blocks of 4 queries; padding in front counts for nothing, whatever it holds."""
    monkeypatch.setattr(hedgehog, "BLOCK", 4)
    layer, x = build(activation=activation, is_causal=is_causal), normal(2, LENGTH, FEATURES)
    teacher, student = weights_of(layer, x, teacher=True), weights_of(layer, x)
    want = -np.where(teacher > 0, teacher * np.log(np.where(teacher > 0, student, 1)), 0).sum(-1).mean()
    padded = np.concatenate([np.full((2, 3, FEATURES), np.nan, np.float32), x], axis=1)
    mask = jnp.broadcast_to(jnp.arange(LENGTH + 3) >= 3, (2, 1, 1, LENGTH + 3))
    for inputs, words in ((x, {}), (padded, dict(mask=mask))):
        np.testing.assert_allclose(jax.jit(layer.distillation_loss)(inputs, **words), want, rtol=1e-5)


@pytest.mark.parametrize("is_causal", [False, True])
def test_the_loss_of_segments_and_of_padding_alone(is_causal, monkeypatch):
    """Packed segments give the mean over all tokens; a sample of padding alone counts for nothing, and its slope is no NaN."""
    monkeypatch.setattr(hedgehog, "BLOCK", 4)
    layer, x, cut = build(is_causal=is_causal), normal(1, LENGTH, FEATURES), 5
    graph, params, rest = nnx.split(layer, nnx.Param, ...)
    loss = jax.jit(lambda params, x, **words: nnx.merge(graph, params, rest).distillation_loss(x, **words))
    parts = [(len(part[0]) * loss(params, part), len(part[0])) for part in (x[:, :cut], x[:, cut:])]
    want = sum(total for total, _ in parts) / LENGTH
    x, real = np.concatenate([x, x]), jnp.array([True, False])[:, None, None, None]
    words = dict(mask=jnp.broadcast_to(real, (2, 1, 1, LENGTH)), segment_ids=jnp.array([7] * cut + [2] * (LENGTH - cut)))
    found, slopes = jax.jit(jax.value_and_grad(lambda params: loss(params, x, **words)))(params)
    np.testing.assert_allclose(found, want, rtol=1e-5)
    assert all(jnp.isfinite(slope).all() for slope in jax.tree.leaves(slopes))


def test_the_loss_trains_the_maps_alone_until_weights_are_alike():
    """Of a converted softmax layer; what remains is less than half of the divergence there was."""
    model = nnx.Sequential(zoo.SoftmaxAttention(2, FEATURES, is_causal=True, rngs=nnx.Rngs(1)))
    layer = zoo.convert(model, "hedgehog", rngs=nnx.Rngs(0)).model.layers[0]
    layer.query.kernel[...] *= 3  # spikier
    graph, params, rest = nnx.split(layer, nnx.Param, ...)
    x = jnp.asarray(normal(4, 24, FEATURES))
    loss = jax.jit(jax.value_and_grad(lambda params: nnx.merge(graph, params, rest).distillation_loss(x)))
    teacher = softmax_weights(layer, x)
    entropy = -np.where(teacher > 0, teacher * np.log(np.maximum(teacher, 1e-30)), 0).sum(-1).mean()
    first, gradient = loss(params)
    moved = {path[0] for path, leaf in nnx.to_flat_state(gradient) if jnp.abs(leaf[...]).max() > 0}
    assert moved == {"query_map", "query_shift", "key_map", "key_shift"}
    for _ in range(60):
        _, gradient = loss(params)
        params = jax.tree.map(lambda p, g: p - 5.0 * g, params, gradient)
    assert 0 < loss(params)[0] - entropy < 0.5 * (first - entropy)


def softmax_weights(layer, x):
    query, key, _ = layer.project(x)
    logits = np.einsum("btnh,bsnh->bnts", query, key) / np.sqrt(layer.head_features)
    return softmax(np.where(np.tri(x.shape[1], dtype=bool), logits, -1e9))


def test_long_inputs_take_no_array_of_all_pairs():
    layer = build(is_causal=True)
    shape = jax.ShapeDtypeStruct((1, 2048, FEATURES), jnp.float32)
    program = jax.make_jaxpr(functools.partial(HedgehogAttention.distillation_loss, layer))(shape)
    assert "2048,2048" not in str(program)
