import dataclasses
import json
import types

import numpy as np
import pytest

from subquad.lra import tasks
from subquad.lra.data.listops import expressions
from subquad.lra.plan import plan
from subquad.lra.report import examples, overview, results
from tests.lra.report.test_results import row


def lines(scores, **groups):
    return [
        {"example": str(n), "score": str(score), **{name: values[n] for name, values in groups.items()}}
        for n, score in enumerate(scores)
    ]


def test_what_is_written_is_read_with_the_groups_of_its_task(tmp_path):
    run = plan("quickstart", "softmax", steps=4)
    folder = tmp_path / "runs" / run.id
    folder.mkdir(parents=True)
    split = [{"inputs": expressions.tokenise(text)} for text in ("[MAX 1 2 ]", "[SM 4 [MED 1 2 ] 9 ]")]
    examples.write(folder / examples.FILE, tasks.find_task("listops", "small"), split, np.array([1.0, 0.0]))
    known = row("softmax", 0.5, seed=0, configuration=json.dumps(dataclasses.asdict(run)))
    assert examples.read([known], tmp_path) == {("softmax", 0): [
        {"example": "0", "score": "1", "tokens": "4", "root operator": "MAX", "depth": "1"},
        {"example": "1", "score": "0", "tokens": "8", "root operator": "SM", "depth": "2"},
    ]}  # fmt: skip
    titles = [table.title for table in overview.training([known], tmp_path).tables]
    assert titles == ["Score and cost", "Score by tokens", "Score by root operator", "Score by depth"]
    assert examples.read([known], tmp_path / "elsewhere") == {}


def test_scores_by_group_are_means_over_seeds():
    depth = dict(depth=["1", "2", "2", "10"])
    kept = {("s4", 0): lines([1, 0, 1, 1], **depth), ("s4", 1): lines([1, 0, 0, 0], **depth)}
    (table,) = examples.by_groups(kept)
    assert table.rows == [
        ["layer", "1", "2", "10"], ["s4", "100.0 %", "25.0 %", "50.0 %"], ["examples", "1", "2", "1"]
    ]  # fmt: skip


def test_many_values_become_ranges_with_as_many_examples_each():
    groups = examples.ranges([str(n) for n in range(1, 101)])
    assert {label: groups.count(label) for label in groups} == {"1-25": 25, "26-50": 25, "51-75": 25, "76-100": 25}
    assert groups[0] == "1-25" and groups[-1] == "76-100"


@pytest.mark.parametrize(
    ("only", "only_other", "cell"),
    # Exact and two-sided: 2 * 0.5**6 = 0.031 of six to none, 2 * 0.5**5 = 0.063 of five to none.
    [(6, 0, "+30.0*"), (5, 0, "+25.0"), (0, 6, "-30.0*"), (4, 4, "+0.0"), (0, 0, "+0.0")],
)
def test_layers_are_told_apart_by_the_examples_that_one_has_right_alone(only, only_other, cell):
    both = 20 - only - only_other
    one = [1.0] * only + [0.0] * only_other + [1.0] * both
    other = [0.0] * only + [1.0] * only_other + [1.0] * both
    table = examples.paired({("a", 0): lines(one), ("b", 0): lines(other)})
    assert table.rows[0] == ["", "a", "b"] and table.rows[1] == ["a", "", cell]


def test_an_example_is_right_where_all_its_targets_are_and_seeds_are_counted_together():
    kept = {("a", 0): lines([1, 1]), ("b", 0): lines([0.99, 1]), ("a", 1): lines([1, 0]), ("b", 1): lines([1, 0])}
    assert examples.paired(kept).rows[1] == ["a", "", "+25.0"]
    assert examples.paired({("a", 0): lines([1]), ("b", 1): lines([1])}) is None


def test_intervals_need_several_seeds_and_hold_the_mean():
    assert examples.intervals([row("a", 0.5)]) is None
    table = examples.intervals([row("a", accuracy, seed=seed) for seed, accuracy in enumerate((0.4, 0.5, 0.6))])
    assert table.rows[1][:3] == ["a", "3", "50.0 %"]
    low, high = (float(word) for word in table.rows[1][3].removesuffix(" %").split(" to "))
    assert 40 <= low < 50 < high <= 60


def test_an_example_of_a_pair_is_as_long_as_both():
    pair = types.MappingProxyType({"inputs1": [1, 2], "inputs2": [3]})
    assert tasks.tokens_of(pair) == {"tokens": 3}


def test_layers_with_other_options_are_told_apart(tmp_path):
    runs = [plan("quickstart", "performer", steps=4, layer_options=dict(num_features=n)) for n in (16, 32)]
    rows = [row("performer", 0.5, configuration=json.dumps(dataclasses.asdict(run))) for run in runs]
    for run, score in zip(runs, (1.0, 0.0), strict=True):
        (tmp_path / "runs" / run.id).mkdir(parents=True)
        path, task = tmp_path / "runs" / run.id / examples.FILE, tasks.find_task("digits", "offline")
        examples.write(path, task, [{"inputs": [1]}], [score])
    kept = examples.read(rows, tmp_path)
    assert [lines[0]["score"] for lines in kept.values()] == ["1", "0"]
    names = [f'performer {{"num_features": {n}, "num_heads": 4}}' for n in (16, 32)]
    assert [name for name, _ in kept] == names and {line[0] for line in results.cells(rows)[1:]} == set(names)
