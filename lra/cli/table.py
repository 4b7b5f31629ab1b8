"""Puts what was run here beside a published table, and runs what is missing.

subquad table --paper lra --table 1
subquad table --paper lra --table 1 --run --budget-hours 8 --seeds 3

--run trains what is missing, cheapest first; stopped by Ctrl-C or by its budget, the same command goes on. A budget that is
used up is no failure: the table is printed, and the exit code is 0. Rows are added to the ledger, checkpoints are beside
it; several of these commands may share them. Hours are this machine's where runs, or steps by --probe, were timed on it.
Ratios of speed and memory are measured by subquad bench on this machine, beside a softmax that keeps all logits in
memory as the papers' does, at the papers' batch of 32 or the largest power of two that fits.
"""

import dataclasses
import os
import pathlib
import shlex
import time
from collections import Counter
from collections.abc import Sequence
from typing import get_args

from subquad.kernels.dispatch import nearest
from subquad.lra import checkpoints, progress
from subquad.lra.cli import bench, commands
from subquad.lra.files import RunError
from subquad.lra.report import (
    cells,
    comparison,
    csv_rows,
    floor_rows,
    ledger,
    published,
    reproduce,
    results,
    text_tables,
    verdicts,
)

LEDGER = "runs/tables/ledger.csv"


def parse(command_line: Sequence[str] | None, program: str):
    papers = list(dict.fromkeys(paper for paper, _ in published.sources()))
    parser = commands.Parser(prog=program, description=__doc__)
    add, count = parser.add_argument, commands.number(int, 1)
    add("--list", action="store_true", help="the papers and their tables")
    add("--verify", action="store_true", help="list every row and file beside the ledger that is damaged; exit code 1 if any")
    add("--paper", default="lra", metavar="NAME", help=f"of {', '.join(papers)}; default: lra")
    add("--table", default=None, metavar="NAME", help="as --list has it; default: the paper's first")
    add("--only", nargs="+", default=[], metavar="CELL", help="only cells whose id starts so, as lra.1.performer")
    add("--run", action="store_true", help="run what is missing, cheapest first")
    add("--probe", type=count, default=None, metavar="STEPS", help="time so many steps of what is missing: its hours here")
    add("--budget-hours", type=commands.number(float, 0), default=None, metavar="H", help="for --run; default: no bound")
    add("--seeds", type=count, default=1, metavar="N", help="of each cell, for --run; default: 1")
    every = "steps between validations, for --run: the same cells, in less time; default: the recipe's"
    add("--evaluate-every", type=count, default=None, metavar="N", help=every)
    add("--batch-size", type=count, default=None, metavar="N", help="of measured ratios; default: 32, or what fits")
    add("--ledger", default=LEDGER, metavar="CSV", help="what was run; default: %(default)s")
    add("--data-dir", default=None, help="folder of data sets; default: TFDS's own")
    add("--floors", nargs="+", default=[], metavar="TASK", help="measure what simple rules reach, as listops/lra")
    add("--format", default="text", choices=comparison.FORMS, help="default: text")
    add("--out", default=None, metavar="FILE", help="default: the terminal")
    return parser.parse_args(command_line)


def main(command_line: Sequence[str] | None = None, program: str = "reproduce_table") -> int:
    """Does what the words of a command line say; None: of this process."""
    arguments = parse(command_line, program)
    files = files_of(arguments.ledger)
    if arguments.verify:
        return verify(files)
    if arguments.floors:
        return measure_floors(arguments.floors, files["floors"], arguments.data_dir)
    known = read_known(files, arguments.batch_size)
    if arguments.list:
        return write_out(text_tables.aligned(listed(known)) + "\n", arguments.out)
    name = arguments.table
    if name is None:
        published.read_figures(arguments.paper)
        name = next(table for paper, table in published.sources() if paper == arguments.paper)
    wanted = chosen(cells.cells_of_table(arguments.paper, name), arguments.only)
    code = 0
    if arguments.probe:
        csv_rows.check_file(files["hours"], ledger.StepTiming)
        failed = reproduce.time_missing(wanted, files["hours"], known=known, steps=arguments.probe, say=progress.say)
        code, known = commands.FAILED if failed else 0, read_known(files, arguments.batch_size)
    if arguments.run:
        code = run_missing(wanted, files, known, arguments) or code
        known = read_known(files, arguments.batch_size)
    given = {
        "--ledger": arguments.ledger if arguments.ledger != LEDGER else None, "--batch-size": arguments.batch_size,
        "--data-dir": arguments.data_dir,
    }  # fmt: skip
    options = " ".join(f"{name} {shlex.quote(str(value))}" for name, value in given.items() if value is not None)
    judged = [verdicts.judge(cell, known, options=options, data_dir=arguments.data_dir) for cell in wanted]
    return write_out(comparison.render(arguments.paper, name, judged, known, arguments.format), arguments.out) or code


def files_of(path: str) -> dict[str, pathlib.Path]:
    """The ledger, and beside it the files of measurements, of floors, and of timed steps."""
    ledger_path = pathlib.Path(path)
    beside = {kind: ledger_path.with_name(f"{ledger_path.stem}-{kind}.csv") for kind in ("bench", "floors", "hours")}
    return {"runs": ledger_path, **beside}


def read_known(files: dict[str, pathlib.Path], batch_size: int | None) -> ledger.Ledger:
    """What is known; of measurements those with this batch size, where one is given."""
    known = ledger.read_ledger(files.values())
    measured = [row for row in known.measurements if batch_size in (None, row.batch_size)]
    return dataclasses.replace(known, measurements=measured)


def verify(files: dict[str, pathlib.Path]) -> int:
    """Lists what is damaged among the rows and the runs that there are."""
    found, faults = ledger.verify_files(files.values())
    runs = sorted((files["runs"].parent / "runs").glob("*/run.json"))
    damaged = list(map(str, faults))
    for path in runs:
        try:
            checkpoints.read_result(path.parent, checkpoints.read_configuration(path.parent), results.Result)
        except RunError as error:
            damaged.append(str(error))
    print("\n".join([*damaged, f"Files of rows: {len(found)}; runs: {len(runs)}; faults: {len(damaged)}."]))
    return commands.FAILED if damaged else 0


def chosen(every: tuple[cells.Cell, ...], words: list[str]) -> list[cells.Cell]:
    for word in words:
        if not any(cell.id.startswith(word) for cell in every):
            rows = list(dict.fromkeys(".".join(cell.id.split(".")[:3]) for cell in every))
            raise ValueError(f"--only must start a cell's id, got {word!r}. {nearest(word, rows)}")
    return [cell for cell in every if not words or any(cell.id.startswith(word) for word in words)]


def run_missing(wanted: list[cells.Cell], files: dict[str, pathlib.Path], known: ledger.Ledger, arguments) -> int:
    csv_rows.check_file(files["runs"], results.Result)
    began, hours = time.monotonic(), arguments.budget_hours
    code = reproduce.measure_missing(
        bench.main, wanted, files["bench"], known=known, batch_size=arguments.batch_size, budget_hours=hours, say=progress.say
    )
    left = None if hours is None else hours - (time.monotonic() - began) / 3600
    failures = reproduce.train_missing(
        wanted, files["runs"], known=known, seeds=arguments.seeds, evaluate_every=arguments.evaluate_every, budget_hours=left,
        data_dir=arguments.data_dir, say=progress.say,
    )  # fmt: skip
    return commands.FAILED if code or failures else 0


def listed(known: ledger.Ledger) -> list[list[str]]:
    """The tables, with how many of their cells came to what, and the hours of those that wait, on which machine."""
    outcomes = get_args(verdicts.Outcome)
    rows = [["paper", "table", "cells", "reproduced", *outcomes[1:], "hours to run", "what it holds"]]
    for paper, name in progress.over(published.sources(), "Tables"):
        every = [cell for cell in cells.cells_of_table(paper, name) if cell.task != "average"]
        judged = [verdicts.judge(cell, known) for cell in every]
        counts = Counter(one.outcome for one in judged)
        # Several cells may wait for one run.
        costs = {
            one.cell.id if one.cell.recipe == "bench" else verdicts.run_of(one.cell).id: one.cost
            for one in judged if one.cost is not None
        }  # fmt: skip
        hours: dict[str, float] = {}
        for cost in costs.values():
            hours[cost.hardware] = hours.get(cost.hardware, 0.0) + cost.hours
        shown = ", ".join(f"{total:.3g} on {hardware}" for hardware, total in hours.items()) or "0"
        found = [str(counts[outcome]) for outcome in outcomes]
        rows.append([paper, name, str(len(every)), *found, shown, published.sources()[paper, name].title])
    return rows


def measure_floors(words: list[str], path: pathlib.Path, data_dir) -> int:
    csv_rows.check_file(path, ledger.Floor)
    for word in words:
        found = floor_rows.measure_floors(word, data_dir)
        csv_rows.write_rows(path, ledger.Floor, found, ledger.FLOOR_KEY)
        for floor in found:
            print(f"{floor.task}/{floor.config}: {results.FLOORS[floor.floor]} {floor.value:.4f}")
    print(f"Rows in {path}.")
    return 0


def write_out(text: str, out: str | None) -> int:
    if out is None:
        print(text, end="")
    else:
        results.write_text(text, out)
        progress.say(f"Written to {os.path.abspath(out)}.")
    return 0
