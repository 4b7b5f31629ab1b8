"""Runs the cells of a table that are missing: cheapest first, within a budget, and on from where it was stopped."""

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from subquad.lra import machine, progress, tasks
from subquad.lra.bench import programs
from subquad.lra.checkpoints import Interrupted, saved_steps
from subquad.lra.data.sources import DatasetError
from subquad.lra.files import RunError, one_line
from subquad.lra.report import costs, csv_rows, results, step_timings, verdicts
from subquad.lra.report.cells import Cell, lengths_to_test
from subquad.lra.report.ledger import STEP_TIMING_KEY, Ledger, StepTiming, validations_count
from subquad.lra.run import Run


def missing(
    cells: Sequence[Cell], known: Ledger, seeds: int, evaluate_every: int | None = None
) -> list[tuple[Run, list[Cell]]]:
    """The runs that cells wait for, each once, with its cells; `evaluate_every` as in `train_missing`."""
    found: dict[str, tuple[Run, list[Cell]]] = {}
    for cell in cells:
        if cell.cannot or cell.recipe == "bench":
            continue
        for seed in range(seeds):
            run = verdicts.run_of(cell, seed)
            if evaluate_every is not None and not validations_count(vars(run)):
                run = dataclasses.replace(run, evaluate_every=evaluate_every)
            if not known.has(run):
                found.setdefault(run.id, (run, []))[1].append(cell)
    return list(found.values())


def train_missing(
    cells: Sequence[Cell],
    path: str | os.PathLike,
    *,
    known: Ledger,
    seeds: int = 1,
    evaluate_every: int | None = None,
    budget_hours: float | None = None,
    data_dir: str | os.PathLike | None = None,
    say: Callable[[str], None] = progress.say,
) -> int:
    """Trains what is missing and adds a row for each to the ledger at `path`; checkpoints are in `runs` beside it.

    The next cheapest run is started while its estimate fits into what is left of the budget; one that takes longer is
    stopped when the budget is used up, and keeps its checkpoint. What a checkpoint has done is taken off the estimate.

    Args:
        cells: those of a table, or some of them.
        path: the ledger, a CSV file.
        known: what was run before.
        seeds: 0..seeds-1 of each.
        evaluate_every: steps between validations, where no step depends on them; None: as the recipe has it.
        budget_hours: None: no bound.
        data_dir: where data sets are.
        say: is called with a line for whatever happens.
    Returns: how many runs failed.
    Raises: Interrupted: Ctrl-C or SIGTERM.
    """
    from subquad.lra import train

    folder = pathlib.Path(path).parent / "runs"

    def price(run: Run, cell: Cell) -> costs.Cost:
        whole = verdicts.forecast(cell, run, tasks.find_task(run.task, run.config), known, here=True)
        return whole._replace(hours=whole.hours * undone(run, folder / run.id))

    wanted = missing(cells, known, seeds, evaluate_every)
    waiting = sorted(((price(run, its[0]), run, its) for run, its in wanted), key=lambda one: one[0].hours)
    if waiting:
        hours = sum(cost.hours for cost, _, _ in waiting)
        say(f"Missing runs: {len(waiting)}, about {hours:.3g} hours on {machine.hardware()}.")
    began, failures = time.monotonic(), 0
    for number, (cost, run, its) in enumerate(waiting, 1):
        left = None if budget_hours is None else budget_hours - (time.monotonic() - began) / 3600
        if left is not None and cost.hours >= left:
            rest = len(waiting) - number + 1
            say(f"Left for another time: {rest}. The next would take {cost}, of a budget that has {max(left, 0):.3g} h left.")
            break
        say(f"[{number}/{len(waiting)}] {', '.join(cell.id for cell in its)}, seed {run.seed}: {cost}")
        say(json.dumps(dataclasses.asdict(run), sort_keys=True))
        try:
            with budget(left):
                row = train.train(
                    run, out=folder / run.id, data_dir=data_dir, resume=True, test_lengths=lengths_to_test(its[0])
                )
        except UsedUp as stopped:
            say(f"The budget is used up. {stopped}The same command goes on from there.")
            break
        except Interrupted as stopped:
            raise Interrupted(f"{_saved(stopped)}The same command goes on from there.", stopped.number) from None
        except (ValueError, TypeError, NotImplementedError, RuntimeError, DatasetError, RunError) as error:
            failures += 1
            say(f"{run.layer} on {run.task}: {one_line(error)}")
            continue
        results.append(row, path, ("configuration", "status"))  # another command may have added it meanwhile
        say(f"{run.layer} on {run.task}: {row.status}" + (f", {100 * row.accuracy:.2f} %" if row.accuracy is not None else ""))
    return failures


def time_missing(
    cells: Sequence[Cell], path: str | os.PathLike, *, known: Ledger, steps: int, say: Callable[[str], None]
) -> int:
    """Times `steps` steps of every run that is missing, on this machine, into the CSV at `path`. See `step_timings`.

    Returns: how many could not be timed.
    """
    waiting, failures = missing(cells, known, 1), 0
    for number, (run, its) in enumerate(waiting, 1):
        ids = [cell.id for cell in its]
        task = tasks.find_task(run.task, run.config)
        try:
            timed = step_timings.time_steps(run, task, steps)
        except (ValueError, TypeError, NotImplementedError, RuntimeError, MemoryError) as error:
            failures += 1
            say(f"[{number}/{len(waiting)}] {', '.join(ids)}: {one_line(error)}")
            continue
        csv_rows.write_rows(path, StepTiming, [timed], STEP_TIMING_KEY)
        cost = verdicts.forecast(its[0], run, task, Ledger({}, [], {}, [timed]))
        say(f"[{number}/{len(waiting)}] {', '.join(ids)}: {cost}")
    return failures


def undone(run: Run, folder: pathlib.Path) -> float:
    """The part of a run's steps that its checkpoint does not have, of 1."""
    return 0.0 if (folder / "result.json").exists() else 1 - max(saved_steps(folder), default=0) / run.steps


class UsedUp(Exception):
    """A budget that ended a block; the message is what the block says of what it saved."""


def _saved(stopped: BaseException) -> str:
    """What an interruption says of what was saved, without the way to go on."""
    return f"{str(stopped).partition(' Go on')[0]} ".lstrip()


@contextlib.contextmanager
def budget(hours: float | None) -> Iterator[None]:
    """Ends a block after so many hours by what Ctrl-C sends. Raises: UsedUp: it did.  Others: what Ctrl-C itself raises."""
    if hours is None:
        yield
        return
    used_up = threading.Event()

    def ring():
        used_up.set()
        os.kill(os.getpid(), signal.SIGINT)

    timer = threading.Timer(min(3600 * hours, threading.TIMEOUT_MAX), ring)
    timer.daemon = True
    timer.start()
    try:
        yield
    except (Interrupted, KeyboardInterrupt) as stopped:
        if used_up.is_set():
            raise UsedUp(_saved(stopped)) from None
        raise
    finally:
        timer.cancel()
        timer.join()


def missing_ratios(
    cells: Sequence[Cell], known: Ledger, batch_size: int | None = None, device: str | None = None
) -> list[Cell]:
    """The cells of ratios that wait to be measured.

    What was measured with another batch size (None: with any) or on another machine than `device` (None: this one) is
    missing, and so is what was measured beside a softmax that keeps no logits.
    """
    device = device or machine.hardware()
    here = [row for row in known.measurements if row.hardware == device and batch_size in (None, row.batch_size)]
    judged = [verdicts.judge(cell, dataclasses.replace(known, measurements=here)) for cell in cells if cell.recipe == "bench"]
    return [one.cell for one in judged if one.command]


def bench_commands(wanted: Sequence[Cell], path: str | os.PathLike, batch_size: int | None = None) -> list[list[str]]:
    """What subquad bench measures for cells of ratios, into the CSV at `path`: words for each batch size.

    Args:
        batch_size: None: the papers', or what fits.
    """
    layers = dict.fromkeys(cell.layer for cell in wanted if cell.layer != verdicts.BASELINE)
    limit = machine.available_memory()[0]
    of_batch: dict[int, list[int]] = {}
    for length in sorted({cell.length for cell in wanted}):
        fitting = batch_size or programs.fitting_batch_size(verdicts.MODEL, length, limit)
        of_batch.setdefault(fitting, []).append(length)
    return [
        [
            "--model", verdicts.MODEL, "--modes", verdicts.MODE, "--baseline", programs.PLAIN, "--layers",
            ",".join(layers) or programs.PLAIN, "--lengths", ",".join(map(str, lengths)), "--batch-size", str(fitting),
            "--out", str(path),
        ]
        for fitting, lengths in of_batch.items()
    ]  # fmt: skip


def measure_missing(
    measure: Callable[[list[str]], int], cells: Sequence[Cell], path: str | os.PathLike, *, known: Ledger,
    batch_size: int | None = None, budget_hours: float | None = None, say: Callable[[str], None],
) -> int:  # fmt: skip
    """Measures what is missing here, by the command `measure` of words, until the budget is used up.

    Returns: the largest exit code of the commands; 0 where nothing was missing, or the budget ended it.
    """
    wanted = missing_ratios(cells, known, batch_size)
    if not wanted:
        return 0
    if budget_hours is not None and budget_hours < verdicts.MEASURING.hours:
        left = f"of a budget that has {budget_hours:.3g} h left"
        say(f"Left for another time: measurements. One would take {verdicts.MEASURING}, {left}.")
        return 0
    code = 0
    try:
        with budget(budget_hours):
            with progress.Work("batch sizes that fit"):
                commands = bench_commands(wanted, path, batch_size)
            for words in commands:
                say(f"subquad bench {' '.join(words)}")
                code = max(code, measure(words))
        return code
    except UsedUp:
        say("The budget is used up; the measurements that are done are kept, and the same command makes the others.")
        return 0
