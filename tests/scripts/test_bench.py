"""The two benchmarks, at sizes that take no time; PyTorch and the peers need not be there."""

import csv
import importlib
import json
import os
import pathlib
import subprocess
import sys

import pytest

from subquad.kernels import gate
from subquad.lra.bench import timing

SCRIPTS = pathlib.Path(__file__).parents[2] / "scripts"
SHAPE = "scan.first_order/real"


@pytest.fixture
def load(monkeypatch):
    """A script as a module, and its main() with these words, all processors left to the tests."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setattr(timing, "limit_threads", lambda count: count or 1)
    monkeypatch.setattr(timing, "copy_bandwidth", lambda: 1e10)
    monkeypatch.setattr(timing, "matmul_rate", lambda dtype: 1e11)

    def load(name):
        module = importlib.import_module(name)

        def main(*words):
            monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
            return module.commands.exit_code_of(name, module.main)

        return module, main

    return load


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_kernels_are_timed_after_they_proved_right(load, tmp_path, capsys):
    _, main = load("bench_kernels")
    out = tmp_path / "kernels.csv"
    assert main("--operation", SHAPE, "--length", 32, 64, "--repeats", 3, "--out", out) == 0
    rows = rows_of(out)
    assert [(row["status"], row["length"], row["direction"], row["calls"]) for row in rows] == [
        ("ok", "32", "forward", "3"), ("ok", "32", "both", "3"), ("ok", "64", "forward", "3"), ("ok", "64", "both", "3"),
    ]  # fmt: skip
    for row in rows:
        assert 0 < float(row["best_ms"]) <= float(row["lower_ms"]) <= float(row["median_ms"]) <= float(row["upper_ms"])
        assert float(row["error"]) <= float(row["allowed"]) and row["against"] == f"reference, T = {row['length']}"
        assert float(row["compile_seconds"]) > 0 and float(row["copy_percent"]) > 0 and row["hardware"] and row["commit"]
        assert int(row["calls_in_program"]) >= 1 and row["processor"]
    assert (tmp_path / "kernels.png").read_bytes()[1:4] == b"PNG"
    shown = capsys.readouterr().out
    assert SHAPE in shown and "reference, T = 64" in shown


def test_the_committed_rows_have_the_columns_of_the_benchmarks(load):
    results = SCRIPTS.parent / "kernels" / "results"
    for script, names in (("bench_kernels", ["kernels"]), ("bench_peers", ["peers_cpu", "peers_gpu"])):
        module, _ = load(script)
        for name in names:
            assert (results / f"{name}.csv").read_text().splitlines()[0] == ",".join(module.FIELDS)


def test_a_wrong_kernel_has_no_time(load, tmp_path, monkeypatch, capsys):
    _, main = load("bench_kernels")
    out = tmp_path / "kernels.csv"
    monkeypatch.setattr(gate, "check", lambda *words: gate.Verdict(0.5, 0.1, "reference, T = 32"))
    assert main("--operation", SHAPE, "--length", 32, "--out", out) == 1
    (row,) = rows_of(out)
    assert row["status"] == "failed: wrong by 5.0e-01, allowed 1.0e-01"
    assert row["median_ms"] == row["best_ms"] == ""
    assert "wrong by" in capsys.readouterr().out


def test_an_implementation_that_declines_is_a_row(load, tmp_path):
    _, main = load("bench_kernels")
    out = tmp_path / "kernels.csv"
    assert main("--operation", SHAPE, "--length", 32, "--implementation", "triton", "--out", out) == 0
    (row,) = rows_of(out)
    assert row["status"].startswith("not run: scan.first_order: implementation='triton' declines")


@pytest.mark.parametrize(
    ("script", "words", "said"),
    [
        ("bench_kernels", ["--operation", "scan.frst_order"], "Did you mean 'scan.first_order'"),
        ("bench_kernels", ["--operation", "scan.first_order/reel"], "Did you mean 'scan.first_order/real'"),
        ("bench_kernels", ["--implementation", "xl"], "Did you mean 'xla'"),
        ("bench_kernels", ["--length", "0"], "--length: must be >= 1, got 0"),
        ("bench_kernels", ["--repeats", "0"], "--repeats: must be >= 1, got 0"),
        ("bench_kernels", ["--dtype", "int8"], "invalid choice: 'int8'"),
        ("bench_peers", ["--family", "performr"], "Did you mean 'performer'"),
        ("bench_peers", ["--lenght", "64"], "Did you mean '--length'"),
        ("bench_peers", ["--length", "0"], "--length: must be >= 1, got 0"),
        ("bench_peers", ["--seconds", "-1"], "--seconds: must be >= 0, got -1"),
        ("bench_peers", ["--match", "nothing"], "--match must be a part of a race's name, got 'nothing'"),
    ],
)
def test_wrong_words_are_one_line_and_code_2(load, script, words, said, capsys):
    _, main = load(script)
    try:
        code = main(*words)
    except SystemExit as stopped:
        code = stopped.code
    error = capsys.readouterr().err
    assert code == 2 and said in error and error.count("\n") == 1 and error.startswith(f"{script}: ")


@pytest.mark.parametrize("script", ["bench_kernels", "bench_peers"])
def test_interrupted_it_leaves_whole_rows(load, script, tmp_path, monkeypatch):
    module, main = load(script)
    out, calls = tmp_path / "rows.csv", []

    def alternate(functions, **words):
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        return [timing.Spread(0.1, 0.2, 0.3, 0.4, 2)] * len(functions)

    monkeypatch.setattr(timing, "time_alternately", alternate)
    words = ["--operation", SHAPE] if script == "bench_kernels" else ["--family", "own", "--match", "local", "--no-memory"]
    assert main(*words, "--length", 64, "--out", out) == 130
    (row,) = rows_of(out)
    assert row["status"] == "ok" and row["direction"] == "forward"
    assert set(row) == set(module.FIELDS)


class Absent:
    """An importer of nothing called torch. (None in sys.modules would trip einops, which looks there.)"""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ModuleNotFoundError(f"No module named {name!r}")


def test_a_peer_that_is_not_installed_is_a_row(load, tmp_path, monkeypatch, capsys):
    _, main = load("bench_peers")
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Absent, *sys.meta_path])
    out = tmp_path / "peers.csv"
    assert main("--family", "dense", "--length", 64, "--out", out) == 0
    rows = rows_of(out)
    assert len(rows) == 4 and all(row["status"].startswith("not run: ") and "torch" in row["status"] for row in rows)
    assert all(row["ours_ms"] == row["time_ratio"] == "" for row in rows)
    assert "not run" in capsys.readouterr().out


def test_without_a_gpu_its_races_are_rows_that_say_so(load, tmp_path):
    if importlib.import_module("jax").default_backend() == "gpu":
        pytest.skip("there is a GPU here")
    _, main = load("bench_peers")
    out = tmp_path / "peers.csv"
    assert main("--device", "gpu", "--dtype", "bfloat16", "--length", 4096, "--out", out) == 0
    rows = rows_of(out)
    expected = {"fused SDPA, causal", "FlexAttention", "fla, causal", "kvax, causal", "accelerated-scan"}
    assert expected <= {row["contest"] for row in rows}
    assert {row["status"] for row in rows} == {"not run: JAX finds no GPU on this machine"}


def test_ours_against_our_softmax(load, tmp_path):
    _, main = load("bench_peers")
    out = tmp_path / "peers.csv"
    assert main("--family", "own", "--match", "local", "--length", 64, "--seconds", 0, "--direction", "both", "--out", out) == 0
    (row,) = rows_of(out)
    assert float(row["time_ratio"]) == pytest.approx(float(row["ours_ms"]) / float(row["theirs_ms"]), abs=2e-3)
    assert float(row["memory_ratio"]) == pytest.approx(
        int(row["ours_temporary_bytes"]) / int(row["theirs_temporary_bytes"]), abs=2e-3
    )
    assert row["ours_peak_bytes"] == "" and row["threads"] == "1" and row["clock"] == "process_time"


def test_a_peer_that_computes_something_else_has_no_time(load):
    module, _ = load("bench_peers")
    ones = module.np.ones((2, 3))
    assert module.difference([ones], [ones]) == 0
    assert module.difference([1.1 * ones, ones], [ones, ones]) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="shapes"):
        module.difference([ones], [ones.T])
    wrong = ones * float("nan")  # what is not a number agrees with nothing
    assert not module.difference([ones, wrong, ones], [ones] * 3) <= 1


def every_contest():
    sys.path.insert(0, str(SCRIPTS))
    try:
        return [pytest.param(one, id=f"{one.family}, {one.name}") for one in importlib.import_module("peers").contests()]
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.mark.parametrize("contest", every_contest())
def test_every_race_has_our_side(contest, load):
    case = importlib.import_module("peers.sides").Case(256, heads=2, features=16)
    side = contest.ours(case)  # builds the arrays and traces the function
    assert callable(side.forward) and callable(side.train)
    assert contest.theirs is not None or contest.fixed["length"] == 65536


@pytest.mark.parametrize("contest", [one for one in every_contest() if "cpu" in one.values[0].devices and one.values[0].theirs])
def test_every_peer_that_is_here_runs_and_agrees(contest, load):
    module, _ = load("bench_peers")
    pytest.importorskip("torch", reason="PyTorch is not installed: pip install -e .[bench]")
    case = importlib.import_module("peers.sides").Case(1024 if "BigBird" in contest.name else 512)
    try:
        theirs = contest.theirs(case)
    except ImportError as error:
        pytest.skip(f"{contest.peer} is not installed: {error}")
    found = theirs.results(theirs.train())
    assert all(module.np.isfinite(array).all() for array in found)
    if contest.same:
        ours = contest.ours(case)
        assert module.difference(ours.results(ours.train()), found) < 1e-4


@pytest.mark.parametrize("resets", [True, False])
def test_memory_on_a_gpu_is_growth_on_both_sides(load, resets):
    """PyTorch's allocator can forget its peak and JAX's cannot; arguments count for neither."""
    module, _ = load("bench_peers")
    memory = dict(now=700, peak=800)  # arguments, and what made them

    def call():
        memory["peak"] = max(memory["peak"], memory["now"] + 300)

    reset = [lambda: memory.update(peak=memory["now"])] * resets
    assert module.growth(call, lambda: memory["now"], lambda: memory["peak"], *reset) == 300


def test_memory_is_measured_in_a_process_of_its_own():
    task = dict(family="own", name="our softmax layer against local", case=dict(length=256), side="ours", word="train")
    words = [sys.executable, SCRIPTS / "bench_peers.py", "--measure", json.dumps(task)]
    done = subprocess.run(words, env={**os.environ, **timing.PLAIN_MALLOC}, capture_output=True, text=True, check=True)
    # At least the gradients of four projections of 256 x 256.
    assert int(done.stdout) > 4 * 256 * 256 * 4
