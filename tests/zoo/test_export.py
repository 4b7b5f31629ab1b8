"""`jax.export` leaves the batch size open: one exported layer serves batches of any size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad import zoo
from tests.zoo.cases import CASES, FEATURES, inputs, sampled

SIZE = jax.export.symbolic_shape("b")[0]


@sampled
@pytest.mark.parametrize("name", CASES)
def test_a_layer_is_exported_for_batches_of_any_size(name):
    layer = CASES[name].make(bool(CASES[name].supports.causal))
    shapes = jax.ShapeDtypeStruct((SIZE, 9, FEATURES), jnp.float32), jax.ShapeDtypeStruct((SIZE, 1, 1, 9), bool)
    exported = jax.export.export(jax.jit(lambda x, mask: layer(x, mask=mask)))(*shapes)
    for batch in (1, 3):
        is_real = np.arange(9) % 4 >= np.arange(batch)[:, None]
        x, mask = inputs(9, batch=batch), jnp.asarray(is_real[:, None, None])
        found, expected = exported.call(x, mask), layer(x, mask=mask)
        np.testing.assert_allclose(found[is_real], expected[is_real], atol=CASES[name].tolerance)


def test_a_step_is_exported_for_batches_of_any_size():
    layer = CASES["softmax"].make(True)
    cache = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((SIZE, *leaf.shape[1:]), leaf.dtype), layer.init_cache(1, 5))
    exported = jax.export.export(jax.jit(layer.extend))(jax.ShapeDtypeStruct((SIZE, 2, FEATURES), jnp.float32), cache)
    found, cache = exported.call(inputs(2, batch=3), layer.init_cache(3, 5))
    np.testing.assert_allclose(found, layer.extend(inputs(2, batch=3), layer.init_cache(3, 5))[0], atol=1e-5)
    assert cache.length.tolist() == [2, 2, 2]


def test_a_call_that_draws_is_not_exported_with_an_open_batch():
    layer = zoo.SoftmaxAttention(2, FEATURES, dropout_rate=0.5, rngs=nnx.Rngs(0))
    draw = lambda x: layer(x, deterministic=False, rngs=nnx.Rngs(1))
    with pytest.raises(ValueError, match="deterministic: must be True where jax.export"):
        jax.export.export(jax.jit(draw))(jax.ShapeDtypeStruct((SIZE, 5, FEATURES), jnp.float32))


@pytest.mark.parametrize("name,options", [("softmax", {}), ("local", dict(window_size=2)), ("performer", {})], ids=str)
def test_flaxs_attention_with_a_function_of_ours_is_exported_for_batches_of_any_size(name, options):
    model = nnx.MultiHeadAttention(
        4, FEATURES, attention_fn=zoo.attention_fn(name, **options), decode=False, rngs=nnx.Rngs(0)
    )
    shapes = jax.ShapeDtypeStruct((SIZE, 9, FEATURES), jnp.float32), jax.ShapeDtypeStruct((SIZE, 1, 1, 9), bool)
    exported = jax.export.export(jax.jit(lambda x, mask: model(x, mask=mask)))(*shapes)
    x, mask = inputs(9, batch=3), zoo.masks.padding_mask(jnp.array([3, 9, 5]), 9)
    np.testing.assert_allclose(exported.call(x, mask), model(x, mask=mask), atol=1e-5)


@pytest.mark.parametrize("key", [jax.random.key, jax.random.PRNGKey])
def test_a_function_that_draws_is_not_exported_with_an_open_batch(key):
    draw = lambda x: zoo.attention_fn("softmax")(x, x, x, dropout_rate=0.5, dropout_rng=key(0))
    with pytest.raises(ValueError, match="deterministic: must be True where jax.export"):
        jax.export.export(jax.jit(draw))(jax.ShapeDtypeStruct((SIZE, 9, 2, 8), jnp.float32))


def test_generation_is_not_exported_with_an_open_batch():
    sizes = dict(vocab_size=7, in_features=FEATURES, num_layers=1, mlp_features=8, max_length=40, mixer="linear")
    model = zoo.CausalLM(**sizes, mixer_options=dict(num_heads=2), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"generate: prompt must have a known batch size, got \(b, 9\)"):
        jax.export.export(jax.jit(lambda prompt: model.generate(prompt, 4)))(jax.ShapeDtypeStruct((SIZE, 9), jnp.int32))
