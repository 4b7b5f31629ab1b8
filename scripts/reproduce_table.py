"""Puts what was run here beside a published table, and runs what is missing.

python scripts/reproduce_table.py --paper lra --table 1
python scripts/reproduce_table.py --paper lra --table 1 --run --budget-hours 8 --seeds 3

--run trains what is missing, cheapest first; stopped by Ctrl-C or by its budget, the same command goes on. Rows are added
to the ledger, checkpoints are beside it. Ratios of speed and memory are measured by scripts/bench_lra.py on this machine.
"""

import os
import pathlib
import sys
from collections import Counter

from subquad.kernels.dispatch import nearest
from subquad.lra import commands, results, tables
from subquad.lra.tables import cells, figures, floor_rows, ledger, reproduce

BENCH = pathlib.Path(__file__).with_name("bench_lra.py")


def parse():
    papers = list(dict.fromkeys(paper for paper, _ in figures.sources()))
    parser = commands.Parser(prog="reproduce_table", description=__doc__)
    add = parser.add_argument
    add("--list", action="store_true", help="the papers and their tables")
    add("--paper", default="lra", metavar="NAME", help=f"of {', '.join(papers)}; default: lra")
    add("--table", default=None, metavar="NAME", help="as --list has it; default: the paper's first")
    add("--only", nargs="+", default=[], metavar="CELL", help="only cells whose id starts so, as lra.1.performer")
    add("--run", action="store_true", help="run what is missing, cheapest first")
    add("--budget-hours", type=float, default=None, metavar="H", help="for --run; default: no bound")
    add("--seeds", type=int, default=1, metavar="N", help="of each cell, for --run; default: 1")
    add("--batch-size", type=int, default=None, metavar="N", help="of measured ratios; default: 1 on a CPU, else 32")
    add("--ledger", default="runs/tables/ledger.csv", metavar="CSV", help="what was run; default: %(default)s")
    add("--data-dir", default=None, help="folder of data sets; default: TFDS's own")
    add("--floors", nargs="+", default=[], metavar="TASK", help="measure what simple rules reach, as listops/lra")
    add("--format", default="text", choices=("text", "markdown", "latex", "csv"), help="default: text")
    add("--out", default=None, metavar="FILE", help="default: the terminal")
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    files = files_of(arguments.ledger)
    if arguments.floors:
        return measure_floors(arguments.floors, files["floors"], arguments.data_dir)
    known = ledger.read(files.values())
    if arguments.list:
        return write(tables.text(listed(known)) + "\n", arguments.out)
    name = arguments.table
    if name is None:
        figures.read(arguments.paper)
        name = next(table for paper, table in figures.sources() if paper == arguments.paper)
    wanted = chosen(cells.table(arguments.paper, name), arguments.only)
    code = 0
    if arguments.run:
        if arguments.seeds < 1:
            raise ValueError(f"--seeds must be >= 1, got {arguments.seeds}. Leave it out for one.")
        code = run(wanted, files, known, arguments)
        known = ledger.read(files.values())
    options = "" if arguments.ledger == "runs/tables/ledger.csv" else f"--ledger {arguments.ledger}"
    verdicts = [tables.judge(cell, known, options=options, data_dir=arguments.data_dir) for cell in wanted]
    return write(tables.render(arguments.paper, name, verdicts, known, arguments.format), arguments.out) or code


def files_of(path: str) -> dict[str, pathlib.Path]:
    """The ledger, and beside it the files of measurements and of floors."""
    ledger_path = pathlib.Path(path)
    beside = {kind: ledger_path.with_name(f"{ledger_path.stem}-{kind}.csv") for kind in ("bench", "floors")}
    return {"runs": ledger_path, **beside}


def chosen(every: tuple[cells.Cell, ...], words: list[str]) -> list[cells.Cell]:
    for word in words:
        if not any(cell.id.startswith(word) for cell in every):
            rows = list(dict.fromkeys(".".join(cell.id.split(".")[:3]) for cell in every))
            raise ValueError(f"--only must start a cell's id, got {word!r}. {nearest(word, rows)}")
    return [cell for cell in every if not words or any(cell.id.startswith(word) for word in words)]


def run(wanted: list[cells.Cell], files: dict[str, pathlib.Path], known: ledger.Ledger, arguments) -> int:
    files["runs"].parent.mkdir(parents=True, exist_ok=True)
    words = [] if arguments.batch_size is None else ["--batch-size", str(arguments.batch_size)]
    code = reproduce.measure_missing(BENCH, wanted, files["bench"], known=known, words=words, say=say)
    failures = reproduce.train_missing(
        wanted, files["runs"], known=known, seeds=arguments.seeds, budget_hours=arguments.budget_hours,
        data_dir=arguments.data_dir, say=say,
    )  # fmt: skip
    return commands.FAILED if code or failures else 0


def listed(known: ledger.Ledger) -> list[list[str]]:
    """The tables, with how many of their cells came to what, and the estimated hours of a GPU for those that wait."""
    rows = [["paper", "table", "cells", "reproduced", "differs", "not run", "cannot", "hours to run", "what it holds"]]
    for paper, name in figures.sources():
        every = [cell for cell in cells.table(paper, name) if cell.column != "average"]
        verdicts = [tables.judge(cell, known) for cell in every]
        counts = Counter(one.outcome for one in verdicts)
        hours = sum(one.cost.hours for one in verdicts if one.cost is not None)
        found = [str(counts[outcome]) for outcome in ("reproduced within tolerance", "differs", "not run", "cannot")]
        rows.append([paper, name, str(len(every)), *found, f"{hours:.3g}", figures.sources()[paper, name].title])
    return rows


def measure_floors(words: list[str], path: pathlib.Path, data_dir) -> int:
    for word in words:
        found = floor_rows.measure(word, data_dir)
        path.parent.mkdir(parents=True, exist_ok=True)
        floor_rows.write(found, path)
        for floor in found:
            print(f"{floor.task}/{floor.config}: {ledger.NAMES.get(floor.floor, floor.floor)} {floor.value:.4f}")
    print(f"Rows in {path}.")
    return 0


def write(text: str, out: str | None) -> int:
    if out is None:
        print(text, end="")
    else:
        results.write(text, out)
        say(f"Written to {os.path.abspath(out)}.")
    return 0


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(commands.explained("reproduce_table", main))
