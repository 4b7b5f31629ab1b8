"""Linformer: the identity that makes it softmax, the four ways of sharing, padding, and peers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad import zoo
from subquad.zoo import masks
from subquad.zoo.lowrank.linformer import LinformerAttention, LinformerProjection
from tests import oracle

FEATURES, HEADS, LENGTH, LANDMARKS = 16, 2, 12, 5
SHARING = ["none", "headwise", "key_value", "layerwise"]


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def build(sharing="headwise", landmarks=LANDMARKS, **options):
    if sharing == "layerwise":
        options["projection"] = LinformerProjection(LENGTH, landmarks, rngs=nnx.Rngs(9))
    else:
        options |= dict(max_length=LENGTH, num_landmarks=landmarks)
    return LinformerAttention(HEADS, FEATURES, sharing=sharing, rngs=nnx.Rngs(0), **options)


def sizes(module):
    return {"/".join(map(str, path)): v[...].shape for path, v in nnx.to_flat_state(nnx.state(module, nnx.Param))}


@pytest.mark.parametrize("length", [LENGTH, 7])
@pytest.mark.parametrize("sharing", SHARING)
def test_identity_projections_are_softmax(sharing, length):
    """With k = T and E = F = 1 no mixture mixes."""
    layer = build(sharing, landmarks=LENGTH)
    layer.projection.key[...] = jnp.broadcast_to(jnp.eye(LENGTH), layer.projection.key[...].shape)
    if layer.projection.value is not None:
        layer.projection.value[...] = jnp.broadcast_to(jnp.eye(LENGTH), layer.projection.value[...].shape)
    softmax = zoo.SoftmaxAttention(HEADS, FEATURES, rngs=nnx.Rngs(1))
    nnx.update(softmax, {name: nnx.state(getattr(layer, name)) for name in ("query", "key", "value", "out")})
    x = normal(2, length, FEATURES)
    if length == LENGTH:
        np.testing.assert_allclose(layer(x), softmax(x), rtol=1e-4, atol=1e-5)
    else:
        # Rows beyond the sequence are keys of 0 that a softmax over all k still weighs: k = T means T = max_length.
        assert jnp.abs(layer(x) - softmax(x)).max() > 1e-3


@pytest.mark.parametrize("sharing", SHARING)
def test_the_formula(sharing):
    layer = build(sharing)
    x, context = normal(2, 9, FEATURES), normal(2, 11, FEATURES, seed=1)
    query, key, value = layer.project(x, context)
    E = layer.projection.key[...]
    F = E if layer.projection.value is None else layer.projection.value[...]
    E, F = (jnp.broadcast_to(m, (HEADS, LENGTH, LANDMARKS))[:, :11] for m in (E, F))
    heads = []
    for n in range(HEADS):
        mixed_key, mixed_value = E[n].T @ key[:, :, n], F[n].T @ value[:, :, n]
        logits = query[:, :, n] @ mixed_key.swapaxes(1, 2) / (FEATURES / HEADS) ** 0.5
        heads.append(jax.nn.softmax(logits) @ mixed_value)
    np.testing.assert_allclose(layer(x, context), layer.out(jnp.stack(heads, 2)), rtol=1e-4, atol=1e-6)


def test_what_each_sharing_owns():
    owned = {s: {k: v for k, v in sizes(build(s)).items() if k.startswith("projection")} for s in SHARING}
    matrix = (LENGTH, LANDMARKS)
    assert owned == {
        "none": {"projection/key": (HEADS, *matrix), "projection/value": (HEADS, *matrix)},
        "headwise": {"projection/key": matrix, "projection/value": matrix},
        "key_value": {"projection/key": matrix},
        "layerwise": {"projection/key": matrix},
    }


def test_layers_share_one_projection():
    shared = LinformerProjection(LENGTH, LANDMARKS, rngs=nnx.Rngs(9))

    def model(projections):
        return nnx.List(
            LinformerAttention(HEADS, FEATURES, sharing="layerwise", projection=p, rngs=nnx.Rngs(i))
            for i, p in enumerate(projections)
        )

    def gradient(layers):
        graphdef, params = nnx.split(layers, nnx.Param)

        def loss(params):
            x = normal(2, 10, FEATURES)
            for layer in nnx.merge(graphdef, params):
                x = x + layer(x)
            return jnp.sum(x**2)

        return jax.jit(jax.grad(loss))(params)

    together = model([shared] * 3)
    assert sum("projection" in path for path in sizes(together)) == 1
    apart = model([nnx.clone(shared) for _ in range(3)])
    one, three = gradient(together), gradient(apart)
    expected = sum(three[i]["projection"]["key"][...] for i in range(3))
    np.testing.assert_allclose(one[0]["projection"]["key"][...], expected, rtol=1e-4, atol=1e-4)

    layers = nnx.merge(*nnx.split(together))
    layers[2].projection.key[...] += 1.0
    np.testing.assert_array_equal(layers[0].projection.key[...], layers[2].projection.key[...])


def test_layers_of_a_model_share_one_projection():
    shared = LinformerProjection(LENGTH, LANDMARKS, rngs=nnx.Rngs(9))
    model = zoo.Encoder(
        11, FEATURES, num_layers=3, mlp_features=16, max_length=LENGTH, mixer="linformer",
        mixer_options=dict(num_heads=HEADS, sharing="layerwise", projection=shared), rngs=nnx.Rngs(0),
    )
    assert sum("projection" in path for path in sizes(model)) == 1


@pytest.mark.parametrize("sharing", ["none", "headwise"])
def test_rotation_comes_before_the_mixtures(sharing):
    """With E = F = 1 it is softmax attention with the same rotation; in cross-attention both sides count from 0."""
    layer = build(sharing, landmarks=LENGTH, rotary_base=20.0)
    for matrix in (layer.projection.key, layer.projection.value):
        matrix[...] = jnp.broadcast_to(jnp.eye(LENGTH), matrix[...].shape)
    softmax = zoo.SoftmaxAttention(HEADS, FEATURES, rotary_base=20.0, rngs=nnx.Rngs(1))
    nnx.update(softmax, {name: nnx.state(getattr(layer, name)) for name in ("query", "key", "value", "out")})
    x = normal(2, LENGTH, FEATURES)
    for arguments in ((x,), (x[:, :5], x)):
        np.testing.assert_allclose(layer(*arguments), softmax(*arguments), rtol=1e-4, atol=1e-5)
        assert jnp.abs(layer(*arguments) - build(sharing, landmarks=LENGTH)(*arguments)).max() > 1e-3
    # Positions count real tokens, wherever the padding stands.
    mask = jnp.arange(LENGTH) >= jnp.array([[[[0]]], [[[4]]]])
    np.testing.assert_allclose(layer(x, mask=mask)[1, 4:], layer(x[1:, 4:])[0], rtol=1e-4, atol=1e-5)


def test_segments_are_refused_with_the_reason():
    with pytest.raises(ValueError, match="LinformerAttention does not support segment_ids: .*mixture of all tokens"):
        build()(normal(2, LENGTH, FEATURES), segment_ids=jnp.zeros(LENGTH, int))


@pytest.mark.parametrize("sharing", SHARING)
def test_padding_is_left_out_whatever_it_holds(sharing):
    layer = build(sharing)
    # The key's bias would give even a zero token a part in every mixture.
    layer.key.bias[...], layer.value.bias[...] = normal(HEADS, 8, seed=2), normal(HEADS, 8, seed=3)
    x = normal(2, LENGTH, FEATURES)
    mask = masks.padding_mask(jnp.array([LENGTH, 7]), LENGTH)
    y = layer(x, mask=mask)
    np.testing.assert_allclose(layer(x.at[1, 7:].set(jnp.nan), mask=mask)[1, :7], y[1, :7], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(layer(x[1:, :7])[0], y[1, :7], rtol=1e-4, atol=1e-6)
    assert jnp.abs(layer(x)[1, :7] - y[1, :7]).max() > 1e-3


def test_nothing_to_see_is_zero():
    layer = build()
    layer.value.bias[...] = 1.0
    layer.out.bias[...] = 3.0
    x = normal(2, LENGTH, FEATURES)
    mask = masks.padding_mask(jnp.array([LENGTH, 0]), LENGTH)
    np.testing.assert_array_equal(layer(x, mask=mask)[1], 3.0)
    gradient = jax.grad(lambda x: jnp.sum(layer(x, mask=mask)[1] ** 2))(x)
    np.testing.assert_array_equal(gradient, 0)


def test_bfloat16():
    """Also that the mixtures are summed in float32: 2000 terms of one size would stop at 256 in bfloat16."""
    layer = build(dtype=jnp.bfloat16)
    x = normal(2, LENGTH, FEATURES)
    y = layer(x)
    assert y.dtype == jnp.bfloat16
    exact = build()(x)
    assert jnp.abs(y.astype(jnp.float32) - exact).max() < 0.03 * jnp.abs(exact).max() + 0.01

    projection = LinformerProjection(2000, 3, rngs=nnx.Rngs(0))
    projection.key[...] = jnp.ones((2000, 3))
    ones = jnp.ones((1, 2000, 1, 4), jnp.bfloat16)
    mixed, _ = jax.jit(lambda x: projection(x, x, None))(ones)
    assert mixed.dtype == jnp.bfloat16
    np.testing.assert_allclose(mixed.astype(jnp.float32), 2000, rtol=2**-8)


@pytest.mark.parametrize(
    "change,argument",
    [
        (dict(max_length=None), "max_length"),
        (dict(max_length=0), "max_length"),
        (dict(num_landmarks=0), "num_landmarks"),
        (dict(sharing="rows"), "sharing"),
        (dict(sharing="layerwise"), "projection"),
        (dict(projection=LinformerProjection(9, 3, rngs=nnx.Rngs(0))), "projection"),
        (dict(sharing="layerwise", projection=LinformerProjection(9, 3, rngs=nnx.Rngs(0))), "max_length"),
        (
            dict(
                sharing="layerwise", max_length=None, num_landmarks=None,
                projection=LinformerProjection(9, 3, num_heads=3, rngs=nnx.Rngs(0)),
            ),
            "projection",
        ),
        (dict(is_causal=True), "is_causal"),
    ],
)
def test_refusals(change, argument):
    with pytest.raises(ValueError, match=rf"Linformer\w+(:| does not support) {argument}"):
        LinformerAttention(HEADS, FEATURES, **(dict(max_length=LENGTH, num_landmarks=5, rngs=nnx.Rngs(0)) | change))


def test_a_longer_sequence_is_refused():
    layer = build()
    with pytest.raises(ValueError, match="LinformerAttention: inputs_kv must be .* max_length = 12 tokens, got 13"):
        layer(normal(1, LENGTH + 1, FEATURES))
    assert layer(normal(1, 40, FEATURES), normal(1, LENGTH, FEATURES)).shape == (1, 40, FEATURES)  # queries may be more


# Peers.


@pytest.mark.parametrize("name", ["linformer_plain", "linformer_short"])
def test_oracle(name):
    """The `linformer` package: E and F for all heads, no biases but the last. It takes no mask."""
    peer = oracle.load(name)
    config = peer.meta["cfg"]
    layer = LinformerAttention(
        config["H"], 16, max_length=config["seq_len"], num_landmarks=config["k"], sharing="headwise", rngs=nnx.Rngs(0)
    )
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out": "out"}
    names |= {"proj_k": "projection.key", "proj_v": "projection.value"}
    oracle.compare("linformer", peer, lambda inputs, weights: oracle.holding(layer, weights, names)(inputs["x"]))


def test_oracle_lra():
    """Long Range Arena's: one matrix for keys and values of all heads, longer than the sequence."""
    peer = oracle.load("lra_linformer")
    sizes = {word: int(peer.meta["cfg"][word]) for word in ("num_heads", "max_len", "low_rank_features")}
    heads, length, landmarks = sizes.values()
    layer = LinformerAttention(heads, 16, max_length=length, num_landmarks=landmarks, sharing="key_value", rngs=nnx.Rngs(0))
    names = {"lr_kernel": "projection.key"}
    oracle.compare("linformer", peer, lambda inputs, weights: oracle.holding(layer, weights, names)(inputs["x"]))


def test_it_mixes_with_the_projection_it_is_given():
    given = LinformerProjection(LENGTH, 4, num_heads=HEADS, share_key_value=False, rngs=nnx.Rngs(5))
    layer = LinformerAttention(HEADS, FEATURES, sharing="layerwise", projection=given, rngs=nnx.Rngs(0))
    assert layer.projection is given
    owned, x = build("none", landmarks=4), normal(2, LENGTH, FEATURES)
    nnx.update(owned, nnx.state(layer))
    np.testing.assert_array_equal(layer(x), owned(x))
