"""The commands about Triton kernels, on a machine without a GPU."""

import csv
import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

from subquad.kernels import launch

ROOT = pathlib.Path(__file__).parents[2]


def run(script, *arguments):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "scripts" / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment | {"JAX_PLATFORMS": "cpu"})


@pytest.mark.aot
def test_the_table_of_machine_code(tmp_path):
    out = tmp_path / "aot.csv"
    done = run("aot_kernels.py", "--spec", "softmax.attention/causal", "--target", "sm_90", "--length", 512, "--out", out)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(out.open()))
    assert {row["dtype"] for row in rows} == {"bfloat16", "float32"} and len({row["kernel"] for row in rows}) >= 3
    for row in rows:
        assert int(row["registers"]) > 0 and row["spills"] == "0" and row["fits"] == "True", row
    assert "softmax_forward" in done.stdout and str(out) in done.stdout


@pytest.mark.aot
def test_each_operation_has_lengths_of_its_own(tmp_path):
    """A matrix of 4096 rows is not served by the kernels that balance small ones."""
    done = run("aot_kernels.py", "--spec", "matrix.sinkhorn/plain", "--target", "sm_90", "--out", tmp_path / "aot.csv")
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "aot.csv").read_text().splitlines()) > 4


@pytest.mark.aot
def test_the_tuner_lists_what_fits(monkeypatch, capsys):
    place = importlib.util.spec_from_file_location("tune_kernels", ROOT / "scripts" / "tune_kernels.py")
    tuner = importlib.util.module_from_spec(place)
    place.loader.exec_module(tuner)
    words = ["--list", "--spec", "matrix.sinkhorn/plain", "--length", "64", "--dtype", "float32"]
    monkeypatch.setattr(sys, "argv", ["tune_kernels", *words])
    candidates = tuner.around(launch.Config({"BLOCK": 64}))
    assert len(candidates) == len(set(candidates)) > 10
    monkeypatch.setattr(tuner, "around", lambda heuristic: candidates[:2])  # each takes a second to compile
    assert tuner.main() == 0
    listed = capsys.readouterr().out
    assert "2 of 2 fit sm_90" in listed and "{'BLOCK': 64} warps=4" in listed


@pytest.mark.parametrize(
    ("script", "arguments", "says"),
    [
        ("aot_kernels.py", ["--spec", "softmax.atention/causal"], "Did you mean 'softmax.attention/causal'"),
        ("aot_kernels.py", ["--target", "sm_9"], "Did you mean 'sm_90'"),
        ("tune_kernels.py", ["--target", "gfx94", "--list"], "Did you mean 'gfx942'"),
        ("tune_kernels.py", [], "needs an NVIDIA GPU"),
    ],
)
def test_bad_input_is_one_line(script, arguments, says):
    done = run(script, *arguments)
    assert done.returncode != 0 and says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
