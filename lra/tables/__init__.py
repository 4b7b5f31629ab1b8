"""A published table beside what was run here: theirs, ours, the difference, and what came of each cell."""

import csv
import dataclasses
import functools
import io
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from subquad.lra import markup, prepare, recipes, tasks
from subquad.lra.bench import Measurement, programs
from subquad.lra.data import catalogue
from subquad.lra.results import Result
from subquad.lra.tables import cells, costs, figures
from subquad.lra.tables.cells import Cell
from subquad.lra.tables.ledger import NAMES, Ledger

# "baseline": what ratios are to, 1 by definition.
Outcome = Literal["reproduced within tolerance", "differs", "not run", "cannot", "baseline"]
FIVE = ("listops", "text", "retrieval", "image", "pathfinder")
SIX = (*FIVE, "path_x")
CHANCE = 50.0  # of Path-X, in per cent
# Lengths within it count as the same: papers write 1K for 1000 and for 1024.
SAME_LENGTH = 0.05
MODEL, MODE, BASELINE = "lra-text", "train", "softmax"
# Values of a run that decide what its program computes; the others are numbers in it, or how often it is called.
PROGRAM = (
    "task", "layer", "layer_options", "in_features", "num_layers", "mlp_features", "pooling", "positions", "dropout_rate",
    "batch_size", "accumulate", "clip_norm", "dtype", "ema", "remat", "head", "inputs",
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
            that failed or collapsed.
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


def run_of(cell: Cell, seed: int = 0) -> recipes.Run:
    """The run that answers to a cell."""
    return recipes.plan(cell.recipe, cell.layer, seed=seed, **cell.overrides)


def _trained(cell: Cell, ledger: Ledger, options: str, data_dir) -> Verdict:
    run = run_of(cell)
    rows = ledger.of(run)
    failed = [row for row in ledger.failed(run) if row.seed not in {one.seed for one in rows}]
    if failed and not rows:
        return Verdict(cell, "differs", seeds=len(failed), reason=failed[-1].status)
    if not rows:
        task = tasks.find(run.task, run.config)
        command = _command(cell, f"{_prepare(task, data_dir)}python scripts/reproduce_table.py", options)
        return Verdict(cell, "not run", reason=cell.note, command=command, cost=costs.of_run(run, task))
    if cell.metric == "train_accuracy":
        rows = [row for row in rows if row.accuracy_train is not None]
        if not rows:
            return Verdict(cell, "cannot", reason="its run is of a version that did not score train")
    values = [100 * (row.accuracy_train if cell.metric == "train_accuracy" else row.accuracy) for row in rows]
    ours, spread = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None
    theirs = CHANCE if cell.expected is None else cell.expected
    close = abs(ours - theirs) <= cell.tolerance
    collapsed = [f"seed {row.seed} collapsed at step {row.collapsed_step}" for row in rows if row.collapsed_step is not None]
    lost = [f"seed {row.seed} {row.status}" for row in failed]
    reason = "; ".join([*([] if close else filter(None, [cell.note])), *collapsed, *lost])
    found = dict(ours=ours, spread=spread, difference=ours - theirs, seeds=len(rows), reason=reason, results=tuple(rows))
    return Verdict(cell, "reproduced within tolerance" if close else "differs", **found)


def _measured(cell: Cell, ledger: Ledger, options: str) -> Verdict:
    near = lambda row: abs(row.length - cell.length) <= SAME_LENGTH * cell.length
    rows = [
        row for row in ledger.measurements
        if (row.model, row.mode, row.layer, row.status, row.baseline) == (MODEL, MODE, cell.layer, "ok", BASELINE)
        and near(row) and getattr(row, cell.metric) is not None and _as_planned(row)
    ]  # fmt: skip
    if not rows:
        command = _command(cell, "python scripts/reproduce_table.py", options)
        return Verdict(cell, "not run", reason=cell.note, command=command, cost=MEASURING)
    row = max(rows, key=lambda row: row.finished_utc or "")
    ours = getattr(row, cell.metric)
    found = dict(ours=ours, seeds=1, hardware=f"{row.hardware}, batch {row.batch_size}, {row.dtype}")
    if cell.layer == BASELINE:
        return Verdict(cell, "baseline", **found)
    ratio = ours / cell.expected
    close = 1 / cell.tolerance <= ratio <= cell.tolerance
    reason = "" if close or not cell.note else f"theirs: {cell.note}"
    return Verdict(cell, "reproduced within tolerance" if close else "differs", difference=ratio, reason=reason, **found)


def _as_planned(row: Measurement) -> bool:
    """Whether the program is the one that is measured where nothing but the batch size is told."""
    given = json.loads(row.configuration or "{}")
    run = _planned(row.layer, row.length, row.batch_size)
    return all(name in given and given[name] == getattr(run, name) for name in PROGRAM)


@functools.cache
def _planned(layer: str, length: int, batch_size: int) -> recipes.Run:
    return programs.plan(MODEL, layer, length, batch_size=batch_size)[0]


def _command(cell: Cell, program: str, options: str) -> str:
    # Both ratios are measured at once.
    only = cell.id.removesuffix(f".{cell.metric}")
    words = f"--paper {cell.paper} --table {cell.table} --only {only} --run"
    return " ".join(filter(None, [program, words, options]))


def _prepare(task: tasks.Task, data_dir) -> str:
    """The command that has to come first, for data that has to be fetched."""
    if catalogue.find(task.dataset).source is None or prepare.is_prepared(task, data_dir):
        return ""
    return f"python scripts/prepare_lra.py prepare {task.name}/{task.config} && "


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
        of = {one.cell.column: one for one in scores if one.cell.row == row}
        if not set(FIVE) <= set(of):
            if "average" in of:
                printed = of["average"].cell
                count, marked = 6 if "six tasks" in printed.note else 5, "failed Path-X" in printed.note
                found.append(Average(row, count, printed.expected, marked, None, False))
            continue
        path_x = of.get("path_x")
        theirs = [of[name].cell.expected for name in FIVE]
        ours = [of[name].ours for name in FIVE]
        found.append(Average(row, 5, statistics.mean(theirs), False, _whole(ours), False))
        last = None if path_x is None else path_x.cell.expected
        mine = CHANCE if path_x is None else path_x.ours
        failed = path_x is None or (mine is not None and mine <= CHANCE + cells.TOLERANCE)
        found.append(Average(
            row, 6, statistics.mean([*theirs, CHANCE if last is None else last]), last is None,
            _whole([*ours, CHANCE if failed else mine]), failed,
        ))  # fmt: skip
    return found


def _whole(values: Sequence[float | None]) -> float | None:
    return None if None in values else statistics.mean(values)


def title(source: figures.Source) -> str:
    """One line: paper, table, title."""
    number = f", arXiv {source.arxiv}" * bool(source.arxiv)
    return f"{source.paper}, table {source.table}: {source.title}. {source.work}{number}"


def notes(source: figures.Source, verdicts: Sequence[Verdict], ledger: Ledger) -> list[str]:
    """What is to be known of the numbers: where theirs were read, what ours were run on, floors, marks."""
    found = [f"Theirs: {source.where}" + f"; {source.hardware}" * bool(source.hardware) + "."]
    machines = sorted({row.hardware for one in verdicts for row in one.results} | {one.hardware for one in verdicts} - {""})
    found += [f"Ours: {machine}." for machine in machines]
    commits = sorted({row.commit[:12] for one in verdicts for row in one.results})
    if commits:
        found.append(f"Commits of our runs: {', '.join(commits)}.")
    if any(one.cell.metric == "accuracy" for one in verdicts):
        found += floors(verdicts, ledger)
        found.append("* A Path-X that failed, or that a table leaves out, counts as 50 in the average of six tasks.")
        deviating = f"twice the published deviation where there is one, {cells.LEAST_TOLERANCE:g} point at least"
        found.append(f"Tolerance: {cells.TOLERANCE:g} points; {deviating}.")
    if any(one.cell.unit == "ratio" for one in verdicts):
        tolerated = f"the difference is a factor, tolerated up to {cells.RATIO_TOLERANCE:g}"
        found.append(f"Ratios: to the Transformer's, measured in turn with it; {tolerated}.")
    count = lambda name: sum(one.outcome == name and one.cell.column != "average" for one in verdicts)
    return [*found, "; ".join(f"{count(name)} {name}" for name in get_args(Outcome) if name != "baseline" or count(name)) + "."]


def floors(verdicts: Iterable[Verdict], ledger: Ledger) -> list[str]:
    """A line for each task: what rules reach that see next to nothing, in per cent of test."""
    found, seen = [], set()
    for one in verdicts:
        if one.cell.column == "average" or not one.cell.overrides:
            continue
        run = run_of(one.cell) if one.cell.recipe != "bench" else None
        if run is None or (run.task, run.config) in seen:
            continue
        seen.add((run.task, run.config))
        known = {name: floor.value for name, floor in ledger.floors.get((run.task, run.config), {}).items()}
        for row in one.results:
            told = {"majority": row.floor_majority, "root": row.floor_root, "bag": row.floor_bag, "network": row.floor_network}
            known = {**{name: value for name, value in told.items() if value is not None}, **known}
        words = [f"{NAMES[name]} {100 * known[name]:.1f}" for name in NAMES if name in known]
        chance = f"chance {100 / tasks.find(run.task, run.config).num_classes:.0f}"
        more = "" if words else f"; others by python scripts/reproduce_table.py --floors {run.task}/{run.config}"
        found.append(f"Floors of {run.task}/{run.config}, %: {', '.join([chance, *words])}{more}.")
    return found


def matrix(verdicts: Sequence[Verdict]) -> list[list[str]]:
    """The table as it is printed, heading first: a row for each model, and in every cell theirs and ours."""
    shown = [one for one in verdicts if one.cell.column != "average"]
    columns = list(dict.fromkeys((one.cell.column, one.cell.length, one.cell.metric, one.cell.unit) for one in shown))
    of = {(one.cell.row, one.cell.column, one.cell.length, one.cell.metric): one for one in shown}
    means = {(one.row, one.tasks): one for one in averages(verdicts)}
    counts = sorted({tasks for _, tasks in means})
    heading = ["model"] + [_column(*column) for column in columns] + [f"average of {count}" for count in counts]
    body = []
    for row in dict.fromkeys(one.cell.row for one in verdicts):
        line = [row] + [_both(of.get((row, *column[:3]))) for column in columns]
        body.append(line + [_mean(means.get((row, count))) for count in counts])
    return [heading, *body]


def _column(task: str, length: int | None, metric: str, unit: str) -> str:
    name = cells.NAMES.get(task, task.replace("_", " "))
    what = "" if metric == "accuracy" else f" {metric.replace('_', ' ')}"
    return f"{name}{f' {length}' if length else ''}{what}" + (f", {unit}" if unit not in ("%", "ratio") else "")


def _both(one: Verdict | None) -> str:
    if one is None:
        return ""
    theirs = "chance" if one.cell.expected is None else number(one.cell.expected, one.cell.unit)
    return f"{theirs} / {number(one.ours, one.cell.unit)}"


def _mean(one: Average | None) -> str:
    if one is None:
        return ""
    marked = one.ours_marked and one.ours is not None
    return f"{number(one.theirs, '%')}{'*' * one.theirs_marked} / {number(one.ours, '%')}{'*' * marked}"


def number(value: float | None, unit: str) -> str:
    """Two decimals of a per cent, three digits of others; "-" for nothing."""
    if value is None:
        return "-"
    return f"{value:.2f}" if unit == "%" else f"{value:.3g}"


HEADING = ("cell", "theirs", "ours", "difference", "seeds", "outcome", "why, or how")


def listing(verdicts: Sequence[Verdict]) -> list[list[str]]:
    """A line for each cell, heading first."""
    body = []
    for one in verdicts:
        if one.cell.column == "average":
            continue
        spread = "" if one.spread is None else f" ± {one.spread:.2f}"
        sign = "x{:.2f}" if one.cell.unit == "ratio" else "{:+.2f}"
        sign = "" if one.difference is None else sign.format(one.difference)
        how = f"{one.command} [{one.cost}]" if one.outcome == "not run" else one.reason
        theirs = "chance" if one.cell.expected is None else number(one.cell.expected, one.cell.unit)
        theirs += "" if one.cell.deviation is None else f" ± {one.cell.deviation:g}"
        seeds = str(one.seeds or "")
        body.append([one.cell.id, theirs, number(one.ours, one.cell.unit) + spread, sign, seeds, one.outcome, how])
    return [list(HEADING), *body]


def text(rows: Sequence[Sequence[str]]) -> str:
    """Columns side by side, two spaces between; the last is not filled up."""
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def comma_separated(verdicts: Sequence[Verdict]) -> str:
    """One line for each cell, with its source and the values of the run that answers to it."""
    buffer = io.StringIO()
    names = (
        "id", "paper", "table", "row", "column", "length", "metric", "unit", "theirs", "their_deviation", "ours",
        "our_deviation", "difference", "seeds", "outcome", "tolerance", "reason", "command", "hours", "hours_hardware",
        "hours_source", "protocol", "recipe", "layer", "configuration", "note", "source",
    )  # fmt: skip
    writer = csv.DictWriter(buffer, names, lineterminator="\n")
    writer.writeheader()
    for one in verdicts:
        cell = dataclasses.asdict(one.cell)
        values = {name: cell[name] for name in names if name in cell}
        cost = one.cost or costs.Cost(math.nan, "", "")
        run = None if one.cell.recipe in ("bench", None) else run_of(one.cell)
        writer.writerow({
            **values, "theirs": cell["expected"], "their_deviation": cell["deviation"], "ours": one.ours,
            "our_deviation": one.spread, "difference": one.difference, "seeds": one.seeds, "outcome": one.outcome,
            "reason": one.reason, "command": one.command, "hours": "" if one.cost is None else round(cost.hours, 4),
            "hours_hardware": cost.hardware, "hours_source": cost.source, "protocol": "" if run is None else run.protocol,
            "configuration": "" if run is None else json.dumps(dataclasses.asdict(run), sort_keys=True),
        })  # fmt: skip
    return buffer.getvalue()


def render(paper: str, name: str, verdicts: Sequence[Verdict], ledger: Ledger, form: str = "text") -> str:
    """The whole table: as it is printed, cell by cell, and what is to be known of its numbers.

    Args:
        form: "text", "markdown", "latex" or "csv".
    """
    if form == "csv":
        return comma_separated(verdicts)
    source = figures.sources()[paper, name]
    draw = {"text": text, "markdown": markup.markdown, "latex": markup.latex}[form]
    remarks = [f"{title(source)}. Theirs / ours.", *notes(source, verdicts, ledger)]
    if form == "latex":
        return "\n".join([*(f"% {remark}" for remark in remarks), draw(matrix(verdicts)), "", draw(listing(verdicts)), ""])
    first, *rest = remarks
    ends = [f"- {remark}" for remark in rest] if form == "markdown" else rest
    return "\n".join([first, "", draw(matrix(verdicts)), "", draw(listing(verdicts)), "", *ends, ""])
