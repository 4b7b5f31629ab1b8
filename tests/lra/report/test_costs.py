"""Hours: whose they are, what they hold, and how a few timed steps tell them."""

import dataclasses
import functools
import itertools

import jax
import pytest

from subquad.lra import machine, sizes, tasks
from subquad.lra.bench import programs
from subquad.lra.plan import plan
from subquad.lra.report import cells, comparison, costs, csv_rows, ledger, reproduce, step_timings, verdicts
from tests.lra.report.test_results import row as made

LISTOPS = "lra.1.transformer.listops"


def cell(name):
    return next(one for one in cells.cells_of_table("lra", "1") if one.id == name)


def timed_steps(run, **words):
    values = dict(
        configuration_hash=ledger.hash_without_seed(dataclasses.asdict(run)), recipe=run.recipe, layer=run.layer, task=run.task,
        config=run.config, probe_steps=3, step_seconds=2.0, evaluation_seconds=0.5, compile_seconds=60.0, step_flops=1e9,
        hardware=machine.hardware(), finished_utc="2026-01-01T00:00:00Z",
    )  # fmt: skip
    return ledger.StepTiming(**{**values, **words})


def known(rows=(), step_timings=()):
    return ledger.Ledger({"": list(rows)}, [], {}, list(step_timings))


def test_validation_and_test_are_part_of_the_hours():
    run, task = plan("nystromformer", "softmax"), tasks.find_task("listops", "lra")
    # 100 validations of 2,000 examples in batches of 32, and three times as many as test has.
    assert (run.steps, run.evaluate_every, run.batch_size) == (5000, 50, 32)
    assert costs.evaluation_batches(run, task) == 100 * 63 + 3 * 63
    often = dataclasses.replace(run, evaluate_every=5)
    assert costs.forecast(often, task, known()).hours > 2 * costs.forecast(run, task, known()).hours
    at_home = lambda run: costs.forecast(run, task, known(), here=True).hours
    assert at_home(often) > 2 * at_home(run)
    steps = run.steps * 2.0 + 60 + 0.5 * costs.evaluation_batches(run, task)
    assert costs.forecast(run, task, known((), [timed_steps(run)])).hours == pytest.approx(steps / 3600)


def test_hours_say_whose_they_are(monkeypatch):
    run, task = verdicts.run_of(cell(LISTOPS)), tasks.find_task("listops", "lra")
    here = functools.partial(costs.forecast, hardware="this")
    nothing = here(run, task, known())
    assert nothing.hardware == "one V100" and "--probe" in nothing.source
    stated = here(plan("s4", "s4"), task, known())
    assert (stated.hours, stated.hardware) == (10.0, "one T4") and "as its authors state" in stated.source
    rough = here(run, task, known(), here=True)
    assert rough.hardware == "this" and rough.source.startswith("rough estimate, nothing was measured on it")
    # A run, or steps, measured elsewhere say nothing of this machine.
    other = made(hardware="other", flops_per_step=10**9, steps_per_second=1.0)
    assert here(run, task, known([other], [timed_steps(run, hardware="other")])).hardware == "one V100"
    another = timed_steps(dataclasses.replace(run, steps=7), hardware="this", step_flops=4e9, step_seconds=2.0)
    near = here(run, task, known([], [another]))
    flops = costs.training_flops(run, task) + costs.evaluation_flops(run, task)
    assert near.hardware == "this" and near.hours == pytest.approx(flops / 2e9 / 3600)
    exact = here(run, task, known([other], [timed_steps(run, hardware="this")]))
    assert exact.source == "from 3 steps timed on it, validation included"


def test_tests_at_further_lengths_are_part_of_the_hours():
    at = {one.length: one for one in cells.cells_of_table("mamba", "11") if one.row == "H3"}
    run = verdicts.run_of(at[256])
    task = tasks.find_task(run.task, run.config)
    lengths = cells.lengths_to_test(at[256])
    assert lengths == [2**power for power in range(6, 16)] == cells.lengths_to_test(at[64])
    further = 500 * sum(costs.forward_flops(run, length, length) for length in lengths)
    flops = costs.training_flops(run, task) + costs.evaluation_flops(run, task)
    rows = [made(hardware=machine.hardware(), flops_per_step=10**9, steps_per_second=1.0)]
    assert verdicts.judge(at[256], known(rows)).cost.hours == pytest.approx((flops + further) / 1e9 / 3600)
    # A batch of test takes as long as the timed one of validation, for as many FLOPs.
    batch = costs.forward_flops(run, run.batch_size * task.length, task.length)
    seconds = run.steps * 2.0 + 60 + 0.5 * (costs.evaluation_batches(run, task) + further / batch)
    assert verdicts.judge(at[256], known((), [timed_steps(run)])).cost.hours == pytest.approx(seconds / 3600)


def test_the_newest_steps_of_this_machine_and_run_count():
    run = verdicts.run_of(cell(LISTOPS))
    old, new = timed_steps(run), timed_steps(run, step_seconds=1.0, finished_utc="2026-02-01T00:00:00Z")
    other = timed_steps(dataclasses.replace(run, steps=7), finished_utc="2027-01-01T00:00:00Z")
    for order in itertools.permutations([old, new, other, timed_steps(run, hardware="x", finished_utc="2027-01-01T00:00:00Z")]):
        assert known((), order).timed_steps(dataclasses.replace(run, seed=5), machine.hardware()) == new
    assert ledger.Ledger({}, [], {}).timed_steps(run, machine.hardware()) is None


def test_steps_are_timed_written_and_tell_the_hours_of_a_cell(tmp_path, monkeypatch):
    called, seconds, said = [], itertools.count(), []
    program = lambda run, task, mode: programs.Program(run, task, mode, None, 5.0, None)
    monkeypatch.setattr(programs, "compile_program", program)
    monkeypatch.setattr(programs, "start_program", lambda program: lambda: called.append(program.mode))
    run, task = verdicts.run_of(cell(LISTOPS)), tasks.find_task("listops", "lra")
    found = step_timings.time_steps(run, task, 4, clock=lambda: float(next(seconds)))
    assert called == ["train"] * 5 + ["forward"] * 5
    assert (found.step_seconds, found.evaluation_seconds, found.compile_seconds) == (0.25, 0.25, 10.0)
    assert found.step_flops == costs.training_flops(run, task) / run.steps and found.hardware == machine.hardware()
    path = tmp_path / "ledger-hours.csv"
    csv_rows.write_rows(path, ledger.StepTiming, [found], ledger.STEP_TIMING_KEY)
    assert ledger.read_ledger([path]).step_timings == [found] and ledger.verify_files([path])[1] == []
    one = verdicts.judge(cell(LISTOPS), ledger.read_ledger([path]))
    assert one.cost.hardware == machine.hardware() and one.cost.source == "from 4 steps timed on it, validation included"
    assert "from 4 steps timed on it" in comparison.render("lra", "1", [one], ledger.read_ledger([path]))
    # What cannot fit, or is refused, is told, and the others are timed.
    refuse = lambda run, task: (_ for _ in ()).throw(ValueError("too large")) if run.layer == "softmax" else None
    monkeypatch.setattr(sizes, "check", refuse)
    wanted = [cell(LISTOPS), cell("lra.1.performer.listops"), cell("lra.1.bigbird.average")]
    assert reproduce.time_missing(wanted, tmp_path / "more.csv", known=known(), steps=2, say=said.append) == 1
    assert said[0] == f"[1/2] {LISTOPS}: too large" and "from 2 steps timed on it" in said[1]
    assert [one.layer for one in ledger.read_ledger([tmp_path / "more.csv"]).step_timings] == ["performer"]


@pytest.mark.parametrize("kind", ["classification", "pair", "language_model", "tagging"])
def test_steps_of_every_kind_of_task_have_a_batch(kind):
    classes = 10 if kind != "language_model" else 16
    task = dataclasses.replace(tasks.find_task("listops", "tiny"), kind=kind, num_classes=classes)
    run = plan(task=task, batch_size=2, in_features=16, num_layers=1, mlp_features=16)
    batch = programs._batch(run, task)
    inputs = ("inputs1", "inputs2") if kind == "pair" else ("inputs",)
    assert {name for name in batch if name.startswith("inputs")} == set(inputs)
    assert batch["targets"].shape == ((2, 30) if kind in ("language_model", "tagging") else (2,))
    function, arguments = programs._function(run, task, "train", programs._abstract(run, task))
    jax.eval_shape(function, *arguments)


def test_a_budget_is_of_this_machines_hours(tmp_path):
    """What fits into it is told by the steps that were timed, under whatever name runs of this machine have."""
    run, said = verdicts.run_of(cell(LISTOPS)), []
    slow = timed_steps(run, step_seconds=1e6)
    listed = known((), [slow])
    assert reproduce.train_missing([cell(LISTOPS)], tmp_path / "l.csv", known=listed, budget_hours=1e5, say=said.append) == 0
    assert said[-1].startswith("Left for another time: 1.") and "from 3 steps timed on it" in said[-1]
    assert machine.hardware() == machine.environment()["hardware"]  # of one device of a CPU
