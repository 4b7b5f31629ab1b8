"""Runs and measurements of cells that are missing: which, in what order, and where a budget or a signal ends them."""

import dataclasses
import json
import signal
import threading
import time

import pytest

from subquad.lra.checkpoints import Interrupted
from subquad.lra.report import cells, costs, ledger, reproduce, results, verdicts
from tests.lra.report.test_comparison import IMAGE, TRANSFORMER, cell
from tests.lra.report.test_results import row as made


def test_measuring_stops_with_the_budget(tmp_path, monkeypatch):
    asked, said = [], []
    wanted = [one for one in cells.cells_of_table("lra", "2") if one.row == "Performer"]

    def measured(budget, measure=lambda words: asked.append(words) or idle()):
        words = dict(known=ledger.Ledger({}, [], {}), say=said.append, budget_hours=budget, batch_size=1)
        return reproduce.measure_missing(measure, wanted, tmp_path / "out.csv", **words)

    assert measured(verdicts.MEASURING.hours / 2) == 0
    (text,) = said
    assert text.startswith("Left for another time: measurements. One would take 0.05 h on any device") and not asked
    monkeypatch.setattr(verdicts, "MEASURING", verdicts.MEASURING._replace(hours=0))
    assert measured(0.05 / 3600) == 0
    assert asked[0][:4] == ["--model", "lra-text", "--modes", "train"] and "The budget is used up" in said[-1]
    assert measured(1, lambda words: 3) == 3


@pytest.fixture
def trained(monkeypatch):
    """Runs are not trained but recorded; the one of the layer "local" is stopped."""
    done = []

    def train(run, *, out, data_dir, resume, test_lengths):
        assert resume and out.name == run.id
        if run.task == "induction":
            assert test_lengths == [2**power for power in range(6, 16)]  # of all its cells, though two are wanted
        if run.layer == "local":
            raise Interrupted(f"Stopped at step 3 of {run.steps}; saved in {out}. Go on with --resume.")
        if run.layer == "linformer":
            raise RuntimeError("no memory")
        done.append(run)
        configuration = json.dumps(dataclasses.asdict(run), sort_keys=True)
        named = ("layer", "task", "config", "recipe", "seed")
        return made(accuracy=0.4, configuration=configuration, **{word: getattr(run, word) for word in named})

    monkeypatch.setattr("subquad.lra.train.train", train)
    return done


def column(task, *rows):
    return [one for one in cells.cells_of_table("lra", "1") if one.task == task and one.row in rows]


def test_missing_runs_are_trained_cheapest_first_and_once(tmp_path, trained):
    path, said = tmp_path / "ledger.csv", []
    wanted = column("listops", "Transformer", "Linformer", "Performer") + column("average", "BigBird")
    words = dict(seeds=2, say=said.append)
    assert reproduce.train_missing(wanted, path, known=ledger.read_ledger([path]), **words) == 2  # Linformer's two
    assert [(run.layer, run.seed) for run in trained] == [
        ("performer", 0), ("performer", 1), ("softmax", 0), ("softmax", 1)
    ]  # fmt: skip
    assert any("no memory" in text for text in said) and '"recipe": "lra-2020"' in "".join(said)
    assert len(results.read_results(path)) == 4
    reproduce.train_missing(wanted, path, known=ledger.read_ledger([path]), **words)
    assert len(trained) == 4


def test_cells_of_several_lengths_are_one_run(tmp_path, trained):
    wanted = [one for one in cells.cells_of_table("mamba", "11") if one.row == "Mamba" and one.length in (512, 1024)]
    path = tmp_path / "ledger.csv"
    assert reproduce.train_missing(wanted, path, known=ledger.Ledger({}, [], {}), say=lambda text: None) == 0
    assert [run.layer for run in trained] == ["mamba"]


def test_a_budget_and_ctrl_c_stop_between_and_in_runs(tmp_path, trained):
    path, said = tmp_path / "ledger.csv", []
    wanted = column("listops", "Transformer", "Local Attention")
    reproduce.train_missing(wanted, path, known=ledger.read_ledger([path]), budget_hours=0.001, say=said.append)
    assert not trained and "Left for another time: 2." in said[-1]
    with pytest.raises(Interrupted, match="Stopped at step 3 of 5000; saved in .* The same command goes on from there"):
        reproduce.train_missing(wanted, path, known=ledger.read_ledger([path]), say=said.append)


def idle():
    """Until a signal raises; a pause could miss one that comes just before it."""
    while True:
        time.sleep(0.01)


def test_a_run_that_outlasts_the_budget_is_interrupted():
    with pytest.raises(reproduce.UsedUp), reproduce.budget(0.05 / 3600):
        idle()
    with pytest.raises(KeyboardInterrupt), reproduce.budget(1.0):
        raise KeyboardInterrupt
    with reproduce.budget(1.0):
        (timer,) = (one for one in threading.enumerate() if isinstance(one, threading.Timer))
        assert timer.interval == 3600
    assert not timer.is_alive()  # the alarm is off


@pytest.mark.parametrize("saves", [True, False])
def test_a_budget_that_ends_in_a_run_is_no_failure(tmp_path, monkeypatch, saves):
    def train(run, **words):
        try:
            idle()
        except KeyboardInterrupt:
            if not saves:  # nothing is trained yet
                raise
            raise Interrupted("Stopped at step 3 of 5000; saved in there. Go on with --resume.") from None

    monkeypatch.setattr("subquad.lra.train.train", train)
    monkeypatch.setattr(costs, "forecast", lambda *words, **more: costs.Cost(0.0, "this", "a test"))
    said = []
    wanted = column("listops", "Transformer", "Performer")
    words = dict(known=ledger.read_ledger([]), budget_hours=0.5 / 3600, say=said.append)
    assert reproduce.train_missing(wanted, tmp_path / "ledger.csv", **words) == 0
    saved = "Stopped at step 3 of 5000; saved in there. " * saves
    assert said[-1] == f"The budget is used up. {saved}The same command goes on from there."
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_a_checkpoint_has_done_is_taken_off_the_estimate(tmp_path):
    run = verdicts.run_of(cell(f"{TRANSFORMER}.listops"))
    assert reproduce.undone(run, tmp_path / "absent") == 1
    (tmp_path / "checkpoint" / "1250").mkdir(parents=True)
    (tmp_path / "checkpoint" / "1300.partial").mkdir()
    assert reproduce.undone(run, tmp_path) == 0.75
    (tmp_path / "result.json").touch()
    assert reproduce.undone(run, tmp_path) == 0


def test_one_run_that_answers_to_several_tables_is_missing_once():
    wanted = [one for table in ("1", "3") for one in cells.cells_of_table("lra", table) if one.row == "Transformer"]
    found = {tuple(cell.id for cell in its) for _, its in reproduce.missing(wanted, ledger.read_ledger(), 1)}
    assert (f"{TRANSFORMER}.image", f"{IMAGE}.train_accuracy", IMAGE) in found
