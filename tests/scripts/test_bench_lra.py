"""The command that measures models, with races that take no time."""

import dataclasses
import os
import sys
import time

import pytest

from subquad.lra.bench import energy, speed, timing
from subquad.lra.cli import bench, commands
from subquad.lra.report import measurements


@pytest.fixture
def run(monkeypatch, tmp_path):
    """main() with these words; races give rows at once."""
    monkeypatch.setattr(timing, "limit_threads", lambda count: count or 1)
    monkeypatch.setattr(timing, "matmul_rate", lambda dtype, clock: 1e11 if clock is time.process_time else 1e12)
    monkeypatch.setattr(energy, "meter", lambda device: (None, "a test"))
    monkeypatch.setattr(bench.progress, "PATIENCE", 1e6)
    monkeypatch.setattr(bench.jax.config, "update", lambda *words: None)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    raced = []

    def race(layers, length, mode, settings, say):
        raced.append((layers, length, mode, settings))
        if length == 4096:
            raise KeyboardInterrupt
        rows = [dataclasses.replace(speed._blank(layer, length, mode, settings), baseline="softmax") for layer in layers]
        times = dict(median_ms=2.0, steps_per_second=500.0, speed_ratio=1.0, peak_bytes=2**20, memory_ratio=1.0)
        failed = dict(status="failed: a reason")
        return [dataclasses.replace(row, **(failed if row.layer == "s4" else times)) for row in rows]

    monkeypatch.setattr(speed, "race", race)
    out = tmp_path / "lra.csv"

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["bench_lra", *map(str, words), "--out", str(out)])
        return commands.exit_code_of("bench_lra", bench.main), raced, out

    return run


def test_lengths_and_modes_are_measured_and_everything_is_written(run, capsys):
    words = ("--lengths", "2K,1024,1K", "--modes", "train", "--layers", "local,linformer", "--watts", 100)
    code, raced, out = run(*words, "--memory-limit", "1.5G", "--override", "in_features=8", "--limits", "batch")
    assert code == 0 and [(layers, length, mode) for layers, length, mode, _ in raced] == [
        (["softmax", "local", "linformer"], 1024, "train"), (["softmax", "local", "linformer"], 2048, "train"),
    ]  # fmt: skip
    settings = raced[0][3]
    assert settings.memory_limit == 3 * 2**29 and settings.values == {"in_features": 8} and settings.limits == ["batch"]
    # One thread is timed by its processor's clock, and so is what its rate is compared with.
    assert (settings.threads, settings.matmul_rate) == (1, 1e11)
    assert settings.batch_size == 1 and settings.rates["watts"] == 100 and not settings.peaks
    assert len(measurements.read_measurements(out)) == 6 and not (out.parent / "lra-2.png").exists()
    shown = capsys.readouterr()
    assert "lra-text, in_features=8, batch 1, float32, train" in shown.out and "500 (1.00)" in shown.out
    assert "estimated from 100 W (no meter: a test)" in shown.err
    assert "tabular" in out.with_suffix(".tex").read_text() and "| local |" in out.with_suffix(".md").read_text()
    assert (out.parent / "lra-1.png").read_bytes()[1:4] == b"PNG"


def test_every_option_of_what_is_measured_reaches_the_races(run):
    words = "--lengths 1K --modes forward --layers performer --baseline local --model small --batch-size 3 --dtype bfloat16"
    words += " --implementation xla --layer-options performer.num_features=8 --seconds 0.5 --repeats 7 --peaks --threads 1"
    words += " --energy-seconds 0 --watts 50 --grid-intensity 300 --price-per-hour 2.5 --currency EUR --limits length"
    _, raced, _ = run(*words.split())
    ((layers, length, mode, settings),) = raced
    assert (layers, length, mode) == (["local", "performer"], 1024, "forward")
    named = {name: getattr(settings, name) for name in (
        "model", "baseline", "batch_size", "dtype", "implementation", "options", "seconds", "repeats", "peaks", "threads",
        "energy_seconds", "rates", "limits",
    )}  # fmt: skip
    assert named == dict(
        model="small", baseline="local", batch_size=3, dtype="bfloat16", implementation="xla",
        options={"performer.num_features": 8}, seconds=0.5, repeats=7, peaks=True, threads=1, energy_seconds=0,
        limits=["length"], rates=dict(watts=50, grid_intensity=300, price_per_hour=2.5, currency="EUR"),
    )  # fmt: skip


def test_other_values_leave_the_rows_of_the_model_alone(run):
    words = ("--lengths", "1K", "--modes", "train", "--layers", "local")
    _, _, out = run(*words)
    before = measurements.read_measurements(out)
    _, raced, _ = run(*words, "--override", "batch_size=4", "dtype=bfloat16", "in_features=16", "mlp_features=16")
    after = measurements.read_measurements(out)
    assert after[:2] == before and {row.model for row in after[2:]} == {"lra-text, in_features=16, mlp_features=16"}
    assert {(row.batch_size, row.dtype) for row in after[2:]} == {(4, "bfloat16")}
    assert (raced[1][3].batch_size, raced[1][3].dtype) == (4, "bfloat16")


def test_ctrl_c_keeps_what_was_measured_before(run, capsys):
    code, raced, out = run("--lengths", "1K,4K,16K", "--modes", "forward", "--layers", "local")
    assert code == 130 and [length for _, length, _, _ in raced] == [1024, 4096]
    assert [row.length for row in measurements.read_measurements(out)] == [1024, 1024]
    assert "500 (1.00)" in capsys.readouterr().out


def test_a_layer_that_failed_is_told_by_the_exit_code(run, capsys):
    code, raced, out = run("--lengths", "1K", "--modes", "forward", "--layers", "s4")
    assert code == 1 and len(raced) == 1 and "s4: failed: a reason" in capsys.readouterr().err
    assert "s4 at 1K: failed: a reason" in out.with_suffix(".md").read_text()


@pytest.mark.parametrize(
    "words,message",
    [
        (("--layers", "locl"), "--layers must be a known name, got 'locl'"),
        (("--modes", "trian"), "--modes must be a known name, got 'trian'"),
        (("--limits", "depth"), "--limits must be a known name"),
        (("--lengths", "0"), "--lengths: must be a number such as 4096, 16K or 2G, got '0'"),
        (("--lengths", "1X"), "--lengths: must be a number such as 4096, 16K or 2G, got '1X'"),
        (("--batch-size", "0"), "--batch-size: must be >= 1, got 0"),
        (("--lenghts", "1"), "--lengths"),
        (("--seconds", "nan"), "--seconds: must be > 0, got nan"),
        (("--energy-seconds", "-1"), "--energy-seconds: must be >= 0, got -1"),
        (("--price-per-hour", "-3"), "--price-per-hour: must be >= 0, got -3"),
        (("--grid-intensity", "-5"), "--grid-intensity: must be >= 0, got -5"),
        (("--watts", "inf"), "--watts: must be > 0, got inf"),
        (("--memory-limit", "infG"), "--memory-limit: must be a number such as 4096, 16K or 2G, got 'infG'"),
        (("--override", "in_featurs=8"), "changed, got 'in_featurs'. Did you mean 'in_features'?"),
        (("--override", "layer=local"), "--override must be a value that can be changed, got 'layer'"),
        (("--override", "in_features=big", "--layers", "softmax"), "layer softmax must take its options and the values"),
        (("--override", "batch_size=0"), "got batch_size must be > 0"),
        (("--layer-options", "locl.window_size=3"), "--layer-options must be of a layer that is measured"),
        (("--layer-options", "local.windw_size=3"), "layer local must take its options"),
        (("--lengths", "1K,1000000000"), "--lengths must fit into "),
        (("--lengths", "1000000000", "--modes", "forward"), ", got 1,000,000,000: a batch of 1 at 256 features takes 10"),
        (("--batch-size", "1000000000"), "got 1,024: a batch of 1,000,000,000 at 256 features takes "),
        (("--override", "in_features=1000000000"), "got 1,024: a batch of 1 at 1,000,000,000 features takes "),
        (("--override", "num_layers=1000000000"), "got 1,024: a batch of 1 at 256 features takes "),
    ],
)
def test_a_wrong_word_is_one_line(run, capsys, words, message):
    try:
        code = run(*words)[0]
    except SystemExit as stopped:
        code = stopped.code
    error = capsys.readouterr().err
    assert code == 2 and message in error and error.splitlines()[-1].startswith("bench_lra: ")
    assert error.count("\n") == 1 or "Memory for programs" in error
