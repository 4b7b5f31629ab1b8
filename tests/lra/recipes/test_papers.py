import pytest

from subquad.lra import tasks
from subquad.lra.plan import plan
from subquad.lra.recipes import RECIPES
from subquad.zoo import LAYERS

SMALL = ("nystromformer", "skyformer", "xformers")
FIVE = ("listops", "text", "retrieval", "image", "pathfinder")


@pytest.mark.parametrize("recipe", SMALL)
@pytest.mark.parametrize("task", FIVE)
def test_the_small_model_takes_every_layer_on_every_task(recipe, task):
    for layer in LAYERS:
        run = plan(recipe, layer, task=task)
        large = (recipe, task) == ("xformers", "text")
        assert (run.num_layers, run.in_features, run.mlp_features) == ((4, 256, 1024) if large else (2, 64, 128))
        assert (run.protocol, run.selection, run.schedule, run.head) == ("modern", "best", "onecycle", "mlp")
        heads = 4 if large else 2
        assert run.attention_dropout_rate == (0.1 if layer == "softmax" else 0)
        assert run.inputs == "tokens" and run.layer_options.get("num_heads", heads) == heads


def test_rows_of_the_small_model():
    small_run = lambda recipe, layer, task: plan(recipe, layer, task=task)
    run = small_run("nystromformer", "softmax", "retrieval")
    assert (run.batch_size, run.steps, run.warmup_steps, run.learning_rate, run.interaction) == (32, 30_000, 800, 1e-4, "nli")
    assert small_run("skyformer", "softmax", "pathfinder").learning_rate == 2e-4
    assert small_run("skyformer", "linformer", "text").layer_options["num_landmarks"] == 128
    assert small_run("xformers", "linformer", "image").layer_options["num_landmarks"] == 1024 // 4
    blocks = {task: small_run("xformers", "softmax", task).reversible for task in FIVE}
    assert blocks == dict(listops=False, text=False, retrieval=True, image=True, pathfinder=True)
    assert small_run("xformers", "softmax", "listops").steps == 2 * small_run("nystromformer", "softmax", "listops").steps
    nystrom = {name: small_run(name, "nystrom", "listops").layer_options for name in SMALL}
    sizes = {name: (one["num_landmarks"], one["conv_width"]) for name, one in nystrom.items()}
    assert sizes == {"nystromformer": (64, 35), "skyformer": (128, None), "xformers": (128, 35)}
    assert small_run("nystromformer", "performer", "listops").layer_options["kernel"] == "relu"


@pytest.mark.parametrize("recipe", ["s4", "s4d", "s4-v1"])
@pytest.mark.parametrize("task", [*FIVE, "path_x"])
def test_state_spaces_learn_slowly_and_pixels_are_numbers(recipe, task):
    name, config = ("pathfinder", "128_hard") if task == "path_x" else (task, None)
    run = plan(recipe, "s4", task=name, **({"config": config} if config else {}))
    assert run.state_learning_rate == 1e-3 and run.protocol == "modern" and run.mlp_features == 0
    assert run.inputs == ("continuous" if name in ("image", "pathfinder") else "tokens")
    assert run.schedule == ("plateau" if recipe == "s4-v1" else "cosine")
    assert (run.layer_options.get("dt_min") == 1e-4) == (task == "path_x")
    assert run.steps <= 500_000 and tasks.find_task(run.task, run.config).length == tasks.find_task(name, run.config).length


def test_rows_of_s4():
    run = plan("s4", "s4", task="image")
    assert (run.num_layers, run.in_features, run.batch_size, run.steps, run.warmup_steps) == (6, 512, 50, 180_000, 18_000)
    assert (run.learning_rate, run.weight_decay, run.dropout_rate) == (0.01, 0.05, 0.1)
    assert run.layer_options == dict(state_size=64, num_ssm=1)
    assert plan("s4", "s4").layer_options == dict(state_size=4, num_ssm=1)
    assert plan("s4d", "s4", layer_options=dict(mode="diagonal", init="lin")).in_features == 128
    assert plan("s4-v1", "s4").layer_options["is_causal"] is True


def test_norms_of_s4_are_the_papers():
    norms = lambda recipe, task: (plan(recipe, "s4", task=task).norm, plan(recipe, "s4", task=task).norm_order)
    for recipe in ("s4", "s4d", "s4-v1"):
        assert norms(recipe, "listops") == ("batch", "post") and norms(recipe, "pathfinder") == ("batch", "pre")
        assert norms(recipe, "image") == ("batch" if recipe == "s4" else "layer", "post")
        said = " ".join(RECIPES[recipe].differences("listops", "lra", "s4"))
        assert "Layer norm" not in said and "before the mixer" not in said


def test_rows_of_s5():
    """Table of lindermanlab/S5's bin/run_experiments: layers, features, state, blocks; rates; epochs."""
    rows = {
        "listops": (8, 128, 16, 8, 3e-3, 1e-3, 0.04, 0.0, 50, 40 * 1920),
        "text": (6, 256, 192, 12, 4e-3, 1e-3, 0.07, 0.1, 50, 35 * 450),
        "retrieval": (6, 128, 256, 16, 2e-3, 1e-3, 0.05, 0.0, 32, 20 * 4597),
        "image": (6, 512, 384, 3, 4.5e-3, 1e-3, 0.07, 0.1, 50, 250 * 900),
        "pathfinder": (6, 192, 256, 8, 4.5e-3, 9e-4, 0.03, 0.05, 64, 200 * 2500),
        "path_x": (6, 128, 256, 16, 1.8e-3, 6e-4, 0.06, 0.0, 32, 75 * 5000),
    }  # fmt: skip
    for task, row in rows.items():
        name, config = ("pathfinder", dict(config="128_hard")) if task == "path_x" else (task, {})
        run = plan("s5", "s5", task=name, **config)
        options, example = run.layer_options, tasks.find_task(run.task, run.config)
        assert row == (
            run.num_layers, run.in_features, options["state_size"], options["num_blocks"], run.learning_rate,
            run.state_learning_rate, run.weight_decay, run.dropout_rate, run.batch_size, run.steps,
        )  # fmt: skip
        assert run.steps % run.evaluate_every == 0
        assert run.evaluate_every == -(-example.splits["train"] // run.batch_size)  # an epoch
        assert options.get("gate", "half") == ("only" if task in ("listops", "text") else "half")
        assert (options.get("dt_min") == 1e-4) == (task == "path_x") and run.mlp_features == 0
        assert (run.norm, run.norm_order) == ("batch", "pre")


def test_path_x_has_nothing_of_pathfinders_own():
    path_x = dict(task="pathfinder", config="128_hard")
    assert plan("s4d", "s4", task="pathfinder").pooling == "last"
    assert (plan("s4d", "s4", **path_x).pooling, plan("s4d", "s4", **path_x).weight_decay) == ("mean", 0.05)
    assert plan("s4-v1", "s4", task="pathfinder").dropout_rate == 0.1
    assert plan("s4-v1", "s4", **path_x).dropout_rate == 0


@pytest.mark.parametrize("task", [*FIVE, "path_x"])
def test_a_plateau_waits_for_epochs(task):
    name, config = ("pathfinder", "128_hard") if task == "path_x" else (task, None)
    run = plan("s4-v1", "s4", task=name, **({"config": config} if config else {}))
    examples = tasks.find_task(run.task, run.config).splits["train"]
    assert (run.evaluate_every - 1) * run.batch_size < examples <= run.evaluate_every * run.batch_size
    assert run.steps % run.evaluate_every == 0


def test_step_sizes_are_fast_on_tokens_and_slow_on_pixels():
    rates = {task: plan("s4", "s4", task=task).step_learning_rate for task in FIVE}
    assert rates == dict(listops=0.01, text=0.01, retrieval=0.01, image=None, pathfinder=None)

