import dataclasses
import json
import types

import numpy as np
import pytest

from subquad.lra import tasks
from subquad.lra.cli import report
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
    known = row("softmax", 0.5, seed=0, configuration=json.dumps(dataclasses.asdict(run)), test_examples=2)
    assert examples.read([known], tmp_path) == ({("softmax", 0): [
        {"example": "0", "score": "1", "tokens": "4", "root operator": "MAX", "depth": "1"},
        {"example": "1", "score": "0", "tokens": "8", "root operator": "SM", "depth": "2"},
    ]}, [])  # fmt: skip
    titles = [table.title for table in overview.training([known], tmp_path)[0].tables]
    assert titles == ["Score and cost", "Score by tokens", "Score by root operator", "Score by depth"]
    assert examples.read([known], tmp_path / "elsewhere") == ({}, [])


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


def drawn(rng, examples_count, seeds):
    """A layer's seeds, which are right on the same examples."""
    right = rng.integers(0, 2, examples_count)
    return [lines(right) for _ in range(seeds)]


def test_several_seeds_make_no_example_count_several_times():
    """Of equal layers whose seeds agree, one in twenty pairs differs; counted three times it would be one in four."""
    rng, marked, of_many = np.random.default_rng(0), 0, 0
    for _ in range(400):
        layers = {name: drawn(rng, 60, 3) for name in "ab"}
        kept = {(name, seed): its for name, seeds in layers.items() for seed, its in enumerate(seeds)}
        marked += examples.paired(kept).rows[1][2].endswith("*")
        difference = examples.scores_of(layers["a"][0]) - examples.scores_of(layers["b"][0])
        of_many += examples.sign_flips(np.tile(difference, 3).astype(int)) < examples.SIGNIFICANT
    assert marked / 400 <= 0.06 and of_many / 400 > 0.15


def test_sign_flips_are_counted_by_hand():
    # Signs of 2, 1, 1: sums 4, 2, 2, 0, 0, -2, -2, -4.
    for differences, wanted in (((2, 1, 1), 2 / 8), ((2, 1, -1), 6 / 8), ((2, -1, -1), 1), ((0, 0), 1), ((1,) * 6, 2 / 64)):
        assert examples.sign_flips(np.array(differences)) == pytest.approx(wanted)


def test_rows_that_are_no_seeds_are_not_counted_as_seeds(tmp_path):
    of = lambda rate, seed: json.dumps(dataclasses.asdict(plan("quickstart", steps=4, learning_rate=rate, seed=seed)))
    rows = [row(accuracy=one, configuration=of(0.1, 0), test_examples=2) for one in (0.1, 0.5)]  # one run twice
    rows += [row(accuracy=one, configuration=of(0.2, seed), test_examples=2) for seed, one in enumerate((0.6, 0.8))]
    (_, line) = examples.intervals(rows).rows
    assert line[:3] == ["softmax learning_rate=0.2", "2", "70.0 %"]
    for at, one in enumerate(rows):
        path = examples.path_of(one, tmp_path, examples.FILE)
        path.parent.mkdir(parents=True, exist_ok=True)
        examples.write(path, tasks.find_task("digits", "offline"), [{"inputs": [1]}] * 2, np.array([at, 0]))
    kept, faults = examples.read(rows, tmp_path)
    assert {key: its[0]["score"] for key, its in kept.items()} == {
        ("softmax learning_rate=0.2", 0): "2", ("softmax learning_rate=0.2", 1): "3", ("softmax learning_rate=0.1", 0): "1",
    } and not faults  # fmt: skip


DAMAGES = [
    ("1,0,8,2", "1,O,8,2", 3), ("1,0,8,2", "1,nan,8,2", 3), ("1,0,8,2", "x,0,8,2", 3), ("1,0,8,2\n", "", 3),
    ("1,0,8,2", "1,0", 3), ("2,1,4,1\n", "", 4), ("2,1,4,1", "2,1,4,1\n3,1,4,1", 5), ("1,0,8,2", "1,0,x,2", 3),
    ("1,0,8,2", "1,0,8,3", 3), ("example,score", "example,scoer", 2),
]  # fmt: skip


@pytest.mark.parametrize(("good", "bad", "line"), DAMAGES)
def test_a_damaged_line_costs_its_own_run_alone(good, bad, line, tmp_path, capsys):
    rows = [
        row(layer, 0.5, configuration=json.dumps(dataclasses.asdict(plan("quickstart", layer, steps=4))), test_examples=3)
        for layer in ("softmax", "local", "linformer")
    ]  # fmt: skip
    for one in rows:
        path = examples.path_of(one, tmp_path, examples.FILE)
        path.parent.mkdir(parents=True)
        text = "example,score,tokens,depth\n0,1,4,1\n1,0,8,2\n2,1,4,1\n"
        path.write_text(text.replace(good, bad) if one is rows[0] else text)
    damaged = examples.path_of(rows[0], tmp_path, examples.FILE)
    for one in rows:
        results.append(one, tmp_path / "rows.csv")
    assert report.main([str(tmp_path / "rows.csv")]) == 0
    assert f"warning: {damaged}:{line} must " in capsys.readouterr().err
    text = (tmp_path / "rows.html").read_text()
    compared = text.partition("<caption>Layers compared")[2].partition("</table>")[0]
    assert "local" in compared and "softmax" not in compared and str(damaged) in text.partition("Damaged rows")[2]


def test_a_number_that_is_none_among_many_is_seen_without_another_run(tmp_path):
    path = tmp_path / "test.csv"
    path.write_text("example,score,tokens\n" + "".join(f"{n},1,{'x' if n == 5 else n}\n" for n in range(20)))
    assert examples._lines(path, 20)[1].line == 7


def test_an_example_is_right_where_all_its_targets_are_and_counts_once():
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
    rows = [row("performer", 0.5, configuration=json.dumps(dataclasses.asdict(run)), test_examples=1) for run in runs]
    for run, score in zip(runs, (1.0, 0.0), strict=True):
        (tmp_path / "runs" / run.id).mkdir(parents=True)
        path, task = tmp_path / "runs" / run.id / examples.FILE, tasks.find_task("digits", "offline")
        examples.write(path, task, [{"inputs": [1]}], [score])
    kept, _ = examples.read(rows, tmp_path)
    assert [lines[0]["score"] for lines in kept.values()] == ["1", "0"]
    names = [f"performer num_features={n}" for n in (16, 32)]
    assert [name for name, _ in kept] == names and {line[0] for line in results.cells(rows)[1:]} == set(names)
