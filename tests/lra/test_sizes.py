"""What cannot fit is refused before anything is made: by counting, never by building."""

import dataclasses
import math

import jax
import pytest

from subquad.lra import machine, models, sizes, tasks, train
from subquad.lra.bench import programs, speed
from subquad.lra.data import store
from subquad.lra.plan import plan
from tests.lra.bench.test_speed import SETTINGS

TASK = tasks.find_task("listops", "small")


def small_run(layer="softmax", **words):
    return plan("nystromformer", layer, config="small", **words)


@pytest.mark.parametrize("layer", ["softmax", "linformer", "s4", "transformer_xl"])
def test_deep_models_are_counted_by_shallow_ones(layer, monkeypatch):
    run, task = small_run(layer, num_layers=4, in_features=512), tasks.find_task("listops", "small")
    every = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(models._abstract(run, task)))
    built = []
    abstract = models._abstract
    monkeypatch.setattr(models, "_abstract", lambda run, task: built.append(run) or abstract(run, task))
    assert models.count_parameters(run, task) == every
    assert max(one.num_layers for one in built) == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (dict(in_features=10**9), "got at least 528,000,000,000 parameters, whose state takes 10560 GB"),
        (dict(in_features=10**18), "memory: run must fit into "),
        (dict(num_layers=10**9), "Make|accumulate more"),
        (dict(mlp_features=10**12), r"Make in_features, num_layers, mlp_features or the layer's own sizes smaller\.$"),
        (dict(batch_size=8001), r"batches: batch_size must be in 1\.\.8000, the training examples of listops/small, got 8001"),
    ],
)
@pytest.mark.parametrize("layer", ["softmax", "s4"])
def test_a_run_that_cannot_fit_makes_nothing(layer, words, said, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "memory", lambda: (64 * 10**9, "a test"))
    monkeypatch.setattr(models, "build", lambda *words: pytest.fail("built"))
    monkeypatch.setattr(store, "load", lambda *words: pytest.fail("made data"))
    run = small_run(layer, **words)
    with pytest.raises(ValueError, match=said) as caught:
        train.train(run, out=tmp_path / "out", quiet=True)
    assert "\n" not in str(caught.value) and not any(tmp_path.iterdir())


def test_the_recipe_that_equals_budgets_plans_a_wide_model_at_once():
    run = plan("quickstart", "local", in_features=10**9)
    assert run.mlp_features == 128  # the softmax model's, whose layer has as many parameters
    with pytest.raises(ValueError, match="memory: run must fit"):
        sizes.check(run, TASK)


def test_the_bound_is_below_what_the_compiler_finds():
    """Never more than a program needs: what fits is not refused."""
    run, task = programs.plan("small", "local", 64, batch_size=2, in_features=16, mlp_features=16)
    for mode in ("forward", "gradient", "train"):
        assert 0 < sizes.least(run, task, mode).total <= programs.compile_program(run, task, mode).memory.peak
        assert sizes.least(run, task, mode, counted=False).total <= sizes.least(run, task, mode).total


def test_devices_and_parts_of_a_batch_share_what_is_needed():
    run, task = small_run(batch_size=32), TASK
    one, many = sizes.least(run, task), sizes.least(run, task, devices=4, sharded=True)
    assert (many.inputs, many.activations, many.state) == (one.inputs / 4, one.activations / 4, one.state / 4)
    assert sizes.least(run, task, devices=4).state == one.state
    assert sizes.least(dataclasses.replace(run, accumulate=4), task).activations == one.activations / 4
    assert sizes.least(dataclasses.replace(run, dtype="bfloat16"), task).activations == one.activations / 2
    assert sizes.least(dataclasses.replace(run, ema=0.9), task).state == one.state * 6 / 5
    pair = tasks.find_task("retrieval", "lra")
    assert sizes.least(plan("nystromformer", task="retrieval"), pair).inputs == 2 * 5 * 32 * 4000


def test_examples_that_are_given_are_counted_themselves(tmp_path):
    example = {"inputs": [1, 2, 3], "label": 1}
    splits = {name: [example] * 4 for name in ("train", "validation", "test")}
    with pytest.raises(ValueError, match=r"batch_size must be in 1\.\.4, "):
        train.train(small_run(batch_size=5), out=tmp_path / "out", splits=splits, quiet=True)
    assert not any(tmp_path.iterdir())


def test_a_program_that_cannot_fit_is_a_row_and_is_not_compiled(monkeypatch):
    monkeypatch.setattr(programs, "compile_program", lambda *words: pytest.fail("compiled"))
    settings = dataclasses.replace(SETTINGS, memory_limit=10_000)
    rows = speed.race(["softmax", "local"], 64, "train", settings, lambda text: None)
    assert [row.layer for row in rows] == ["softmax", "local"]
    assert all(row.status.startswith("skipped: memory: run must fit into 10 kB of a test, got") for row in rows)
