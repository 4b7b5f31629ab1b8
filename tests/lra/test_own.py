"""What a user brings along: a task."""

import numpy as np
import pytest

from subquad.lra import recipes, tasks, train

PARITY = tasks.Task(
    "parity", "own", "bits that I drew", vocabulary_size=3, length=12, num_classes=2,
    splits={"train": 64, "validation": 20, "test": 24}, floors=lambda splits: {"majority": 0.5}, source="this test",
)  # fmt: skip


def examples(count, seed):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        bits = rng.integers(1, 3, rng.integers(4, 13))
        yield {"inputs": bits, "label": int(bits.sum() % 2)}


def splits():
    return {name: examples(count, seed) for seed, (name, count) in enumerate(PARITY.splits.items())}


def test_a_task_of_ones_own_is_trained(tmp_path):
    words = dict(in_features=16, num_layers=1, mlp_features=16, steps=10, evaluate_every=5)
    run = recipes.plan("quickstart", "softmax", task=PARITY, **words)
    result = train.train(run, out=tmp_path, task=PARITY, splits=splits(), quiet=True)
    assert (result.status, result.task, result.config, result.test_examples) == ("ok", "parity", "own", 24)
    assert result.data.startswith("bits that I drew as passed to train") and result.floor_majority == 0.5
    assert 0 <= result.accuracy_best <= 1 and result.accuracy * 24 == pytest.approx(round(result.accuracy * 24))
    with pytest.raises(ValueError, match="task must be a known name, got 'parity'"):
        train.train(run, out=tmp_path, resume=True)
    with pytest.raises(ValueError, match="task must be the run's, listops/small, got parity/own"):
        train.train(recipes.plan(), out=tmp_path / "other", task=PARITY, splits=splits())
    with pytest.raises(ValueError, match="config must be the task's, 'own', got 'small'. Leave it out"):
        recipes.plan(task=PARITY, config="small")


@pytest.mark.parametrize(
    ("example", "match"),
    [
        ({"inputs": [1, 2], "target": 0}, r"splits\['test'\]\[0\] must have the fields \('inputs', 'label'\)"),
        ({"inputs": [0, 2], "label": 0}, r"\['inputs'\] must be in 1..2, got 0..2. Id 0 is padding"),
        ({"inputs": [1, 3], "label": 0}, r"\['inputs'\] must be in 1..2, got 1..3"),
        ({"inputs": [1, 2], "label": 2}, r"\['label'\] must be in 0..1, got 2..2"),
        ({"inputs": [1.0, 2.0], "label": 1}, r"\['inputs'\] must be a sequence of integers, got float64"),
        ({"inputs": [], "label": 1}, r"\['inputs'\] must be a sequence of integers"),
        ({"inputs": [1, 2], "label": [1]}, r"\['label'\] must be an integer, got int64 of shape \(1,\)"),
    ],
)
def test_examples_that_do_not_fit_the_task_are_refused(example, match):
    with pytest.raises(ValueError, match=match):
        tasks.check_splits(PARITY, {**splits(), "test": [example]})


def test_a_split_that_is_missing_or_empty_is_told():
    some = splits()
    with pytest.raises(ValueError, match="splits must have 'test', got"):
        tasks.check_splits(PARITY, {name: some[name] for name in ("train", "validation")})
    with pytest.raises(ValueError, match=r"splits\['validation'\] must have examples, got none"):
        tasks.check_splits(PARITY, {**splits(), "validation": []})
