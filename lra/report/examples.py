"""Scores of single examples: kept with a run, by what the examples are like, and compared between layers."""

import csv
import io
import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from subquad.lra.files import explained, write_whole
from subquad.lra.report import csv_rows, results
from subquad.lra.report.results import Result
from subquad.lra.report.text_tables import Table
from subquad.lra.run import Run
from subquad.lra.tasks import Task

Kept = Mapping[tuple[str, int], list[dict[str, str]]]  # (layer, seed) -> the lines of its run
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


def read(rows: Sequence[Result], folder: pathlib.Path) -> Kept:
    """(layer, seed) -> the lines of a run, of those results whose run lies in `folder`/runs."""
    found = {}
    for row, label in zip(rows, results.layer_labels(rows), strict=True):
        lines = csv_rows.read_rows(folder / "runs" / Run(**json.loads(row.configuration)).id / FILE)
        if lines:
            found[label, row.seed] = lines
    return found


def by_groups(kept: Kept) -> list[Table]:
    """For each kind of group the score of each layer on its examples, the mean over seeds."""
    first, tables = next(iter(kept.values())), []
    for kind in [column for column in first[0] if column not in ("example", "score")]:
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
    if len(set(values)) <= MOST_GROUPS:
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
    """By how many examples each layer is better than each other, and whether McNemar's exact test tells them apart.

    An example is right where all of its targets are; seeds that both layers have are counted together. None: fewer than two
    layers with a common seed.
    """
    from scipy.stats import binomtest

    layers = list(dict.fromkeys(layer for layer, _ in kept))
    cells = {}
    for one, other in itertools.permutations(layers, 2):
        seeds = [seed for layer, seed in kept if layer == one and (other, seed) in kept]
        if not seeds:
            continue
        right = [np.concatenate([scores_of(kept[layer, seed]) >= 1 for seed in seeds]) for layer in (one, other)]
        only, only_other = int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())
        differ = only + only_other
        significant = differ > 0 and binomtest(only, differ).pvalue < SIGNIFICANT
        cells[one, other] = f"{100 * (only - only_other) / len(right[0]):+.1f}" + "*" * bool(significant)
    if not cells:
        return None
    body = [[one, *(cells.get((one, other), "") for other in layers)] for one in layers]
    note = (
        f"Points by which the layer of the row is better than that of the column. * McNemar's exact test, p < {SIGNIFICANT:g}, "
        "on examples with all targets right for one of the two; not corrected for the number of pairs."
    )
    return Table("Layers compared on the same examples", [["", *layers], *body], [note])


def intervals(rows: Sequence[Result]) -> Table | None:
    """The mean accuracy over seeds with its 95 % bootstrap interval; None where no layer has several."""
    accuracies: dict[str, list[float]] = {}
    for row, label in zip(rows, results.layer_labels(rows), strict=True):
        if row.accuracy is not None:
            accuracies.setdefault(label, []).append(100 * row.accuracy)
    several = {layer: np.array(values) for layer, values in accuracies.items() if len(values) > 1}
    if not several:
        return None
    body = []
    for layer, values in several.items():
        means = np.random.default_rng(0).choice(values, (10_000, len(values))).mean(1)
        low, high = np.quantile(means, (0.025, 0.975))
        body.append([layer, str(len(values)), f"{values.mean():.1f} %", f"{low:.1f} to {high:.1f} %"])
    note = "Bootstrap: seeds drawn with replacement 10,000 times; of few seeds such an interval is too narrow."
    return Table("Accuracy over seeds", [["layer", "seeds", "mean", "95 % interval"], *body], [note])


def scores_of(lines: Sequence[dict[str, str]]) -> np.ndarray:
    return np.array([float(line["score"]) for line in lines])
