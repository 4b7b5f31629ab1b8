"""The zoo traces under JAX's strict settings: no implicit broadcast over more axes, no implicit promotion of dtypes."""

import contextlib

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from subquad import zoo
from tests.zoo.cases import CASES, DIRECTIONS, EXTENDING, inputs, label, sampled


@contextlib.contextmanager
def strict():
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


@sampled
@pytest.mark.parametrize(("name", "is_causal"), DIRECTIONS, ids=label)
def test_layer_traces_under_strict_settings(name, is_causal):
    with strict():
        mask = jnp.ones((2, 1, 1, 9), bool)
        for dtype in (None, jnp.bfloat16):
            layer = CASES[name].make(is_causal, dtype=dtype)
            total = lambda x, layer=layer: jnp.sum(layer(x, mask=mask).astype(jnp.float32))
            assert jax.eval_shape(jax.grad(total), inputs(9)).shape == inputs(9).shape
            if is_causal and name in EXTENDING:
                extend = lambda x, layer=layer: layer.extend(x, layer.init_cache(2, 20), mask=mask)[0]
                assert jax.eval_shape(extend, inputs(9)).shape == jax.eval_shape(layer, inputs(9)).shape


@sampled
@pytest.mark.parametrize(("name", "is_causal"), DIRECTIONS, ids=label)
def test_float64_is_computed_in_and_caches_keep_their_dtypes(name, is_causal):
    with jax.enable_x64(True):
        layer, x = CASES[name].make(is_causal), jax.ShapeDtypeStruct(inputs(9).shape, jnp.float64)
        assert jax.eval_shape(layer, x).dtype == jnp.float64
        if is_causal and name in EXTENDING:
            before = jax.eval_shape(lambda: layer.init_cache(2, 20))
            outputs, after = jax.eval_shape(lambda x: layer.extend(x, layer.init_cache(2, 20)), x)
            assert outputs.dtype == jnp.float64 and after == before


def test_masks_and_positions_trace_under_strict_settings():
    with strict():
        at, of = jnp.arange(3), jnp.arange(8).reshape(2, 4)
        assert zoo.masks.padding_mask(jnp.array([[1, 3]]), 3).shape == (1, 2, 1, 1, 3)
        for mask in (zoo.masks.causal_mask, zoo.masks.segment_mask, lambda *pair: zoo.masks.window_mask(*pair, 2)):
            assert mask(at, of).shape == (2, 1, 3, 4)
        assert zoo.positions.sinusoidal(of, 6).shape == (2, 4, 6)
        assert zoo.positions.rotary(jnp.ones((2, 4, 2, 6)), of, 10000.0).shape == (2, 4, 2, 6)
        assert zoo.positions.alibi(at, at, 3).shape == (3, 3, 3)


@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
def test_models_trace_under_strict_settings(positions):
    # In float32 alone: Flax's own LayerNorm promotes half precision.
    options = dict(vocab_size=7, in_features=8, num_layers=1, mlp_features=8, max_length=20, positions=positions)
    options |= dict(dropout_rate=0.1, mixer="softmax", mixer_options=dict(num_heads=2), rngs=nnx.Rngs(0))
    tokens, mask = jnp.ones((2, 5), jnp.int32), jnp.ones((2, 5), bool)
    sampling = dict(mask=mask, temperature=1.0, top_k=2, stop_token=3)
    with strict():
        draws = lambda: dict(deterministic=False, rngs=nnx.Rngs(1))
        for pooling in ("mean", "max", "first", "last"):
            classifier = zoo.Classifier(3, pooling=pooling, **options)
            logits = lambda tokens, model=classifier: model(tokens, mask=mask, **draws())
            assert jax.eval_shape(logits, tokens).shape == (2, 3)
        dual, model = zoo.DualEncoder(3, **options), zoo.CausalLM(**options)
        both = lambda tokens: dual(tokens, tokens, mask=mask, other_mask=mask, **draws())
        assert jax.eval_shape(both, tokens).shape == (2, 3)
        assert jax.eval_shape(lambda tokens: model(tokens, mask=mask, **draws()), tokens).shape == (2, 5, 7)
        for draft in (None, model):
            generate = lambda tokens, draft=draft: model.generate(tokens, 4, rngs=nnx.Rngs(2), draft=draft, **sampling)
            assert all(x.shape[0] == 2 for x in jax.tree.leaves(jax.eval_shape(generate, tokens)))
