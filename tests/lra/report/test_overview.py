import dataclasses
import json
import math

import pytest

from subquad.lra.checkpoints import write_history
from subquad.lra.plan import plan
from subquad.lra.report import examples, ledger, overview, plots, published, results
from tests.lra.report.test_measurements import ROW
from tests.lra.report.test_results import FAILED, row


def measured(layer, *times, lengths=(256, 1024, 4096)):
    """Rows of a layer with these times in ms at these lengths, beside softmax's 1, 16, 256."""
    base = dict(zip((256, 1024, 4096), (1.0, 16.0, 256.0), strict=True))
    return [
        dataclasses.replace(
            ROW, layer=layer, layer_options="{}", length=length, mode="forward", median_ms=time, baseline="softmax",
            speed_ratio=base[length] / time, peak_bytes=length * 2**10,
        )
        for length, time in zip(lengths, times, strict=True)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("times", "found", "words"),
    [
        ((0.5, 2, 8), 0.0, "at every length"),
        ((2, 32, 512), math.inf, "not up to 4K"),
        ((4, 16.001, 64), 1024.05, "from about 1,000"),  # equal at 1K, to one part in ten thousand
        ((4, 8, 300), math.inf, "not up to 4K"),  # cheaper once, and dearer again
        ((2, 4, 8), 406.37, "from about 410"),  # ratios 1/2 and 4: a third of the way on a logarithmic scale
    ],
)
def test_a_layer_is_cheaper_from_the_length_that_its_line_crosses(times, found, words):
    rows = measured("local", *times)
    assert overview.crossover(rows) == pytest.approx(found, rel=2e-2)
    assert overview.crossover_words(rows) == words


def test_costs_are_a_row_for_each_layer_and_a_picture():
    section = overview.cost([*measured("softmax", 1, 16, 256), *measured("local", 2, 4, 8)])
    (table,) = section.tables
    assert [line[0] for line in table.rows[1:]] == ["softmax", "local"]
    assert [line[1] for line in table.rows[1:]] == ["T^2.00", "T^0.50"] and table.rows[1][-1] == ""
    assert table.rows[2][3:] == ["7.81", "1.95", "4.0", "from about 410"]
    assert len(section.pictures) == 1


def test_what_did_not_run_has_no_time_and_no_row_fails():
    lost = [dataclasses.replace(one, median_ms=None, speed_ratio=None, status="failed: x") for one in measured("s4", 1, 1, 1)]
    (table,) = overview.cost([*measured("softmax", 1, 16, 256), *lost]).tables
    assert table.rows[-1] == ["s4", *[""] * 6] and "s4 at 4K: failed: x" in table.notes
    assert not overview.cost(lost).tables


def test_abilities_are_coloured_from_chance_and_reasons_stand_below():
    rows = [
        row("softmax", 1.0, task="recall", floor_majority=0.5, floor_root=None),
        row("local", 0.5, task="recall", floor_majority=0.5, floor_root=None),
        row("s4", task="recall", floor_majority=0.5, floor_root=None, **FAILED),
    ]
    section = overview.ability(rows, "Of layers.", reasons={("linformer", "recall"): "it is not causal"})
    (table,) = section.tables
    cells = {line[0]: line[1] for line in table.rows[1:]}
    assert cells == {
        "softmax": "100.0 %", "local": "50.0 %", "s4": FAILED["status"], "linformer": "cannot", "chance": "50.0 %"
    }  # fmt: skip
    shades = {line[0]: shade[1] for line, shade in zip(table.rows[1:], table.shades, strict=True)}
    assert shades == {"softmax": 1.0, "local": 0.0, "s4": None, "linformer": None, "chance": None}
    assert table.notes[-1] == "linformer cannot do recall: it is not causal"


def test_each_length_of_a_test_is_a_column_with_its_own_chance():
    scores = json.dumps({"48": 0.75, "96": "cannot: too long"})
    rows = [row("s4", 1.0, task="parity", config="small", floor_chance=25 / 48, floor_root=None, scores_by_length=scores)]
    (table,) = overview.ability(rows, "").tables
    assert table.rows[0] == ["layer", "parity", "parity at 48", "parity at 96"]
    assert table.rows[1] == ["s4", "100.0 %", "75.0 %", "cannot: too long"]
    assert table.rows[2] == ["chance", "52.1 %", "51.0 %", "50.5 %"]
    assert [note.partition(":")[0] for note in table.notes] == ["parity"]


def test_the_best_simple_rule_stands_below_chance():
    (table,) = overview.ability([row("softmax", 0.4)], "").tables
    assert table.rows[-2:] == [["chance", "18.8 %"], ["best simple rule", "36.0 %"]]


def test_published_tables_without_a_run_are_named_and_not_shown():
    empty = ledger.Ledger({}, [], {})
    section = overview.arena(empty, [("nystromformer", "3")])
    assert section.tables == [] and "No cell of these was run: nystromformer, table 3." in section.says
    assert ("nystromformer", "3") in published.sources()


def test_runs_are_a_table_with_their_curves_where_histories_are(tmp_path):
    run = plan("quickstart", "softmax", steps=4)
    known = row("softmax", 0.4, configuration=json.dumps(dataclasses.asdict(run)))
    section, _ = overview.training([known], tmp_path)
    assert section.tables[0].rows[1][:2] == ["softmax", "40.0 %"] and len(section.pictures) == 1
    (tmp_path / "runs" / run.id).mkdir(parents=True)
    write_history(tmp_path / "runs" / run.id / "history.csv", [2.0, 1.5, 1.2, 1.0], [(2, 0.3, 1.6), (4, 0.5, 1.4)])
    figure = overview.training([known], tmp_path)[0].pictures[-1][0]
    (line,) = figure.axes[0].lines
    assert line.get_label() == "softmax" and line.get_xydata().tolist() == [[2, 0.3], [4, 0.5]]


def test_a_damaged_history_leaves_out_its_curve_and_is_told(tmp_path):
    run = plan("quickstart", "softmax", steps=4)
    known = row("softmax", 0.4, configuration=json.dumps({**dataclasses.asdict(run), "of a later version": 1}))
    path = examples.path_of(known, tmp_path, "history.csv")
    path.parent.mkdir(parents=True)
    for damaged in ("2,1.5,0.x,1.6", "2,1.5"):
        write_history(path, [2.0, 1.5, 1.2, 1.0], [(2, 0.3, 1.6), (4, 0.5, 1.4)])
        path.write_text(path.read_text().replace("2,1.5,0.3,1.6", damaged))
        section, (fault,) = overview.training([known], tmp_path)
        assert len(section.pictures) == 1 and (fault.path, fault.line) == (path, 3)
        (last,) = overview.damaged([], [fault])
        assert last.tables[0].rows[-1][:2] == [str(path), "3"]


def test_seeds_are_one_line_with_a_band():
    seeds = [row("softmax", 0.4, seed=seed) for seed in range(3)]
    figure = plots.learning_curves({one: [(2, score)] for one, score in zip(seeds, (0.1, 0.2, 0.6), strict=True)})
    (line,), (band,) = figure.axes[0].lines, figure.axes[0].collections
    assert line.get_ydata() == pytest.approx([0.3])
    assert band.get_paths()[0].get_extents().intervaly.tolist() == [0.1, 0.6]


def test_all_that_was_measured_has_a_table_of_growth_for_each_mode():
    rows = [*measured("softmax", 1, 16, 256), *measured("local", 2, 4, 8)]
    rows += [dataclasses.replace(one, mode="train") for one in rows]
    section = overview.measured(rows)
    assert [table.rows[0][-1] for table in section.tables[:2]] == ["cheaper than softmax"] * 2
    assert section.title.startswith("small, batch 1, float32") and len(section.tables) > 2


def test_damaged_lines_stand_at_the_end_with_file_and_line(tmp_path):
    path = tmp_path / "rows.csv"
    results.append(row("softmax", 0.5), path)
    assert overview.damaged([path]) == []
    path.write_text(path.read_text() + "ok,softmax\n")
    (section,) = overview.damaged([path])
    (line,) = section.tables[0].rows[1:]
    assert line[:2] == [str(path), "3"] and line[2].startswith("must be a row of ")
