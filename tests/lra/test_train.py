import csv
import dataclasses
import errno
import functools
import json
import os
import pathlib
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from subquad.lra import checkpoints, evaluation, models, objectives, optim, tasks, train
from subquad.lra.data import pipeline, store
from subquad.lra.plan import plan
from subquad.lra.step import train_step
from tests.lra.data import in_memory

SMALL = dict(config="tiny", in_features=16, num_layers=1, mlp_features=16, batch_size=16, evaluate_every=20)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    store.prepare("lra_listops/tiny", folder)
    return folder


def small_run(layer="softmax", **words):
    return plan("quickstart", layer, **{**SMALL, **words})


def history(folder):
    with (folder / "history.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("layer", ["softmax", "performer"])
def test_the_loss_falls(layer, data, tmp_path):
    run = small_run(layer, steps=80, warmup_steps=5, learning_rate=5e-3)
    result = train.train(run, out=tmp_path, data_dir=data, quiet=True)
    losses = [float(row["train_loss"]) for row in history(tmp_path)]
    assert len(losses) == 80
    assert np.mean(losses[-10:]) < np.mean(losses[:10]) - 0.2
    assert result.status == "ok" and result.train_loss_last == pytest.approx(np.mean(losses[-8:]))
    assert 0 <= result.accuracy_last <= 1 and result.accuracy == result.accuracy_best
    assert result.floor_majority < result.floor_root
    assert result.flops_per_step > 1e6 and result.memory_peak_bytes > result.memory_temporary_bytes > 0
    assert json.loads(result.configuration)["layer"] == layer
    validations = [(float(row["validation_accuracy"]), -float(row["validation_loss"]), int(row["step"]))
                   for row in history(tmp_path) if row["validation_accuracy"]]  # fmt: skip
    assert [step for *_, step in validations] == [20, 40, 60, 80]
    best = max(validations)
    assert (result.validation_accuracy_best, result.best_step) == (best[0], best[2])


def test_the_reported_accuracies_are_of_the_saved_parameters(data, tmp_path):
    run, task = dataclasses.replace(small_run(steps=40), selection="last"), tasks.find_task("listops", "tiny")
    result = train.train(run, out=tmp_path, data_dir=data, quiet=True)
    assert result.accuracy == result.accuracy_last
    graph, parameters, fixed = nnx.split(models.build(run, task), nnx.Param, ...)
    optimiser = optim.make_optimiser(run)
    state = optim.initial_state(run, optimiser, parameters)
    saved = checkpoints.Checkpoints(tmp_path / "checkpoint").arrays(dict(learner=state, best=parameters, fixed=fixed))
    splits, last = in_memory.generate("lra_listops/tiny"), saved["learner"]["parameters"]
    test = splits["test"]
    drawn = np.random.default_rng(0).permutation(len(splits["train"]))[: len(test)]
    seen = [splits["train"][row] for row in drawn]
    for name, found, examples in (("best", saved["best"], test), ("last", last, test), ("train", last, seen)):
        model = nnx.merge(graph, found, saved["fixed"])
        padded = [pipeline.pad(example, task.length) for example in examples]
        logits = model(np.stack([one["inputs"] for one in padded]), np.stack([one["mask"] for one in padded]))
        right = np.mean(np.argmax(logits, -1) == np.array([one["targets"] for one in padded]))
        assert getattr(result, f"accuracy_{name}") == pytest.approx(right)


# All that a checkpoint has to hold beside parameters and moments.
WHOLE = dict(dropout_rate=0.1, steps=60, accumulate=2, ema=0.9, schedule="plateau", patience=1, remat=True, norm="batch")

CODE = """
import sys
from subquad.lra import progress, train
from subquad.lra.plan import plan
def pause(self, step, *_):
    if step == 30:  # into the steps after the checkpoint, which are lost and done again
        print("at 30", flush=True)
        sys.stdin.read()  # until the parent kills
progress.Progress.update = pause
run = plan("quickstart", "performer", **{words})
train.train(run, out=sys.argv[1], data_dir=sys.argv[2], quiet=True)
"""


def test_killed_and_resumed_gives_the_same_final_numbers(data, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    command = [sys.executable, "-c", CODE.replace("{words}", repr({**SMALL, **WHOLE})), str(broken), str(data)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "at 30\n", process.communicate()
    assert [path.name for path in (broken / "checkpoint").iterdir()] == ["20"]
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (broken / "result.json").exists()
    first, second = (
        dataclasses.asdict(train.train(small_run("performer", **WHOLE), out=folder, data_dir=data, resume=True, quiet=True))
        for folder in (whole, broken)
    )
    timing = {"steps_per_second", "train_seconds", "compile_seconds", "finished_utc"}
    assert {k: v for k, v in first.items() if k not in timing} == {k: v for k, v in second.items() if k not in timing}
    assert (whole / "history.csv").read_bytes() == (broken / "history.csv").read_bytes()


@pytest.mark.parametrize("kind", ["classification", "language_model"])
def test_accumulation_equals_the_large_batch(kind):
    classes = 10 if kind == "classification" else 16
    task = dataclasses.replace(tasks.find_task("listops", "tiny"), kind=kind, num_classes=classes)
    rng = np.random.default_rng(0)
    inputs, lengths = rng.integers(1, 16, (16, 30), np.int32), rng.integers(1, 31, (16, 1))
    # Sequences of a language model count by their tokens, which the parts of a batch do not have equally many of.
    targets = rng.integers(0, 10, 16 if kind == "classification" else (16, 30), np.int32)
    batch, after = dict(inputs=inputs, mask=np.arange(30) < np.sort(lengths, 0), targets=targets), {}
    for accumulate in (1, 4):
        # Plain gradient descent: Adam would turn the rounding of a zero gradient into a step of its full length.
        run = small_run(steps=10, accumulate=accumulate)
        graph, parameters, fixed = nnx.split(models.build(run, task), nnx.Param, ...)
        optimiser = optax.sgd(0.1)
        state = optim.initial_state(run, optimiser, parameters)
        step = jax.jit(functools.partial(train_step, run, objectives.OBJECTIVES[task.kind], graph, optimiser))
        for _ in range(3):
            state, loss = step(state, fixed, batch)
        after[accumulate] = (*jax.tree.leaves(state["parameters"]), loss)
    for one, other in zip(*after.values(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_bfloat16_trains_with_float32_parameters(data, tmp_path):
    run = small_run(steps=40, dtype="bfloat16", warmup_steps=5, learning_rate=5e-3)
    result = train.train(run, out=tmp_path, data_dir=data, quiet=True)
    losses = [float(row["train_loss"]) for row in history(tmp_path)]
    assert result.status == "ok" and np.mean(losses[-5:]) < np.mean(losses[:5])
    parameters = nnx.state(models.build(run, tasks.find_task("listops", "tiny")), nnx.Param)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(parameters)} == {"float32"}


def test_a_loss_that_is_no_number_is_a_row_and_not_a_blank(data, tmp_path):
    run = small_run(steps=40, learning_rate=1e30, warmup_steps=0, clip_norm=None)
    result = train.train(run, out=tmp_path, data_dir=data, quiet=True)
    assert result.status.startswith("failed: non-finite loss by step ")
    assert result.accuracy is None and result.floor_majority is not None


def test_a_finished_run_is_read_and_not_trained_again(data, tmp_path):
    run = small_run(steps=10)
    first = train.train(run, out=tmp_path, data_dir=data, quiet=True)
    assert train.train(run, out=tmp_path, data_dir=data, resume=True, quiet=True) == first
    with pytest.raises(checkpoints.RunError, match="must be empty to start anew.*--resume"):
        train.train(run, out=tmp_path, data_dir=data, quiet=True)
    with pytest.raises(checkpoints.RunError, match="got one with steps=10 instead of 11"):
        train.train(dataclasses.replace(run, steps=11), out=tmp_path, data_dir=data, resume=True, quiet=True)


def test_training_imports_only_what_a_bare_image_has():
    code = (
        "import sys, orbax.checkpoint\n"
        "for name in 'tensorflow tensorflow_datasets grain array_record matplotlib tyro PIL pandas'.split():\n"
        "    sys.modules[name] = None\n"
        "import subquad.lra.train, subquad.lra.cli.commands, subquad.lra.recipes, subquad.lra.report.plots\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_folder_that_cannot_be_written_is_told_before_anything_else(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file" / "out", pathlib.Path("/proc/subquad")):
        with pytest.raises(checkpoints.RunError, match="out: folder .* must be writable.*, got .*--out") as caught:
            train.train(small_run(), out=folder)
        assert "\n" not in str(caught.value)


def test_a_disk_without_room_is_told_before_anything_else(monkeypatch, tmp_path):
    asked = []

    def full(descriptor, offset, size):
        asked.append(size)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(checkpoints.RunError, match="MB for checkpoints, got .*No space left on device. Choose another"):
        train.train(small_run(), out=tmp_path)
    assert asked[0] > 8 * 4 * 1000 and not any(tmp_path.iterdir())


FULL = """
import resource, sys
from subquad.lra import checkpoints, train
from subquad.lra.plan import plan
from subquad.lra.checkpoints import Checkpoints
save = Checkpoints.save
def filling(self, step, *rest):
    if step == 40:  # from here on every file is cut at 1 kB, as a full disk cuts them
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))
    save(self, step, *rest)
Checkpoints.save = filling
run = plan("quickstart", "performer", **{words})
try:
    train.train(run, out=sys.argv[1], data_dir=sys.argv[2], quiet=True)
except checkpoints.RunError as error:
    sys.exit(str(error))
"""


def test_a_disk_that_fills_up_keeps_the_checkpoint_before(data, tmp_path):
    code = FULL.replace("{words}", repr({**SMALL, **WHOLE}))
    command = [sys.executable, "-c", code, str(tmp_path), str(data)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    (message,) = done.stderr.strip().splitlines()
    assert message.startswith("checkpoint: folder") and "The checkpoint of step 20 is whole. Make room" in message
    result = train.train(small_run("performer", **WHOLE), out=tmp_path, data_dir=data, resume=True, quiet=True)
    assert result.status == "ok" and len(history(tmp_path)) == 60


def test_a_damaged_checkpoint_is_told(data, tmp_path):
    run = small_run(steps=20)
    train.train(run, out=tmp_path, data_dir=data, quiet=True)
    (tmp_path / "result.json").unlink()
    for path in (tmp_path / "checkpoint" / "20" / "arrays").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.raises(checkpoints.RunError, match="checkpoint: folder .* must be whole.*Delete it and") as caught:
        train.train(run, out=tmp_path, data_dir=data, resume=True, quiet=True)
    assert "\n" not in str(caught.value)


def test_the_cls_token_is_read_and_the_operators_are_not():
    """With "cls" the head reads the token that stands in front, so the models differ from pooling "first"."""
    task = tasks.find_task("listops", "tiny")
    run = plan("lra-2020", "softmax", config="tiny", in_features=16, num_layers=1, mlp_features=16)
    model = models.build(run, task)
    embedding = model.classifier.encoder.embed.embedding
    assert embedding.shape[0] == task.vocabulary_size + 1
    tokens, mask = jnp.ones((1, 30), jnp.int32), jnp.arange(30)[None] < 12
    before = model(tokens, mask)
    assert jnp.array_equal(before, model(tokens.at[:, 12:].set(7), mask))  # padding changes nothing
    embedding.set_value(embedding.get_value().at[-1].set(jnp.arange(16.0) % 3))
    assert not jnp.allclose(before, model(tokens, mask))


def test_a_collapse_is_said_and_kept_and_everything_is_logged(data, monkeypatch, capsys, tmp_path):
    scores = iter([0.0, 0.1, 0.9, 0.1, 0.95, 0.5, 0.5])  # the first is a compilation's, the last two are test's
    monkeypatch.setattr(evaluation, "mean_score", lambda *_: evaluation.Scores(next(scores), 1.0, 0.0, np.ones(2)))
    run = small_run(steps=40, evaluate_every=10, ema=0.5)
    result = train.train(run, out=tmp_path, data_dir=data, tensorboard=True)
    assert result.collapsed_step == 30 and result.best_step == 40
    assert "softmax: collapsed: validation 10.0 % at step 30 is chance" in capsys.readouterr().err
    assert len(history(tmp_path)) == 40
    (events,) = (tmp_path / "tensorboard").iterdir()
    logged = events.read_bytes()
    assert logged.count(b"train/loss") == 40 and logged.count(b"validation/accuracy") == 4
    assert logged.count(b"train/learning_rate") == 4
