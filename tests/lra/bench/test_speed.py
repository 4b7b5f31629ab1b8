import dataclasses
import json

import pytest

from subquad.lra import machine, sizes
from subquad.lra.bench import energy, programs, speed, timing
from subquad.lra.report import measurements
from subquad.zoo import LAYERS

TINY = dict(in_features=8, num_layers=1, mlp_features=8)
SETTINGS = speed.Settings(
    model="small", session="a test", memory_limit=2**30, memory_source="a test", matmul_rate=1e12, batch_size=2, values=TINY,
    repeats=2, options={"linformer.max_length": 4, "local.window_size": 3}, energy_seconds=0.0,
    rates=dict(watts=100.0, grid_intensity=400.0),
)  # fmt: skip


def silent(text):
    pass


def test_layers_are_raced_and_one_that_fails_takes_no_other_with_it():
    said_lines = []
    softmax, linformer, local = speed.race(["softmax", "linformer", "local"], 16, "train", SETTINGS, said_lines.append)
    assert [row.layer for row in (softmax, linformer, local)] == ["softmax", "linformer", "local"]
    assert linformer.status.startswith("failed: ") and "max_length" in linformer.status and linformer.median_ms is None
    assert json.loads(local.layer_options)["window_size"] == 3
    assert json.loads(local.configuration)["in_features"] == 8
    for row in (softmax, local):
        assert row.status == "ok" and row.calls >= 2 and 0 < row.best_ms <= row.lower_ms <= row.median_ms <= row.upper_ms
        assert row.tokens_per_second == pytest.approx(2 * 16 * 1e3 / row.median_ms, rel=1e-4)
        # The training step holds the parameters and Adam's two moments.
        assert row.argument_bytes >= 3 * 4 * row.parameters and row.peak_bytes >= row.argument_bytes
        # Adam's arithmetic is the step's, and nothing that the model needs.
        assert row.model_flops < row.flops < 3 * row.model_flops and row.flops_source == "jaxpr"
        assert row.utilisation == pytest.approx(row.model_flops * 1e3 / row.median_ms / 1e12, rel=1e-4)
        assert row.energy_joules == pytest.approx(100 * row.median_ms / 1e3, rel=1e-4)
        assert row.energy_source == "estimated from 100 W" and row.co2e_grams > 0 and row.price is None
        assert row.hardware and row.commit and row.finished_utc and "in turn with 1 other layers" in row.protocol
        assert row.speed_ratio == pytest.approx(softmax.median_ms / row.median_ms, rel=1e-3)
        assert row.memory_ratio == pytest.approx(row.peak_bytes / softmax.peak_bytes, rel=1e-3)
    assert softmax.speed_ratio == softmax.memory_ratio == 1.0 and linformer.speed_ratio is None
    assert said_lines[-1] == "timing softmax, local"


def test_a_model_with_other_values_has_rows_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(programs, "compile_program", None)  # a failed row is one, too
    plain = dataclasses.replace(SETTINGS, model="lra-text", values={}, options={}, batch_size=1)
    changed = dataclasses.replace(plain, values=dict(mlp_features=16, batch_size=4, dtype="bfloat16"))
    found = [*speed.race(["softmax"], 16, "train", plain, silent), *speed.race(["softmax"], 16, "train", changed, silent)]
    measurements.write_measurements(found, tmp_path / "rows.csv")
    assert [(row.model, row.batch_size, row.dtype) for row in measurements.read_measurements(tmp_path / "rows.csv")] == [
        ("lra-text", 1, "float32"), ("lra-text, batch_size=4, dtype=bfloat16, mlp_features=16", 4, "bfloat16")
    ]  # fmt: skip
    assert len(measurements.groups(found)) == 2


def test_what_does_not_fit_is_compiled_and_not_run(monkeypatch):
    monkeypatch.setattr(programs, "start_program", lambda program: pytest.fail("allocated"))
    # The least that it can need is there, and what it does need is not.
    limit = sizes.least(*SETTINGS.plan("softmax", 16), "forward").total
    settings = dataclasses.replace(SETTINGS, memory_limit=limit)
    (row,) = speed.race(["softmax"], 16, "forward", settings, silent)
    assert row.status.startswith("skipped: memory: the program needs") and row.peak_bytes > limit and row.flops > 0
    assert row.median_ms is None and row.compile_seconds > 0


def test_a_call_that_fails_is_a_row_and_energy_is_read_where_a_meter_is(monkeypatch):
    def started(program):
        if program.run.layer == "local":
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return lambda: None

    counted = iter(range(100))
    meter = energy.Meter("a meter", lambda: float(next(counted)))
    monkeypatch.setattr(programs, "start_program", started)
    settings = dataclasses.replace(SETTINGS, meter=meter, energy_seconds=1e-9)
    softmax, local = speed.race(["softmax", "local"], 16, "forward", settings, silent)
    assert local.status == "failed: RESOURCE_EXHAUSTED: out of memory" and softmax.status == "ok"
    assert softmax.energy_joules == pytest.approx(1 / energy.LEAST_CALLS, rel=1e-3) and softmax.energy_source == "a meter"


def test_gradient_and_training_step_see_the_same_loss():
    run, task = SETTINGS.plan("softmax", 16)
    gradient, training = (programs.start_program(programs.compile_program(run, task, mode)) for mode in ("gradient", "train"))
    losses = [float(gradient()[0]), *(float(training()[0]) for _ in range(8))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # dropout the same
    assert losses[1:] != [losses[1]] * 8  # the state goes on from call to call


SIZES = {
    "affine": lambda n: 5_000_000 + 3000 * n,
    "quadratic": lambda n: 1_000_000 + 4 * n * n,
    "stairs": lambda n: 10_000_000 * (n // 3000 + 1),
    "given up": lambda n: 500 * n if n < 5000 else None,
    "jump": lambda n: 1000 * n if n < 2000 else 10**13,
}


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("start", [1, 1024, 65536])
@pytest.mark.parametrize("grain", [1, 64])
def test_the_largest_that_fits_is_found_in_few_tries(name, start, grain):
    tried = []

    def peak(n):
        tried.append(n)
        return SIZES[name](n)

    found, note = programs.largest_that_fits(peak, 10**7, start, 2**20, grain)
    beyond = SIZES[name](found + max(grain, found // 20))
    assert SIZES[name](found) <= 10**7 and (beyond is None or beyond > 10**7) and note == "to a twentieth"
    assert len(set(tried)) == len(tried) <= 20 and all(n % grain == 0 for n in tried)
    if name in ("affine", "quadratic") and start > 1:
        assert len(tried) <= 11


def test_the_search_ends_at_its_bounds():
    assert programs.largest_that_fits(lambda n: n, 10**9, 64, 2**20) == (2**20, "at least: the search ends at 1048576")
    assert programs.largest_that_fits(lambda n: 10, 1, 64, 2**20) == (None, "not even 1 fits")


def test_limits_are_columns_and_a_layers_refusal_is_a_note(monkeypatch):
    memory = lambda run, task: 1000 * run.batch_size * task.length
    sizes = lambda run, task: programs.measure.Memory(0, 0, 0, memory(run, task))
    program = lambda run, task, mode: programs.Program(run, task, mode, None, 0.0, sizes(run, task))
    monkeypatch.setattr(programs, "compile_program", program)
    settings = dataclasses.replace(SETTINGS, limits=("length", "batch"), memory_limit=10**7)
    found = speed.limits("softmax", 64, "train", settings)
    assert 4700 <= found["largest_length"] <= 5000 and 148 <= found["largest_batch"] <= 156
    tried = []
    recorded = lambda run, task, mode: tried.append(run.batch_size) or program(run, task, mode)
    monkeypatch.setattr(programs, "compile_program", recorded)
    longer = speed.limits("softmax", 128, "train", settings)
    assert longer["largest_length"] == found["largest_length"] and 74 <= longer["largest_batch"] <= 78
    assert set(tried) != {2}  # the length was not looked for again
    assert speed.limits("softmax", 128, "train", settings) == longer and len(tried) <= 10
    refused = speed.limits("linformer", 64, "train", dataclasses.replace(settings, values={"bogus": 1}, found={}))
    assert refused["largest_length"] is None and "bogus" in refused["limits_note"]


def test_options_are_for_all_layers_or_for_one():
    options = {"local.window_size": 3, "num_heads": 1}
    local, _ = programs.plan("small", "local", 16, options=options, **TINY)
    softmax, task = programs.plan("lra-text", "softmax", 100, options=options)
    assert local.layer_options["window_size"] == 3 and "window_size" not in softmax.layer_options
    assert local.layer_options["num_heads"] == softmax.layer_options["num_heads"] == 1
    assert (softmax.in_features, softmax.num_layers, softmax.mlp_features, task.length) == (256, 4, 1024, 100)


@pytest.mark.parametrize("model", programs.MODELS)
def test_every_layer_has_a_plan_in_every_model_that_is_of_the_length(model):
    for layer in LAYERS:
        run, task = programs.plan(model, layer, 3000)
        assert run.layer == layer and task.length == 3000
        assert run.layer_options.get("max_length") in (None, 3000 + (run.pooling == "cls"))
    # The arena's Reformer cuts every sequence into ten chunks.
    chunks = [programs.plan(model, "reformer", length)[0].layer_options["chunk_size"] for length in (3000, 4096)]
    assert chunks == [300, 410] if model == "lra-text" else chunks[0] == chunks[1]


def test_the_machines_memory_is_told(monkeypatch):
    limit, source = machine.available_memory()
    most, whose = machine.memory()
    assert 2**20 < limit < most < 2**50 and source and whose
    assert timing.clock_of(1).__name__ == "process_time"
