"""What was run before: rows of training, measurements and floors, found in CSV files by their columns."""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from subquad.lra.report import csv_rows, results
from subquad.lra.report.measurements import Measurement
from subquad.lra.report.results import Result
from subquad.lra.run import Run

SHIPPED = pathlib.Path(__file__).parents[1] / "results"


@dataclass(frozen=True)
class Floor:
    """What a rule reaches on a task that sees next to nothing of the input.

    Attributes:
        task, config: of `tasks.find_task`.
        floor: the rule's name, see `results.FLOORS`.
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


FLOOR_KEY = ("task", "config", "floor")


@dataclass(frozen=True)
class StepTiming:
    """Some steps of a run, timed on a machine.

    Attributes:
        configuration_hash: of the run's values but the seed, `hash_without_seed`.
        probe_steps: how many were timed, after a first one.
        step_seconds, evaluation_seconds: of a step, and of a batch of validation; compile_seconds: of both programs.
        step_flops: of a step, as `costs.training_flops` estimates them.
    """

    configuration_hash: str
    recipe: str
    layer: str
    task: str
    config: str
    probe_steps: int
    step_seconds: float
    evaluation_seconds: float
    compile_seconds: float
    step_flops: float
    hardware: str
    finished_utc: str


STEP_TIMING_KEY = ("configuration_hash", "hardware")
KINDS = (Result, Measurement, Floor, StepTiming)


@dataclass(frozen=True)
class Ledger:
    """All that was read: results by the key of their configuration, measurements, floors, timed steps."""

    results: dict[str, list[Result]]
    measurements: list[Measurement]
    floors: dict[tuple[str, str], dict[str, Floor]]
    step_timings: list[StepTiming] = field(default_factory=list)

    def timed_steps(self, run: Run, hardware: str) -> StepTiming | None:
        """The steps of a run, whatever its seed, that were timed on a machine."""
        name = hash_without_seed(dataclasses.asdict(run))
        found = [one for one in self.step_timings if (one.configuration_hash, one.hardware) == (name, hardware)]
        return max(found, key=lambda one: one.finished_utc) if found else None

    def rows(self) -> list[Result]:
        """Every result."""
        return [row for rows in self.results.values() for row in rows]

    def finished_runs(self, run: Run) -> list[Result]:
        """The finished runs that `hash_without_seed` names as it does `run`, one for each seed, in their order."""
        found = [row for row in self._of_any_seed(run) if row.accuracy is not None]
        # Of two rows of a seed that of the run itself, not the one that was validated more or less often.
        found.sort(key=lambda row: evaluate_every(row) == run.evaluate_every)
        seeds = {row.seed: row for row in found}
        return [seeds[seed] for seed in sorted(seeds)]

    def failed_runs(self, run: Run) -> list[Result]:
        """The runs of the same kind that ended without a number."""
        return [row for row in self._of_any_seed(run) if row.status != "ok"]

    def has(self, run: Run) -> bool:
        """Whether this very run is there, its seed included, whatever it ended with."""
        return run.seed in {row.seed for row in self._of_any_seed(run)}

    def _of_any_seed(self, run: Run) -> Sequence[Result]:
        return self.results.get(hash_without_seed(dataclasses.asdict(run)), ())


def hash_without_seed(configuration: str | dict) -> str:
    """What names a configuration without its seed, and without how often it is validated where no step depends on that.

    Values at their defaults do not count: those that an older version did not know had them.

    Example:
        >>> hash_without_seed({"seed": 1}) == hash_without_seed({"seed": 2, "steps": Run.steps})
        True
        >>> hash_without_seed({"seed": 1}) == hash_without_seed({"seed": 1, "steps": 7})
        False
        >>> hash_without_seed({"steps": 7}) == hash_without_seed({"steps": 7, "evaluate_every": 500})
        True
    """
    given = json.loads(configuration) if isinstance(configuration, str) else configuration
    usual = dataclasses.asdict(Run())
    left_out = {"seed"} if validations_count({**usual, **given}) else {"seed", "evaluate_every"}
    counted = {name: value for name, value in given.items() if name not in left_out and value != usual.get(name)}
    return results.configuration_hash(counted)


def validations_count(values: Mapping[str, Any]) -> bool:
    """Whether a run's steps depend on how often it is validated: something waits for a number of validations."""
    return values["schedule"] == "plateau" or values["early_stopping"] is not None


def evaluate_every(row: Result) -> int:
    """How often the run of a row was validated, in steps."""
    return json.loads(row.configuration).get("evaluate_every", Run.evaluate_every)


def read_ledger(paths: Iterable[str | os.PathLike] = ()) -> Ledger:
    """The rows of the files that come with the package, and of `paths`: files, or folders of them.

    A line that cannot be read, and a file whose first line names no columns of ours, is reported on stderr and passed over. Of
    two rows of one configuration the one in the later file counts, but for one that failed where the other did not.
    """
    found: dict[type, list] = {kind: [] for kind in KINDS}
    for path in _files([SHIPPED, *paths]):
        kind = kind_of(path)
        if kind is None:
            csv_rows.warn_once(_unknown(path), "The file is passed over; mend that line or move the file away.")
        else:
            found[kind] += csv_rows.read_rows(path, kind)
    latest: dict[str, Result] = {}
    for row in found[Result]:
        name = results.configuration_hash(row.configuration)
        if row.status == "ok" or name not in latest or latest[name].status != "ok":
            latest[name] = row
    of_any_seed: dict[str, list[Result]] = {}
    for row in latest.values():
        of_any_seed.setdefault(hash_without_seed(row.configuration), []).append(row)
    floors: dict[tuple[str, str], dict[str, Floor]] = {}
    for floor in found[Floor]:
        floors.setdefault((floor.task, floor.config), {})[floor.floor] = floor
    return Ledger(of_any_seed, found[Measurement], floors, found[StepTiming])


def kind_of(path: str | os.PathLike) -> type | None:
    """What a file holds rows of; None for a file that is none of ours."""
    header, _ = csv_rows.read_lines(path)
    return next((kind for kind in KINDS if not header or csv_rows.holds(header, kind)), None)


def _unknown(path: pathlib.Path) -> csv_rows.Fault:
    header = ",".join(csv_rows.read_lines(path)[0])
    return csv_rows.Fault(path, 1, f"must name the columns of results, measurements or floors, got {header[:60]!r}.")


def verify_files(paths: Iterable[str | os.PathLike] = ()) -> tuple[list[pathlib.Path], list[csv_rows.Fault]]:
    """(the files that `read_ledger` reads, every fault in them)."""
    files, found = _files([SHIPPED, *paths]), []
    for path in files:
        kind = kind_of(path)
        if kind is None:
            found.append(_unknown(path))
        else:
            found += csv_rows.sort_out_rows(path, functools.partial(csv_rows.parse, kind))[1]
    return files, found


def _files(paths: Iterable[str | os.PathLike]) -> list[pathlib.Path]:
    found = []
    for path in map(pathlib.Path, paths):
        found += sorted(path.glob("*.csv")) if path.is_dir() else [path] if path.is_file() else []
    return found
