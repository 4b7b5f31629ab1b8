import pytest

from subquad.lra import tasks
from subquad.lra.plan import plan
from subquad.zoo import LAYERS

ARENA_TASKS = [
    ("listops", "lra"), ("text", "lra"), ("retrieval", "lra"), ("image", "lra"), ("pathfinder", "32_hard"),
    ("pathfinder", "64_hard"),
    ("pathfinder", "128_hard"), ("pathfinder", "256_hard"), ("pathfinder", "release_128_hard"),
]  # fmt: skip


@pytest.mark.parametrize(("task", "config"), ARENA_TASKS)
def test_every_layer_has_a_row_for_every_task(task, config):
    for layer in LAYERS:
        run = plan("lra-2020", layer, task=task, config=config)
        assert (run.task, run.config, run.protocol, run.selection, run.clip_norm) == (
            task, config, "lra-2020", "last", 1.0 if "128" in config else None
        )  # fmt: skip
        if "reformer" in layer:
            assert run.layer_options["chunk_size"] * 10 >= tasks.find_task(task, config).length


def test_rows_are_those_of_the_released_configurations():
    small_run = lambda layer, task, **words: plan("lra-2020", layer, task=task, **words)
    width = lambda run: run.layer_options.get("qkv_features", run.in_features)
    size = lambda run: (run.num_layers, run.in_features, width(run), run.mlp_features)
    heads = lambda run: run.layer_options["num_heads"]
    run = small_run("softmax", "text")
    assert (*size(run), heads(run)) == (4, 256, 256, 1024, 4)
    assert (run.steps, run.warmup_steps, run.schedule, run.learning_rate) == (20_000, 8000, "rsqrt", 0.05)
    run = small_run("linformer", "image")
    assert (*size(run), heads(run), run.pooling, run.dropout_rate) == (1, 128, 64, 128, 8, "cls", 0.3)
    assert (run.batch_size, run.steps, run.schedule, run.positions) == (256, 35_000, "cosine", "learned")
    run = small_run("reformer", "pathfinder")
    assert (*size(run), heads(run), run.dropout_rate) == (2, 64, 64, 64, 8, 0.2)
    run = small_run("local", "image")
    assert (heads(run), run.pooling) == (2, "mean")
    run = small_run("softmax", "pathfinder", config="128_hard")
    assert (*size(run), heads(run), run.dropout_rate, run.steps, run.pooling) == (1, 32, 16, 32, 2, 0.1, 500_000, "mean")
    assert small_run("softmax", "pathfinder", config="64_hard").pooling == "cls"
    assert small_run("softmax", "listops").layer_options["use_bias"] is False
