"""SoftmaxAttention is nnx.MultiHeadAttention, and more."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import __version__ as flax_version
from flax import nnx

from subquad import zoo
from subquad.zoo import masks
from tests import oracle
from tests.assertions import assert_close


def inputs(length, seed=0, features=16):
    return jax.random.normal(jax.random.key(seed), (2, length, features))


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_checkpoints_interchange_with_flax(kv_heads):
    flax = nnx.MultiHeadAttention(4, 16, num_kv_heads=kv_heads, decode=False, rngs=nnx.Rngs(1))
    ours = zoo.SoftmaxAttention(4, 16, num_kv_heads=kv_heads, rngs=nnx.Rngs(2))
    state = jax.tree.map(lambda a: a + 0.1, nnx.state(flax, nnx.Param))
    nnx.update(flax, state)
    nnx.update(ours, state)
    x, y = inputs(17), inputs(11, seed=1)
    np.testing.assert_allclose(ours(x), flax(x), atol=1e-5)
    np.testing.assert_allclose(ours(x, y), flax(x, y), atol=1e-5)
    mask = jax.random.bernoulli(jax.random.key(3), 0.7, (2, 4, 17, 17)).at[..., 0].set(True)
    np.testing.assert_allclose(ours(x, mask=mask), flax(x, mask=mask), atol=1e-5)
    nnx.update(flax, nnx.state(ours, nnx.Param))
    causal = zoo.SoftmaxAttention(4, 16, num_kv_heads=kv_heads, is_causal=True, rngs=nnx.Rngs(2))
    nnx.update(causal, state)
    np.testing.assert_allclose(causal(x), flax(x, mask=nnx.make_causal_mask(jnp.ones((2, 17)), dtype=bool)), atol=1e-5)


@pytest.mark.parametrize("is_causal", [False, True])
def test_outputs_and_gradients_are_flaxs(is_causal):
    flax = nnx.MultiHeadAttention(4, 16, decode=False, rngs=nnx.Rngs(1))
    ours = zoo.SoftmaxAttention(4, 16, is_causal=is_causal, rngs=nnx.Rngs(2))
    state = jax.tree.map(lambda a: a + 0.1, nnx.state(flax, nnx.Param))
    mask = nnx.make_causal_mask(jnp.ones((2, 300)), dtype=bool) if is_causal else None
    x, weights = inputs(300), inputs(300, seed=1)

    def run(layer, mask):
        graphdef = nnx.graphdef(layer)

        def loss(state, x):
            y = nnx.merge(graphdef, state)(x, mask=mask)
            return jnp.sum(y * weights), y

        return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(state, x)

    (ours, y), (theirs, expected) = run(ours, None), run(flax, mask)
    peer = SimpleNamespace(name="nnx.MultiHeadAttention", meta={"peer": "flax", "version": flax_version})
    oracle.check("softmax", peer, (y, expected), (ours, theirs))


@pytest.mark.parametrize(("kv_heads", "broadcast"), [(4, True), (2, False)])
def test_dropout_is_flaxs(kv_heads, broadcast):
    """The same key drops the same weights; off until `train()`, or until a call says so."""
    options = dict(num_kv_heads=kv_heads, dropout_rate=0.4, broadcast_dropout=broadcast)
    flax = nnx.MultiHeadAttention(4, 16, **options, decode=False, deterministic=True, rngs=nnx.Rngs(1))
    ours = zoo.SoftmaxAttention(4, 16, **options, rngs=nnx.Rngs(2))
    nnx.update(ours, nnx.state(flax, nnx.Param))
    x, cotangent = inputs(9), inputs(9, seed=1)

    @nnx.jit
    def run(layer, seed):
        def loss(layer):
            y = layer(x, rngs=nnx.Rngs(dropout=jax.random.key(seed)))
            return jnp.sum(y * cotangent), y

        (_, y), gradients = nnx.value_and_grad(loss, has_aux=True)(layer)
        return y, nnx.to_pure_dict(nnx.state(gradients, nnx.Param))

    quiet = run(ours, 0)
    assert_close(quiet, run(flax, 0), 1e-5)
    ours.train(), flax.train()
    noisy = run(ours, 0)
    assert_close(noisy, run(flax, 0), 1e-5)
    np.testing.assert_array_equal(run(ours, 0)[0], noisy[0])
    for other in (quiet, run(ours, 1)):
        assert oracle.relative_error(other[0], noisy[0]) > 0.1
    assert_close(ours(x, deterministic=True), quiet[0], 1e-5)
    ours.eval()
    assert_close(ours(x, deterministic=False, rngs=nnx.Rngs(dropout=0)), noisy[0], 1e-5)


def test_dropout_under_every_mask_and_in_steps():
    """A rate so small that nothing is dropped shows the path that makes all weights: causality, masks, segments, rotation."""
    options = dict(num_kv_heads=2, is_causal=True, rotary_base=100.0, rngs=nnx.Rngs(0))
    ours = zoo.SoftmaxAttention(4, 16, dropout_rate=1e-12, **options)
    x, draws = inputs(12), dict(deterministic=False, rngs=nnx.Rngs(dropout=0))
    masked = dict(mask=jax.random.bernoulli(jax.random.key(3), 0.6, (2, 4, 12, 12)).at[:, :, 4].set(False))
    padded = dict(mask=jnp.ones((2, 1, 1, 12), bool).at[0, ..., :5].set(False).at[1, ..., 7].set(False))
    packed = dict(segment_ids=jnp.array([0] * 5 + [1] * 7), positions=jnp.concatenate([jnp.arange(5), jnp.arange(7)]))
    for call in ({}, masked, padded, packed):
        assert_close(ours(x, **call, **draws), ours(x, **call), 1e-5)
    # Steps drop nothing.
    ours.dropout_rate = 0.5
    ours.train()
    assert_close(ours.extend(x, ours.init_cache(2, 12))[0], ours(x, deterministic=True), 1e-5)
    with pytest.raises(ValueError, match="SoftmaxAttention: rngs must be given where it draws"):
        ours(x)
    with pytest.raises(NotImplementedError, match="stores no weights"):
        zoo.SoftmaxAttention(4, 16, dropout_rate=0.5, implementation="triton", rngs=nnx.Rngs(0))(x, **draws)


@pytest.mark.parametrize("padding", [None, "right", "left"])
def test_sown_weights_are_flaxs(padding):
    options = dict(num_kv_heads=2, dropout_rate=0.4)
    flax = nnx.MultiHeadAttention(4, 16, **options, decode=False, deterministic=False, rngs=nnx.Rngs(1))
    ours = zoo.SoftmaxAttention(4, 16, **options, rngs=nnx.Rngs(2))
    nnx.update(ours, nnx.state(flax, nnx.Param))
    ours.train()
    x, y = inputs(9), inputs(7, seed=1)
    is_real = jnp.ones((2, 7), bool) if padding is None else jnp.arange(7) < jnp.array([[7], [4]])
    is_real = is_real[:, ::-1] if padding == "left" else is_real
    mask = None if padding is None else is_real[:, None, None]

    @nnx.jit
    def run(layer, *inputs):
        layer(*inputs, mask=mask, rngs=nnx.Rngs(dropout=0), sow_weights=True)
        return nnx.pop(layer, nnx.Intermediate)["attention_weights"][0]

    for arguments in ((y,), (x, y)):
        found, expected = run(ours, *arguments), run(flax, *arguments)
        assert found.shape == expected.shape and found.dtype == expected.dtype
        queries = is_real if len(arguments) == 1 else jnp.ones((2, 9), bool)  # a query at padding sees what it likes
        assert_close(jnp.where(queries[:, None, :, None], found, 0), jnp.where(queries[:, None, :, None], expected, 0), 1e-5)
    assert not nnx.state(ours, nnx.Intermediate)


def test_sown_weights_add_nothing_to_a_call():
    ours = zoo.SoftmaxAttention(4, 16, is_causal=True, rotary_base=100.0, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    x, segments = inputs(9).reshape(1, 2, 9, 16), jnp.array([0] * 4 + [1] * 5)
    assert_close(ours(x, segment_ids=segments, sow_weights=True), ours(x, segment_ids=segments), 2e-2)
    weights = ours.attention_weights[0]
    assert weights.shape == (1, 2, 4, 9, 9) and weights.dtype == jnp.bfloat16
    seen = np.tril(np.ones((9, 9), bool)) & (segments[:, None] == segments)
    np.testing.assert_array_equal(weights > 0, np.broadcast_to(seen, weights.shape))


def test_dropout_of_everything_leaves_the_bias():
    layer = zoo.SoftmaxAttention(4, 16, dropout_rate=1.0, bias_init=nnx.initializers.ones, rngs=nnx.Rngs(0))
    value, gradient = jax.value_and_grad(
        lambda x: jnp.sum(layer(x, deterministic=False, rngs=nnx.Rngs(dropout=0)))
    )(inputs(5))
    assert value == 2 * 5 * 16 and not gradient.any()


def test_paths_and_shapes_are_flaxs():
    paths = lambda m: {path: v[...].shape for path, v in nnx.to_flat_state(nnx.state(m, nnx.Param))}
    flax = nnx.MultiHeadAttention(4, 16, qkv_features=8, out_features=24, decode=False, rngs=nnx.Rngs(0))
    assert paths(flax) == paths(zoo.SoftmaxAttention(4, 16, qkv_features=8, out_features=24, rngs=nnx.Rngs(0)))


def test_a_row_that_sees_nothing_is_the_projection_of_zero():
    layer = zoo.SoftmaxAttention(4, 16, bias_init=nnx.initializers.ones, rngs=nnx.Rngs(0))
    mask = jnp.ones((2, 1, 9, 9), bool).at[:, :, 3].set(False)
    np.testing.assert_allclose(layer(inputs(9), mask=mask)[:, 3], 1.0)


def test_segments_are_separate_sequences():
    layer = zoo.SoftmaxAttention(4, 16, is_causal=True, rotary_base=10000.0, rngs=nnx.Rngs(0))
    x = inputs(12)
    segments = jnp.array([0] * 5 + [1] * 7)
    positions = jnp.concatenate([jnp.arange(5), jnp.arange(7)])
    packed = layer(x, segment_ids=segments, positions=positions)
    np.testing.assert_allclose(packed[:, :5], layer(x[:, :5]), atol=1e-5)
    np.testing.assert_allclose(packed[:, 5:], layer(x[:, 5:]), atol=1e-5)


def test_rotary_sees_distances_only():
    layer = zoo.SoftmaxAttention(4, 16, rotary_base=10000.0, rngs=nnx.Rngs(0))
    x = inputs(12)
    np.testing.assert_allclose(layer(x, positions=jnp.arange(12) + 1000), layer(x), atol=2e-4)
    assert jnp.abs(layer(x, positions=2 * jnp.arange(12)) - layer(x)).max() > 1e-3


def test_rotary_extend_equals_one_call():
    layer = zoo.SoftmaxAttention(4, 16, num_kv_heads=2, is_causal=True, rotary_base=100.0, rngs=nnx.Rngs(0))
    x, cache, pieces = inputs(10), layer.init_cache(2, 16), []
    for start, stop in ((0, 4), (4, 5), (5, 10)):
        y, cache = layer.extend(x[:, start:stop], cache)
        pieces.append(y)
    np.testing.assert_allclose(jnp.concatenate(pieces, 1), layer(x), atol=1e-5)
    assert cache.key.shape == (2, 16, 2, 4)


def test_masks_of_positions():
    q, k = jnp.arange(4), jnp.arange(6)
    assert masks.causal_mask(q + 2, k)[0, 0].tolist() == np.tril(np.ones((4, 6)), 2).astype(bool).tolist()
    assert masks.window_mask(q, k, 1)[0, 0].tolist() == (np.abs(np.subtract.outer(np.arange(4), np.arange(6))) <= 1).tolist()
    assert masks.window_mask(q, k, (2, 0))[0, 0, 3].tolist() == [False, True, True, True, False, False]
    assert masks.window_mask(q, k, np.int64(1)).tolist() == masks.window_mask(q, k, 1).tolist()
    assert masks.segment_mask(jnp.array([0, 1]), jnp.array([1, 0]))[0, 0].tolist() == [[False, True], [True, False]]
    assert masks.padding_mask(jnp.array([1, 2]), 2).shape == (2, 1, 1, 2)
    two = jnp.stack([q, q + 1])
    assert masks.causal_mask(two, k)[1, 0].tolist() == masks.causal_mask(q + 1, k)[0, 0].tolist()


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_masks_of_one_sample_serve_any_batch(batch):
    at, x = jnp.arange(5), jax.random.normal(jax.random.key(0), (*batch, 5, 16))
    layer, causal = (zoo.SoftmaxAttention(4, 16, is_causal=is_causal, rngs=nnx.Rngs(0)) for is_causal in (False, True))
    np.testing.assert_allclose(layer(x, mask=masks.causal_mask(at, at)), causal(x), atol=1e-6)
    assert masks.window_mask(at, at, 1).shape == masks.segment_mask(at, at).shape == (1, 1, 5, 5)


def test_each_axis_of_a_mask_may_be_one():
    layer, x = zoo.SoftmaxAttention(4, 16, rngs=nnx.Rngs(0)), inputs(5)
    rows = jnp.array([True, False, True, True, False])[:, None]
    for mask in (rows[None, None], jnp.ones((1, 1, 1, 1), bool), jnp.zeros((2, 4, 1, 1), bool).at[0].set(True)):
        np.testing.assert_allclose(layer(x, mask=mask), layer(x, mask=jnp.broadcast_to(mask, (2, 4, 5, 5))), atol=1e-6)


@pytest.mark.parametrize(
    "arguments,word",
    [
        (dict(num_heads=3), "num_heads"),
        (dict(num_heads=4, num_kv_heads=3), "num_kv_heads"),
        (dict(num_heads=0), "num_heads"),
        (dict(num_heads=4, qkv_features=12, rotary_base=1e4), "rotary_base"),
        (dict(num_heads=4, rotary_base=0), "rotary_base"),
        (dict(num_heads=4, rotary_base=-1.0), "rotary_base"),
        (dict(num_heads=4, dropout_rate=1.5), "dropout_rate"),
        (dict(num_heads=4, dropout_rate=math.nan), "dropout_rate"),
    ],
)
def test_sizes_are_refused(arguments, word):
    with pytest.raises(ValueError, match=f"SoftmaxAttention: {word}"):
        zoo.SoftmaxAttention(in_features=16, rngs=nnx.Rngs(0), **arguments)


def test_positions_of_another_shape_are_refused():
    layer = zoo.SoftmaxAttention(4, 16, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="positions"):
        layer(inputs(9), positions=jnp.arange(8))
    with pytest.raises(ValueError, match="SoftmaxAttention: positions must be None where neither"):
        layer(inputs(9), positions=jnp.arange(9))
    with pytest.raises(TypeError, match="segment_ids"):
        layer(inputs(9), segment_ids=jnp.ones(9))
    with pytest.raises(ValueError, match="inputs_kv"):
        zoo.SoftmaxAttention(4, 16, is_causal=True, rngs=nnx.Rngs(0))(inputs(9), inputs(9))
