import collections

import numpy as np
import pytest

from subquad.lra import train
from subquad.lra.data.diagnostics.recall import Recall
from subquad.lra.plan import plan


def solve(one: Recall, inputs) -> list[int]:
    """Reads the pairs into a dictionary, and looks the questions up."""
    known, answers = {}, []
    for token in inputs:
        if token <= one.keys * one.values:
            known[(token - 1) // one.values] = (token - 1) % one.values
            answers.append(-1)
        else:
            answers.append(known[token - 1 - one.keys * one.values])
    return answers


@pytest.mark.parametrize("one", [Recall(), Recall(keys=5, values=3), Recall(keys=5, writes=3)])
def test_the_targets_are_what_the_tokens_say(one):
    for split, part in one.splits().items():
        for index in range(20):
            example = part[index]
            assert example["targets"].tolist() == solve(one, example["inputs"]), split
            questions = example["inputs"][one.keys * one.writes :]
            assert sorted(questions) == [*range(1 + one.keys * one.values, one.vocabulary_size)]


def test_the_last_of_several_values_counts():
    inputs = Recall(keys=3, writes=4).example("test", 1)["inputs"][:12]
    assert sorted(collections.Counter((inputs - 1) // 8).items()) == [(0, 4), (1, 4), (2, 4)]


def test_every_value_is_as_likely():
    part = Recall().splits()["train"]
    counts = collections.Counter(np.concatenate([part[index]["targets"][16:] for index in range(500)]).tolist())
    assert set(counts) == set(range(8)) and max(counts.values()) / 8000 == pytest.approx(Recall().chance, abs=0.015)


def test_it_is_the_same_everywhere():
    assert Recall().example("train", 7)["inputs"].tolist()[:8] == [84, 40, 17, 109, 72, 58, 30, 102]


def test_softmax_learns_it_in_seconds(tmp_path):
    run = plan("diagnostics", "softmax", task="recall", steps=120, evaluate_every=60)
    result = train.train(run, out=tmp_path, quiet=True)
    assert result.accuracy > 0.4 > 3 * result.floor_chance and result.data.endswith("drawn, batches by grain")
    assert result.accuracy_sequences <= result.accuracy and result.floor_majority is None
