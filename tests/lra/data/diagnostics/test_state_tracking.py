import functools
import itertools

import numpy as np
import pytest

from subquad.lra.data.diagnostics.state_tracking import WordProblem, products

PARITY, ADDITION = WordProblem(group="cyclic", order=2), WordProblem(group="cyclic", order=7, length=9)


@pytest.mark.parametrize("one", [PARITY, ADDITION])
def test_sums_are_counted_by_hand(one):
    for part in one.splits().values():
        for index in range(10):
            numbers = (part[index]["inputs"] - 1).tolist()
            assert part[index]["targets"].tolist() == [sum(numbers[: at + 1]) % one.order for at in range(len(numbers))]


@pytest.mark.parametrize("group", ["symmetric", "alternating"])
def test_permutations_are_applied_to_things_one_after_the_other(group):
    one = WordProblem(group=group)
    elements = [p for p in itertools.permutations(range(5)) if group == "symmetric" or np.linalg.det(np.eye(5)[list(p)]) > 0]
    assert one.num_classes == len(elements) == {"symmetric": 120, "alternating": 60}[group]
    for split in ("train", "test"):
        for index in range(10):
            example = one.example(split, index)
            for thing in range(5):
                now = thing
                for token, target in zip(example["inputs"], example["targets"], strict=True):
                    now = elements[token - 1][now]
                    assert elements[target][thing] == now


@pytest.mark.parametrize(("group", "order"), [("cyclic", 60), ("symmetric", 4), ("alternating", 5)])
def test_tables_are_groups(group, order):
    table = products(group, order)
    every = np.arange(len(table))
    assert (table[0] == every).all() and (table[:, 0] == every).all()
    assert (np.sort(table, 0) == every[:, None]).all() and (np.sort(table, 1) == every).all()
    assert (table[table[:9, :9]] == table[every[:9, None, None], table[:9]]).all()  # (ab)c = a(bc)


def test_chance_knows_the_first_product_alone():
    assert PARITY.chance == pytest.approx((1 + 23 / 2) / 24) and WordProblem(length=1).chance == 1


def test_longer_ones_and_what_cannot_be():
    assert WordProblem().at_length(100).example("test", 3)["targets"].shape == (100,)
    with pytest.raises(ValueError, match="WordProblem: group must be cyclic, symmetric or alternating, got 'dihedral'"):
        WordProblem(group="dihedral")
    with pytest.raises(ValueError, match="order must be at most 6 where the group is symmetric, got 7"):
        WordProblem(order=7)


@pytest.mark.parametrize("split", ["train", "test"])
def test_lengths_are_drawn_and_only_the_last_is_asked(split):
    one = WordProblem(group="cyclic", order=2, length=9, shortest=4, asked="last")
    examples = [one.example(split, index) for index in range(200)]
    assert {len(example["inputs"]) for example in examples} == set(range(4, 10))
    for example in examples:
        bits, targets = example["inputs"] - 1, example["targets"]
        assert len(targets) == len(bits) and (targets[:-1] == -1).all() and targets[-1] == bits.sum() % 2
    assert one.chance == 0.5
    longer = [one.at_length(20).example("test", index) for index in range(200)]
    assert {len(example["inputs"]) for example in longer} == set(range(9, 21))
    assert {len(one.at_length(6).example("test", index)["inputs"]) for index in range(9)} == {6}


def test_chance_of_drawn_lengths_is_that_of_their_answers():
    one = WordProblem(group="cyclic", order=4, length=3, shortest=1)
    answers = [example["targets"] for example in map(functools.partial(one.example, "train"), range(2000))]
    known = sum(1 + (len(each) - 1) / 4 for each in answers) / sum(map(len, answers))
    assert one.chance == pytest.approx((3 + 3 / 4) / 6) and one.chance == pytest.approx(known, abs=0.1)
    assert WordProblem(group="cyclic", order=4, length=2, shortest=1, asked="last").chance == pytest.approx((1 + 1 / 4) / 2)


def test_bad_lengths_and_questions_are_named():
    with pytest.raises(ValueError, match="shortest must be at most length=24, got 25"):
        WordProblem(shortest=25)
    with pytest.raises(ValueError, match="shortest must be >= 1, got 0"):
        WordProblem(shortest=0)
    with pytest.raises(ValueError, match="asked must be each or last, got 'first'"):
        WordProblem(asked="first")


def test_it_is_the_same_everywhere():
    example = WordProblem(length=6).example("train", 7)
    assert (example["inputs"].tolist(), example["targets"].tolist()) == ([120, 16, 2, 76, 118, 99], [119, 45, 39, 20, 97, 90])
