"""What was run before: rows of training, measurements and floors, found in CSV files by their columns."""

import csv
import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable
from dataclasses import dataclass

from subquad.lra import bench, results
from subquad.lra.bench import Measurement
from subquad.lra.recipes import Run
from subquad.lra.results import Result

SHIPPED = pathlib.Path(__file__).parents[1] / "results"


@dataclass(frozen=True)
class Floor:
    """What a rule reaches on a task that sees next to nothing of the input.

    Attributes:
        task, config: of `tasks.find`.
        floor: the rule's name, see NAMES.
        value: accuracy, a fraction; or bits per byte.
        examples: of the test split that it was read off.
        data: what was read; command: that measured it.
    """

    task: str
    config: str
    floor: str
    value: float
    examples: int
    data: str
    command: str
    commit: str
    versions: str
    hardware: str
    finished_utc: str


FLOOR_FIELDS = [one.name for one in dataclasses.fields(Floor)]
# Short names, in the columns of a `Result` and the keys of `Task.floors`, and what they are.
NAMES = {
    "majority": "majority class",
    "root": "root operator alone",
    "bag": "bag of bytes",
    "network": "small CNN",
    "unigram": "unigram",
    "bigram": "bigram",
}


@dataclass(frozen=True)
class Ledger:
    """All that was read: results by the key of their configuration, measurements, floors."""

    results: dict[str, list[Result]]
    measurements: list[Measurement]
    floors: dict[tuple[str, str], dict[str, Floor]]

    def rows(self) -> list[Result]:
        """Every result."""
        return [row for rows in self.results.values() for row in rows]

    def of(self, run: Run) -> list[Result]:
        """The finished runs that differ from `run` in the seed alone, one for each seed, in their order."""
        seeds = {row.seed: row for row in self.results.get(key(dataclasses.asdict(run)), ()) if row.accuracy is not None}
        return [seeds[seed] for seed in sorted(seeds)]

    def failed(self, run: Run) -> list[Result]:
        """The runs of the same kind that ended without a number."""
        return [row for row in self.results.get(key(dataclasses.asdict(run)), ()) if row.status != "ok"]

    def has(self, run: Run) -> bool:
        """Whether this very run is there, its seed included, whatever it ended with."""
        return run.seed in {row.seed for row in self.results.get(key(dataclasses.asdict(run)), ())}


def key(configuration: str | dict) -> str:
    """What names a configuration without its seed. Values that an older version did not know have their defaults.

    Example:
        >>> key({"seed": 1}) == key({"seed": 2, "steps": Run.steps}) != key({"steps": 7})
        True
    """
    given = json.loads(configuration) if isinstance(configuration, str) else configuration
    values = {**dataclasses.asdict(Run()), **given}
    values["layer_options"] = dict(values["layer_options"])
    del values["seed"]
    return results.configuration_hash(values)


def read(paths: Iterable[str | os.PathLike] = ()) -> Ledger:
    """The rows of the files that come with the package, and of `paths`: files, or folders of them.

    A file with other columns is passed over. Of two rows of one configuration the one in the later file counts, but for
    one that failed where the other did not.

    Raises: RunError: a file has our columns and a cell that cannot be read.
    """
    rows: dict[str, Result] = {}
    measured: list[Measurement] = []
    floors: dict[tuple[str, str], dict[str, Floor]] = {}
    for path in _files([SHIPPED, *paths]):
        columns = set(_heading(path))
        if {"accuracy", "configuration", "seed"} <= columns:
            for row in results.read(path):
                name = results.configuration_hash(row.configuration)
                if row.status == "ok" or name not in rows or rows[name].status != "ok":
                    rows[name] = row
        elif set(bench.FIELDS) <= columns:
            measured += bench.read(path)
        elif set(FLOOR_FIELDS) <= columns:
            for floor in read_floors(path):
                floors.setdefault((floor.task, floor.config), {})[floor.floor] = floor
    found: dict[str, list[Result]] = {}
    for row in rows.values():
        found.setdefault(key(row.configuration), []).append(row)
    return Ledger(found, measured, floors)


def _files(paths: Iterable[str | os.PathLike]) -> list[pathlib.Path]:
    found = []
    for path in map(pathlib.Path, paths):
        found += sorted(path.glob("*.csv")) if path.is_dir() else [path] if path.is_file() else []
    return found


def _heading(path: pathlib.Path) -> list[str]:
    with path.open(newline="") as file:
        return next(csv.reader(file), [])


def add(row: Result, path: str | os.PathLike) -> bool:
    """Appends a result unless the file holds one of the same configuration that ended well. Returns: whether it did.

    Raises: RunError: as `results.append`.
    """
    known = {results.configuration_hash(one.configuration) for one in results.read(path) if one.status == "ok"}
    if results.configuration_hash(row.configuration) in known:
        return False
    results.append(row, path)
    return True


def read_floors(path: str | os.PathLike) -> list[Floor]:
    """The rows of a file of floors."""
    with pathlib.Path(path).open(newline="") as file:
        return [
            Floor(**{**row, "value": float(row["value"]), "examples": int(row["examples"])}) for row in csv.DictReader(file)
        ]
