import pytest

from subquad.lra import recipes, tasks
from subquad.lra.recipes.base import Recipe, settings
from subquad.zoo import LAYERS

ARENA_TASKS = [
    ("listops", "lra"), ("text", "lra"), ("retrieval", "lra"), ("image", "lra"), ("pathfinder", "32_hard"),
    ("pathfinder", "64_hard"),
    ("pathfinder", "128_hard"), ("pathfinder", "256_hard"), ("pathfinder", "release_128_hard"),
]  # fmt: skip


def test_the_levels_of_a_recipe_replace_one_another():
    rules = Recipe(
        "x", dict(steps=1, batch_size=1, config="a", seed=1), {"s4": dict(state_size=2, dt_min=0.1)}, False, "",
        configs={"a": dict(steps=2), "b": dict(steps=3)},
        tasks={"t": dict(batch_size=4, seed=4, layer_options=dict(dt_min=0.2)), "t/b": dict(seed=5)},
        pairs={("t", "s4"): dict(batch_size=6, layer_options=dict(num_ssm=1)), ("t/b", "s4"): dict(batch_size=7)},
    )  # fmt: skip
    assert settings(rules, "t", None, "s4") == dict(
        steps=2, batch_size=6, config="a", seed=4, layer_options=dict(state_size=2, dt_min=0.2, num_ssm=1)
    )
    assert settings(rules, "t", "b", "s4") == dict(
        steps=3, batch_size=7, config="b", seed=5, layer_options=dict(state_size=2, dt_min=0.2, num_ssm=1)
    )
    assert settings(rules, "other", "c", "local") == dict(
        steps=1, batch_size=1, config="c", seed=1, layer_options={}
    )


@pytest.mark.parametrize(("task", "config"), ARENA_TASKS)
def test_every_layer_has_a_row_for_every_task(task, config):
    for layer in LAYERS:
        run = recipes.plan("lra-2020", layer, task=task, config=config)
        assert (run.task, run.config, run.protocol, run.selection, run.clip_norm) == (
            task, config, "lra-2020", "last", 1.0 if "128" in config else None
        )  # fmt: skip
        if "reformer" in layer:
            assert run.layer_options["chunk_size"] * 10 >= tasks.find(task, config).length


def test_rows_are_those_of_the_released_configurations():
    plan = lambda layer, task, **words: recipes.plan("lra-2020", layer, task=task, **words)
    width = lambda run: run.layer_options.get("qkv_features", run.in_features)
    size = lambda run: (run.num_layers, run.in_features, width(run), run.mlp_features)
    heads = lambda run: run.layer_options["num_heads"]
    run = plan("softmax", "text")
    assert (*size(run), heads(run)) == (4, 256, 256, 1024, 4)
    assert (run.steps, run.warmup_steps, run.schedule, run.learning_rate) == (20_000, 8000, "rsqrt", 0.05)
    run = plan("linformer", "image")
    assert (*size(run), heads(run), run.pooling, run.dropout_rate) == (1, 128, 64, 128, 8, "cls", 0.3)
    assert (run.batch_size, run.steps, run.schedule, run.positions) == (256, 35_000, "cosine", "learned")
    run = plan("reformer", "pathfinder")
    assert (*size(run), heads(run), run.dropout_rate) == (2, 64, 64, 64, 8, 0.2)
    run = plan("local", "image")
    assert (heads(run), run.pooling) == (2, "mean")
    run = plan("softmax", "pathfinder", config="128_hard")
    assert (*size(run), heads(run), run.dropout_rate, run.steps, run.pooling) == (1, 32, 16, 32, 2, 0.1, 500_000, "mean")
    assert plan("softmax", "pathfinder", config="64_hard").pooling == "cls"
    assert plan("softmax", "listops").layer_options["use_bias"] is False
