"""Ratios of speed and memory: the measurements that answer to published ones."""

import dataclasses
import json

import pytest

from subquad.lra.bench import programs
from subquad.lra.report import cells, comparison, ledger, measurements, reproduce, verdicts
from tests.lra.report.test_comparison import cell


def measurement(layer, length, batch_size=1, values=None, **other):
    run, _ = programs.plan("lra-text", layer, length, batch_size=batch_size, **values or {})
    layer = run.layer
    words = dict(
        status="ok", model="lra-text", layer=layer, layer_options="{}", length=length, batch_size=batch_size, mode="train",
        dtype="float32", implementation=None, threads=1, hardware="a machine", finished_utc="2026-01-01T00:00:00Z",
        baseline=programs.PLAIN, configuration=json.dumps(dataclasses.asdict(run)),
    )  # fmt: skip
    return measurements.Measurement(**{**words, **other})


@pytest.mark.usefixtures("nothing_shipped")
def test_ratios_are_read_from_measurements_and_the_device_is_named(tmp_path):
    rows = [measurement("performer", 1024, speed_ratio=1.3, memory_ratio=0.9), measurement("performer", 2048)]
    measurements.write_measurements(rows, tmp_path / "bench.csv")
    found = ledger.read_ledger([tmp_path])
    wanted = [one for one in cells.cells_of_table("lra", "2") if one.row == "Performer"]
    judged = {one.id: verdicts.judge(one, found) for one in wanted}
    one = judged["lra.2.performer.text.1000.speed_ratio"]
    assert (one.outcome, one.ours) == ("reproduced within tolerance", 1.3)
    assert one.difference == pytest.approx(1.3 / 1.2) and one.hardware == "a machine, batch 1, float32, to plain_softmax"
    one = judged["lra.2.performer.text.1000.memory_ratio"]
    assert one.outcome == "differs" and one.cell.value == pytest.approx(0.37 / 0.85)
    assert judged["lra.2.performer.text.4000.speed_ratio"].outcome == "not run"
    shown = comparison.render("lra", "2", list(judged.values()), found)
    assert "Ours: a machine, batch 1, float32, to plain_softmax." in shown and "No comparison" not in shown
    lengths = lambda batch, device: sorted({one.length for one in reproduce.missing_ratios(wanted, found, batch, device)})
    assert lengths(1, "a machine") == lengths(None, "a machine") == [2000, 3000, 4000]
    # On another machine, and with another batch size, nothing is known yet.
    assert lengths(1, "another") == lengths(2, "a machine") == [1000, 2000, 3000, 4000]


def test_ratios_are_measured_beside_plain_softmax_at_the_papers_batch_where_it_fits(monkeypatch):
    wanted = [one for one in cells.cells_of_table("lra", "2") if one.row in ("Transformer", "Performer")]
    fits = {1000: 32, 2000: 8, 3000: 8, 4000: 2}
    monkeypatch.setattr(programs, "fitting_batch_size", lambda model, length, limit: fits[length])
    words = "--model lra-text --modes train --baseline plain_softmax --layers performer --lengths {} --batch-size {} --out o"
    expected = [words.format(*one).split() for one in (("1000", 32), ("2000,3000", 8), ("4000", 2))]
    assert reproduce.bench_commands(wanted, "o") == expected
    assert reproduce.bench_commands(wanted, "o", 4) == [words.format("1000,2000,3000,4000", 4).split()]
    (alone,) = reproduce.bench_commands([one for one in wanted if one.row == "Transformer"], "o", 1)
    assert alone[alone.index("--layers") + 1] == programs.PLAIN


def test_the_batch_is_halved_until_plain_softmax_fits():
    run, task = programs.plan("small", programs.PLAIN, 64, batch_size=32)
    assert (run.layer, run.layer_options["implementation"], run.attention_dropout_rate) == ("softmax", "reference", 0)
    peak = programs.compile_program(run, task, "train").memory.peak
    fitting = {limit: programs.fitting_batch_size("small", 64, int(limit / 0.9) + 1) for limit in (1, peak / 4, peak - 9, peak)}
    assert list(fitting.values()) == [1, 8, 16, 32]


@pytest.mark.usefixtures("nothing_shipped")
def test_a_ratio_to_a_softmax_without_logits_is_no_comparison_and_the_command_offers_one(tmp_path):
    ratio = dict(speed_ratio=1.2, memory_ratio=1.0)
    rows = [measurement(layer, 1024, baseline="softmax", **ratio) for layer in ("softmax", "performer")]
    measurements.write_measurements(rows, tmp_path / "bench.csv")
    found = ledger.read_ledger([tmp_path])
    wanted = [one for one in cells.cells_of_table("lra", "2") if one.row in ("Transformer", "Performer") and one.length == 1000]
    judged = [verdicts.judge(one, found) for one in wanted]
    assert [one.outcome for one in judged] == ["baseline", "baseline", "no comparison", "no comparison"]
    shown = comparison.render("lra", "2", judged, found)
    assert "1.2 / 1.2" in shown and "--only lra.2.performer.text.1000 --run [0.05 h" in shown
    assert "say nothing of the paper's. --run measures beside plain_softmax" in shown and "2 no comparison." in shown
    assert [one.row for one in reproduce.missing_ratios(wanted, found, 1, "a machine")] == ["Performer"] * 2
    # One that was measured beside the other counts, however old it is.
    right = measurement("performer", 1024, speed_ratio=3.0, finished_utc="2025-01-01T00:00:00Z")
    measurements.write_measurements([right], tmp_path / "bench.csv")
    one = verdicts.judge(wanted[2], ledger.read_ledger([tmp_path]))
    assert (one.outcome, one.ours) == ("differs", 3.0)


@pytest.mark.usefixtures("nothing_shipped")
@pytest.mark.parametrize(
    "other",
    [
        dict(values=dict(in_features=16)),  # as rows of earlier versions have it
        dict(values=dict(options=dict(num_features=8))),
        dict(model="lra-text, in_features=16"),
        dict(values=dict(dtype="bfloat16"), dtype="bfloat16"),
        dict(configuration=None),
        dict(baseline="local"),
    ],
)
def test_a_measurement_of_another_model_is_no_answer(tmp_path, other):
    measurements.write_measurements([measurement("performer", 1024, speed_ratio=1.3, **other)], tmp_path / "bench.csv")
    one = verdicts.judge(cell("lra.2.performer.text.1000.speed_ratio", table="2"), ledger.read_ledger([tmp_path]))
    assert one.outcome == "not run"


@pytest.mark.usefixtures("nothing_shipped")
def test_the_newest_measurement_counts_wherever_it_stands(tmp_path):
    dated = lambda ratio, date, **other: measurement("performer", 1024, speed_ratio=ratio, finished_utc=date, **other)
    new, old = dated(1.2, "2026-03-01T00:00:00Z", hardware="new"), dated(9.0, "2026-02-01T00:00:00Z", hardware="old")
    for order in ([new, old], [old, new]):
        known = ledger.Ledger({}, order, {})
        one = verdicts.judge(cell("lra.2.performer.text.1000.speed_ratio", table="2"), known)
        assert (one.ours, one.hardware) == (1.2, "new, batch 1, float32, to plain_softmax")
    # A factor of 1.25 is tolerated, either way; a length of another twentieth is another.
    expected = one.cell.value
    for factor, outcome in ((1.249, True), (1.251, False), (1 / 1.249, True), (1 / 1.251, False)):
        known = ledger.Ledger({}, [dated(expected * factor, None)], {})
        assert (verdicts.judge(one.cell, known).outcome == "reproduced within tolerance") == outcome
    for length, found in ((1050, True), (1051, False), (950, True), (949, False)):
        known = ledger.Ledger({}, [measurement("performer", length, speed_ratio=1.2)], {})
        assert (verdicts.judge(one.cell, known).outcome != "not run") == found


@pytest.mark.usefixtures("nothing_shipped")
def test_the_baseline_is_no_reproduction(tmp_path):
    ratios = dict(speed_ratio=1.0, memory_ratio=1.0)
    measurements.write_measurements(
        [measurement(programs.PLAIN, 1024, **ratios), measurement("performer", 1024, **ratios)], tmp_path / "bench.csv"
    )
    found = ledger.read_ledger([tmp_path])
    wanted = [one for one in cells.cells_of_table("lra", "2") if one.row in ("Transformer", "Performer") and one.length == 1000]
    judged = [verdicts.judge(one, found) for one in wanted]
    outcomes = ["baseline", "baseline", "reproduced within tolerance", "differs"]
    assert [one.outcome for one in judged] == outcomes
    assert "1 reproduced within tolerance; 1 differs; 0 not run; 0 cannot; 2 baseline." in comparison.render(
        "lra", "2", judged, found
    )


def test_the_measurements_that_come_with_the_package_answer():
    known = ledger.read_ledger()
    judged = [verdicts.judge(one, known) for one in cells.cells_of_table("lra", "2")]
    measured = {(row.layer, row.length) for row in known.measurements}
    answering = {one.layer for one in cells._SPEED.values()} & {layer for layer, _ in measured}
    assert answering and {one.cell.layer for one in judged if one.ours is not None} == answering
    missing = {(one.cell.layer, one.cell.length) for one in judged if one.outcome == "not run"}
    near = verdicts.SAME_LENGTH
    assert not any(
        layer == other and abs(at - length) <= near * length for layer, length in missing for other, at in measured
    )
