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
from subquad.lra.run import Run


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

    def check(self) -> None:
        """Raises: ValueError: no run can have left this row: an "ok" without a score, or columns that contradict each other."""
        if self.status == "ok":
            name = "accuracy" if self.bits_per_byte is None else "bits_per_byte"
            score = getattr(self, name)
            if score is None or not math.isfinite(score):
                raise ValueError(f"status ok with {name} {score}, which is no finite number")
            for name in ("test_examples", "steps_per_second", "flops_per_step", "memory_peak_bytes"):
                value = getattr(self, name)
                if value is not None and not 0 < value < math.inf:
                    raise ValueError(f"status ok with {name}={value}, which is not above 0")
        values = json.loads(self.configuration)
        actual = configuration_hash(values)
        if self.configuration_hash not in (None, actual):
            raise ValueError(f"configuration_hash {self.configuration_hash} where {actual} is its configuration's")
        for name in values.keys() & set(OF_RUN):
            if getattr(self, name) not in (None, values[name]):
                raise ValueError(f"{name}={getattr(self, name)} where its configuration says {values[name]}")


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
    "parameters": lambda rows: f"{most:,}" if (most := max(row.parameters for row in rows)) else "",
    "steps/s": lambda rows: _mean(rows, "steps_per_second", lambda rate: f"{rate:.1f}" if rate < 10 else f"{rate:.0f}"),
    "peak memory": lambda rows: _mean(rows, "memory_peak_bytes", lambda size: f"{size / 2**20:.1f} MiB"),
    "FLOPs/step": lambda rows: _mean(rows, "flops_per_step", lambda count: f"{count / 1e9:.2f} G"),
}


def _values(row: Result) -> dict:
    """The values of a row's run. What an older version did not know had its default."""
    return {**_USUAL, **json.loads(row.configuration)}


_USUAL = dataclasses.asdict(Run())


def groups(rows: Iterable[Result]) -> list[list[Result]]:
    """Rows that differ in nothing but the seed, together; of two rows of one run the later. The best score first.

    Scores are means over the runs that have one; groups without any are last.
    """
    found: dict[str, dict[int, Result]] = {}
    for row in rows:
        values = _values(row)
        seed = values.pop("seed")
        found.setdefault(json.dumps(values, sort_keys=True), {})[seed] = row
    return sorted((list(seeds.values()) for seeds in found.values()), key=_worth, reverse=True)


def _worth(group: Sequence[Result]) -> float:
    worth = [row.accuracy if row.bits_per_byte is None else -row.bits_per_byte for row in group if row.status == "ok"]
    known = [one for one in worth if one is not None]
    return statistics.mean(known) if known else -math.inf


def labelled(rows: Iterable[Result]) -> dict[str, list[Result]]:
    """`groups` by their layers, each with the values that tell it from others of its layer: "performer num_features=16"."""
    every = groups(rows)
    values = [_values(group[0]) for group in every]
    words = [
        {f"{name}={value}" for name, value in {**one, **one["layer_options"]}.items() if name not in ("seed", "layer_options")}
        for one in values
    ]
    shared: dict[str, set[str]] = {}
    for group, its in zip(every, words, strict=True):
        shared[group[0].layer] = its & shared.get(group[0].layer, its)
    return {
        " ".join([group[0].layer, *sorted(its - shared[group[0].layer])]): group
        for group, its in zip(every, words, strict=True)
    }


def _models_language(rows: Iterable[Result]) -> bool:
    return any(row.bits_per_byte is not None for row in rows)


def cells(rows: Iterable[Result]) -> list[list[str]]:
    """The table as text, heading first; without the floors that the task has not."""
    rows = list(rows)
    judged = "test bits per byte" if _models_language(rows) else "test accuracy"
    heading = ["layer", *(judged if name == "test accuracy" else name for name in COLUMNS)]
    body = [[label, *(cell(group) for cell in COLUMNS.values())] for label, group in labelled(rows).items()]
    kept = [at for at, name in enumerate(heading) if not name.endswith("floor") or any(line[at] for line in body)]
    return [[line[at] for at in kept] for line in (heading, *body)]


def markdown(rows: Iterable[Result]) -> str:
    """The table in Markdown, with a line below that says what it was measured on; "" without rows."""
    rows = list(rows)
    if not rows:
        return ""
    return f"{text_tables.markdown(cells(rows))}\n\n{caption(rows)}\n"


def caption(rows: Sequence[Result]) -> str:
    """One sentence each: task, training, selection, floors, machine; of all rows."""
    chosen = {"best": "best on validation", "last": "of the last step"}
    known = [name for name in FLOORS if any(getattr(row, f"floor_{name}") is not None for row in rows)]
    floors = "".join(f"; {name} floor: {FLOORS[name]}" for name in known)
    judged = "Bits per byte" if _models_language(rows) else "Accuracy"
    error = "" if _models_language(rows) else f", which leaves a {standard_error(rows)}"
    return (
        f"Task {distinct(f'{row.task} ({row.data})' for row in rows)}, recipe {distinct(row.recipe for row in rows)}, "
        f"{trained(rows)}. {judged} on the {distinct(row.test_examples for row in rows)} "
        f"examples of the {distinct(row.split for row in rows)} split{error}, parameters "
        f"{distinct(chosen.get(row.selection, row.selection) for row in rows)}{floors}. "
        "Peak memory of the compiled training step, its inputs included; FLOPs counted from its jaxpr. "
        f"{machines(rows)}"
    )


def distinct(values: Iterable) -> str:
    """Each value once, in words: "300 or 500"."""
    return " or ".join(dict.fromkeys(map(str, values)))


def trained(rows: Sequence[Result]) -> str:
    """How long rows were trained, and their seeds: "5 steps of 16 or 10 steps of 16, seeds 0, 1"."""
    steps = distinct(f"{row.steps} steps of {row.batch_size}" for row in sorted(rows, key=lambda row: row.steps))
    seeds = sorted({row.seed for row in rows})
    return f"{steps}, seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"


def standard_error(rows: Iterable[Result]) -> str:
    """Of an accuracy on so few examples as the fewest of some rows."""
    return f"standard error of up to {100 * math.sqrt(0.25 / min(row.test_examples for row in rows)):.1f} points"


def machines(rows: Iterable[Result]) -> str:
    """Where rows are from: a sentence for each machine with its versions, and all commits."""
    commits: dict[str, dict[str, None]] = {}
    for row in rows:
        commits.setdefault(f"{row.hardware}; {row.versions}", {})[row.commit[:12]] = None
    return " ".join(f"{where}; commit{'s' * (len(of) > 1)} {', '.join(of)}." for where, of in commits.items())


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
