"""Which data the numbers of a run are of, and how much of it is in memory at once."""

import weakref

import jax
import numpy as np
import pytest

from subquad.lra import collapse, evaluation, tasks, train
from subquad.lra.data import floors, pipeline, small_network
from subquad.lra.plan import plan
from tests.lra.data import in_memory

SMALL = dict(config="tiny", in_features=16, num_layers=1, mlp_features=16, batch_size=8, evaluate_every=2, steps=8)
DIGITS = tasks.find_task("digits", "offline")
MARKS = dict(train=1, validation=2, test=3)


@pytest.fixture
def alive(monkeypatch):
    """How many padded batches of held-out examples are alive: {"now", "most", "made"}."""
    count = dict(now=0, most=0, made=0)

    def gone():
        count["now"] -= 1

    def stack(examples, length, made=pipeline._stack):
        batch = made(examples, length)
        count["now"], count["made"] = count["now"] + 1, count["made"] + 1
        count["most"] = max(count["most"], count["now"])
        weakref.finalize(batch["inputs"], gone)
        return batch

    monkeypatch.setattr(pipeline, "_stack", stack)
    return count


def marked(sizes):
    """Splits whose examples start with their split's mark."""
    draw = np.random.default_rng(0)
    example = lambda mark: {"inputs": np.array([mark, *draw.integers(1, 11, 9)]), "label": int(draw.integers(10))}
    return {name: [example(MARKS[name]) for _ in range(size)] for name, size in sizes.items()}


def test_a_run_holds_few_held_out_batches_at_once_and_reads_them_anew(alive, tmp_path):
    splits = marked(dict(train=64, validation=100, test=50))
    result = train.train(plan(**SMALL), out=tmp_path, splits=splits, quiet=True)
    assert result.status == "ok" and result.test_examples == 50
    validations, batches = 4, -(-100 // 8)
    # The floor, the compilation's one, every validation; test with the best and the last parameters, and as many of train.
    assert alive["made"] >= batches * (1 + validations) + 1 + 2 * -(-50 // 8)
    assert alive["most"] <= 4


def test_every_number_is_of_its_split_and_of_its_parameters(monkeypatch, tmp_path):
    """The best on validation is neither the first nor the last, and scores name the parameters and the split."""
    seen, scores = [], iter([0.1, 0.3, 0.2, 0.9, 0.4])  # the first is a compilation's

    def evaluate(step, mesh, fixed, parameters, batches, carried):
        marks = {int(mark) for batch in batches for mark in batch["inputs"][:, 0]}
        (mark,) = marks  # one split, and no other
        name = next(name for name, one in MARKS.items() if one == mark)
        fingerprint = float(sum(np.abs(np.asarray(leaf)).sum() for leaf in jax.tree.leaves(parameters)))
        seen.append((name, fingerprint))
        return evaluation.Scores(next(scores) if name == "validation" else fingerprint, 1.0, 0.0, np.ones(2))

    monkeypatch.setattr(evaluation, "mean_score", evaluate)
    run = plan(**SMALL)
    result = train.train(run, out=tmp_path, splits=marked(dict(train=64, validation=16, test=16)), quiet=True)
    _, *validated = [value for name, value in seen if name == "validation"]
    assert len(set(validated)) == 4 and result.best_step == 6
    assert (result.accuracy_best, result.accuracy_last) == (validated[2], validated[3])
    assert result.accuracy == result.accuracy_train == validated[2]  # selection "best"
    assert [name for name, _ in seen] == ["validation"] * 5 + ["test", "test", "train"]
    assert (result.validation_accuracy_best, result.validation_accuracy_last) == (0.9, 0.4)


def test_batches_of_a_split_are_made_by_each_loop(alive):
    splits = marked(dict(test=20))
    batches = pipeline.EvaluationBatches(splits["test"], batch_size=8, length=10)
    assert len(batches) == 3 and alive["made"] == 0
    first, second = ([batch["weights"].sum() for batch in batches] for _ in range(2))
    assert first == second == [8, 8, 4] and alive["most"] <= 2
    assert len(pipeline.EvaluationBatches(splits["test"], batch_size=8, length=10, count=9)) == 2
    alive.update(made=0, most=0)
    assert collapse.chance(iter(batches), "accuracy") == collapse.chance(list(batches), "accuracy")


class Counted:
    """A split that makes its examples when they are asked for, and knows how many of them are alive."""

    def __init__(self, size, make):
        self.size, self.make, self.now, self.most = size, make, 0, 0

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if not 0 <= index < self.size:
            raise IndexError(index)
        example = self.make(index)
        self.now += 1
        self.most = max(self.most, self.now)
        weakref.finalize(example["inputs"], self._gone)
        return example

    def _gone(self):
        self.now -= 1


def pictures(count):
    return Counted(count, lambda index: {"inputs": 1 + np.arange(64) % (2 + index), "label": index % 2})


def trees(count):
    known = list(in_memory.generate("lra_listops/tiny")["train"])[:count]
    return Counted(count, lambda index: {**known[index], "inputs": known[index]["inputs"].copy()})


def texts(count):
    draw = np.random.default_rng(1).integers(1, 257, (count, 33))
    return Counted(count, lambda index: {"inputs": draw[index, :-1].copy(), "targets": draw[index, 1:]})


@pytest.mark.parametrize(
    ("rule", "make"),
    [
        (floors.bag_of_tokens, pictures),
        (floors.root, trees),
        (floors.next_token, texts),
        (lambda splits: small_network.read_pictures(splits["test"], 100, (8, 8)), pictures),
        (lambda splits: tasks.check_splits(DIGITS, {**splits, "validation": splits["test"]}), pictures),
    ],
    ids=["bag", "root", "next token", "network", "a user's own"],
)
def test_rules_see_one_example_at_a_time(rule, make):
    splits = {"train": make(16), "test": make(16)}
    rule(splits)
    assert max(split.most for split in splits.values()) <= 3


def test_pixels_are_kept_as_bytes_and_scaled_as_they_are_used():
    seen, labels = small_network.read_pictures([{"inputs": np.arange(1, 257, dtype=np.uint16), "label": 1}], 5, (16, 16))
    assert seen.dtype == np.uint8 and seen.shape == (1, 16, 16, 1) and labels.tolist() == [1]
    values = small_network.scaled(seen, 256).ravel()
    np.testing.assert_allclose(values, np.linspace(-1, 1, 256), atol=1e-6)
