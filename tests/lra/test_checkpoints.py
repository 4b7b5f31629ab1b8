"""What a run's folder holds: whole files, one trainer, and an error with the file and the cure for what is not ours."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest

from subquad.lra import checkpoints
from subquad.lra.report import results
from tests.lra.report.test_results import row

CONFIGURATION = {"layer": "softmax", "seed": 0}
RESULT = dataclasses.asdict(row())


def begin(folder, resume=True, configuration=CONFIGURATION):
    return checkpoints.begin_or_resume(folder, configuration, resume, results.Result)


@pytest.fixture
def finished(tmp_path):
    """A folder with a finished run."""
    assert begin(tmp_path) is None
    checkpoints.write_json(tmp_path / "result.json", RESULT)
    assert results.Result(**begin(tmp_path)) == row()
    return tmp_path


def refused(folder, file):
    """The error that `begin_or_resume` raises, which names the file and says what to do, on one line."""
    with pytest.raises(checkpoints.RunError) as caught:
        begin(folder)
    message = str(caught.value)
    assert message.startswith(f"out: file {folder / file} must be a whole one that was written here, got ")
    assert "\n" not in message and message.endswith(".") and "Delete it" in message and len(message) < 500
    return message


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"null", b"1", b'"ok"', b"\xff\xfe", b'{"seed": NaN}', b"[" * 100_000])
@pytest.mark.parametrize("file", ["run.json", "result.json"])
def test_a_file_that_is_no_object_is_told(file, content, finished):
    (finished / file).write_bytes(content)
    assert "pass --resume" in refused(finished, file)


@pytest.mark.parametrize(
    ("change", "got"),
    [
        (dict(accuracy="0.4"), "accuracy='0.4'"),
        (dict(seed=None), "seed=None"),
        (dict(seed=True), "seed=True"),
        (dict(steps=1.5), "steps=1.5"),
        (dict(layer=["softmax"]), "layer=['softmax']"),
        (dict(acuracy=0.4), "a field 'acuracy', which this version does not know"),
        (dict(configuration="{"), "Expecting property name"),
        (dict(configuration=json.dumps({**CONFIGURATION, "seed": 1})), "the result of another configuration"),
    ],
)
def test_a_result_with_other_fields_or_types_is_told(change, got, finished):
    checkpoints.write_json(finished / "result.json", {**RESULT, **change})
    assert f"got {got}" in refused(finished, "result.json")


def test_a_result_without_a_field_is_told_but_for_those_that_are_newer(finished):
    some = {name: value for name, value in RESULT.items() if name not in ("accuracy", "collapsed_step")}
    checkpoints.write_json(finished / "result.json", some)
    assert "got no accuracy" in refused(finished, "result.json")
    checkpoints.write_json(finished / "result.json", {**some, "accuracy": 1})  # a whole number, as JSON writes 1.0 elsewhere
    assert results.Result(**begin(finished)).collapsed_step is None


def test_another_run_in_the_folder_is_told(finished):
    for configuration, got in (
        ({**CONFIGURATION, "seed": 1}, "got one with seed=0 instead of 1"),
        ({**CONFIGURATION, "ema": 0.9}, "got one with no ema instead of 0.9"),
        ({"layer": "softmax"}, "got one with seed=0 which this version does not know"),
    ):
        with pytest.raises(checkpoints.RunError, match=f"must hold this run or none, {got}. Choose another with --out"):
            begin(finished, configuration=configuration)
    (finished / "run.json").unlink()
    with pytest.raises(checkpoints.RunError, match="must be empty to start anew.*--resume"):
        begin(finished, resume=False)


def test_a_file_is_whole_or_as_before_whatever_ends_its_writing(tmp_path, monkeypatch):
    checkpoints.write_json(tmp_path / "run.json", CONFIGURATION)
    checkpoints.write_history(tmp_path / "history.csv", [1.0], [])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == {"run.json", "history.csv"}
    for name in ("fsync", "replace"):  # the contents are handed over, and the name not yet

        def killed(*_):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(os, name, killed)
            with pytest.raises(KeyboardInterrupt):
                checkpoints.write_json(tmp_path / "run.json", {"another": 1})
            with pytest.raises(KeyboardInterrupt):
                checkpoints.write_history(tmp_path / "history.csv", [2.0], [])
            with pytest.raises(KeyboardInterrupt):
                checkpoints.write_json(tmp_path / "result.json", {"another": 1})
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_resume_does_not_find_is_told_with_the_run_beside_it_that_is_most_alike(tmp_path):
    ours = {"layer": "softmax", "seed": 0, "learning_rate": 0.1}
    said = lambda: checkpoints.nothing_to_resume(tmp_path, {"wanted": ours})
    assert said() == f"Nothing to resume in {tmp_path}; beginning anew."
    others = {"far": dict(seed=1, learning_rate=0.2), "near": dict(learning_rate=0.2), "nearer, but not saved": {}}
    for name, change in others.items():
        (tmp_path / name / "checkpoint").mkdir(parents=True)
        checkpoints.write_json(tmp_path / name / "run.json", {**ours, **change})
    (tmp_path / "far" / "checkpoint" / "5").mkdir()
    checkpoints.write_json(tmp_path / "near" / "result.json", {})
    assert said().endswith("beginning anew. The folder holds near, which differs in learning_rate.")
    (tmp_path / "near" / "run.json").write_text("{")
    assert said().endswith("The folder holds far, which differs in seed, learning_rate.")
    (tmp_path / "wanted" / "checkpoint" / "5").mkdir(parents=True)
    assert said() == ""


TRAINER = """
import pathlib, sys
from subquad.lra import checkpoints
with checkpoints.occupied(pathlib.Path(sys.argv[1])):
    print("trains", flush=True)
    sys.stdin.read()
"""


def test_a_folder_has_one_trainer_and_a_dead_one_keeps_nobody_out(tmp_path):
    command = [sys.executable, "-c", TRAINER, str(tmp_path)]
    trainer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert trainer.stdout.readline() == "trains\n"
    match = f"out: folder {tmp_path} must be free, got one that process {trainer.pid} on .* trains in. Wait for it or choose"
    with pytest.raises(checkpoints.RunError, match=match), checkpoints.occupied(tmp_path):
        pytest.fail("two trainers")
    trainer.kill()
    trainer.wait()
    with checkpoints.occupied(tmp_path):
        assert str(os.getpid()) in (tmp_path / ".trainer").read_text()
    assert not (tmp_path / ".trainer").exists()


def test_a_folder_has_a_name():
    """An empty variable of a shell is not the folder that one stands in."""
    with pytest.raises(checkpoints.RunError, match="out: folder must have a name, got ''. Write . for this one."):
        checkpoints.open_folder("")
