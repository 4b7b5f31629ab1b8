import numpy as np
import pytest

from subquad.lra.data.diagnostics.mqar import MQAR


def solve(one: MQAR, tokens) -> dict[int, int]:
    """Reads the pairs; where one of their keys stands later, its value."""
    ids = [int(token) - 1 for token in tokens]
    context = ids[: 2 * one.pairs]
    known = dict(zip(context[::2], context[1::2], strict=True))
    return {at: known[key] for at, key in enumerate(ids) if at >= 2 * one.pairs and key in known}


@pytest.mark.parametrize("one", [MQAR(), MQAR(length=32, pairs=8, vocabulary=64), MQAR(length=16, pairs=2, power=1.0)])
def test_the_targets_are_what_the_tokens_say(one):
    half = one.vocabulary // 2
    for part in one.splits().values():
        for index in range(20):
            inputs, targets = part[index]["inputs"], part[index]["targets"]
            asked = {at: int(value) for at, value in enumerate(targets) if value >= 0}
            assert asked == solve(one, inputs) and len(asked) == one.pairs
            assert all(at % 2 == 0 for at in asked)
            keys, values = inputs[: 2 * one.pairs : 2] - 1, inputs[1 : 2 * one.pairs : 2] - 1
            assert len(set(keys)) == len(set(values)) == one.pairs
            assert (0 < keys).all() and (keys < half).all() and (half <= values).all()
            silent = np.delete(inputs, [*range(2 * one.pairs), *asked])
            assert (silent == 1).all()


def test_gaps_follow_the_power_law():
    """The first of them is drawn with exactly these probabilities."""
    one = MQAR(length=16, pairs=1, vocabulary=64, power=0.01)
    part = one.splits()["train"]
    first = np.array([np.flatnonzero(part[index]["targets"] >= 0)[0] for index in range(4000)])
    likely = np.arange(1, 8) ** -0.99
    np.testing.assert_allclose(np.bincount((first - 2) // 2, minlength=7) / 4000, likely / likely.sum(), atol=0.025)


def test_the_filler_may_be_random():
    inputs = MQAR(random_filler=True).example("train", 0)["inputs"]
    assert len(set(inputs.tolist())) > 50


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (dict(length=15, pairs=1), "length must be even and >= 4 . pairs = 4, got 15"),
        (dict(pairs=17), "length must be even and >= 4 . pairs = 68, got 64"),
        (dict(vocabulary=8), "vocabulary must be > 2 . pairs = 8, got 8"),
        (dict(power=0.0), r"power must be in \(0, 1\], got 0.0"),
    ],
)
def test_parameters_that_cannot_be_are_refused(words, match):
    with pytest.raises(ValueError, match=f"MQAR: {match}"):
        MQAR(**words)


def test_it_is_the_same_everywhere():
    example = MQAR(length=8, pairs=2, vocabulary=16).example("train", 7)
    assert example["inputs"].tolist() == [2, 13, 7, 16, 2, 1, 7, 1]
