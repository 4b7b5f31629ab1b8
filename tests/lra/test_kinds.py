"""Pairs and language models: what is built, what is minimised, what is reported."""

import contextlib
import csv
import dataclasses
import functools
import json
import math
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad.lra import models, objectives, tasks, train
from subquad.lra.data import store
from subquad.lra.files import RunError
from subquad.lra.plan import plan
from subquad.zoo import LAYERS

TINY = dict(in_features=16, num_layers=1, mlp_features=16, batch_size=8, learning_rate=0.02, warmup_steps=2)
SPLITS = {"train": 64, "validation": 20, "test": 12}


def task(name, kind, length, num_classes, **words):
    return tasks.Task(
        name, "own", "drawn here", vocabulary_size=6, length=length, num_classes=num_classes, splits=SPLITS, kind=kind,
        floors=lambda splits: {}, source="this test", **words,
    )  # fmt: skip


TWINS = task("twins", "pair", 8, 2)
CYCLE = task("cycle", "language_model", 12, 6, metric="bits per byte")


def twins(rng):
    """Are both sequences of the same token?"""
    token, label = rng.integers(1, 6), int(rng.integers(2))
    other = token if label else (token + rng.integers(4)) % 5 + 1
    return {"inputs1": np.full(rng.integers(2, 9), token), "inputs2": np.full(rng.integers(2, 9), other), "label": label}


def cycle(rng):
    """1 2 3 4 5 1 2 ..., from anywhere."""
    ids = (np.arange(rng.integers(4, 14)) + rng.integers(5)) % 5 + 1
    return {"inputs": ids[:-1], "targets": ids[1:]}


def splits(draw):
    return {name: [draw(np.random.default_rng([n, i])) for i in range(n)] for name, n in SPLITS.items()}


def test_a_pair_is_trained_through_one_encoder(tmp_path):
    run = plan("quickstart", "softmax", task=TWINS, **TINY, steps=80, evaluate_every=40, accumulate=2)
    result = train.train(run, out=tmp_path, task=TWINS, splits=splits(twins), quiet=True)
    assert (result.status, result.protocol, result.bits_per_byte) == ("ok", "modern", None)
    assert result.accuracy > 0.9  # neither sequence alone tells
    built = models.build(run, TWINS)
    model = functools.partial(nnx.jit(lambda model, *inputs: model(*inputs)), built)
    a, b = jnp.array([[1, 2, 3, 0]]), jnp.array([[4, 5, 0, 0]])
    real = lambda tokens: tokens > 0
    logits = model(a, real(a), b, real(b))
    assert jnp.abs(logits - model(b, real(b), a, real(a))).max() > 1e-4  # a - b tells them apart
    np.testing.assert_allclose(logits, model(jnp.where(real(a), a, 5), real(a), b, real(b)), atol=1e-5)
    vectors = built.classifier.head.inner[0].kernel
    assert vectors.shape == (4 * 16, 16)  # [a, b, a * b, a - b]


def test_a_language_model_is_judged_by_bits_per_byte(tmp_path):
    run = plan("quickstart", "softmax", task=CYCLE, **TINY, steps=60, evaluate_every=20)
    given = splits(cycle)
    result = train.train(run, out=tmp_path, task=CYCLE, splits=given, quiet=True)
    assert (result.status, result.accuracy, result.validation_accuracy_best) == ("ok", None, None)
    assert result.bits_per_byte == result.bits_per_byte_best < 0.5 < math.log2(5)  # the rule is learnt
    with (tmp_path / "history.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["validation_bits_per_byte"]]
    bits = {int(row["step"]): float(row["validation_bits_per_byte"]) for row in rows}
    assert set(bits) == {20, 40, 60} and result.best_step == min(bits, key=bits.get)
    assert all(float(row["validation_loss"]) == pytest.approx(bits[int(row["step"])] * math.log(2)) for row in rows)


def test_bits_are_of_real_tokens_only_and_of_those_before():
    model = models.build(plan("quickstart", "softmax", task=CYCLE, **TINY), CYCLE)
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 6, (2, 13))
    inputs, targets = ids[:, :-1], ids[:, 1:]
    mask = np.arange(12) < np.array([[12], [5]])
    asked = jnp.where(mask, targets, -1)
    batch = dict(inputs=jnp.asarray(inputs), targets=asked, mask=jnp.asarray(mask))
    objective = objectives.OBJECTIVES["language_model"]
    logits_of = nnx.jit(lambda model, tokens, mask: model(tokens, mask))
    rows_of = nnx.jit(lambda model, batch: objective.rows(model, batch))
    logits = logits_of(model, batch["inputs"], batch["mask"])
    likely = nnx.log_softmax(logits)[np.arange(2)[:, None], np.arange(12), targets]
    rows = rows_of(model, batch)
    score, loss, count = rows.sum(0)
    assert count == 17 and loss == pytest.approx(-float((likely * mask).sum()), rel=1e-4)
    assert score == pytest.approx(float(loss) / math.log(2), rel=1e-5)
    total, number = nnx.jit(lambda model, batch: objective.loss(model, batch, rngs=nnx.Rngs(dropout=0)))(model, batch)
    assert number == 17 and total == pytest.approx(float(loss), rel=1e-5)
    one = rows[1]
    assert one[2] == 5 and one[1] == pytest.approx(-float(likely[1, :5].sum()), rel=1e-4)
    later = batch["inputs"].at[:, 7].set(batch["inputs"][:, 7] % 5 + 1)
    changed = jnp.abs(logits_of(model, later, batch["mask"]) - logits).max(axis=(0, 2))
    assert (changed[:7] == 0).all() and changed[7] > 1e-4
    assert objective.rank(1.0, 2.0) > objective.rank(1.1, 0.0)  # fewer bits are better


def test_an_objective_of_tags_counts_the_tokens_that_are_asked():
    """By hand: logits 1 for the class that is chosen, 0 for the other two."""
    chosen = jnp.array([[0, 1, 2, 2], [1, 1, 0, 0], [2, 2, 2, 2]])
    targets = jnp.array([[-1, 1, 2, -1], [1, 0, -1, -1], [-1, 0, -1, -1]])
    model = lambda inputs, mask, **words: nnx.one_hot(chosen, 3)
    batch = dict(inputs=chosen, mask=chosen >= 0, targets=targets)
    objective = objectives.OBJECTIVES["tagging"]
    right, wrong = math.log(math.e + 2) - 1, math.log(math.e + 2)
    scores, losses, counts = objective.rows(model, batch).T
    assert scores.tolist() == [2, 1, 0] and counts.tolist() == [2, 2, 1]
    assert losses.tolist() == pytest.approx([2 * right, right + wrong, wrong], rel=1e-5)
    total, number = objective.loss(model, batch, rngs=None)
    assert number == 5 and total == pytest.approx(3 * right + 2 * wrong, rel=1e-5)


def test_a_task_of_ones_own_may_ask_a_few_tokens(tmp_path):
    """The token before; a model that need not be causal, and one that must."""
    def before(rng):
        ids = rng.integers(1, 6, rng.integers(3, 9))
        return {"inputs": ids, "targets": np.where(np.arange(len(ids)) % 2, np.roll(ids, 1), -1)}

    free = task("before", "tagging", 8, 6)
    given = splits(before)
    bad = [{"inputs": np.array([1, 2]), "targets": np.array([-2, 1])}]
    with pytest.raises(ValueError, match=r"\['targets'\] must be in -1..5, got -2..1"):
        tasks.check_splits(free, {**given, "test": bad})
    with pytest.raises(ValueError, match="pooling must be left out for 'before', a task of kind tagging"):
        plan("lra-2020", "softmax", task=free, pooling="mean")
    with pytest.raises(ValueError, match="test lengths must be left out for before/own, .*lengths are listops, selective_copy"):
        tasks.check_lengths(free, [16])
    bound = dataclasses.replace(free, answers_ahead=True)
    with pytest.raises(ValueError, match="layer must be causal for a task with the answers in its inputs, got 'linf"):
        plan("lra-2020", "linformer", task=bound)
    run = plan("quickstart", "softmax", task=free, **TINY, steps=60, evaluate_every=30)
    result = train.train(run, out=tmp_path, task=free, splits=given, quiet=True)
    assert result.status == "ok" and result.accuracy > 0.5 > result.accuracy_sequences - 0.5
    tokens, mask = jnp.array([[1, 2, 3, 4, 5, 1, 2, 3]]), jnp.ones((1, 8), bool)
    for one, sees in ((free, True), (bound, False)):
        model = nnx.jit(models.build(run, one))
        changed = jnp.abs(model(tokens, mask) - model(tokens.at[0, 6].set(5), mask)).max((0, 2))
        assert (changed[0] > 1e-6) == sees and changed[6] > 1e-6


def few(examples):
    return [examples[index] for index in range(40)]


@pytest.mark.parametrize("layer", ["softmax", "linformer"])
def test_a_run_is_tested_at_lengths_that_it_was_not_trained_at(layer, tmp_path):
    listed = tasks.find_task("induction", "small")
    given = {split: few(part) for split, part in store.load(listed.dataset)[0].items()}
    short = dataclasses.replace(listed, at_length=lambda length: few(listed.at_length(length)))
    run = plan("diagnostics", layer, task="induction", steps=2, **{**TINY, "warmup_steps": 0, "num_layers": 1})
    result = train.train(run, out=tmp_path, task=short, splits=given, quiet=True, test_lengths=(32, 64, 128))
    found = json.loads(result.scores_by_length)
    assert found["64"] == result.accuracy == result.accuracy_sequences and 0 <= found["32"] <= 1
    assert found["128"] <= 1 if layer == "softmax" else found["128"].startswith("cannot: Linformer")


@pytest.mark.parametrize("selection", ["best", "last"])
def test_a_finished_run_is_tested_at_the_lengths_that_it_lacks(selection, tmp_path):
    listed = tasks.find_task("induction", "small")
    given = {split: few(part) for split, part in store.load(listed.dataset)[0].items()}
    short = dataclasses.replace(listed, at_length=lambda length: few(listed.at_length(length)))
    # Two validations at a rate at which the last is another model than the best, and an average to be tested.
    words = {**TINY, "warmup_steps": 0, "steps": 4, "evaluate_every": 2, "ema": 0.5, "learning_rate": 0.1}
    run = dataclasses.replace(plan("diagnostics", "softmax", task="induction", **words), selection=selection)
    fit = lambda out, **more: train.train(run, out=tmp_path / out, task=short, splits=given, quiet=True, **more)
    whole, first = fit("whole", test_lengths=(32, 128)), fit("parts", test_lengths=(32,))
    assert set(json.loads(first.scores_by_length)) == {"32"}
    further = fit("parts", resume=True, test_lengths=(32, 128))
    assert json.loads(further.scores_by_length) == pytest.approx(json.loads(whole.scores_by_length))
    assert dataclasses.replace(further, scores_by_length=first.scores_by_length) == first
    shutil.rmtree(tmp_path / "parts" / "checkpoint")
    assert fit("parts", resume=True, test_lengths=(128,)) == further  # which is in the result now
    with pytest.raises(RunError, match="must hold a checkpoint to be tested at length 64, got none. Leave that length out"):
        fit("parts", resume=True, test_lengths=(64,))


@pytest.mark.parametrize("layer", sorted(LAYERS))
def test_layers_that_can_be_causal_model_language(layer):
    if not LAYERS[layer].supports.causal:
        with pytest.raises(ValueError, match=f"layer must be causal for a language model, got '{layer}', .*Use softmax, "):
            plan("quickstart", layer, task="pylib_lm")
        return
    leaks = LAYERS[layer].supports.causal == "mask"
    with pytest.warns(match="may flatter it") if leaks else contextlib.nullcontext():
        run = plan("quickstart", layer, task="pylib_lm", mlp_features=8, num_layers=1)
    assert run.config == "offline"
    assert models.count_parameters(run, tasks.find_task("pylib_lm", "offline")) > 257 * run.in_features


@pytest.mark.parametrize("name", ["bbc_text", "bbc_halves", "photo_patches", "pathfinder", "text"])
def test_the_quickstarts_budget_holds_on_long_tasks_even_for_the_layer_with_rows_per_position(name):
    run = plan("quickstart", "linformer", task=name)
    assert run.mlp_features >= 8 and run.config in ("offline", "32_hard", "modern")
