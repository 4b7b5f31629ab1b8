"""The commands about Triton kernels, on a machine without a GPU."""

import contextlib
import csv
import dataclasses
import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

from subquad.kernels import gate, gpu, launch, specs, tuning

from .calling import call

ROOT = pathlib.Path(__file__).parents[2]


def run(script, *arguments):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "scripts" / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment | {"JAX_PLATFORMS": "cpu"})


def load(script):
    place = importlib.util.spec_from_file_location(script, ROOT / "scripts" / f"{script}.py")
    module = importlib.util.module_from_spec(place)
    place.loader.exec_module(module)
    return module


@pytest.mark.aot
def test_the_table_of_machine_code(tmp_path):
    out = tmp_path / "aot.csv"
    fields = (ROOT / "kernels/results/aot.csv").read_text().splitlines()[0]
    kept = "softmax.attention/window,float32,kept,,sm_80,1,0,0,0,0,0,0,True,,3.9.0"
    stale = kept.replace("window", "causal").replace("kept", "stale").replace("sm_80", "sm_90")
    out.write_text(f"{fields}\n{stale}\n{kept}\n")
    done = run("aot_kernels.py", "--spec", "softmax.attention/causal", "--target", "sm_90", "--length", 512, "--out", out)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(out.open()))
    assert rows.pop()["kernel"] == "kept" and "stale" not in {row["kernel"] for row in rows}
    assert {row["dtype"] for row in rows} == {"bfloat16", "float32"} and len({row["kernel"] for row in rows}) >= 3
    for row in rows:
        assert int(row["registers"]) > 0 and row["spills"] == "0" and row["fits"] == "True", row
    assert "flash_forward" in done.stdout and str(out) in done.stdout


@pytest.mark.parametrize(
    "script, table, words, first",
    [
        ("aot_kernels", "aot.csv", ["--spec", "softmax.attention/causal", "lsh.attention/causal"], "softmax.attention/causal"),
        ("bench_mesh", "mesh.csv", ["--operation", "lsh.extend"], "lsh.extend,"),
    ],
)
def test_a_part_that_is_stopped_keeps_the_rows_of_others(script, table, words, first, tmp_path, monkeypatch):
    """The committed table is the default of --out."""
    module, started, out = load(script), [], tmp_path / table
    kept = (ROOT / "kernels" / "results" / table).read_text()
    out.write_text(kept)

    def rows_of(name, *words):
        started.append(name)
        if len(started) == 2:
            raise KeyboardInterrupt
        return ()

    monkeypatch.setattr(module, "rows_of", rows_of)
    monkeypatch.setattr(sys, "argv", [script, *words, "--out", str(out)])
    with contextlib.suppress(KeyboardInterrupt):
        module.main()
    now = set(out.read_text().splitlines())
    assert not [line for line in kept.splitlines() if not line.startswith(first) and line not in now]


@pytest.mark.aot
def test_each_operation_has_lengths_of_its_own(tmp_path):
    """A matrix of 4096 rows is not served by the kernels that balance small ones."""
    done = run("aot_kernels.py", "--spec", "matrix.sinkhorn/plain", "--target", "sm_90", "--out", tmp_path / "aot.csv")
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "aot.csv").read_text().splitlines()) > 4


@pytest.fixture
def tuner():
    return load("tune_kernels")


def asked(tuner, name, kernel, length, dtype="float32"):
    """(spec, dtype, length), the request and the heuristic of a kernel of this spec."""
    spec = specs.find(name)
    found = tuner.requests_of(spec, dtype, length)
    return (spec, dtype, length), *next(pair for pair in found.items() if pair[0].kernel == kernel)


@pytest.mark.aot
def test_the_tuner_lists_what_fits(tuner, monkeypatch, capsys):
    words = ["--list", "--spec", "softmax.attention/causal", "--length", "64", "--dtype", "bfloat16"]
    monkeypatch.setattr(sys, "argv", ["tune_kernels", *words])
    candidates = tuner.around(tuning.Config({"BLOCK_Q": 64, "BLOCK_K": 64}))
    assert len(candidates) == len(set(candidates)) > 50
    larger = tuning.Config({"BLOCK_Q": 128, "BLOCK_K": 64})  # than the 64 tokens, to which it is cut
    monkeypatch.setattr(tuner, "around", lambda heuristic: [candidates[0], larger])  # each takes a second to compile
    assert tuner.main() == 0
    listed = capsys.readouterr().out
    assert "flash_forward" in listed and listed.count("1 of 2 fit sm_90") == listed.count(" fit sm_90")
    assert "{'BLOCK_Q': 64, 'BLOCK_K': 64} warps=4" in listed and "128" not in listed


@pytest.mark.aot
def test_blocks_that_an_operation_adds_hide_no_spills(tuner):
    """Attention has blocks of features beside those that can be chosen."""
    case, request, heuristic = asked(tuner, "softmax.attention/causal", "flash_forward", 1024)
    assert tuner.fits(*case, "sm_90", request, heuristic, heuristic)
    absurd = tuning.Config(dict.fromkeys(heuristic.blocks, 256), 4, 4)
    assert not tuner.fits(*case, "sm_90", request, absurd, heuristic)


@pytest.mark.aot
def test_the_size_of_a_matrix_is_no_candidate(tuner):
    """A smaller block would balance a part of the matrix only, in less time."""
    case, request, heuristic = asked(tuner, "matrix.sinkhorn/plain", "matrix.sinkhorn_forward", 40)
    assert all(not config.blocks for config in tuner.around(heuristic))
    with tuning.trying({request: dataclasses.replace(heuristic, num_warps=2)}):
        forward = specs.launches(*case)[0]
    assert dict(forward.config.blocks) == dict(BLOCK=64) and forward.config.num_warps == 2


def test_what_is_wrong_or_does_not_fit_is_not_timed(tuner, monkeypatch, capsys):
    """The fastest candidate is wrong; of another kernel none fits."""
    spec = specs.find("matrix.pseudo_inverse/six-iterations")
    heuristic, wrong, good = tuning.Config({"BLOCK": 64}), tuning.Config({"BLOCK": 32}), tuning.Config({"BLOCK": 128})
    requests = {tuning.Request("forward", ()): heuristic, tuning.Request("backward", ()): heuristic}
    tried, timed, written = [], [], {}

    @contextlib.contextmanager
    def trying(trials):
        tried[:] = trials.values()
        yield {}

    def check(spec, implementation, length, dtype):
        return gate.Verdict(1.0 if tried == [wrong] else 0.0, 0.1, "reference")

    def seconds(spec, dtype, length, request, config, repeats):
        timed.append(config)
        return {32: 1.0, 64: 3.0, 128: 2.0}[config.blocks["BLOCK"]]

    monkeypatch.setattr(sys, "argv", ["tune_kernels", "--spec", spec.name, "--length", "64", "--dtype", "float32"])
    monkeypatch.setattr(launch, "require", lambda mode: None)
    monkeypatch.setattr(gpu, "capability", lambda: 90)
    monkeypatch.setattr(tuning, "trying", trying)
    monkeypatch.setattr(gate, "check", check)
    monkeypatch.setattr(tuner, "requests_of", lambda *words: requests)
    monkeypatch.setattr(tuner, "around", lambda heuristic: [heuristic, wrong, good])
    monkeypatch.setattr(tuner, "fits", lambda spec, dtype, length, target, request, *configs: request.kernel == "forward")
    monkeypatch.setattr(tuner, "seconds", seconds)
    monkeypatch.setattr(tuner, "write", lambda kind, rows: written.update(rows))
    assert tuner.main() == 0
    assert timed == [heuristic, good] and written == {tuning.Request("forward", ()): good}
    said = capsys.readouterr().out
    assert "forward {}: 3 of 3 fit, 2 are right" in said and "backward {}: skipped, 0 of 3 fit, 0 are right" in said


@pytest.mark.parametrize(
    ("script", "arguments", "says"),
    [
        ("aot_kernels", ["--spec", "softmax.atention/causal"], "Did you mean 'softmax.attention/causal'"),
        ("aot_kernels", ["--target", "sm_9"], "Did you mean 'sm_90'"),
        ("aot_kernels", ["--length", "0"], "--length: must be >= 1, got 0"),
        ("tune_kernels", ["--length", "0", "--list"], "--length: must be >= 1, got 0"),
        ("tune_kernels", ["--repeats", "0"], "--repeats: must be >= 1, got 0"),
        ("bench_mesh", ["--length", "0"], "--length: must be >= 1, got 0"),
        ("bench_mesh", ["--operation", "sofmax"], "operation must be a part of a name, got 'sofmax'"),
        ("tune_kernels", ["--target", "gfx94", "--list"], "Did you mean 'gfx942'"),
        ("tune_kernels", [], "needs an NVIDIA GPU"),
        ("tune_kernels", ["--spec", "strided.attention/causal", "--list"], "--length must be given"),
    ],
)
def test_bad_input_is_one_line(script, arguments, says):
    done = call(script, *arguments)
    assert done.returncode != 0 and says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
