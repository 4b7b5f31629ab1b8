"""What runs found: one CSV row each, and the table and plot made of the rows."""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from subquad.lra import machine
from subquad.lra.files import RunError, explained
from subquad.lra.report import csv_rows, text_tables


@dataclass(frozen=True)
class Result:
    """One run. The fields are the columns of the CSV; a field that does not apply is None, an empty cell.

    Accuracies are fractions of 1, all on the split that `split` names unless the name says train or validation.
    """

    status: str  # "ok", or "failed: " and why
    layer: str
    task: str
    config: str
    recipe: str
    seed: int
    accuracy: float | None  # of the parameters that `selection` picks
    accuracy_best: float | None  # of the best step on validation
    accuracy_last: float | None  # of the last step
    best_step: int | None
    validation_accuracy_best: float | None
    validation_accuracy_last: float | None
    train_loss_last: float | None  # mean over the last tenth of the steps
    floor_majority: float | None
    floor_root: float | None
    selection: str
    split: str
    test_examples: int
    parameters: int
    steps: int
    batch_size: int
    steps_per_second: float | None
    train_seconds: float | None
    compile_seconds: float | None
    flops_per_step: int | None
    memory_temporary_bytes: int | None
    memory_peak_bytes: int | None
    configuration: str  # JSON of every value of the run
    data: str
    source: str
    commit: str
    versions: str
    hardware: str
    finished_utc: str
    # Files of earlier versions have no columns for what follows.
    protocol: str | None = None  # "lra-2020" or "modern"
    configuration_hash: str | None = None  # of `configuration`, see `configuration_hash`
    collapsed_step: int | None = None  # first validation at chance after one clearly above it, see `collapse`
    bits_per_byte: float | None = None  # of a language model, as `accuracy`, `accuracy_best` and `accuracy_last`
    bits_per_byte_best: float | None = None
    bits_per_byte_last: float | None = None
    floor_bag: float | None = None  # how often each token occurs, and no order
    floor_network: float | None = None  # a small convolutional network, see `network_floor`
    floor_unigram: float | None = None  # bits per byte of the tokens' frequencies
    floor_bigram: float | None = None  # of those after one token
    accuracy_train: float | None = None  # as `accuracy`, of drawn training examples, as many as of test
    bits_per_byte_train: float | None = None
    floor_chance: float | None = None  # what guessing reaches by the task's own definition
    accuracy_sequences: float | None = None  # of sequences with several targets: those with all of them right
    stopped_step: int | None = None  # that early stopping ended the run at
    scores_by_length: str | None = None  # JSON: a length of test examples -> the score of `selection`, or why there is none


FIELDS = csv_rows.column_names(Result)
# Columns that are values of the run.
OF_RUN = ("layer", "task", "config", "recipe", "protocol", "seed", "selection", "steps", "batch_size")


def network_floor(task: str, config: str) -> float | None:
    """What the small network of `data.small_network` reached on a task of pictures, if measured: results/floors.csv."""
    floors = csv_rows.read_rows(pathlib.Path(__file__).parents[1] / "results" / "floors.csv")
    found = {(row["task"], row["config"]): row["value"] for row in floors if row["floor"] == "network"}
    return float(found[task, config]) if (task, config) in found else None


def configuration_hash(configuration: str | Mapping) -> str:
    """16 hexadecimal digits that name a configuration, the JSON text or the values.

    Example:
        >>> configuration_hash({"b": 1, "a": 2}) == configuration_hash('{"a": 2, "b": 1}')
        True
    """
    values = json.loads(configuration) if isinstance(configuration, str) else configuration
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def append(result: Result, path: str | os.PathLike, key: Sequence[str] = FIELDS) -> None:
    """Adds a row to a CSV file, which is made if it is not there; one with the same `key` cells takes the older one's place.

    See `csv_rows.write_rows` for several processes.

    Raises: RunError: the file cannot be written, or has other columns; the message carries the row, so nothing is lost.
    """
    try:
        csv_rows.write_rows(path, Result, [result], key)
    except RunError as error:
        row = csv_rows.row_as_line(dataclasses.asdict(result), FIELDS)
        raise RunError(f"{str(error).rstrip('.')}; the row was: {row}") from error


def columns_of_run(run, task, devices: int = 1) -> dict:
    """The columns that are known of a run whatever comes of it."""
    configuration = json.dumps(dataclasses.asdict(run), sort_keys=True)
    return dict(
        **{name: getattr(run, name) for name in OF_RUN}, configuration=configuration,
        configuration_hash=configuration_hash(configuration), split="test", test_examples=task.splits["test"],
        source=task.source, finished_utc=machine.utc_now(), **machine.environment(devices),
    )  # fmt: skip


def failure(run, task, reason: str) -> Result:
    """The row of a run that could not be trained."""
    known = columns_of_run(run, task) | dict(status=f"failed: {reason}", data=task.dataset, parameters=0)
    return Result(**(dict.fromkeys(FIELDS) | known))


def write_text(text: str, path: str | os.PathLike, cure: str = "Choose another with --out.") -> None:
    """Writes a text file.

    Raises: RunError: it cannot be written; the message ends with `cure`.
    """
    with explained(f"results: file {path} must be writable", cure, OSError):
        pathlib.Path(path).write_text(text)


def show(rows: Iterable[Result]) -> None:
    """Prints the table and its caption on stdout."""
    rows = list(rows)
    # The reason of a failure is long, and wraps.
    text_tables.print_table(cells(rows), unbroken=lambda name: not name.startswith("test "), squeeze=True)
    print(caption(rows))


def read_results(path: str | os.PathLike) -> list[Result]:
    """The rows of a CSV file, see `csv_rows.read_rows`. Columns that an earlier version did not have are None."""
    return csv_rows.read_rows(path, Result)


# What rules reach that see next to nothing of the input: the columns floor_..., the keys of `Task.floors`. The last two are
# bits per byte.
FLOORS = {
    "chance": "a guess",
    "majority": "the commonest answer",
    "root": "the commonest answer given the root operator",
    "bag": "a linear rule on how often each token occurs",
    "network": "a small convolutional network",
    "unigram": "counts of bytes",
    "bigram": "counts of bytes after one byte",
}
# What the table shows beside the layer: heading, and the cell of a group of rows that differ in seed only.
COLUMNS = {
    "test accuracy": lambda rows: score_of_seeds(rows),
    **{f"{name} floor": lambda rows, name=name: floor_cell(name, getattr(rows[0], f"floor_{name}")) for name in FLOORS},
    "parameters": lambda rows: f"{rows[0].parameters:,}" if rows[0].parameters else "",
    "steps/s": lambda rows: _mean(rows, "steps_per_second", lambda rate: f"{rate:.1f}" if rate < 10 else f"{rate:.0f}"),
    "peak memory": lambda rows: _mean(rows, "memory_peak_bytes", lambda size: f"{size / 2**20:.1f} MiB"),
    "FLOPs/step": lambda rows: _mean(rows, "flops_per_step", lambda count: f"{count / 1e9:.2f} G"),
}


def layer_labels(rows: Sequence[Result]) -> list[str]:
    """The layer of each row, with its options where the rows have it with several."""
    options = [json.dumps(json.loads(row.configuration).get("layer_options", {}), sort_keys=True) for row in rows]
    known: dict[str, set[str]] = {}
    for row, given in zip(rows, options, strict=True):
        known.setdefault(row.layer, set()).add(given)
    several = {layer for layer, given in known.items() if len(given) > 1}
    return [f"{row.layer} {given}" if row.layer in several else row.layer for row, given in zip(rows, options, strict=True)]


def groups(rows: Iterable[Result]) -> list[list[Result]]:
    """Rows that differ in nothing but the seed, together; of two rows of one run the later. Best accuracy first."""
    latest: dict[str, Result] = {}
    for row in rows:
        latest[row.configuration] = row
    found: dict[str, list[Result]] = {}
    for row in latest.values():
        without_seed = {name: value for name, value in json.loads(row.configuration).items() if name != "seed"}
        found.setdefault(json.dumps(without_seed, sort_keys=True), []).append(row)
    worth = lambda row: -row.bits_per_byte if row.bits_per_byte is not None else row.accuracy or 0.0
    return sorted(found.values(), key=lambda group: -statistics.mean(map(worth, group)))


def _models_language(rows: Iterable[Result]) -> bool:
    return any(row.bits_per_byte is not None for row in rows)


def cells(rows: Iterable[Result]) -> list[list[str]]:
    """The table as text, heading first; without the floors that the task has not."""
    rows = list(rows)
    labels = {row.configuration: label for row, label in zip(rows, layer_labels(rows), strict=True)}
    judged = "test bits per byte" if _models_language(rows) else "test accuracy"
    heading = ["layer", *(judged if name == "test accuracy" else name for name in COLUMNS)]
    body = [[labels[group[0].configuration], *(cell(group) for cell in COLUMNS.values())] for group in groups(rows)]
    kept = [at for at, name in enumerate(heading) if not name.endswith("floor") or any(line[at] for line in body)]
    return [[line[at] for at in kept] for line in (heading, *body)]


def markdown(rows: Iterable[Result]) -> str:
    """The table in Markdown, with a line below that says what it was measured on; "" without rows."""
    rows = list(rows)
    if not rows:
        return ""
    return f"{text_tables.markdown(cells(rows))}\n\n{caption(rows)}\n"


def caption(rows: Sequence[Result]) -> str:
    """One sentence each: task, training, selection, floors, machine."""
    one = rows[0]
    seeds = sorted({row.seed for row in rows})
    chosen = "best on validation" if one.selection == "best" else "of the last step"
    known = [name for name in FLOORS if getattr(one, f"floor_{name}") is not None]
    floors = "".join(f"; {name} floor: {FLOORS[name]}" for name in known)
    judged, error = "Bits per byte", ""
    if not _models_language(rows):
        judged = "Accuracy"
        error = f", which leaves a standard error of up to {100 * math.sqrt(0.25 / one.test_examples):.1f} points"
    return (
        f"Task {one.task} ({one.data}), recipe {one.recipe}, {one.steps} steps of {one.batch_size}, "
        f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}. {judged} on the {one.test_examples} "
        f"examples of the {one.split} split{error}, parameters {chosen}{floors}. "
        "Peak memory of the compiled training step, its inputs included; FLOPs counted from its jaxpr. "
        f"{machine_of_row(one)}"
    )


def machine_of_row(row: Result) -> str:
    """Where a row is from, as a sentence."""
    return f"{row.hardware}; {row.versions}; commit {row.commit[:12]}."


def score_of_seeds(rows: Sequence[Result]) -> str:
    """Of rows that differ in seed only: accuracy, or bits per byte."""
    name, scale, digits, unit = ("bits_per_byte", 1, 3, "") if _models_language(rows) else ("accuracy", 100, 1, " %")
    values = [scale * getattr(row, name) for row in rows if row.status == "ok"]
    failures = [row.status for row in rows if row.status != "ok"]
    if not values:
        return failures[0]
    text = f"{statistics.mean(values):.{digits}f}{unit}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.{digits}f} ({len(values)} seeds)"
    collapsed = sum(row.collapsed_step is not None for row in rows)
    return text + (f", {collapsed} collapsed" if collapsed else "") + (f", {len(failures)} failed" if failures else "")


def _mean(rows: Sequence[Result], name: str, write) -> str:
    values = [getattr(row, name) for row in rows if getattr(row, name) is not None]
    return write(statistics.mean(values)) if values else ""


def floor_cell(name: str, value: float | None) -> str:
    """A floor as tables show it; "" where there is none."""
    if value is None:
        return ""
    return f"{value:.3f}" if name in ("unigram", "bigram") else f"{100 * value:.1f} %"
