"""Models through Flax's bridge to Linen, whose `apply` takes the word `rngs` for itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from subquad import zoo
from tests.zoo.test_model import PERFORMER, SMALL, SOFTMAX, tokens

X = tokens((2, 6))
LAYER = dict(num_heads=2, in_features=16)


def apply(model, variables, *inputs, key=None, **call):
    rngs = {} if key is None else dict(rngs={"dropout": jax.random.key(key)})
    return model.apply(variables, *inputs, **call, **rngs)


@pytest.mark.parametrize("remat", [False, True])
def test_dropout_draws_from_the_key_of_the_call(remat):
    model = nnx.bridge.to_linen(zoo.Classifier, 3, **SMALL, **SOFTMAX, dropout_rate=0.5, remat=remat)
    variables = model.init(jax.random.key(0), X)
    call = jax.jit(lambda key: model.apply(variables, X, deterministic=False, rngs={"dropout": key}))
    one, other = call(jax.random.key(1)), call(jax.random.key(2))
    np.testing.assert_array_equal(call(jax.random.key(1)), one)
    without = apply(model, variables, X)
    np.testing.assert_array_equal(apply(model, variables, X, key=1), without)  # deterministic, to begin with
    assert min(jnp.abs(a - b).max() for a, b in ((one, other), (one, without), (other, without))) > 1e-3
    with pytest.raises(Exception, match="rngs"):
        apply(model, variables, X, deterministic=False)


def test_every_model_and_a_block_alone_draw():
    dual = nnx.bridge.to_linen(zoo.DualEncoder, 3, **SMALL, **SOFTMAX, dropout_rate=0.5)
    language = nnx.bridge.to_linen(zoo.CausalLM, **SMALL, **SOFTMAX, dropout_rate=0.5)
    encoder = nnx.bridge.to_linen(zoo.Encoder, **SMALL, **SOFTMAX, dropout_rate=0.5)
    block = nnx.bridge.to_linen(
        lambda rngs: zoo.Block(zoo.SoftmaxAttention(**LAYER, rngs=rngs), 16, mlp_features=4, dropout_rate=0.5, rngs=rngs)
    )
    features = jax.random.normal(jax.random.key(3), (2, 6, 16))
    for model, inputs in ((dual, (X, X)), (language, (X,)), (encoder, (X,)), (block, (features,))):
        method = dict(nnx_method=zoo.Block.__call__) if model is block else {}
        variables = model.init(jax.random.key(0), *inputs, **method)
        draw = lambda key, m=model, v=variables, x=inputs, w=method: apply(m, v, *x, key=key, deterministic=False, **w)
        one = draw(1)
        np.testing.assert_array_equal(draw(1), one)
        assert (draw(2) != one).any()


def test_inside_a_linen_module_of_the_users():
    class Pair(linen.Module):
        @linen.compact
        def __call__(self, x):
            one, other = (nnx.bridge.to_linen(zoo.Encoder, **SMALL, **SOFTMAX, dropout_rate=0.5, name=n) for n in "ab")
            return one(x, deterministic=False), other(x, deterministic=False)

    model = Pair()
    variables = model.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, X)
    variables["params"]["b"] = variables["params"]["a"]
    a, b = apply(model, variables, X, key=3)
    assert (a != b).any()
    np.testing.assert_array_equal(apply(model, variables, X, key=3)[0], a)


def test_generation_samples_from_the_key_of_the_call():
    model = nnx.bridge.to_linen(zoo.CausalLM, **SMALL, **SOFTMAX)
    variables = model.init(jax.random.key(0), X)
    draw = lambda key, method="generate": apply(model, variables, X, 8, temperature=5.0, nnx_method=method, key=key)
    one = draw(1)
    np.testing.assert_array_equal(draw(1), one)
    assert (draw(2) != one).any()
    np.testing.assert_array_equal(jnp.stack(list(draw(1, "stream")), axis=1), one)
    np.testing.assert_array_equal(jax.jit(draw)(1), one)
    greedy = apply(model, variables, X, 8, nnx_method="generate")
    np.testing.assert_array_equal(apply(model, variables, X, 8, nnx_method="generate", key=1), greedy)
    with pytest.raises(ValueError, match="rngs must be given"):
        apply(model, variables, X, 8, temperature=5.0, nnx_method="generate")


def test_from_trained_parameters_to_linens_variables():
    trained = zoo.CausalLM(**SMALL, **PERFORMER, rngs=nnx.Rngs(7))
    model = nnx.bridge.to_linen(zoo.CausalLM, **SMALL, **PERFORMER)
    kinds = {"params": nnx.Param, "RandomFeature": zoo.RandomFeature}
    variables = {name: nnx.to_pure_dict(nnx.state(trained, kind)) for name, kind in kinds.items()}
    fresh = model.init(jax.random.key(0), X)
    assert jax.tree.structure(fresh) == jax.tree.structure(variables)
    np.testing.assert_allclose(apply(model, variables, X), trained(X), atol=1e-5)
    np.testing.assert_array_equal(apply(model, variables, X, 4, nnx_method="generate"), trained.generate(X, 4))


def test_outside_of_linen_a_call_changes_nothing_and_draws_from_nothing_of_its_own():
    model = zoo.CausalLM(**SMALL, **SOFTMAX, dropout_rate=0.5, rngs=nnx.Rngs(0, dropout=1))
    assert not jax.tree.leaves(nnx.state(model, nnx.RngState))
    before = nnx.to_pure_dict(nnx.state(model))
    graph = nnx.graphdef(model)
    model.train()
    call = jax.jit(lambda key: model(X, rngs=nnx.Rngs(dropout=key)))
    assert (call(jax.random.key(1)) != call(jax.random.key(2))).any()
    with pytest.raises(Exception, match="rngs"):
        model(X)
    model.eval()
    assert nnx.graphdef(model) == graph
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(model)), before)


@pytest.mark.parametrize("kind", [zoo.SoftmaxAttention, zoo.LightConv, zoo.DynamicConv])
def test_a_layer_alone_draws(kind):
    x = jax.random.normal(jax.random.key(3), (2, 6, 16))
    model = nnx.bridge.to_linen(kind, **LAYER, dropout_rate=0.5)
    variables = model.init(jax.random.key(0), x)
    draw = lambda key: apply(model, variables, x, key=key, deterministic=False)
    np.testing.assert_array_equal(draw(1), draw(1))
    assert (draw(1) != draw(2)).any()


def test_networks_alone_draw():
    x = jax.random.normal(jax.random.key(3), (2, 6, 16))
    for kind, options in ((zoo.Experts, dict(num_experts=2)), (zoo.FeedForward, {})):
        model = nnx.bridge.to_linen(kind, 16, 8, dropout_rate=0.5, **options)
        variables = model.init(jax.random.key(0), x)
        draw = lambda key, m=model, v=variables: apply(m, v, x, key=key, deterministic=False)
        np.testing.assert_array_equal(draw(1), draw(1))
        assert (draw(1) != draw(2)).any()
