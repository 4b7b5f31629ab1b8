import dataclasses
import pathlib

import pytest

from subquad.lra.files import RunError
from subquad.lra.report import measurements, plots, results

ROW = measurements.Measurement(
    status="ok", model="small", layer="local", layer_options='{"num_heads": 2, "window_size": 50}', length=1024, batch_size=1,
    mode="train", dtype="float32", implementation=None, threads=2, hardware="a machine", median_ms=1.5, calls=7,
    flops=10**12, speed_ratio=2.0, protocol="warm, medians",
)  # fmt: skip


def test_rows_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "rows.csv"
    other = dataclasses.replace(ROW, length=2048, status='failed: "memory", all of it')
    measurements.write_measurements([ROW, other], path)
    assert measurements.read_measurements(path) == [ROW, other]
    later = dataclasses.replace(ROW, median_ms=1.25)
    measurements.write_measurements([later], path)
    assert measurements.read_measurements(path) == [later, other]
    assert measurements.read_measurements(tmp_path / "absent.csv") == []
    against_local = dataclasses.replace(ROW, baseline="local")
    measurements.write_measurements([against_local], path)
    assert measurements.read_measurements(path) == [later, other, against_local]


def test_a_file_that_is_none_of_ours_is_refused(tmp_path, capsys):
    path = tmp_path / "rows.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(RunError, match="table: file .* must have the columns of this version"):
        measurements.read_measurements(path)
    measurements.write_measurements([ROW], tmp_path / "own.csv")
    text = (tmp_path / "own.csv").read_text().replace(",1024,", ",many,")
    path.write_text(text)
    assert measurements.read_measurements(path) == [] and "rows.csv:2 must be a row" in capsys.readouterr().err


def rows():
    """Softmax and local at two lengths, softmax too large at the longer."""
    found = []
    for layer, length, ms, status in (
        ("softmax", 1024, 3.0, "ok"), ("softmax", 2048, None, "skipped: memory: 10 & 50 % of_it"), ("local", 1024, 1.5, "ok"),
        ("local", 2048, 3.0, "ok"),
    ):  # fmt: skip
        found.append(dataclasses.replace(
            ROW, layer=layer, length=length, median_ms=ms, status=status, steps_per_second=ms and 1e3 / ms, baseline="softmax",
            speed_ratio=ms and 3.0 / ms if length == 1024 else None, peak_bytes=length * 2**20, memory_ratio=1.0, session="now",
            energy_joules=1.5 if ms else None, energy_source="estimated from 100 W" if ms else None,
        ))  # fmt: skip
    return found


def test_tables_hold_every_row_and_what_became_of_those_that_failed():
    speed, rest = measurements.tables(rows())
    assert speed.title == "small, batch 1, float32, train"
    assert speed.rows == [
        ["layer", "calls/s 1K", "calls/s 2K", "MiB 1K", "MiB 2K"],
        ["softmax", "333 (1.00)", "skipped", "1,024 (1.00)", "2,048 (1.00)"],
        ["local", "667 (2.00)", "333", "1,024 (1.00)", "2,048 (1.00)"],
    ]
    assert speed.notes[0].startswith("Warm, medians of 7 calls. MiB")
    assert "softmax at 2K: skipped: memory: 10 & 50 % of_it." in speed.notes and "a machine" in speed.notes[0]
    # Each layer at the longest length that it ran at, and no column that nothing fills.
    assert rest.rows[0] == ["layer", "at", "GFLOP", "J/call"]
    assert [row[:2] for row in rest.rows[1:]] == [["softmax", "1K"], ["local", "2K"]]
    assert "Estimated from 100 W." in rest.notes
    others = [dataclasses.replace(rows()[0], **one) for one in (dict(dtype="bfloat16"), dict(baseline="local"))]
    assert len(measurements.groups([*rows(), *others])) == 3


def test_markdown_and_latex_say_the_same():
    text = "\n".join(table.markdown() for table in measurements.tables(rows()))
    assert "| local | 667 (2.00) | 333 | 1,024 (1.00) | 2,048 (1.00) |" in text and "| --- | ---: |" in text
    assert measurements.tables([]) == []
    latex = "\n".join(table.latex() for table in measurements.tables(rows()))
    assert r"local & 667 (2.00) & 333 & 1,024 (1.00) & 2,048 (1.00) \\" in latex
    assert r"\begin{tabular}{lrrrr}" in latex and latex.count(r"\toprule") == latex.count(r"\end{table}") == 2
    assert r"10 \& 50 \% of\_it" in latex


def test_cost_is_drawn_against_length_with_slopes_and_what_did_not_run(tmp_path):
    figure = plots.cost_against_length(rows(), tmp_path / "length.png")
    time, memory = figure.axes
    assert all(high >= 3.99 * low for low, high in (axes.get_ylim() for axes in figure.axes))
    names = lambda axes: [text.get_text() for text in axes.get_legend().get_texts()]
    assert names(time) == ["softmax", "local, slope 1.00"] and names(memory) == ["softmax, slope 1.00", "local, slope 1.00"]
    hollow = [line for line in memory.lines if line.get_markerfacecolor() == "white"]
    assert [tuple(line.get_xdata()) for line in hollow] == [(2048,)]
    assert (tmp_path / "length.png").read_bytes()[1:4] == b"PNG"
    assert plots.slope([(4, 16.0), (1, 7.0), (2, 4.0)]) == 2.0 and plots.slope([(1, 1.0)]) is None
    assert plots.cost_against_length([]).axes == []


def test_accuracy_is_drawn_against_time_with_memory_as_area(tmp_path):
    shipped = results.read_results(pathlib.Path(results.__file__).parents[1] / "results" / "quickstart.csv")
    found = [row for row in shipped if row.seed == 0]
    figure = plots.accuracy_against_time(found, tmp_path / "time.png")
    by_size = sorted(found, key=lambda row: -row.memory_peak_bytes)
    bubbles = [one for one in figure.axes[0].collections if "MiB" in one.get_label()]
    assert [one.get_label() for one in bubbles] == [f"{row.layer}, {row.memory_peak_bytes / 2**20:.0f} MiB" for row in by_size]
    expected = [plots.LARGEST_BUBBLE * row.memory_peak_bytes / by_size[0].memory_peak_bytes for row in by_size]
    assert [one.get_sizes()[0] for one in bubbles] == pytest.approx(expected)
    best = plots.front([(1 / row.steps_per_second, row.accuracy) for row in by_size])
    step = next(line for line in figure.axes[0].lines if line.get_label() == "Pareto front")
    assert list(step.get_xdata()) == pytest.approx([1e3 / by_size[index].steps_per_second for index in best])
    # What has no accuracy is named.
    failed = [dataclasses.replace(row, accuracy=None) if row.layer == "s4" else row for row in found]
    assert "not drawn: s4" in plots.accuracy_against_time(failed).axes[0].get_title(loc="left")


def test_a_caption_names_all_sessions_and_commits():
    """Rows of two sessions, in turn with as many other layers as either had."""
    protocol = "warm, in turn with {} other layers; medians"
    mixed = [
        dataclasses.replace(
            ROW, length=1024 * calls, protocol=protocol.format(count), calls=calls, commit=commit, session=commit
        )
        for count, calls, commit in ((8, 2, "a" * 40), (15, 4, "b" * 40))
    ]
    (caption,) = [" ".join(table.notes) for table in measurements.tables(mixed)[:1]]
    assert "Warm, in turn with 8-15 other layers; medians of 2-4 calls." in caption
    assert "Measured in 2 sessions" in caption and f"commit {'a' * 12}, {'b' * 12}." in caption
