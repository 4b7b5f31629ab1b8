"""Tables and plots of rows that are there, whichever command wrote them: quickstart, train, table or bench.

subquad report runs/quickstart/quickstart.csv runs/bench/lra.csv

The tables of each file are printed; beside it they are written as Markdown, plots as PNG, and all of it as one HTML page.
"""

import argparse
import pathlib
from collections.abc import Iterable, Sequence

from subquad.lra.cli import commands
from subquad.lra.report import csv_rows, ledger, measurements, overview, page, plots, results
from subquad.lra.report.measurements import Measurement
from subquad.lra.report.results import Result

KEPT = "Its rows are in the CSV beside it."


def main(command_line: Sequence[str] | None = None, program: str = "report") -> int:
    """Does what the words of a command line say; None: of this process."""
    parser = commands.Parser(prog=program, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="CSV", help="rows of training, or of measurements")
    for path in parser.parse_args(command_line).files:
        if not pathlib.Path(path).is_file():
            raise ValueError(f"file must be there, got {path}, which is none. Check the name.")
        kind = ledger.kind_of(path) if csv_rows.read_lines(path)[1] else None
        if kind is Measurement:
            show_measurements(path, measurements.read_measurements(path))
        elif kind is Result:
            show_results(path)
        else:
            raise ValueError(f"file must hold rows of training or of measurements, got {path}. Name another.")
    return 0


def show_measurements(path: str, shown: Iterable[Measurement]) -> None:
    """Prints the tables of some rows of a CSV; writes those of all its rows, and plots, beside it."""
    for table in measurements.tables(shown):
        table.show()
    rows, stem = measurements.read_measurements(path), pathlib.Path(path).with_suffix("")
    every = measurements.tables(rows)
    results.write_text("\n".join(table.markdown() for table in every), f"{stem}.md", KEPT)
    latex = ["% Needs \\usepackage{booktabs}", *(table.latex() for table in every)]
    results.write_text("\n".join(latex), f"{stem}.tex", KEPT)
    written = [f"{stem}.md", f"{stem}.tex"]
    for number, group in enumerate(measurements.groups(rows), 1):
        picture = f"{stem}-{number}.png"
        plots.cost_against_length(group, picture)
        written.append(picture)
    sections = [*(overview.measured(group) for group in measurements.groups(rows)), *overview.damaged([path])]
    page.write(stem.name, sections, f"{stem}.html")
    written.append(f"{stem}.html")
    print(f"\nRows in {path}; {', '.join(written)}.")


def show_results(path: str) -> None:
    """Prints a table for each task and recipe of a CSV of training; writes them, and plots, beside it."""
    rows, stem = results.read_results(path), pathlib.Path(path).with_suffix("")
    kinds = csv_rows.rows_that_agree(rows, ("task", "config", "recipe", "protocol", "data"))
    for group in kinds:
        results.show(group)
    written = write_results(kinds, stem) + draw_accuracy_against_time(rows, stem)
    parts = [overview.training(group, stem.parent) for group in kinds]
    faults = [fault for _, found in parts for fault in found]
    page.write(stem.name, [*(section for section, _ in parts), *overview.damaged([path], faults)], f"{stem}.html")
    written.append(f"{stem}.html")
    print(f"\nRows in {path}; {', '.join(written)}.")


def write_results(kinds: Sequence[Sequence[Result]], stem: pathlib.Path) -> list[str]:
    """Writes the tables of several kinds of rows, and a plot of each that has accuracies. Returns: the files."""
    results.write_text("\n".join(map(results.markdown, kinds)), f"{stem}.md", KEPT)
    written = [f"{stem}.md"]
    for number, rows in enumerate(kinds, 1):
        if any(row.accuracy is not None for row in rows):
            written.append(f"{stem}-{number}.png" if len(kinds) > 1 else f"{stem}.png")
            plots.accuracy_against_cost(rows, written[-1])
    return written


def draw_accuracy_against_time(rows: Sequence[Result], stem: pathlib.Path) -> list[str]:
    """Accuracy against time, a picture for each task, recipe and machine. Returns: the files."""
    kinds = csv_rows.rows_that_agree(rows, ("task", "config", "recipe", "hardware"))
    written = [f"{stem}-time-{number}.png" if len(kinds) > 1 else f"{stem}-time.png" for number in range(1, len(kinds) + 1)]
    for group, picture in zip(kinds, written, strict=True):
        plots.accuracy_against_time(group, picture)
    return written
