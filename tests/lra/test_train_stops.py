"""Runs that end early: by SIGTERM, or killed between validations. They go on from the last checkpoint to the same numbers."""

import csv
import dataclasses
import json
import shutil
import signal
import types

import numpy as np
import pytest

from subquad.lra import checkpoints, progress, tasks, train
from subquad.lra.cli import commands
from subquad.lra.cli import train as train_command
from subquad.lra.plan import plan

SIZES = {"train": 64, "validation": 16, "test": 20}
TASK = tasks.Task(
    "bits", "own", "drawn bits", vocabulary_size=3, length=12, num_classes=2, splits=SIZES,
    floors=lambda splits: {"majority": 0.5}, source="this test",
)  # fmt: skip
TIMING = {"steps_per_second", "train_seconds", "compile_seconds", "finished_utc"}


def examples(count, seed):
    rng = np.random.default_rng(seed)
    drawn = (rng.integers(1, 3, rng.integers(4, 13)) for _ in range(count))
    return [{"inputs": bits, "label": int(bits.sum() % 2)} for bits in drawn]


def fit(out, **words):
    """Sixty steps with all that a checkpoint has to hold beside parameters and moments, and a validation every hundred."""
    small = dict(in_features=8, num_layers=1, mlp_features=8, batch_size=8, steps=60, evaluate_every=100)
    whole = dict(dropout_rate=0.1, accumulate=2, ema=0.9, schedule="plateau", patience=1, norm="batch")
    run = plan("quickstart", "softmax", task=TASK, **small, **whole)
    splits = {name: examples(size, seed) for seed, (name, size) in enumerate(SIZES.items())}
    result = train.train(run, out=out, task=TASK, splits=splits, quiet=True, **words)
    return {name: value for name, value in dataclasses.asdict(result).items() if name not in TIMING}


def test_a_run_whose_validations_become_no_better_stops_early_and_says_so(tmp_path):
    words = dict(in_features=8, num_layers=1, mlp_features=8, batch_size=8, steps=60, evaluate_every=5, warmup_steps=0)
    run = plan("quickstart", "softmax", task=TASK, learning_rate=1e-30, early_stopping=3, **words)
    splits = {name: examples(size, seed) for seed, (name, size) in enumerate(SIZES.items())}
    result, again = (
        train.train(run, out=tmp_path, task=TASK, splits=splits, quiet=True, resume=resume) for resume in (False, True)
    )
    assert (result.status, result.steps, result.best_step, result.stopped_step) == ("ok", 60, 5, 20) and again == result
    assert result.accuracy == result.accuracy_best == result.accuracy_last
    with (tmp_path / "history.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 20
    # Killed after the checkpoint that was the last one, it does no step more.
    (tmp_path / "result.json").unlink()
    assert train.train(run, out=tmp_path, task=TASK, splits=splits, quiet=True, resume=True).stopped_step == 20


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    return fit(folder), (folder / "history.csv").read_bytes()


@pytest.fixture
def looks(monkeypatch):
    """What the test appends is called with the step at every look."""
    found = []
    monkeypatch.setattr(progress.Progress, "update", lambda self, step, *_: [call(step) for call in found])
    return found


@pytest.fixture
def saves(monkeypatch):
    """The steps of the checkpoints."""
    found, save = [], checkpoints.Checkpoints.save

    def recorded(self, step, *rest):
        save(self, step, *rest)
        found.append(step)

    monkeypatch.setattr(checkpoints.Checkpoints, "save", recorded)
    return found


def saved_losses(folder):
    with (folder / "history.csv").open(newline="") as file:
        return len(list(csv.DictReader(file)))


def test_sigterm_saves_as_ctrl_c_does_and_loses_nothing(undisturbed, looks, tmp_path):
    handled = lambda *_: pytest.fail("SIGTERM reached the program")
    before = signal.signal(signal.SIGTERM, handled)
    # Twice, as schedulers do: the second one must not end the process while it saves.
    looks.append(lambda step: [signal.raise_signal(signal.SIGTERM) for _ in range(2) if step == 20])
    try:
        with pytest.raises(checkpoints.Interrupted, match="Stopped at step 20 of 60; saved in .* Go on with --re") as stopped:
            fit(tmp_path)
    finally:
        assert signal.signal(signal.SIGTERM, before) is handled
    assert stopped.value.number == signal.SIGTERM
    assert saved_losses(tmp_path) == 20 and (tmp_path / "checkpoint" / "20").is_dir()
    looks.clear()
    assert (fit(tmp_path, resume=True), (tmp_path / "history.csv").read_bytes()) == undisturbed


def when_validated(monkeypatch, step, number=signal.SIGTERM):
    """Sends a signal in the validation of a step."""
    validate = train.Job.validate

    def signalled(self, state):
        validate(self, state)
        if state.step == step:
            signal.raise_signal(number)

    monkeypatch.setattr(train.Job, "validate", signalled)


def test_a_signal_in_the_last_validation_ends_the_run_and_resume_only_tests(undisturbed, looks, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        when_validated(patch, 60)
        with pytest.raises(checkpoints.Interrupted, match="Stopped at step 60 of 60; saved in .* Go on with --resume"):
            fit(tmp_path)
    assert (tmp_path / "checkpoint" / "60").is_dir() and not (tmp_path / "result.json").exists()
    looks.append(lambda step: pytest.fail("trained"))
    assert (fit(tmp_path, resume=True), (tmp_path / "history.csv").read_bytes()) == undisturbed


def test_a_signal_as_a_run_stops_early_or_fails_is_no_less_a_signal(tmp_path, monkeypatch):
    words = dict(in_features=8, num_layers=1, mlp_features=8, batch_size=8, steps=60, evaluate_every=5, warmup_steps=0)
    run = plan("quickstart", "softmax", task=TASK, learning_rate=1e-30, early_stopping=3, **words)
    splits = {name: examples(size, seed) for seed, (name, size) in enumerate(SIZES.items())}
    fit_early = lambda out, **more: train.train(run, out=out, task=TASK, splits=splits, quiet=True, **more)
    with monkeypatch.context() as patch:
        when_validated(patch, 20)
        with pytest.raises(checkpoints.Interrupted, match="Stopped at step 20 of 60"):
            fit_early(tmp_path / "early")
    assert fit_early(tmp_path / "early", resume=True).stopped_step == 20
    with monkeypatch.context() as patch:
        patch.setattr(train.Job, "run_steps", lambda *_: signal.raise_signal(signal.SIGTERM) or [float("nan")])
        with pytest.raises(checkpoints.Interrupted):
            fit_early(tmp_path / "failed")
    assert fit_early(tmp_path / "failed", resume=True).status.startswith("failed: non-finite loss")


def test_no_seed_is_trained_after_a_signal(tmp_path, monkeypatch, capsys):
    when_validated(monkeypatch, 5)
    words = "--task recall --in-features 16 --num-layers 1 --mlp-features 16 --steps 5 --evaluate-every 5 --seeds 0 1 --out"
    code = commands.exit_code_of("train", lambda: train_command.main([*words.split(), str(tmp_path)]))
    assert code == commands.TERMINATED and "Stopped at step 5 of 5" in capsys.readouterr().err
    assert len(list((tmp_path / "runs").iterdir())) == 1


def test_a_run_that_saved_nothing_begins_anew_without_resume(undisturbed, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(train, "fit", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fit(tmp_path)
    assert (tmp_path / "checkpoint").is_dir() and not checkpoints.is_saved(tmp_path)
    assert fit(tmp_path) == undisturbed[0]
    with pytest.raises(checkpoints.RunError, match="must be empty to start anew, got this run, saved. Pass --resume."):
        fit(tmp_path)


def test_a_second_ctrl_c_stops_at_once(looks, tmp_path, monkeypatch):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    looks.append(lambda step: [signal.raise_signal(signal.SIGINT) for _ in range(2)])
    try:
        with pytest.raises(KeyboardInterrupt):
            fit(tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not any((tmp_path / "checkpoint").iterdir())


def test_a_run_that_dies_between_validations_goes_on_from_the_last_ten_minutes(undisturbed, looks, saves, tmp_path):
    class Died(Exception):
        pass

    def die(step):
        if step == 50:
            raise Died

    looks.append(die)
    with pytest.raises(Died):
        fit(tmp_path, checkpoint_minutes=0)
    assert saves == [10, 20, 30, 40] and saved_losses(tmp_path) == 40
    looks.clear()
    steps = []
    looks.append(steps.append)
    assert (fit(tmp_path, resume=True), (tmp_path / "history.csv").read_bytes()) == undisturbed
    assert steps == [50, 60] and saves[4:] == [60]


@pytest.mark.parametrize(("words", "wanted"), [({}, [30, 60]), (dict(checkpoint_minutes=5), [20, 40, 60]),
                                               (dict(checkpoint_minutes=float("inf")), [60])])  # fmt: skip
def test_checkpoints_come_by_the_clock(words, wanted, looks, saves, monkeypatch, tmp_path, undisturbed):
    now = [0.0]
    clock = types.SimpleNamespace(monotonic=lambda: now[0], perf_counter=lambda: now[0])
    monkeypatch.setattr(train, "time", clock)
    looks.append(lambda step: now.__setitem__(0, now[0] + 250))  # seconds: the third look is past ten minutes
    assert fit(tmp_path, **words) == undisturbed[0]
    assert saves == wanted


@pytest.mark.parametrize("minutes", [-1, float("nan")])
def test_minutes_that_are_none_are_refused(minutes, tmp_path):
    with pytest.raises(ValueError, match="train: checkpoint_minutes must be >= 0, got .*Leave it out for 10."):
        fit(tmp_path / "out", checkpoint_minutes=minutes)
    assert not (tmp_path / "out").exists()


def test_a_run_in_a_folder_where_another_trains_is_refused_in_words(tmp_path):
    with checkpoints.occupied(tmp_path):
        with pytest.raises(checkpoints.RunError, match="must be free, got one that process .* trains in. Wait"):
            fit(tmp_path, resume=True)
    assert not (tmp_path / "run.json").exists()


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory):
    """A run with a checkpoint and no result."""
    folder = tmp_path_factory.mktemp("unfinished")
    fit(folder)
    (folder / "result.json").unlink()
    return folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(losses={}), "must be whole .*got losses={}. Delete it and start"),
        (dict(format=1), "must have format 3 of this version, got format 1. Finish the run with the version that began it"),
    ],
)
def test_a_checkpoint_with_other_plain_data_is_refused(change, said, unfinished, tmp_path):
    folder = shutil.copytree(unfinished, tmp_path / "copy")
    written = folder / "checkpoint" / "60" / "record" / "metadata"
    written.write_text(json.dumps(json.loads(written.read_text()) | change))
    with pytest.raises(checkpoints.RunError, match=f"checkpoint: folder .* {said}"):
        fit(folder, resume=True)


def test_a_checkpoint_of_the_time_before_formats_is_refused(unfinished, tmp_path):
    folder = shutil.copytree(unfinished, tmp_path / "copy")
    (folder / "checkpoint" / "60" / "record").rename(folder / "checkpoint" / "60" / "progress")
    with pytest.raises(checkpoints.RunError, match="must have format 3 of this version, got an older one. Finish the run"):
        fit(folder, resume=True)
