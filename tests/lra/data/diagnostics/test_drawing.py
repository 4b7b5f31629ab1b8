"""What holds for every diagnostic task: the same everywhere, splits apart, ids and classes in their bounds."""

import hashlib

import numpy as np
import pytest

from subquad.lra import recipes, tasks
from subquad.lra.data.diagnostics.configs import CONFIGS
from subquad.lra.data.diagnostics.drawing import SPLITS, Drawn
from subquad.lra.data.diagnostics.recall import Recall

EVERY = [(task, name) for task, configs in CONFIGS.items() for name in configs]
each = pytest.mark.parametrize(("task", "name"), EVERY)


@each
def test_an_example_is_that_of_its_split_and_index(task, name):
    one, again = CONFIGS[task][name].splits(), CONFIGS[task][name].splits()
    for split in SPLITS:
        last = len(one[split]) - 1
        for index in (last, 0, 1):  # whatever was read before
            first, second = one[split][index], again[split][index]
            assert all(np.array_equal(first[field], second[field]) for field in ("inputs", "targets"))
        assert not np.array_equal(one[split][0]["inputs"], one[split][1]["inputs"])


@each
def test_no_two_splits_share_a_sequence(task, name):
    """Whatever the index: a sequence itself tells the split."""
    splits = CONFIGS[task][name].splits()
    share = lambda example: hashlib.blake2b(example["inputs"].tobytes(), digest_size=1).digest()[0] % 8
    for split, shares in (("train", range(2, 8)), ("validation", [1]), ("test", [0])):
        assert {share(splits[split][index]) for index in range(30)} <= set(shares)


@each
def test_examples_are_those_of_the_task(task, name):
    listed, generator = tasks.find_task(task, name), CONFIGS[task][name]
    splits = generator.splits()
    assert {split: len(part) for split, part in splits.items()} == listed.splits
    few = {split: [part[index] for index in range(3)] for split, part in splits.items()}
    tasks.check_splits(listed, few)
    shortest = getattr(generator, "shortest", None) or listed.length - 1  # some draw their lengths
    assert all(shortest <= len(one["inputs"]) <= listed.length for part in few.values() for one in part)
    assert all((one["targets"] >= 0).any() for part in few.values() for one in part)
    assert listed.floors(splits) == {"chance": generator.chance} and 0 < generator.chance < 0.6


@pytest.mark.parametrize("task", CONFIGS)
def test_the_small_recipe_has_every_task(task):
    known = tasks.TASKS[task]
    named = recipes.RECIPES["diagnostics"].config(task, "softmax")
    assert named is None or named in known


def test_a_split_is_read_like_a_list():
    drawn = Drawn(lambda index: {"index": index}, 3)
    assert [one["index"] for one in drawn] == [0, 1, 2] and drawn[-1] == drawn[2] and drawn[2] is drawn[2]
    with pytest.raises(IndexError):
        drawn[3]


def test_parameters_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="Recall: values must be >= 2, got 1. Leave it out for its default."):
        Recall(values=1)
    with pytest.raises(ValueError, match="Recall: train must be >= 1, got 0"):
        Recall(train=0)
    with pytest.raises(ValueError, match="Recall: parameters must allow enough sequences for some to belong to 'validation'"):
        Recall(keys=1, values=2).example("validation", 0), Recall(keys=1, values=2).example("test", 0)
