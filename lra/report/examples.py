"""Scores of single examples: kept with a run, by what the examples are like, and compared between layers."""

import csv
import io
import itertools
import json
import math
import pathlib
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from subquad.lra.files import explained, write_whole
from subquad.lra.report import csv_rows, results
from subquad.lra.report.csv_rows import Fault
from subquad.lra.report.results import Result
from subquad.lra.report.text_tables import Table
from subquad.lra.run import run_id
from subquad.lra.tasks import Task

Kept = Mapping[tuple[str, int], list[dict[str, str]]]  # (label, seed) -> the lines of its run
FILE = "test.csv"  # in a run's folder
MOST_GROUPS = 8  # columns of a table; more values become ranges with as many examples each
SIGNIFICANT = 0.05


def write(path: pathlib.Path, task: Task, split: Sequence[dict], scores: Sequence[float]) -> None:
    """Writes a line for each example: its number, its score, and its groups.

    The score is the share of its targets that are right; of a language model, bits per byte.
    """
    text = io.StringIO()
    lines = [{"example": number, "score": f"{score:.6g}", **task.groups(split[number])} for number, score in enumerate(scores)]
    rows = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    rows.writeheader()
    rows.writerows(lines)
    with explained(f"out: file {path} must be writable", "Make room and run again with --resume."):
        write_whole(path, text.getvalue().encode())


def read(rows: Sequence[Result], folder: pathlib.Path) -> tuple[Kept, list[Fault]]:
    """((label, seed) -> the lines of a run, why runs were left out), of the results with an accuracy.

    Runs lie in `folder`/runs. All have lines of the same examples, in their order. Labels are those of `results.labelled`.
    """
    found, faults = {}, []
    for label, group in results.labelled(rows).items():
        for row in group:
            path = path_of(row, folder, FILE)
            if row.accuracy is None or not path.exists():
                continue
            lines, fault = _lines(path, row.test_examples)
            if fault is None:
                found[label, row.seed] = (path, lines)
            else:
                faults.append(fault)
    # Where runs contradict each other on what the examples are, most of them are right.
    likes = {key: tuple(tuple(_groups(line).items()) for line in lines) for key, (_, lines) in found.items()}
    for usual, _ in Counter(likes.values()).most_common(1):
        for key, like in likes.items():
            if like != usual:
                at = next(at for at, (one, other) in enumerate(itertools.zip_longest(like, usual)) if one != other)
                got, wanted = (dict(lines[at]) if at < len(lines) else "no line" for lines in (like, usual))
                faults.append(Fault(found.pop(key)[0], at + 2, f"must be {wanted}, as in other runs, got {got}."))
    for fault in faults:
        csv_rows.warn_once(fault, "The run is left out of tables of examples; mend that line or train anew.")
    return {key: lines for key, (_, lines) in found.items()}, faults


def path_of(row: Result, folder: pathlib.Path, name: str) -> pathlib.Path:
    """A file of the run of a row, which lies in `folder`/runs."""
    return folder / "runs" / run_id({"layer": row.layer, "seed": row.seed, **json.loads(row.configuration)}) / name


def _lines(path: pathlib.Path, count: int) -> tuple[list[dict[str, str]], Fault | None]:
    """(the lines of a run's examples, the first thing that is wrong with them)."""
    lines, faults = csv_rows.sort_out_rows(path, _line)
    if faults:
        return [], faults[0]
    numbers = [int(line["example"]) for line in lines]
    for at, (number, wanted) in enumerate(itertools.zip_longest(numbers, range(count))):
        if number != wanted:
            must = "be absent" if wanted is None else f"be of example {wanted}"
            return [], Fault(path, at + 2, f"must {must}, of {count}, got {'no line' if number is None else number}.")
    for kind in _groups(lines[0]) if lines else ():
        words = [at for at, line in enumerate(lines) if not _is_number(line[kind])]
        if 0 < len(words) < len(lines) / 2:
            return [], Fault(path, words[0] + 2, f"must have a number as {kind}, got {lines[words[0]][kind]!r:.60}.")
    return lines, None


def _line(cells: dict[str, str]) -> dict[str, str]:
    if not _is_number(cells.get("score", "")) or not cells.get("example", "").isdigit():
        raise ValueError(f"example {cells.get('example')!r:.60} with score {cells.get('score')!r:.60}")
    return cells


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _groups(line: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in line.items() if name not in ("example", "score")}


def by_groups(kept: Kept) -> list[Table]:
    """For each kind of group the score of each layer on its examples, the mean over seeds."""
    first, tables = next(iter(kept.values())), []
    for kind in _groups(first[0]):
        groups = np.array(ranges([line[kind] for line in first]))
        shown = sorted(set(groups.tolist()), key=in_order)
        if len(shown) < 2:
            continue
        body = []
        for layer in dict.fromkeys(layer for layer, _ in kept):
            scores = np.mean([scores_of(lines) for (name, _), lines in kept.items() if name == layer], 0)
            body.append([layer, *(f"{100 * scores[groups == label].mean():.1f} %" for label in shown)])
        counts = [str((groups == label).sum()) for label in shown]
        tables.append(Table(f"Score by {kind}", [["layer", *shown], *body, ["examples", *counts]]))
    return tables


def ranges(values: Sequence[str]) -> list[str]:
    """The group of each value: itself, or where numbers have too many values a range with as many examples as the others.

    Example:
        >>> ranges(["a", "b", "a"])
        ['a', 'b', 'a']
    """
    if len(set(values)) <= MOST_GROUPS or not all(map(_is_number, values)):
        return list(values)
    numbers = np.array(values, float)
    edges = np.unique(np.quantile(numbers, (0, 0.25, 0.5, 0.75)))
    place = np.searchsorted(edges, numbers, side="right") - 1
    labels = [f"{numbers[place == at].min():g}-{numbers[place == at].max():g}" for at in range(len(edges))]
    return [labels[at] for at in place]


def in_order(label: str) -> tuple[float, str]:
    """What sorts labels: numbers, and ranges of them, by their size."""
    start = label.partition("-")[0]
    return (float(start) if start.isdigit() else 0.0, label)


def paired(kept: Kept) -> Table | None:
    """By how many examples each layer is better than each other, and whether `sign_flips` tells them apart.

    An example is right where all of its targets are. It counts once, by the mean over the seeds that both layers have: what
    several seeds make of one example are no independent draws. None: fewer than two layers with a common seed.
    """
    layers, right = list(dict.fromkeys(layer for layer, _ in kept)), {key: scores_of(lines) >= 1 for key, lines in kept.items()}
    cells = {}
    for one, other in itertools.combinations(layers, 2):
        seeds = [seed for layer, seed in kept if layer == one and (other, seed) in kept]
        if not seeds:
            continue
        differences = sum(right[one, seed].astype(int) - right[other, seed] for seed in seeds)
        points, mark = 100 * differences.mean() / len(seeds), "*" * (sign_flips(differences) < SIGNIFICANT)
        cells[one, other], cells[other, one] = f"{points:+.1f}{mark}", f"{0 - points:+.1f}{mark}"
    if not cells:
        return None
    body = [[one, *(cells.get((one, other), "") for other in layers)] for one in layers]
    note = (
        f"Points by which the layer of the row is better than that of the column. * Exact sign-flip test, p < {SIGNIFICANT:g}, "
        "of one value for each example, the mean over the seeds that both have; of one seed it is McNemar's. It tells these "
        "trained models apart, not what other seeds would give, and is not corrected for the number of pairs."
    )
    return Table("Layers compared on the same examples", [["", *layers], *body], [note])


def sign_flips(differences: np.ndarray) -> float:
    """How probable a sum of integers at least this far from 0 is where the sign of each is a coin's: exact, two-sided.

    Example:
        >>> round(sign_flips(np.array([1, 1, 1, 1, 1, 1, 0])), 6)
        0.03125
    """
    from scipy.signal import fftconvolve
    from scipy.stats import binom

    sizes, counts = np.unique(np.abs(differences[differences != 0]), return_counts=True)
    chances = np.ones(1)  # of each sum of those that are positive
    for size, count in zip(sizes, counts, strict=True):
        of_size = np.zeros(size * count + 1)
        of_size[::size] = binom.pmf(np.arange(count + 1), count, 0.5)
        chances = fftconvolve(chances, of_size) if len(chances) > 1 else of_size
    sums = 2 * np.arange(len(chances)) - (len(chances) - 1)
    return min(1.0, float(chances[np.abs(sums) >= abs(differences.sum())].sum()))


def intervals(rows: Sequence[Result]) -> Table | None:
    """The mean accuracy over seeds with its 95 % bootstrap interval; None where no layer has several."""
    body = []
    for label, group in results.labelled(rows).items():
        values = np.array([100 * row.accuracy for row in group if row.accuracy is not None])
        if len(values) > 1:
            means = np.random.default_rng(0).choice(values, (10_000, len(values))).mean(1)
            low, high = np.quantile(means, (0.025, 0.975))
            body.append([label, str(len(values)), f"{values.mean():.1f} %", f"{low:.1f} to {high:.1f} %"])
    if not body:
        return None
    note = "Bootstrap: seeds drawn with replacement 10,000 times; of few seeds such an interval is too narrow."
    return Table("Accuracy over seeds", [["layer", "seeds", "mean", "95 % interval"], *body], [note])


def scores_of(lines: Sequence[dict[str, str]]) -> np.ndarray:
    return np.array([float(line["score"]) for line in lines])
