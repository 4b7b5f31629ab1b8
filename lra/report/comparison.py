"""A published table beside what was run here: theirs, ours, the difference, and what came of each cell."""

import csv
import dataclasses
import io
import json
from collections.abc import Iterable, Sequence
from typing import Any, get_args

from subquad.lra import tasks
from subquad.lra.bench import programs
from subquad.lra.report import cells, published, results, text_tables
from subquad.lra.report.ledger import Ledger
from subquad.lra.report.verdicts import Average, Outcome, Verdict, averages, run_of

# Outcomes that are counted only where there are some.
RARE = ("baseline", "no comparison")
FORMS = ("text", "markdown", "latex", "csv", "json")
# Of a cell that another published value of the same configuration contradicts.
CONTRADICTED = "†"
NO_COMPARISON = (
    "No comparison: the paper's Transformer keeps all its logits in memory, our softmax none, so ratios to it, at batch 1 on "
    f"a CPU above all, say nothing of the paper's. --run measures beside {programs.PLAIN}, which keeps them, at the paper's "
    f"batch of {programs.PAPERS_BATCH}, or where that does not fit at the largest power of two that does."
)


def title(source: published.Source) -> str:
    """One line: paper, table, title."""
    number = f", arXiv {source.arxiv}" * bool(source.arxiv)
    return f"{source.paper}, table {source.table}: {source.title}. {source.work}{number}"


def notes(source: published.Source, verdicts: Sequence[Verdict], ledger: Ledger) -> list[str]:
    """What is to be known of the numbers: where theirs were read, what ours were run on, floors, marks."""
    found = [f"Theirs: {source.where}" + f"; {source.hardware}" * bool(source.hardware) + "."]
    machines = sorted({row.hardware for one in verdicts for row in one.results} | {one.hardware for one in verdicts} - {""})
    found += [f"Ours: {machine}." for machine in machines]
    commits = sorted({row.commit[:12] for one in verdicts for row in one.results})
    if commits:
        found.append(f"Commits of our runs: {', '.join(commits)}.")
        seeds = sorted({one.seeds for one in verdicts if one.results})
        found.append(f"Seeds of each of ours: {' or '.join(map(str, seeds))}.")
    noted: dict[str, list[str]] = {}
    for one in verdicts:
        if one.cell.note and one.results:
            noted.setdefault(one.cell.note, []).append(one.cell.row)
    found += [f"{', '.join(dict.fromkeys(rows))}: {note.rstrip('.')}." for note, rows in noted.items()]
    if any(one.cell.metric == "accuracy" for one in verdicts):
        found += floors(verdicts, ledger)
        if any(one.theirs_marked or one.ours_marked for one in averages(verdicts)):
            found.append("* A Path-X that failed, or that a table leaves out, counts as 50 in the average of six tasks.")
        deviating = f"twice the published deviation where there is one, {cells.LEAST_TOLERANCE:g} point at least"
        found.append(f"Tolerance: {cells.TOLERANCE:g} points; {deviating}.")
    if any(one.cell.unit == "ratio" for one in verdicts):
        tolerated = f"the difference is a factor, tolerated up to {cells.RATIO_TOLERANCE:g}"
        found.append(f"Ratios: to the Transformer's, measured in turn with it; {tolerated}.")
        if any(one.outcome == "no comparison" for one in verdicts):
            found.append(NO_COMPARISON)
    if any(mark.endswith(CONTRADICTED) for mark in footnotes(verdicts).values()):
        found.append(f"{CONTRADICTED} Another paper has a value of the same configuration beyond the tolerance.")
    count = lambda name: sum(one.outcome == name and one.cell.task != "average" for one in verdicts)
    return [*found, "; ".join(f"{count(name)} {name}" for name in get_args(Outcome) if name not in RARE or count(name)) + "."]


def floors(verdicts: Iterable[Verdict], ledger: Ledger) -> list[str]:
    """A line for each task: what rules reach that see next to nothing, in per cent of test."""
    found, seen = [], set()
    for one in verdicts:
        if one.cell.task == "average" or not one.cell.overrides:
            continue
        run = run_of(one.cell) if one.cell.recipe != "bench" else None
        if run is None or (run.task, run.config) in seen:
            continue
        seen.add((run.task, run.config))
        known = {name: floor.value for name, floor in ledger.floors.get((run.task, run.config), {}).items()}
        for row in one.results:
            scores = {name: getattr(row, f"floor_{name}") for name in results.FLOORS}
            known = {**{name: value for name, value in scores.items() if value is not None}, **known}
        # A guess among the classes, where the task does not say what guessing reaches.
        chance = [] if "chance" in known else [f"chance {100 / tasks.find_task(run.task, run.config).num_classes:.0f}"]
        words = [f"{what} {100 * known[name]:.1f}" for name, what in results.FLOORS.items() if name in known]
        more = "" if words else f"; others by subquad table --floors {run.task}/{run.config}"
        found.append(f"Floors of {run.task}/{run.config}, %: {', '.join([*chance, *words])}{more}.")
    return found


def footnotes(verdicts: Iterable[Verdict]) -> dict[str, str]:
    """Sentence -> its mark: what runs do otherwise than their papers, and other values of the same configurations.

    Marks are numbers in the order of the cells, with a dagger where the other value is a contradiction.
    """
    found: dict[str, str] = {}
    for one in verdicts:
        if one.cell.task != "average" and not one.cell.cannot:
            for sentence, contradicts in remarks(one.cell):
                found.setdefault(sentence, f"{len(found) + 1}{CONTRADICTED * contradicts}")
    return found


def remarks(cell: cells.Cell) -> list[tuple[str, bool]]:
    """(sentence, whether it is a contradiction) of a cell."""
    found = [(sentence, False) for sentence in cell.deviations]
    for other in cells.published_elsewhere(cell):
        contradicts = cells.contradict(cell, other)
        value, unit = _value(other), " %" * (other.unit == "%" and other.value is not None)
        words = "contradicted by" if contradicts else "also published:"
        printed = f"table {other.table}, row {other.row}" if other.paper == cell.paper else other.source
        found.append((f"{cell.id} ({_value(cell)}) {words} {value}{unit} of {printed}.", contradicts))
    return found


def matrix(verdicts: Sequence[Verdict]) -> list[list[str]]:
    """The table as it is printed, heading first: a row for each model, and in every cell theirs and ours."""
    shown = [one for one in verdicts if one.cell.task != "average"]
    columns = list(dict.fromkeys((one.cell.task, one.cell.length, one.cell.metric, one.cell.unit) for one in shown))
    of = {(one.cell.row, one.cell.task, one.cell.length, one.cell.metric): one for one in shown}
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
    contradicted = any(cells.contradict(one.cell, other) for other in cells.published_elsewhere(one.cell))
    return f"{_value(one.cell)}{CONTRADICTED * contradicted} / {number(one.ours, one.cell.unit)}"


def _value(cell: cells.Cell) -> str:
    return "chance" if cell.value is None else number(cell.value, cell.unit)


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


HEADING = ("cell", "theirs", "ours", "difference", "seeds", "outcome", "notes", "why, or how")


def listing(verdicts: Sequence[Verdict]) -> list[list[str]]:
    """A line for each cell, heading first; its notes are the marks of `footnotes`."""
    body, marks = [], footnotes(verdicts)
    for one in verdicts:
        if one.cell.task == "average":
            continue
        spread = "" if one.spread is None else f" ± {one.spread:.2f}"
        sign = "x{:.2f}" if one.cell.unit == "ratio" else "{:+.2f}"
        sign = "" if one.difference is None else sign.format(one.difference)
        how = f"{one.command} [{one.cost}]" if one.command else one.reason
        theirs = _value(one.cell) + ("" if one.cell.deviation is None else f" ± {one.cell.deviation:g}")
        marked = [] if one.cell.cannot else [marks[sentence] for sentence, _ in remarks(one.cell)]
        ours = number(one.ours, one.cell.unit) + spread
        body.append([one.cell.id, theirs, ours, sign, str(one.seeds or ""), one.outcome, " ".join(marked), how])
    return [list(HEADING), *body]


def records(verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """A record for each cell, with its source, the values of the run that answers to it, and what is to be known of it."""
    names = ("id", "paper", "table", "row", "length", "metric", "unit", "tolerance", "recipe", "layer", "note", "source")
    found = []
    for one in verdicts:
        cell, cost = one.cell, one.cost
        run = None if cell.recipe in ("bench", None) else run_of(cell)
        other = [] if cell.cannot else cells.published_elsewhere(cell)
        found.append({
            **{name: getattr(cell, name) for name in names}, "column": cell.task,
            "theirs": cell.value, "their_deviation": cell.deviation, "ours": one.ours, "our_deviation": one.spread,
            "difference": one.difference, "seeds": one.seeds, "outcome": one.outcome, "reason": one.reason,
            "command": one.command, "hours": cost and round(cost.hours, 4), "hours_hardware": cost and cost.hardware,
            "hours_source": cost and cost.source, "protocol": run and run.protocol,
            "configuration": run and json.dumps(dataclasses.asdict(run), sort_keys=True),
            "deviations": list(cell.deviations),
            "published_elsewhere": [f"{one.id}: {_value(one)}" for one in other],
            "contradicted_by": [f"{one.id}: {_value(one)}" for one in other if cells.contradict(cell, one)],
        })  # fmt: skip
    return found


def _comma_separated(verdicts: Sequence[Verdict]) -> str:
    rows = records(verdicts)
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    # A list is a cell of sentences.
    writer.writerows({name: "; ".join(v) if isinstance(v, list) else v for name, v in row.items()} for row in rows)
    return buffer.getvalue()


def render(paper: str, name: str, verdicts: Sequence[Verdict], ledger: Ledger, form: str = "text") -> str:
    """The whole table: as it is printed, cell by cell, and what is to be known of its numbers.

    Args:
        form: one of `FORMS`.
    """
    if form == "csv":
        return _comma_separated(verdicts)
    if form == "json":
        return json.dumps(records(verdicts), indent=1) + "\n"
    source = published.sources()[paper, name]
    draw = {"text": text_tables.aligned, "markdown": text_tables.markdown, "latex": text_tables.latex}[form]
    first, *rest = [f"{title(source)}. Theirs / ours.", *notes(source, verdicts, ledger)]
    marked = [[mark, sentence] for sentence, mark in footnotes(verdicts).items()]
    if form == "latex":
        drawn = [draw(rows) for rows in (matrix(verdicts), listing(verdicts), [["note", ""], *marked]) if len(rows) > 1]
        return "\n".join([*(f"% {remark}" for remark in (first, *rest)), "\n\n".join(drawn), ""])
    rest += [f"[{mark}] {sentence}" for mark, sentence in marked]
    ends = [f"- {remark}" for remark in rest] if form == "markdown" else rest
    return "\n".join([first, "", draw(matrix(verdicts)), "", draw(listing(verdicts)), "", *ends, ""])
