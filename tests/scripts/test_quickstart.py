import csv
import dataclasses
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import pytest

from subquad import zoo
from subquad.lra import tasks, train
from subquad.lra.cli import quickstart
from subquad.lra.data import store
from subquad.lra.plan import plan
from subquad.lra.recipes import RECIPES
from subquad.lra.report import measurements, results
from tests.lra.report.test_page import BROWSER, Reader, assert_browser_shows

from .calling import call

ROOT = pathlib.Path(__file__).parents[2]
TINY = ("--layers", "softmax", "performer", "--tasks", "recall", "--steps", "20", "--lengths", "64,128")
LISTOPS = ("--layers", "softmax", "performer", "--tasks", "listops/tiny", "--steps", "20", "--lengths", "64")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    store.prepare("lra_listops/tiny", folder)
    return folder


def command(name, *words):
    return [sys.executable, str(ROOT / "scripts" / f"{name}.py"), *map(str, words)]


def run(name, *words, **options):
    return subprocess.run(command(name, *words), capture_output=True, text=True, timeout=500, **options)


def stderr_of(finished) -> str:
    """What it said on stderr, but for the progress of long work, which a busy machine shows."""
    progress = re.compile(r"cost: |.*: (\S+/\S+  )?\d+:\d\d\b")
    return "".join(line for line in finished.stderr.splitlines(keepends=True) if not progress.match(line))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    return run("quickstart", *TINY, "--seed", 3, "--out", folder / "out", cwd=folder), folder / "out"


def test_it_ends_with_both_tables_a_page_and_two_files_of_rows(done):
    finished, out = done
    assert finished.returncode == 0, finished.stderr
    assert all(word in finished.stdout for word in ("Cost", "time grows as", "cheaper than softmax", "Ability", "chance"))
    rows = results.read_results(out / "quickstart.csv")
    assert [(row.layer, row.status, row.seed, row.steps, row.task) for row in rows] == [
        ("softmax", "ok", 3, 20, "recall"), ("performer", "ok", 3, 20, "recall")
    ]  # fmt: skip
    costs = measurements.read_measurements(out / "cost.csv")
    assert {(row.layer, row.length) for row in costs} == {(n, at) for n in ("softmax", "performer") for at in (64, 128)}
    assert all(row.status == "ok" and row.speed_ratio for row in costs)
    for row in rows:
        assert f"{100 * row.accuracy:.1f} %" in finished.stdout


def test_its_page_has_every_table_and_every_layer_in_its_picture(done):
    read = Reader((done[1] / "index.html").read_text())
    names = [row[0] for row in read.rows]
    assert names.count("layer") >= 2 and names.count("performer") >= 2 and not read.fetched
    assert all(any(word.startswith(f"{layer}, slope") for word in read.words) for layer in ("softmax", "performer"))


@pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome here")
def test_a_browser_opens_the_page(done, tmp_path):
    assert_browser_shows((done[1] / "index.html").read_text(), tmp_path)


def test_it_shows_loss_speed_and_time_left(done):
    assert re.search(r"softmax: step 20/20  loss \d+\.\d+  \d+\.\d steps/s  0:00 left  validation \d+\.\d %", done[0].stderr)


def test_a_second_call_keeps_what_is_finished(done):
    out = done[1]
    before = [(out / name).read_bytes() for name in ("quickstart.csv", "cost.csv")]
    again = call("quickstart", *TINY, "--seed", 3, "--out", out)
    assert again.returncode == 0 and "softmax, recall: finished before, kept" in again.stderr
    assert "cost: measured before, kept" in again.stderr and "step 20/20" not in again.stderr
    assert [(out / name).read_bytes() for name in ("quickstart.csv", "cost.csv")] == before


def test_the_csv_is_plain(done):
    with (done[1] / "quickstart.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == results.FIELDS and all(None not in row and None not in row.values() for row in rows)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--layers", "sofmax"), 2, "layer must be a known name, got 'sofmax'. Did you mean 'softmax'?"),
        (("--tasks", "recal"), 2, "task must be a known name, got 'recal'. Did you mean 'recall'?"),
        (("--tasks", "listops/smal"), 2, "config must be a configuration of listops, got 'smal'. Did you mean 'small'?"),
        (("--stesp", "3"), 2, "option must be a known one, got '--stesp'. Did you mean '--steps'?"),
        (("--layers", ","), 2, "--layers must name at least one, got ','. Leave it out."),
        (("--lengths", "many"), 2, "--lengths: must be a number such as 4096, 16K or 2G, got 'many'."),
        (("--lengths", ""), 2, "--lengths: must name at least one, got ''. Leave it out."),
        (("--steps", "0"), 2, "steps must be > 0 and finite, got 0."),
        (("--layers", "softmax", "--out", "/proc/subquad/out"), 1, "out: folder /proc/subquad/out must be writable"),
    ],
)
def test_wrong_words_are_one_line(words, code, said):
    finished = call("quickstart", *words)
    assert finished.returncode == code
    assert stderr_of(finished).startswith(f"quickstart: {said}") and stderr_of(finished).count("\n") == 1
    assert finished.stdout == ""


def test_a_read_only_folder_is_told(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    tmp_path.chmod(0o500)
    finished = call("quickstart", *TINY, "--out", tmp_path / "out")
    assert finished.returncode == 1 and finished.stderr.startswith("quickstart: out: folder")


def test_all_layers_are_those_of_the_recipe_and_the_default_is_nine():
    parse = lambda *words: quickstart.parse(words, "quickstart").layers
    assert parse("--layers", "all") == list(RECIPES["quickstart"].layers)
    assert len(parse()) == 9 and set(parse()) < set(parse("--layers", "all"))
    assert parse("--layers", "all,softmax") == ["all", "softmax"]  # which is no layer, and refused as one


class Sized(zoo.SoftmaxAttention):
    """A layer of a user's that needs an option."""

    def __init__(self, in_features, *, size, rngs):
        super().__init__(1, in_features, rngs=rngs)


def test_a_layer_that_lacks_an_option_is_named_with_the_reason():
    layer = f"{__name__}:Sized"
    given = quickstart.parse(["--tasks", "listops/tiny", "--layers", "softmax", layer], "quickstart")
    runs, reasons = quickstart.plan_all(given)
    assert [run.layer for _, run in runs] == ["softmax"]
    assert "size must be given" in reasons[layer, "listops/tiny"]


def test_a_layer_that_cannot_do_a_task_is_named_with_the_reason(tmp_path, monkeypatch, capsys):
    made_up = lambda run, **_: dataclasses.replace(
        results.failure(run, tasks.find_task(run.task, run.config), ""), status="ok", bits_per_byte=3.5
    )
    monkeypatch.setattr(train, "train", made_up)
    monkeypatch.setattr(quickstart, "measure_cost", lambda *_: [])
    words = ["--tasks", "pylib_lm", "--layers", "softmax", "linformer", "--out", str(tmp_path)]
    assert quickstart.main(words) == 0
    said = capsys.readouterr().out
    assert "3.500" in said and "linformer cannot do pylib_lm: layer must be" in said
    assert "linformer cannot do pylib_lm" in (tmp_path / "index.html").read_text()


def test_a_damaged_data_set_is_told(data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    shard = next((tmp_path / "data").rglob("*train.array_record*"))
    shard.write_bytes(shard.read_bytes()[:1000])
    finished = call("quickstart", *LISTOPS, "--out", tmp_path / "out", "--data-dir", tmp_path / "data")
    assert finished.returncode == 1
    assert stderr_of(finished).startswith(f"quickstart: data set: folder {shard.parent} must hold a whole data set")
    assert stderr_of(finished).count("\n") == 1


def test_one_layers_fault_is_a_row_and_the_others_still_run(tmp_path, monkeypatch):
    trained = train.train

    def faulty(run, **words):
        if run.layer == "performer":
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes.")
        return trained(run, **words)

    monkeypatch.setattr(train, "train", faulty)
    finished = call("quickstart", *TINY, "--out", tmp_path)
    assert finished.returncode == 1, finished.stderr
    status = {row.layer: row.status for row in results.read_results(tmp_path / "quickstart.csv")}
    assert status["softmax"] == "ok" and status["performer"].startswith("failed: memory must hold the training step")
    assert "<td>performer</td><td>failed: memory" in (tmp_path / "index.html").read_text()


def interrupted(name, *words, at="step 20/", by=signal.SIGINT):
    """The command, stopped by a signal when its progress says `at`."""
    process = subprocess.Popen(command(name, *words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    said = ""
    for line in process.stderr:
        said += line
        if at in line:
            process.send_signal(by)
            break
    rest = process.communicate(timeout=300)[1]
    return process.returncode, said + rest


def test_ctrl_c_saves_says_how_to_go_on_and_loses_nothing(data, tmp_path):
    words = ["--config", "tiny", "--steps", "100", "--seed", "1", "--data-dir", str(data), "--dropout-rate", "0.1"]
    code, said = interrupted("train", *words, "--out", tmp_path / "stopped")
    assert code == 130, said
    last = said.strip().splitlines()[-1]
    step = int(re.match(r"train: Stopped at step (\d+) of 100; saved in .*\. Go on with --resume\.$", last)[1])
    assert 20 <= step < 100 and "Traceback" not in said
    for out, resume in (("stopped", ["--resume"]), ("whole", [])):
        finished = call("train", *words, "--out", tmp_path / out, *resume)
        assert finished.returncode == 0, finished.stderr
    (one,), (other,) = (results.read_results(tmp_path / out / "results.csv") for out in ("stopped", "whole"))
    same = ("accuracy_best", "accuracy_last", "best_step", "validation_accuracy_best", "train_loss_last")
    assert [getattr(one, name) for name in same] == [getattr(other, name) for name in same]
    losses = [next((tmp_path / out / "runs").rglob("history.csv")).read_bytes() for out in ("stopped", "whole")]
    assert losses[0] == losses[1]


def test_a_stopped_quickstart_goes_on_by_the_same_command(data, tmp_path):
    words = ["--tasks", "listops/tiny", "--steps", "100", "--layers", "softmax", "--lengths", "64", "--out", tmp_path]
    words += ["--data-dir", data]
    code, said = interrupted("quickstart", *words, by=signal.SIGTERM)
    assert code == 143 and said.strip().endswith("The same command goes on from there.")
    finished = call("quickstart", *words)
    assert finished.returncode == 0 and "step 20/100" not in finished.stderr
    assert results.read_results(tmp_path / "quickstart.csv")[0].status == "ok"


def test_train_prints_the_resolved_configuration_and_takes_every_value(data, tmp_path):
    words = "--layer performer --layer-options num_features=8 --steps 10 --batch-size 8 --accumulate 2 --dtype bfloat16"
    finished = call("train", *words.split(), "--config", "tiny", "--out", tmp_path, "--data-dir", data)
    assert finished.returncode == 0, finished.stderr
    assert '"num_features": 8' in finished.stderr.splitlines()[0]
    (row,) = results.read_results(tmp_path / "results.csv")
    expected = plan(
        "quickstart", "performer", layer_options=dict(num_features=8), steps=10, batch_size=8, accumulate=2,
        dtype="bfloat16", config="tiny",
    )  # fmt: skip
    assert expected.id in [path.name for path in (tmp_path / "runs").iterdir()] and row.status == "ok"


def test_the_shell_command_needs_a_python_and_says_so(tmp_path):
    """On a machine whose only Python is too old, or that has none."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": "/nonexistent/python"}
    finished = subprocess.run([tmp_path / "scripts" / "quickstart"], capture_output=True, text=True, env=environment)
    assert finished.returncode != 0
    assert "needs Python 3.11 or newer" in finished.stderr and finished.stderr.count("\n") == 1


def test_the_shell_command_passes_options_and_the_callers_folder(tmp_path):
    """With an installed .venv it installs nothing: the second call is quick and quiet."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").symlink_to(sys.executable)
    stamp = subprocess.run(["cksum"], stdin=(tmp_path / "pyproject.toml").open(), capture_output=True, text=True).stdout
    (tmp_path / ".venv" / f".installed-lra-{stamp.strip().replace(' ', '')}").touch()
    (tmp_path / "scripts" / "quickstart.py").write_text("import os, sys; print(os.getcwd(), *sys.argv[1:])")
    (tmp_path / "elsewhere").mkdir()
    words = [tmp_path / "scripts" / "quickstart", "--out", "here dir"]
    finished = subprocess.run(words, cwd=tmp_path / "elsewhere", capture_output=True, text=True)
    assert finished.stdout == f"{tmp_path / 'elsewhere'} --out here dir\n", finished.stderr
    assert finished.stderr == ""
