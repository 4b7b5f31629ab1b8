"""Language models whose state goes on from sequence to sequence."""

import csv
import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from subquad.lra import checkpoints, models, tasks, train, trained
from subquad.lra.objectives import OBJECTIVES
from subquad.lra.plan import explain, plan
from subquad.lra.report import examples, ledger
from subquad.lra.step import batch_gradient

LENGTH, COUNTS = 6, {"train": 9, "validation": 4, "test": 5}
TASK = tasks.Task(
    "letters", "own", "drawn here", vocabulary_size=9, length=LENGTH, num_classes=9, splits=COUNTS, kind="language_model",
    floors=lambda splits: {}, source="this test", metric="bits per byte",
)  # fmt: skip
TINY = dict(
    in_features=8, num_layers=2, mlp_features=8, batch_size=2, steps=6, evaluate_every=3, warmup_steps=0, carry_state=True,
)  # fmt: skip
OPTIONS = {
    "linear": dict(num_heads=2),
    "transformer_xl": dict(num_heads=2, segment_length=4, memory_length=5),
    "mamba2": dict(head_features=8, state_size=4),
}


def cut(text, length=LENGTH):
    """A text as sequences, each with what follows it."""
    return [
        {"inputs": text[at : at + length], "targets": text[at + 1 : at + length + 1]}
        for at in range(0, len(text) - length, length)
    ]


def splits():
    return {
        name: cut(np.random.default_rng(seed).integers(1, 9, count * LENGTH + 1))
        for seed, (name, count) in enumerate(COUNTS.items())
    }


def tiny(layer, **words):
    return plan("quickstart", layer, task=TASK, layer_options=OPTIONS[layer], **{**TINY, **words})


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def losses(folder):
    return [float(row["train_loss"]) for row in rows_of(folder / "history.csv")]


@pytest.mark.parametrize("layer,accumulate", [("linear", 2), ("transformer_xl", 1)])
def test_without_learning_the_losses_are_those_of_one_long_call(layer, accumulate, tmp_path):
    run, given = tiny(layer, learning_rate=1e-30, accumulate=accumulate), splits()
    result = train.train(run, out=tmp_path, task=TASK, splits=given, quiet=True)
    model = nnx.jit(models.build(run, TASK))

    def of_tokens(parts):
        """The loss of each token of examples in one call, [examples, LENGTH]."""
        inputs, targets = (jnp.asarray(np.concatenate([one[name] for one in parts]))[None] for name in ("inputs", "targets"))
        logits = model(inputs, jnp.ones(inputs.shape, bool))
        return np.asarray(optax.softmax_cross_entropy_with_integer_labels(logits, targets)).reshape(-1, LENGTH)

    streams = [of_tokens(given["train"][4 * row : 4 * row + 4]) for row in range(2)]
    expected = np.mean(streams, axis=(0, 2))
    np.testing.assert_allclose(losses(tmp_path), np.resize(expected, 6), rtol=1e-4)
    tested = np.concatenate([of_tokens(given["test"][:3]), of_tokens(given["test"][3:])]).mean(1) / np.log(2)
    assert result.bits_per_byte == pytest.approx(tested.mean(), rel=1e-4)
    scores = [float(row["score"]) for row in rows_of(tmp_path / examples.FILE)]
    np.testing.assert_allclose(scores, tested, rtol=1e-3)
    # Rows of results say so, and are of another configuration.
    assert json.loads(result.configuration)["carry_state"] is True
    name = ledger.hash_without_seed(result.configuration)
    assert name != ledger.hash_without_seed({**json.loads(result.configuration), "carry_state": False})


def test_a_run_goes_on_in_the_middle_of_an_epoch_to_the_same_numbers(monkeypatch, tmp_path):
    run, save = tiny("linear", num_layers=1, steps=7, learning_rate=0.01), checkpoints.Checkpoints.save
    fit = lambda folder, **words: train.train(run, out=folder, task=TASK, splits=splits(), quiet=True, **words)

    def save_and_stop(self, step, *rest):
        save(self, step, *rest)
        raise checkpoints.RunError("stopped")

    fit(tmp_path / "whole")
    monkeypatch.setattr(checkpoints.Checkpoints, "save", save_and_stop)
    with pytest.raises(checkpoints.RunError, match="^stopped$"):
        fit(tmp_path / "parts")
    monkeypatch.setattr(checkpoints.Checkpoints, "save", save)
    fit(tmp_path / "parts", resume=True)
    whole, parts = ((tmp_path / name / "history.csv").read_bytes() for name in ("whole", "parts"))
    assert whole == parts
    model, loaded, _ = trained.load(tmp_path / "parts", task=TASK)
    assert loaded.carry_state and model.model.longest is None


@pytest.mark.parametrize("layer", sorted(OPTIONS))
def test_the_gradient_within_a_sequence_is_that_of_a_call(layer):
    batch = {name: np.stack([one[name] for one in splits()["train"][:2]]) for name in ("inputs", "targets")}
    batch |= dict(mask=np.ones((2, LENGTH), bool), begins=np.ones(2, bool))
    found = []
    for carry in (False, True):
        run = tiny(layer, carry_state=carry, positions=None, dropout_rate=0.3, drop_path_rate=0.2)
        graph, parameters, _, fixed = models.split(models.build(run, TASK))
        batch["carried"] = models.empty_carried(run, graph, parameters, fixed)
        if carry:  # what was there before a row begins does not count
            batch["carried"] = jax.tree.map(lambda a: a + 1, batch["carried"])
        step = functools.partial(batch_gradient, run, OBJECTIVES[TASK.kind], graph)
        found.append(jax.jit(step)(parameters, fixed, jax.random.key(0), batch)[0])
    for one, other in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


def test_an_answer_in_the_sequence_before_is_found(tmp_path):
    """Each sequence stands twice. Without memory no model has less than 3 bits of the second one."""
    task, counts = TASK, {"train": 512, "validation": 32, "test": 64}
    given = {}
    for seed, (name, count) in enumerate(counts.items()):
        drawn = np.random.default_rng(seed).integers(1, 9, (count // 2 + 1, 1, LENGTH))
        given[name] = cut(np.repeat(drawn, 2, axis=1).ravel())[:count]
    words = dict(num_layers=1, in_features=16, batch_size=16, steps=200, evaluate_every=100, learning_rate=0.02)
    options = dict(layer_options=dict(num_heads=2, segment_length=LENGTH, memory_length=LENGTH))
    run = plan("quickstart", "transformer_xl", task=task, **{**TINY, **words}, **options)
    result = train.train(run, out=tmp_path, task=task, splits=given, quiet=True)
    assert result.bits_per_byte < 2.6


@pytest.mark.parametrize(
    "layer,words,message",
    [
        ("softmax", {}, "carry_state must be left out for layer 'softmax', got a cache that grows.* Use transformer_xl, comp"),
        ("cosformer", dict(layer_options=dict(num_heads=2, max_length=6)), "carry_state must be left out .*max_length"),
        ("linear", dict(positions="learned"), "positions must be None or sinusoidal with carry_state, got learned. Change it"),
        ("linear", dict(norm="batch"), "norm must be layer or rms or scale with carry_state, got batch"),
        ("linear", dict(num_experts=2), "num_experts must be 0 with carry_state, got 2"),
        ("local", dict(attention_dropout_rate=0.1), "attention_dropout_rate must be 0 with carry_state, got 0.1"),
        ("local", dict(layer_options=dict(dropout_rate=0.1)), "layer_options must have dropout_rate 0 with carry_state"),
        ("linear", dict(remat=True), "remat must be False with carry_state, got True"),
        ("linear", dict(reversible=True), "reversible must be False with carry_state, got True"),
        ("linear", dict(documents="apart"), "documents must be joined with carry_state, got apart"),
        ("linear", dict(task="listops"), "carry_state must be left out for 'listops', a task of kind classification"),
    ],
)
def test_what_state_cannot_be_carried_through_is_refused(layer, words, message):
    with pytest.raises(ValueError, match=message):
        plan("quickstart", layer, **{"task": "pylib_lm", "mlp_features": 8, "carry_state": True, **words})


def test_positions_are_left_out_where_the_text_has_no_end():
    words = dict(task="pylib_lm", mlp_features=8)
    assert explain("quickstart", "linear", carry_state=True, **words)["positions"] == (None, "state is carried")
    assert plan("quickstart", "linear", carry_state=True, positions="sinusoidal", **words).positions == "sinusoidal"
    assert plan("quickstart", "linear", **words).positions == "learned"


def test_examples_that_do_not_follow_each_other_are_refused(tmp_path):
    given = splits()
    given["test"] = given["test"][::-1]
    message = r"splits\['test'\]\[\d\] must begin with the last target before it, \d, with carry_state"
    with pytest.raises(ValueError, match=message):
        train.train(tiny("linear"), out=tmp_path / "out", task=TASK, splits=given, quiet=True)
    assert not (tmp_path / "out").exists()


def on_devices(out):
    """What the process that this file starts does."""
    run, found = tiny("linear", num_layers=1, learning_rate=0.01, steps=4, batch_size=4), {}
    for name, words in dict(one={}, two=dict(devices=2), zero=dict(devices=2, shard="zero")).items():
        result = train.train(run, out=out / name, task=TASK, splits=splits(), quiet=True, **words)
        found[name] = [*losses(out / name), result.bits_per_byte]
    print(json.dumps(found))


def test_devices_share_the_state_as_they_share_the_rows(tmp_path):
    flags = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=2"
    code = f"import pathlib; from tests.lra import test_carry; test_carry.on_devices(pathlib.Path({str(tmp_path)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=pathlib.Path(__file__).parents[2],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for name in ("two", "zero"):
        np.testing.assert_allclose(found[name], found["one"], rtol=1e-4)
