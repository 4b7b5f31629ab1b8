import dataclasses
import errno
import json
import re

import matplotlib.image
import pytest

from subquad.lra import files
from subquad.lra.cli import report
from subquad.lra.plan import plan
from subquad.lra.report import ledger, plots, results

NAMES = ("softmax", "blockwise", "local", "strided", "reformer", "linformer", "performer", "transformer_xl", "s4")


def row(layer="softmax", accuracy=0.4, seed=0, status="ok", **other):
    known = dict(
        status=status, layer=layer, task="listops", config="small", recipe="quickstart", seed=seed, accuracy=accuracy,
        accuracy_best=accuracy, accuracy_last=accuracy, best_step=100, validation_accuracy_best=0.41,
        validation_accuracy_last=0.4, train_loss_last=1.5, floor_majority=0.188, floor_root=0.36, selection="best",
        split="test", test_examples=500, parameters=81_546, steps=300, batch_size=32, steps_per_second=12.34,
        train_seconds=30.0, compile_seconds=5.0, flops_per_step=4_000_000_000, memory_temporary_bytes=90 * 2**20,
        memory_peak_bytes=100 * 2**20, configuration=json.dumps({"layer": layer, "seed": seed}), data="made up",
        source='"quoted", and, commas', commit="0123456789abcdef", versions="jax 1", hardware="none",
        finished_utc="2026-01-01T00:00:00Z",
    )  # fmt: skip
    values = json.loads(other.get("configuration", known["configuration"]))  # which the columns do not contradict
    return results.Result(**{**known, **{name: values[name] for name in results.OF_RUN if name in values}, **other})


FAILED = dict(accuracy=None, accuracy_best=None, accuracy_last=None, status="failed: non-finite loss by step 30")


def test_rows_come_back_as_they_went(tmp_path):
    rows = [row(), row("s4", 0.1 + 0.2), row("local", **FAILED, flops_per_step=None)]
    for one in rows:
        results.append(one, tmp_path / "table.csv")
    assert results.read_results(tmp_path / "table.csv") == rows
    assert results.read_results(tmp_path / "nothing.csv") == []


def test_the_header_has_every_column_that_a_number_needs(tmp_path):
    results.append(row(), tmp_path / "table.csv")
    header = (tmp_path / "table.csv").read_text().splitlines()[0].split(",")
    assert {
        "seed", "configuration", "commit", "versions", "hardware", "source", "floor_majority", "floor_root",
        "selection", "split", "status",
    } <= set(header)  # fmt: skip
    for name in header:
        if any(word in name for word in ("memory", "_seconds", "time")):
            assert name.endswith(("_bytes", "_seconds"))


def test_a_row_is_added_once(tmp_path):
    for _ in range(2):
        results.append(row(), tmp_path / "table.csv")
    assert len(results.read_results(tmp_path / "table.csv")) == 1


def test_a_file_with_other_columns_is_left_alone_and_the_row_is_told(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("mine\n1\n")
    with pytest.raises(files.RunError, match="must have the columns of this version.*; the row was: ok,softmax"):
        results.append(row(), path)
    assert path.read_text() == "mine\n1\n"
    with pytest.raises(files.RunError, match="must have the columns of this version"):
        results.read_results(path)


def older_file(path):
    """A file of the version before there were protocols."""
    rows = [row(), row("s4", 0.1 + 0.2, seed=1)]
    for one in rows:
        results.append(one, path)
    lines = [line.rsplit(",", results.FIELDS[::-1].index("finished_utc"))[0] for line in path.read_text().splitlines()]
    path.write_text("\n".join(lines) + "\n")
    assert lines[0].endswith("finished_utc") and lines[1].endswith("Z")
    return rows


def test_files_of_earlier_versions_are_read_and_brought_up_to_date(tmp_path):
    path = tmp_path / "table.csv"
    rows = older_file(path)
    assert results.read_results(path) == rows
    newer = row("local", protocol="modern", collapsed_step=4, bits_per_byte=1.25)
    results.append(newer, path)
    assert results.read_results(path) == [*rows, newer]
    assert path.read_text().split("\n", 1)[0].split(",") == results.FIELDS
    assert [one.name for one in tmp_path.iterdir() if not one.name.endswith(".lock")] == ["table.csv"]


def test_a_file_that_cannot_be_brought_up_to_date_is_kept(monkeypatch, tmp_path):
    path = tmp_path / "table.csv"
    older_file(path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(files.RunError, match="No space left on device.*the row was: ok,local"):
        results.append(row("local"), path)
    assert path.read_bytes() == before
    assert sorted(one.name for one in tmp_path.iterdir()) == [".table.csv.lock", "table.csv"]


def test_a_configuration_is_named_whatever_the_order_of_its_values():
    assert results.configuration_hash({"a": 1, "b": 2}) == results.configuration_hash('{"b": 2, "a": 1}')
    assert results.configuration_hash({"a": 1}) != results.configuration_hash({"a": 2})


def test_a_full_disk_tells_the_row_and_leaves_the_others(monkeypatch, tmp_path):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    results.append(row(), tmp_path / "table.csv")
    before = (tmp_path / "table.csv").read_bytes()
    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(files.RunError, match="No space left on device.*the row was: ok,s4"):
        results.append(row("s4"), tmp_path / "table.csv")
    assert (tmp_path / "table.csv").read_bytes() == before


def test_the_table_has_what_the_quickstart_promises():
    lines = results.markdown([row(), row("s4", 0.45)]).splitlines()
    assert lines[0] == (
        "| layer | test accuracy | majority floor | root floor | parameters | steps/s | peak memory | FLOPs/step |"
    )
    assert lines[2] == "| s4 | 45.0 % | 18.8 % | 36.0 % | 81,546 | 12 | 100.0 MiB | 4.00 G |"  # the best is first
    assert lines[3].startswith("| softmax | 40.0 % |")
    assert results.markdown([]) == ""
    assert "500 examples of the test split, which leaves a standard error of up to 2.2 points" in "\n".join(lines)


def test_floors_that_a_task_has_not_are_left_out():
    table = results.markdown([row(floor_root=None, floor_bag=0.25)])
    assert "| majority floor | bag floor | parameters |" in table and "| 18.8 % | 25.0 % |" in table
    assert "bag floor: a linear rule" in table and "root floor" not in table


def test_the_small_networks_floor_is_that_of_the_committed_file():
    assert results.network_floor("digits", "offline") > 0.8 and results.network_floor("listops", "small") is None
    table = results.markdown([row(floor_network=0.9)])
    assert "| network floor |" in table and "| 90.0 % |" in table and "network floor: a small convolutional" in table


def test_a_text_that_cannot_be_written_tells_the_callers_cure(tmp_path):
    for words, cure in (((), "Choose another with --out."), (("Its rows are kept.",), "Its rows are kept.")):
        with pytest.raises(files.RunError, match="must be writable") as caught:
            results.write_text("text", tmp_path / "nowhere" / "x", *words)
        assert str(caught.value).endswith(f". {cure}")


def test_failures_are_rows_and_not_blanks():
    assert "| local | failed: non-finite loss by step 30 |" in results.markdown([row(), row("local", **FAILED)])


def test_seeds_become_a_mean_with_its_spread():
    rows = [row(accuracy=0.30), row(accuracy=0.32, seed=1), row(accuracy=0.34, seed=2), row("s4", 0.2)]
    table = results.markdown(rows)
    assert "| softmax | 32.0 % ± 2.0 (3 seeds) |" in table and "| s4 | 20.0 % |" in table
    assert "seeds 0, 1, 2" in table
    mixed = results.markdown([row(accuracy=0.3), row(seed=1, **FAILED)])
    assert "| softmax | 30.0 %, 1 failed |" in mixed
    assert "| softmax | 30.0 %, 1 collapsed |" in results.markdown([row(accuracy=0.3, collapsed_step=20)])


CANNOT = [
    (dict(accuracy=None), "accuracy None"), (dict(accuracy=float("nan")), "accuracy nan"),
    (dict(test_examples=0), "test_examples=0"), (dict(steps_per_second=0.0), "steps_per_second=0.0"),
    (dict(accuracy=None, bits_per_byte=float("inf")), "bits_per_byte inf"),
    (dict(flops_per_step=0), "flops_per_step=0"), (dict(steps_per_second=float("nan")), "steps_per_second=nan"),
    (dict(memory_peak_bytes=0), "memory_peak_bytes=0"), (dict(configuration_hash="0123"), "configuration_hash 0123 where"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "said"), CANNOT)
def test_a_row_that_no_run_can_have_left_is_passed_over_with_file_and_line(change, said, tmp_path, capsys):
    path = tmp_path / "table.csv"
    for one in (row("s4", **change), row("local")):
        results.append(one, path)
    assert [one.layer for one in results.read_results(path)] == ["local"]
    told = capsys.readouterr().err
    assert told.startswith(f"warning: {path}:2 must be a row of ") and said in told and told.count("\n") == 1
    assert [one.layer for one in ledger.read_ledger([path]).rows() if one.data == "made up"] == ["local"]
    assert report.main([str(path)]) == 0 and str(path) in (tmp_path / "table.html").read_text().partition("Damaged rows")[2]


def test_a_failure_needs_no_score_and_no_speed(tmp_path):
    failed = row("s4", **FAILED, steps_per_second=None, flops_per_step=0)
    results.append(failed, tmp_path / "table.csv")
    assert results.read_results(tmp_path / "table.csv") == [failed]


def bits(layer, value, **other):
    no_accuracy = dict.fromkeys(("accuracy", "accuracy_best", "accuracy_last", "floor_majority", "floor_root"))
    return row(layer, **{**no_accuracy, "bits_per_byte": value, **other})


@pytest.mark.parametrize("rows", [
    [bits("s4", None, status="failed"), bits("local", 2.5), bits("softmax", 2.2), bits("local", None, seed=1, status="failed")],
    [row("s4", **FAILED), row("local", 0.3), row("softmax", 0.4), row("local", **FAILED, seed=1)],
])  # fmt: skip
def test_failures_are_last_and_take_nothing_from_the_seeds_that_did_not(rows):
    assert [line[0] for line in results.cells(rows)[1:]] == ["softmax", "local", "s4"]


def test_runs_are_told_apart_by_every_value_that_differs_and_all_are_in_the_caption():
    of = lambda *words, **more: json.dumps(dataclasses.asdict(plan("quickstart", *words, warmup_steps=0, **more)))
    one_head = dict(steps=10, layer_options={"num_heads": 1})
    rows = [
        row(accuracy=0.5, configuration=of("softmax", steps=5), commit="a"),
        row(accuracy=0.4, configuration=of("softmax", **one_head), test_examples=100, hardware="b"),
        row(accuracy=0.3, configuration=of("local", steps=10)),
    ]
    labels = [line[0] for line in results.cells(rows)[1:]]
    assert labels == ["softmax num_heads=4 steps=5", "softmax num_heads=1 steps=10", "local"]
    told = results.caption(rows)
    assert "5 steps of 16 or 10 steps of 16, seed 0." in told
    assert "on the 500 or 100 examples" in told and "up to 5.0 points" in told
    assert told.endswith("none; jax 1; commits a, 0123456789ab. b; jax 1; commit 0123456789ab.")
    labels = [text for text in legend(plots.accuracy_against_cost(rows)) if text.startswith("softmax")]
    assert labels == ["softmax num_heads=4 steps=5", "softmax num_heads=1 steps=10"]


def test_a_value_that_an_older_version_did_not_know_had_its_default():
    configuration = dataclasses.asdict(plan("quickstart"))
    older = {name: value for name, value in configuration.items() if name != "documents"}
    rows = [row(accuracy=0.3, configuration=json.dumps(older)), row(accuracy=0.4, configuration=json.dumps(configuration))]
    assert results.groups(rows) == [rows[1:]]


def test_points_of_equal_cost_are_drawn_without_a_warning(recwarn):
    plots.accuracy_against_cost([row(flops_per_step=10_906_443), row("s4", flops_per_step=10_906_443)])
    plots.accuracy_against_time([row(), row("s4")])
    assert not recwarn.list


def test_of_two_rows_of_one_run_the_later_counts():
    assert "| softmax | 50.0 % |" in results.markdown([row(accuracy=0.3), row(accuracy=0.5)])


def test_a_run_that_never_started_is_a_row():
    from subquad.lra import tasks
    from subquad.lra.plan import plan

    run = plan("quickstart", "softmax", config="tiny")
    made = results.failure(run, tasks.find_task("listops", "tiny"), "no memory")
    assert made.status == "failed: no memory" and made.accuracy is None
    assert "| softmax | failed: no memory |" in results.markdown([made])


def test_with_rich_every_cell_is_shown_whole_in_a_pipe(capsys):
    results.show([row(), row("transformer_xl", **FAILED)])
    shown = capsys.readouterr().out
    for text in ("transformer_xl", "failed: non-finite loss by step 30", "100.0 MiB", "81,546", "FLOPs/step"):
        assert text in shown


def test_a_narrow_terminal_shows_every_word(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, for rich
    results.show([row("transformer_xl"), row("s4", **FAILED)])
    table = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).partition("Task listops")[0]
    assert "…" not in table and max(map(len, table.splitlines())) <= 80
    for word in ("accuracy", "majority", "parameters", "steps/s", "memory", "FLOPs/step", "100.0 MiB", "step 30"):
        assert word in table


def test_the_pareto_front_by_hand():
    points = [(3, 0.5), (1, 0.2), (2, 0.2), (2, 0.4), (4, 0.45), (5, 0.6)]
    assert plots.front(points) == [1, 3, 0, 5]
    assert plots.front([]) == [] and plots.front([(1, 1.0)]) == [0]
    assert plots.front([(1, 0.5), (1, 0.6)]) == [1]


def legend(figure):
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def test_every_layer_is_told_by_colour_and_marker():
    figure = plots.accuracy_against_cost([row(f"layer {number}", 0.3 + number / 100) for number in range(30)])
    assert [f"layer {number}" for number in reversed(range(30))] == legend(figure)[:30]
    points = [one for one in figure.axes[0].collections if one.get_label().startswith("layer")]
    looks = {(tuple(one.get_facecolor()[0]), one.get_paths()[0].vertices.tobytes()) for one in points}
    assert len(points) == len(looks) == 30


def test_the_plot_is_a_png_with_front_floors_and_failures(tmp_path):
    rows = [row(), row("s4", 0.5, flops_per_step=9 * 10**9), row("local", **FAILED)]
    figure = plots.accuracy_against_cost(rows, tmp_path / "plot.png")
    assert matplotlib.image.imread(tmp_path / "plot.png").shape[:2] == (750, 1350)
    axes = figure.axes[0]
    assert axes.get_xscale() == "log" and "not drawn: local" in axes.get_title(loc="left")
    labels = [line.get_label() for line in axes.lines]
    assert "majority floor, 18.8 %" in labels and "root operator floor, 36.0 %" in labels
    steps = next(line for line in axes.lines if line.get_label() == "Pareto front")
    assert list(steps.get_xdata()) == [4, 9] and list(steps.get_ydata()) == [40.0, 50.0]


@pytest.mark.parametrize("rows", [[], [row("local", **FAILED)]], ids=["nothing", "failures only"])
def test_a_plot_of_nothing_is_still_a_file(rows, tmp_path):
    plots.accuracy_against_cost(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_results_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        row().accuracy = 1.0


def test_language_models_are_shown_by_bits_per_byte_the_fewest_first():
    rows = [bits("s4", 2.5), bits("local", 2.25), bits("local", 2.35, seed=1)]
    heading, *body = results.cells(rows)
    assert heading[1] == "test bits per byte"
    assert [line[1] for line in body] == ["2.300 ± 0.071 (2 seeds)", "2.500"]
    caption = results.caption(rows)
    assert "Bits per byte on the 500 examples of the test split, parameters best" in caption and "floor" not in caption
    with_floors = [bits("s4", 2.5, floor_unigram=4.45, floor_bigram=3.33)]
    assert results.cells(with_floors)[1][2:4] == ["4.450", "3.330"] and "; bigram floor: counts" in results.caption(with_floors)
    assert "root floor" in results.caption([row()]) and "root floor" not in results.caption([row(floor_root=None)])
