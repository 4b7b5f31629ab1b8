"""Published figures: what papers print, as data, with where each was read."""

import csv
import functools
import pathlib
from dataclasses import dataclass

from subquad.kernels.dispatch import nearest
from subquad.lra.report import csv_rows

FOLDER = pathlib.Path(__file__).parents[1] / "published"


@dataclass(frozen=True)
class Source:
    """Where a table stands.

    Attributes:
        paper, table: what `find_table` takes.
        title: what the table holds.
        work: authors, title, venue; arxiv: its number there, or "".
        where: what was read: not always the paper itself.
        hardware: what was timed on, or "".
    """

    paper: str
    table: str
    title: str
    work: str
    arxiv: str
    where: str
    hardware: str


@dataclass(frozen=True)
class Figure:
    """One number of a table.

    Attributes:
        paper, table, row: where it stands. task: "text", "path_x", "average", or "layer" where no task was run.
        length: in tokens, where the figure is of a length of its own.
        metric: "accuracy" in per cent, "speed_ratio" and "memory_ratio" against the Transformer, or another with `unit`.
        value: None: reported as no better than chance.
        deviation: over seeds, where it was printed.
    """

    paper: str
    table: str
    row: str
    task: str
    length: int | None
    metric: str
    value: float | None
    unit: str
    deviation: float | None
    note: str


@functools.cache
def sources() -> dict[tuple[str, str], Source]:
    """(paper, table) -> where it stands, in the order of the file."""
    with (FOLDER / "sources.csv").open(newline="") as file:
        return {(row["paper"], row["table"]): Source(**row) for row in csv.DictReader(file)}


@functools.cache
def read_figures(paper: str) -> tuple[Figure, ...]:
    """All figures of a paper, as they are printed.

    Raises: ValueError: unknown paper; the nearest known one is named.
    """
    papers = list(dict.fromkeys(paper for paper, _ in sources()))
    if paper not in papers:
        raise ValueError(f"paper must be a known name, got {paper!r}. {nearest(paper, papers)}")
    with (FOLDER / f"{paper}.csv").open(newline="") as file:
        return tuple(csv_rows.parse(Figure, {"paper": paper, **row}) for row in csv.DictReader(file))


def find_table(paper: str, table: str) -> tuple[Source, tuple[Figure, ...]]:
    """One table and where it stands.

    Raises: ValueError: unknown paper or table; the nearest known one is named.
    Example:
        >>> source, figures = find_table("lra", "1")
        >>> figures[0].row, figures[0].task, figures[0].value
        ('Transformer', 'listops', 36.37)
    """
    figures = [figure for figure in read_figures(paper) if figure.table == table]
    if not figures:
        tables = [name for owner, name in sources() if owner == paper]
        raise ValueError(f"table must be one of {paper}, got {table!r}. {nearest(table, tables)}")
    return sources()[paper, table], tuple(figures)
