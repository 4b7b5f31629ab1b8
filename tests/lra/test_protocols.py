"""The two protocols: what each sets, what contradicts it, and the sizes of the arena's released models."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad.lra import models, tasks
from subquad.lra.plan import plan


@pytest.mark.parametrize(
    ("task", "released", "more"),
    [
        ("listops", 8_948_746, 0),
        ("text", 3_486_722, 0),
        ("retrieval", 1_087_618, 0),
        # One symbol more than released, because black is no padding.
        ("image", 248_458, 128),
        ("pathfinder", 26_530, 32),
    ],
)
def test_the_vanilla_models_have_the_released_numbers_of_parameters(task, released, more):
    run = plan("lra-2020", "softmax", task=task)
    assert (run.head, run.protocol) == ("mlp", "lra-2020")
    assert models.count_parameters(run, tasks.find_task(run.task, run.config)) == released + more


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (dict(selection="last"), "selection must be 'best' under protocol 'modern', got 'last'. Pass selection='best', or"),
        (dict(protocol="lra-2020", selection="best"), "selection must be 'last' .* or protocol='modern'"),
        (dict(protocol="lra-2020", pooling="max"), "pooling must be 'cls' or 'mean' under protocol 'lra-2020', got 'max'"),
        (dict(protocol="lra-2020", task="image", inputs="continuous"), "inputs must be 'tokens' under protocol 'lra-2020'"),
        (dict(task="text", config="lra"), r"config must be 'modern' .* got 'lra' \(there IMDb is validated on its test set\)"),
        (dict(protocol="lra-2020", task="text", config="modern"), "config must be 'lra' under protocol 'lra-2020'"),
        (dict(task="bbc_halves", interaction="concat"), "interaction must be 'nli' under protocol 'modern', got 'concat'"),
        (dict(task="bbc_halves", protocol="lra-2020", interaction="nli"), "interaction must be 'concat' under"),
        (dict(interaction="nli"), "interaction must be left out for 'listops', a task of kind classification, got 'nli'"),
        (dict(task="pylib_lm", pooling="max"), "pooling must be left out for 'pylib_lm', a task of kind language_model"),
        (dict(inputs="continuous"), "inputs must be 'tokens' for 'listops', which has no pixels, got 'continuous'"),
        (dict(head="mlp", mlp_features=0), "head must be 'linear' with mlp_features = 0, got 'mlp'. Pass head='linear'"),
        (dict(layer="transformer_xl", pooling="first"), "pooling must be 'mean' for a causal 'transformer_xl', whose first"),
        (dict(layer="s4", layer_options=dict(is_causal=True), pooling="cls"), "pooling must be 'mean' for a causal 's4'"),
        (dict(protocol="lra2020"), "protocol must be a known word, got 'lra2020'. Did you mean 'lra-2020'"),
    ],
)
def test_contradictions_are_refused_with_the_cure(words, match):
    with pytest.raises(ValueError, match=match):
        plan("quickstart", **words)


def test_a_protocol_sets_what_nobody_else_does():
    quick = lambda **words: plan("quickstart", mlp_features=64, **words)
    assert (quick().selection, quick().pooling, quick().head, quick(task="text").config) == ("best", "mean", "linear", "modern")
    old = quick(protocol="lra-2020")
    assert (old.selection, old.pooling, old.head) == ("last", "cls", "mlp")
    assert quick(protocol="lra-2020", pooling="mean").pooling == "mean"
    pair = quick(protocol="lra-2020", task="bbc_halves")
    assert (pair.pooling, pair.interaction, pair.config) == ("first", "concat", "offline")
    assert quick(protocol="lra-2020", task="text").config == "lra"
    # A recipe's own values mean nothing to a language model, and are not kept.
    model = plan("lra-2020", "softmax", task="pylib_lm")
    assert (model.selection, model.pooling, model.head, model.config) == ("last", "mean", "linear", "offline")


def digits(**words):
    task = tasks.find_task("digits", "offline")
    sizes = dict(in_features=16, num_layers=1, mlp_features=16)
    return task, plan("quickstart", "softmax", task="digits", **sizes, **words)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_pixels_may_be_numbers(pooling):
    task, run = digits(inputs="continuous", pooling=pooling)
    model = models.build(run, task)
    logits_of = nnx.jit(lambda model, tokens, mask: model(tokens, mask))
    embed = model.classifier.encoder.embed
    kernel, bias = embed.linear.kernel[...], embed.linear.bias[...]
    hidden = embed(jnp.array([[1, 9, 17]]))[0]  # the values 0, 8 and 16
    np.testing.assert_allclose(hidden, jnp.array([[-1.0], [0.0], [1.0]]) * kernel + bias, atol=1e-6)
    tokens, mask = jnp.arange(64)[None] % 17 + 1, jnp.ones((1, 64), bool)
    before = logits_of(model, tokens, mask)
    assert before.shape == (1, 10)
    count = lambda inputs: models.count_parameters(digits(inputs=inputs, pooling=pooling)[1], task)
    # 18 rows of the embedding against a weight and a bias; the vector in front is a row more, or one of its own.
    assert count("tokens") - count("continuous") == 16 * (18 - 2)
    if pooling == "cls":
        embed.vector.set_value(jnp.arange(16.0) % 3)
        assert jnp.abs(logits_of(model, tokens, mask) - before).max() > 1e-4


@pytest.mark.parametrize("words", [dict(protocol="lra-2020"), dict(recipe="xformers", task="text"), dict(recipe="lra-2020")])
def test_a_causal_layer_is_read_where_it_has_seen_something(words):
    assert plan(layer="transformer_xl", **words).pooling == "mean"
    assert plan(layer="softmax", **words).pooling == "cls"


def test_the_arenas_embeddings_start_as_its_code_draws_them():
    for task in ("listops", "image"):
        run = plan("lra-2020", "softmax", task=task, in_features=64, num_layers=1, layer_options=dict(num_heads=1))
        encoder = models.build(run, tasks.find_task(run.task, run.config)).classifier.encoder
        table = np.asarray(encoder.embed.embedding[...])
        assert abs(table[:-1].std() - 1) < 0.1 and not table[-1].any()  # the last is the token in front
        if task == "image":
            assert abs(np.asarray(encoder.positions.embedding[...]).std() - 0.02) < 0.001
