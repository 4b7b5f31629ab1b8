"""The sections of a page about layers: what they cost against length, what they can do, and published tables beside ours."""

import json
import math
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from subquad.lra.data.diagnostics import configs as diagnostics
from subquad.lra.report import cells, comparison, csv_rows, examples, ledger, measurements, plots, results, verdicts
from subquad.lra.report.ledger import Ledger
from subquad.lra.report.measurements import Measurement, layer_label, length_label
from subquad.lra.report.page import Section
from subquad.lra.report.results import Result
from subquad.lra.report.text_tables import Table


def cost(rows: Iterable[Measurement]) -> Section:
    """Time and memory against length of measurements of one model, and where each layer becomes cheaper than the baseline."""
    every = list(rows)
    rows = [row for row in every if row.median_ms]
    says = (
        "Time per token and memory against length, measured on this machine in turn: what a layer costs here, and from which "
        "length it pays. It does not say what a GPU would take, nor how well a layer learns."
    )
    if not rows:
        return Section("Cost", says)
    tables = [growth([row for row in every if row.mode == mode]) for mode in dict.fromkeys(row.mode for row in rows)]
    return Section("Cost", says, tables, [(plots.cost_against_length(rows), "time and memory against length")])


def growth(rows: Sequence[Measurement]) -> Table:
    """How time and memory of one mode grow with the length, and where each layer becomes cheaper than the baseline.

    Rows of what could not be measured are told below.
    """
    rows, failed = [row for row in rows if row.median_ms], [row for row in rows if not row.median_ms]
    lines: dict[str, dict[int, Measurement]] = {}
    for row in sorted(rows, key=lambda row: row.length):
        lines.setdefault(layer_label(row, rows), {})[row.length] = row
    one, shortest, longest = rows[0], min(row.length for row in rows), max(row.length for row in rows)
    short, long = length_label(shortest), length_label(longest)
    heading = [
        "layer", "time grows as", "memory grows as", f"µs per token at {short}", f"at {long}", f"MiB at {long}",
        f"cheaper than {one.baseline}",
    ]  # fmt: skip
    body = []
    for name, at in lines.items():
        power = lambda column, at=at: plots.slope([(length, getattr(row, column)) for length, row in at.items()])
        per_token = lambda length, at=at: f"{1e3 * at[length].median_ms / length:.2f}" if length in at else ""
        memory = f"{at[longest].peak_bytes / 2**20:.1f}" if longest in at else ""
        powers = ["" if found is None else f"T^{found:.2f}" for found in map(power, ("median_ms", "peak_bytes"))]
        body.append([name, *powers, per_token(shortest), per_token(longest), memory, crossover_words(at.values())])
    note = f"Medians of calls in turn; growth between the two longest lengths. {one.hardware}; {measurements.commits(rows)}."
    body += [[name, *[""] * (len(heading) - 1)] for name in dict.fromkeys(row.layer for row in failed) if name not in lines]
    without = [f"{row.layer} at {length_label(row.length)}: {row.status}" for row in failed]
    return Table(f"{one.model}, {one.mode}, batch {one.batch_size}, {one.dtype}", [heading, *body], [note, *without])


def measured(rows: Sequence[Measurement]) -> Section:
    """All that was measured of one model, see `measurements.groups`: growth, speed and memory at each length, and the rest."""
    section, one = cost(rows), rows[0]
    title = f"{one.model}, batch {one.batch_size}, {one.dtype}, {one.hardware}"
    return replace(section, title=title, tables=[*section.tables, *measurements.tables(rows)])


def crossover(rows: Iterable[Measurement]) -> float:
    """The length from which on a layer is faster than its baseline, on a line between measured lengths; both logarithmic.

    Returns: 0 where it is faster at every length, inf where it is not at the longest one.
    """
    rows = sorted((row for row in rows if row.speed_ratio), key=lambda row: row.length)
    slower = [at for at, row in enumerate(rows) if row.speed_ratio <= 1]
    if not slower:
        return 0.0
    if slower[-1] == len(rows) - 1:
        return math.inf
    before, after = rows[slower[-1]], rows[slower[-1] + 1]
    part = -math.log(before.speed_ratio) / (math.log(after.speed_ratio) - math.log(before.speed_ratio))
    return before.length * (after.length / before.length) ** part


def crossover_words(rows: Iterable[Measurement]) -> str:
    """What `crossover` finds, in words."""
    rows = list(rows)
    if not any(row.speed_ratio for row in rows) or rows[0].layer == rows[0].baseline:
        return ""
    found = crossover(rows)
    if found == 0:
        return "at every length"
    if math.isinf(found):
        return f"not up to {length_label(max(row.length for row in rows))}"
    return f"from about {float(f'{found:.2g}'):,.0f}"


def ability(
    rows: Iterable[Result], says: str, title: str = "Ability", reasons: Mapping[tuple[str, str], str] = {}
) -> Section:
    """What each layer reached on each task, the mean over seeds, with chance below; colours run from chance to all right.

    Args:
        reasons: (layer, task, or task/config) -> why the layer cannot do it.
    """
    rows = at_each_length(rows)
    kinds = list(dict.fromkeys((row.task, row.config) for row in rows))
    chance = {(row.task, row.config): _chance(row) for row in rows}
    rules = {(row.task, row.config): max(filter(None, floors), default=None) for row in rows if (floors := _rules(row))}
    of: dict[tuple, list[Result]] = {}
    for group in results.groups(rows):
        of.setdefault((group[0].layer, group[0].task, group[0].config), group)
    layers = list(dict.fromkeys([*(row.layer for row in rows), *(layer for layer, _ in reasons)]))
    body, shades = [], []
    for layer in layers:
        groups = [of.get((layer, *kind)) for kind in kinds]
        without = ["cannot" if {(layer, task), (layer, f"{task}/{config}")} & reasons.keys() else "" for task, config in kinds]
        scores = [word if group is None else results.score_of_seeds(group) for group, word in zip(groups, without, strict=True)]
        body.append([layer, *scores])
        shades.append([None, *(_shade(group, chance[kind]) for kind, group in zip(kinds, groups, strict=True))])
    for name, known in (("chance", chance), ("best simple rule", rules)):
        if any(known.get(kind) for kind in kinds):
            body.append([name, *(results.floor_cell("chance", known.get(kind)) for kind in kinds)])
            shades.append([None] * (1 + len(kinds)))
    notes = [f"{column_title(*kind)}: {_trained(rows, *kind)}" for kind in kinds if AT not in kind[1]]
    notes += [f"{layer} cannot do {task}: {reason}" for (layer, task), reason in reasons.items()]
    heading = ["layer", *(column_title(*kind) for kind in kinds)]
    return Section(title, says, [Table("Score on test", [heading, *body], notes, shades)] if rows else [])


AT = " at "  # between a configuration and the length that it was tested at


def at_each_length(rows: Iterable[Result]) -> list[Result]:
    """The rows, and after each one more for every other length that it was tested at, in the configuration "small at 48"."""
    found = []
    for row in rows:
        found.append(row)
        for length, score in json.loads(row.scores_by_length or "{}").items():
            task = diagnostics.CONFIGS.get(row.task, {}).get(row.config)
            chance = task.at_length(int(length)).chance if task else None
            status, accuracy = (score, None) if isinstance(score, str) else (row.status, score)
            config = row.config + AT + length
            configuration = json.dumps({**json.loads(row.configuration), "config": config})
            found.append(replace(row, config=config, configuration=configuration, status=status, accuracy=accuracy,
                                 floor_chance=chance, scores_by_length=None))  # fmt: skip
    return found


def column_title(task: str, config: str) -> str:
    """A task in its configuration, whose usual one is not named: "recall", "recall/overwritten", "parity at 48"."""
    return f"{task}/{config}".replace("/small", "")


def _chance(row: Result) -> float | None:
    return row.floor_chance or row.floor_majority


def _rules(row: Result) -> list[float | None]:
    return [row.floor_root, row.floor_bag, row.floor_network]


def _shade(group: Sequence[Result] | None, chance: float | None) -> float | None:
    scores = [row.accuracy for row in group or () if row.accuracy is not None]  # none of a language model
    return (sum(scores) / len(scores) - (chance or 0)) / (1 - (chance or 0)) if scores else None


def _trained(rows: Sequence[Result], task: str, config: str) -> str:
    its = [row for row in rows if (row.task, row.config) == (task, config)]
    unit = "bits per byte; " if any(row.bits_per_byte is not None for row in its) else ""
    recipes, counts = (results.distinct(getattr(row, name) for row in its) for name in ("recipe", "test_examples"))
    return f"{unit}recipe {recipes}, {results.trained(its)}, {counts} examples of {its[0].split}."


def arena(known: Ledger, tables: Sequence[tuple[str, str]]) -> Section:
    """The published tables of which cells were run, theirs beside ours."""
    found, notes = [], []
    for paper, name in tables:
        judged = [verdicts.judge(cell, known) for cell in cells.cells_of_table(paper, name)]
        if any(one.ours is not None for one in judged):
            source = comparison.published.sources()[paper, name]
            found.append(Table(comparison.title(source), comparison.matrix(judged), comparison.notes(source, judged, known)))
        else:
            notes.append(f"{paper}, table {name}")
    says = (
        "Published figures, and ours where their recipe was run: theirs / ours; - is a cell that was not run. "
        "Nothing here was trained by this command."
    )
    if notes:
        says += f" No cell of these was run: {'; '.join(notes)}."
    return Section("Arena", says, found)


def damaged(paths: Iterable[str | os.PathLike], more: Iterable[csv_rows.Fault] = ()) -> list[Section]:
    """A section of the lines of files that cannot be read, or contradict themselves; none where there are none.

    The rows that come with the package are looked at, too; `more` are what was found elsewhere.
    """
    faults = [*ledger.verify_files(paths)[1], *more]
    if not faults:
        return []
    says = "Lines that cannot be read, or say two things. They count nowhere above: mend or delete them."
    body = [[str(one.path), str(one.line), one.reason] for one in faults]
    return [Section("Damaged rows", says, [Table("Faults", [["file", "line", "fault"], *body])])]


def training(rows: Sequence[Result], folder: pathlib.Path) -> tuple[Section, list[csv_rows.Fault]]:
    """The table of runs of one task and recipe, their accuracy against cost, how they learned, and where they differ.

    Args:
        folder: of the CSV; runs that lie beside it, in runs/, have curves and scores of single examples.
    Returns: the section, and the lines of those runs that cannot be read.
    """
    one, pictures = rows[0], []
    if any(row.accuracy is not None and row.flops_per_step for row in rows):
        pictures.append((plots.accuracy_against_cost(rows), "accuracy against cost"))
    with_runs = rows if (folder / "runs").is_dir() else []  # ten thousand rows without are not looked for one by one
    curves, faults = {}, []
    for row in with_runs:
        validations, fault = _validations(row, folder)
        faults += fault
        if validations:
            curves[row] = validations
    if curves:
        pictures.append((plots.learning_curves(curves), "validation against steps"))
    tables = [Table("Score and cost", results.cells(rows), [results.caption(rows)]), examples.intervals(rows)]
    kept, more = examples.read(with_runs, folder)
    if kept:
        tables += [examples.paired(kept), *examples.by_groups(kept)]
    says = "Scores on test, the mean over seeds, and what a training step costs."
    return Section(f"{one.task}/{one.config}, {one.recipe}", says, list(filter(None, tables)), pictures), [*faults, *more]


def _validations(row: Result, folder: pathlib.Path) -> tuple[list[tuple[int, float]], list[csv_rows.Fault]]:
    """((step, score) of each validation of a run, from its history; the first line that cannot be read, which leaves none)."""
    score = "validation_accuracy" if row.bits_per_byte is None else "validation_bits_per_byte"
    of_line = lambda cells: (int(cells.get("step", "")), float(cells[score])) if cells.get(score) else None
    found, faults = csv_rows.sort_out_rows(examples.path_of(row, folder, "history.csv"), of_line)
    for fault in faults[:1]:
        csv_rows.warn_once(fault, "The run's curve is left out; mend that line or train anew.")
    return [] if faults else list(filter(None, found)), faults[:1]
