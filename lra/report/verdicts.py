"""What came of the cells of published tables, by the rows that there are, and the averages of their rows."""

import dataclasses
import functools
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from subquad.lra import tasks
from subquad.lra.bench import programs
from subquad.lra.data import catalogue, store
from subquad.lra.plan import plan
from subquad.lra.report import cells, costs
from subquad.lra.report.cells import CHANCE, Cell
from subquad.lra.report.ledger import Ledger, evaluate_every
from subquad.lra.report.measurements import Measurement
from subquad.lra.report.results import Result
from subquad.lra.run import Run

# "baseline": what ratios are to, 1 by definition. "no comparison": a ratio to a softmax that keeps no logits in memory, as
# the papers' Transformers do.
Outcome = Literal["reproduced within tolerance", "differs", "not run", "cannot", "baseline", "no comparison"]
FIVE = ("listops", "text", "retrieval", "image", "pathfinder")
# Lengths within it count as the same: papers write 1K for 1000 and for 1024.
SAME_LENGTH = 0.05
MODEL, MODE, BASELINE = "lra-text", "train", "softmax"
# Values of a run that decide what its program computes; the others are numbers in it, or how often it is called.
PROGRAM = (
    "task", "layer", "layer_options", "in_features", "num_layers", "mlp_features", "pooling", "positions", "dropout_rate",
    "attention_dropout_rate", "norm", "norm_order", "batch_size", "accumulate", "clip_norm", "dtype", "ema", "remat", "head",
    "inputs", "reversible", "drop_path_rate", "num_experts", "experts_per_token", "capacity_factor", "layer_groups",
    "remat_policy",
)  # fmt: skip
MEASURING = costs.Cost(0.05, "any device", "estimate")  # of one layer at one length


@dataclass(frozen=True)
class Verdict:
    """What came of a cell.

    Attributes:
        ours: mean over seeds, in the cell's unit; None where nothing was run. spread: their standard deviation.
        difference: ours - theirs; of ratios ours / theirs.
        seeds: how many runs.
        outcome, reason: the latter for a cell that cannot be run, or differs from a model that was another, and for seeds
            that failed, collapsed, or whose best step was looked for more or less often.
        command, cost: what runs it, and the hours.
        results: the rows behind it.
        hardware: of a measurement.
    """

    cell: Cell
    outcome: Outcome
    ours: float | None = None
    spread: float | None = None
    difference: float | None = None
    seeds: int = 0
    reason: str = ""
    command: str = ""
    cost: costs.Cost | None = None
    results: tuple[Result, ...] = ()
    hardware: str = ""


def judge(cell: Cell, ledger: Ledger, *, options: str = "", data_dir=None) -> Verdict:
    """What came of a cell, by the rows that there are.

    Args:
        options: more words for the command of a cell that was not run.
        data_dir: where data sets are; one that is not there is part of the command.
    """
    if cell.cannot:
        return Verdict(cell, "cannot", reason=cell.cannot)
    return _measured(cell, ledger, options) if cell.recipe == "bench" else _trained(cell, ledger, options, data_dir)


def run_of(cell: Cell, seed: int = 0) -> Run:
    """The run that answers to a cell."""
    return plan(cell.recipe, cell.layer, seed=seed, **cell.overrides)


def forecast(cell: Cell, run: Run, task: tasks.Task, ledger: Ledger, *, here: bool = False) -> costs.Cost:
    """What the run of a cell will take, its tests at the lengths of the cells beside it included; see `costs.forecast`."""
    return costs.forecast(run, task, ledger, here=here, lengths=cells.lengths_to_test(cell))


def _trained(cell: Cell, ledger: Ledger, options: str, data_dir) -> Verdict:
    run = run_of(cell)
    rows = ledger.finished_runs(run)
    failed = [row for row in ledger.failed_runs(run) if row.seed not in {one.seed for one in rows}]
    if failed and not rows:
        return Verdict(cell, "differs", seeds=len(failed), reason=failed[-1].status)
    if not rows:
        task = tasks.find_task(run.task, run.config)
        command = _command(cell, f"{_prepare(task, data_dir)}subquad table", options)
        return Verdict(cell, "not run", reason=cell.note, command=command, cost=forecast(cell, run, task, ledger))
    scores = {row.seed: score_for(cell, row, tasks.find_task(run.task, run.config)) for row in rows}
    reasons = [score for score in scores.values() if isinstance(score, str)]
    rows = [row for row in rows if not isinstance(scores[row.seed], str)]
    if not rows:
        return Verdict(cell, "cannot", reason=reasons[0])
    values = [100 * scores[row.seed] for row in rows]
    ours, spread = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None
    theirs = CHANCE if cell.value is None else cell.value
    close = abs(ours - theirs) <= cell.tolerance
    collapsed = [f"seed {row.seed} collapsed at step {row.collapsed_step}" for row in rows if row.collapsed_step is not None]
    looked = {row.seed: evaluate_every(row) for row in rows if run.selection == "best"}
    looks = [
        f"seed {seed} validated every {every} steps, theirs every {run.evaluate_every}" for seed, every in looked.items()
        if every != run.evaluate_every
    ]  # fmt: skip
    lost = [f"seed {row.seed} {row.status}" for row in failed]
    reason = "; ".join([*([] if close else filter(None, [cell.note])), *collapsed, *looks, *lost])
    found = dict(ours=ours, spread=spread, difference=ours - theirs, seeds=len(rows), reason=reason, results=tuple(rows))
    return Verdict(cell, "reproduced within tolerance" if close else "differs", **found)


def score_for(cell: Cell, row: Result, task: tasks.Task) -> float | str:
    """A run's score, a fraction, of what a cell is about: test or train, at the cell's own length; or why there is none."""
    if cell.metric == "train_accuracy":
        return "its run is of a version that did not score train" if row.accuracy_train is None else row.accuracy_train
    if cell.length in (None, task.length):
        return row.accuracy
    return json.loads(row.scores_by_length or "{}").get(str(cell.length), "its run was not tested at this length")


def _measured(cell: Cell, ledger: Ledger, options: str) -> Verdict:
    near = lambda row: abs(row.length - cell.length) <= SAME_LENGTH * cell.length
    rows = [
        row for row in ledger.measurements
        if (row.model, row.mode, row.layer, row.status) == (MODEL, MODE, cell.layer, "ok")
        and row.baseline in (BASELINE, programs.PLAIN) and near(row) and getattr(row, cell.metric) is not None
        and _as_planned(row)
    ]  # fmt: skip
    missing = dict(command=_command(cell, "subquad table", options), cost=MEASURING)
    if not rows:
        return Verdict(cell, "not run", reason=cell.note, **missing)
    row = max(rows, key=lambda row: (row.baseline == programs.PLAIN, row.finished_utc or ""))
    ours = getattr(row, cell.metric)
    found = dict(ours=ours, seeds=1, hardware=f"{row.hardware}, batch {row.batch_size}, {row.dtype}, to {row.baseline}")
    if cell.layer == BASELINE:
        return Verdict(cell, "baseline", **found)
    if row.baseline == BASELINE:
        return Verdict(cell, "no comparison", reason=cell.note, **missing, **found)
    ratio = ours / cell.value
    close = 1 / cell.tolerance <= ratio <= cell.tolerance
    reason = "" if close or not cell.note else f"theirs: {cell.note}"
    return Verdict(cell, "reproduced within tolerance" if close else "differs", difference=ratio, reason=reason, **found)


def _as_planned(row: Measurement) -> bool:
    """Whether the program is the one that is measured where nothing but the batch size is given.

    Of a baseline that keeps its logits, softmax is that one.
    """
    # Values that an older version did not know had their defaults.
    given = {**dataclasses.asdict(Run()), **json.loads(row.configuration)} if row.configuration else {}
    layer = row.baseline if (row.layer, row.baseline) == (BASELINE, programs.PLAIN) else row.layer
    run = _planned(layer, row.length, row.batch_size)
    return all(name in given and given[name] == getattr(run, name) for name in PROGRAM)


@functools.cache
def _planned(layer: str, length: int, batch_size: int) -> Run:
    return programs.plan(MODEL, layer, length, batch_size=batch_size)[0]


def _command(cell: Cell, program: str, options: str) -> str:
    # Both ratios are measured at once.
    only = cell.id.removesuffix(f".{cell.metric}")
    words = f"--paper {cell.paper} --table {cell.table} --only {only} --run"
    return " ".join(filter(None, [program, words, options]))


def _prepare(task: tasks.Task, data_dir) -> str:
    """The command that has to come first, for data that has to be fetched."""
    if catalogue.find_dataset(task.dataset).source is None or store.is_prepared(task.dataset, data_dir):
        return ""
    return f"{store.preparing(f'{task.name}/{task.config}', data_dir)} && "


@dataclass(frozen=True)
class Average:
    """The mean of a row's tasks, theirs and ours (None where one of them was not run).

    Marked where a Path-X that failed, or that the table leaves out, counts as 50.
    """

    row: str
    tasks: int
    theirs: float
    theirs_marked: bool
    ours: float | None
    ours_marked: bool


def averages(verdicts: Sequence[Verdict]) -> list[Average]:
    """Both averages of every row of a table of accuracies: over five tasks, and over six; else the one that it prints."""
    found = []
    scores = [one for one in verdicts if one.cell.metric == "accuracy"]
    for row in dict.fromkeys(one.cell.row for one in scores):
        of = {one.cell.task: one for one in scores if one.cell.row == row}
        if not set(FIVE) <= set(of):
            if "average" in of:
                printed = of["average"].cell
                count, marked = 6 if "six tasks" in printed.note else 5, "failed Path-X" in printed.note
                found.append(Average(row, count, printed.value, marked, None, False))
            continue
        path_x = of.get("path_x")
        theirs = [of[name].cell.value for name in FIVE]
        ours = [of[name].ours for name in FIVE]
        found.append(Average(row, 5, statistics.mean(theirs), False, _whole(ours), False))
        last = None if path_x is None else path_x.cell.value
        mine = CHANCE if path_x is None else path_x.ours
        failed = path_x is None or (mine is not None and mine <= CHANCE + cells.TOLERANCE)
        found.append(Average(
            row, 6, statistics.mean([*theirs, CHANCE if last is None else last]), last is None,
            _whole([*ours, CHANCE if failed else mine]), failed,
        ))  # fmt: skip
    return found


def _whole(values: Sequence[float | None]) -> float | None:
    return None if None in values else statistics.mean(values)
