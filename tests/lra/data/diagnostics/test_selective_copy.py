import numpy as np
import pytest

from subquad.lra.data.diagnostics.selective_copy import SelectiveCopy


def solve(inputs) -> list[int]:
    """Queues what is neither noise nor marker; each marker takes the next."""
    queue, answers = [], []
    for token in inputs:
        queue += [token - 3] if token > 2 else []
        answers.append(queue.pop(0) if token == 2 else -1)
    assert not queue
    return answers


@pytest.mark.parametrize("one", [SelectiveCopy(context=40, data=6), SelectiveCopy(context=4, data=4, vocabulary=20)])
def test_the_targets_are_what_the_tokens_say(one):
    for part in one.splits().values():
        for index in range(20):
            assert part[index]["targets"].tolist() == solve(part[index]["inputs"])


def test_symbols_stand_anywhere():
    part = SelectiveCopy(context=40, data=6).splits()["train"]
    placed = np.mean([part[index]["inputs"][:40] > 2 for index in range(2000)], 0)
    np.testing.assert_allclose(placed, 6 / 40, atol=0.035)


def test_longer_ones_copy_as_many():
    longer = SelectiveCopy(context=40, data=6).at_length(256)
    assert (longer.length, longer.data, longer.context) == (256, 6, 250)
    assert SelectiveCopy(context=40, data=6).at_length(46) == SelectiveCopy(context=40, data=6)


def test_it_is_the_same_everywhere():
    example = SelectiveCopy(context=12, data=3).example("train", 7)
    assert example["inputs"].tolist() == [1, 1, 1, 1, 1, 1, 16, 1, 1, 4, 3, 1, 2, 2, 2]


def test_more_data_than_places_are_refused():
    with pytest.raises(ValueError, match="SelectiveCopy: context must be >= data = 6, got 5"):
        SelectiveCopy(context=5, data=6)
