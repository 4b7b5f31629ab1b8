"""From a recipe to a run: levels, what is refused, and budgets."""

import dataclasses

import pytest

from subquad.lra import models, recipes, tasks
from subquad.lra.plan import explain, plan
from subquad.lra.run import Run
from subquad.zoo import LAYERS
from tests.lra.data import in_memory

QUICK = [layer for layer in recipes.RECIPES["quickstart"].layers if layer in LAYERS]


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.full)])
@pytest.mark.parametrize("config", ["small", pytest.param("lra", marks=pytest.mark.full)])
def test_the_quickstarts_models_have_equal_budgets(config, every):
    task = tasks.find_task("listops", config)
    chosen = ["softmax", *list(QUICK)[::every]]
    counts = {layer: models.count_parameters(plan(layer=layer, config=config), task) for layer in chosen}
    assert max(counts.values()) <= 1.1 * min(counts.values()), counts


def test_the_quickstart_names_every_layer():
    assert set(QUICK) == set(LAYERS)


def test_the_small_listops_run_has_a_name():
    named, quick = plan("listops-small", "local"), plan("quickstart", "local")
    assert dataclasses.replace(named, recipe="quickstart") == quick
    assert (named.task, named.config, named.num_layers, named.in_features, named.steps) == ("listops", "small", 2, 64, 300)


def test_counted_parameters_are_those_of_the_model():
    import jax
    from flax import nnx

    run, task = plan("quickstart", "softmax", config="tiny", in_features=16), tasks.find_task("listops", "tiny")
    state = nnx.state(models.build(run, task), nnx.Param)
    assert models.count_parameters(run, task) == sum(leaf.size for leaf in jax.tree.leaves(state))


def test_a_layer_that_does_not_fit_the_budget_is_told():
    with pytest.raises(ValueError, match="layer 'linformer' must fit into .* parameters"):
        plan("quickstart", "linformer", layer_options=dict(num_landmarks=1000))


def test_precedence_is_default_recipe_configuration_command_line():
    assert plan("quickstart").in_features == Run.in_features
    assert plan("quickstart", config="lra").in_features == 128
    assert plan("quickstart", config="lra", in_features=32, mlp_features=64).in_features == 32
    assert plan("lra-2020").learning_rate == 0.05
    assert plan("quickstart", "performer", layer_options=dict(num_features=8)).layer_options == dict(
        num_heads=4, num_features=8
    )


def test_the_length_of_the_task_reaches_the_layers_options():
    assert plan("quickstart", "linformer").layer_options["max_length"] == 200
    assert plan("lra-2020", "linformer").layer_options["max_length"] == 2001  # and the CLS token


@pytest.mark.parametrize(
    ("words", "kind", "match"),
    [
        (dict(recipe="quikstart"), ValueError, "recipe must .* Did you mean 'quickstart'"),
        (dict(layer="perfomer"), ValueError, "layer must .* Did you mean 'performer'"),
        (dict(task="listop"), ValueError, "task must .* Did you mean 'listops'"),
        (dict(layer="linformer", task="pylib_lm"), ValueError, "layer must be causal for a language model, got 'linformer'"),
        (dict(config="smal"), ValueError, "config must .* Did you mean 'small'"),
        (dict(stps=1), TypeError, "stps must .* Did you mean 'steps'"),
        (dict(layer_options=dict(num_head=2)), TypeError, "num_head must .* Did you mean 'num_heads'"),
        (dict(steps="many"), TypeError, "steps must be int, got 'many'. Leave it out for the recipe's."),
        (dict(positions="none"), ValueError, "positions must be a known word, got 'none'"),
        (dict(steps=True), TypeError, "steps must be int"),
        (dict(pooling=None), TypeError, "pooling must be one of mean, max, first, last, cls, got None"),
        (dict(dtype="bfloat"), ValueError, "dtype must .* Did you mean 'bfloat16'"),
        (dict(steps=0), ValueError, "steps must be > 0 and finite, got 0"),
        (dict(dropout_rate=1.0), ValueError, r"dropout_rate must be in \[0, 1\), got 1.0"),
        (dict(accumulate=5), ValueError, r"accumulate must divide batch_size = 16, got 5. Choose one of \[1, 2, 4"),
    ],
)
def test_bad_values_are_told_with_the_nearest(words, kind, match):
    with pytest.raises(kind, match=match):
        plan(**words)


def test_attention_dropout_is_refused_where_no_weights_are_kept():
    for layer in ("softmax", "lightconv"):  # which drops its taps
        assert plan("quickstart", layer, attention_dropout_rate=0.2).attention_dropout_rate == 0.2
    with pytest.raises(ValueError, match="attention_dropout_rate must be 0 for layer 'performer'.*got 0.2.*or use softmax"):
        plan("quickstart", "performer", attention_dropout_rate=0.2)
    run, task = plan("quickstart", "softmax", attention_dropout_rate=0.2), tasks.find_task("listops", "small")
    mixer = models.build(run, task).classifier.encoder.blocks[0].mixer
    assert (mixer.dropout_rate, mixer.broadcast_dropout) == (0.2, False)
    with pytest.raises(ValueError, match="norm must be a known word, got 'bathc'. Did you mean 'batch'"):
        plan("quickstart", "softmax", norm="bathc")
    assert explain("nystromformer", "softmax")["attention_dropout_rate"] == (0.1, 'recipe nystromformer, "* softmax"')
    continuous = plan("nystromformer", "softmax", task="image", inputs="continuous")
    assert (continuous.embedding_std, continuous.position_std) == (None, 0.02)


def test_every_value_changes_the_runs_id():
    run, seen = plan("quickstart"), set()
    other = dict(
        layer_options={"num_heads": 2}, positions="sinusoidal", pooling="last", schedule="rsqrt", decay="all",
        ema=0.9, state_learning_rate=0.1, step_learning_rate=0.1, embedding_std=1.0, position_std=1.0, dtype="bfloat16",
        selection="last", clip_norm=None, protocol="x", head="x", interaction="x", inputs="x", recipe="x", task="x",
        config="x", layer="x", norm="x", norm_order="x", early_stopping=3,
        capacity_factor=1.0, layer_groups=1, remat_policy="x", documents="x", carry_state=True,
    )  # fmt: skip
    for one in dataclasses.fields(run):
        value = other.get(one.name, getattr(run, one.name))
        seen.add(dataclasses.replace(run, **{one.name: value if one.name in other else value + 1}).id)
    assert len(seen) == len(dataclasses.fields(run)) and run.id not in seen
    assert run.id == plan("quickstart").id


def test_the_arenas_transformer_has_the_released_models_size():
    assert models.count_parameters(plan("lra-2020", "softmax"), tasks.find_task("listops", "lra")) == 8_948_746


@pytest.mark.parametrize("config", ["tiny", "small"])
def test_tasks_describe_their_data(config):
    task = tasks.find_task("listops", config)
    splits = in_memory.generate(task.dataset)
    assert {split: len(examples) for split, examples in splits.items()} == task.splits
    longest = max(len(example["inputs"]) for examples in splits.values() for example in examples)
    assert longest == task.length
    assert all(0 < token < task.vocabulary_size for example in splits["test"] for token in example["inputs"])
    assert {int(example["label"]) for example in splits["train"]} == set(range(task.num_classes))
    assert set(task.floors(splits)) == {"majority", "root"}


def test_tasks_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        tasks.find_task("listops", "tiny").length = 3


def test_every_value_names_the_level_that_it_came_from():
    words = dict(task="text", layer_options=dict(num_landmarks=8), steps=9, schedule="cosine")
    found = explain("lra-2020", "linformer", **words)
    levels = {
        "seed": "default", "head": "protocol lra-2020", "batch_size": 'recipe lra-2020, "*"', "task": "given", "steps": "given",
        "in_features": 'recipe lra-2020, "text"', "layer_options.num_landmarks": "given",
        "layer_options.use_bias": "recipe lra-2020, layers", "layer_options.max_length": "length of the sequences",
        "warmup_steps": "half of the steps", "interaction": "default",
    }  # fmt: skip
    assert {name: found[name][1] for name in levels} == levels


def test_explained_values_are_those_of_the_run():
    words = dict(layer="transformer_xl", task="listops", protocol="lra-2020")
    found, run = explain("quickstart", **words), plan("quickstart", **words)
    options = {name.removeprefix("layer_options."): value for name, (value, _) in found.items() if "." in name}
    assert options == run.layer_options
    assert all(getattr(run, name) == value for name, (value, _) in found.items() if "." not in name)
    assert found["pooling"] == ("mean", "the layer is causal")
    assert found["mlp_features"][1] == "as many parameters as softmax"
