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


def test_it_is_the_same_everywhere():
    example = WordProblem(length=6).example("train", 7)
    assert (example["inputs"].tolist(), example["targets"].tolist()) == ([120, 16, 2, 76, 118, 99], [119, 45, 39, 20, 97, 90])
