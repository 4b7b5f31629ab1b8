"""Tables as text, for terminals, README files and papers: rows of cells, heading first, the first column holds names."""

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

Rows = Sequence[Sequence[str]]

_SPECIAL = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", **{c: f"\\{c}" for c in "&%$#_{}"},
    "<": r"\textless{}", ">": r"\textgreater{}", "±": r"$\pm$",
}  # fmt: skip


class Table(NamedTuple):
    """A table with what is to be known of it.

    Attributes:
        title: what its rows share.
        rows: heading first; the first cell of each is a name.
        notes: of its numbers, one sentence each.
        shades: how good each cell below the heading is, from 0 to 1; None, for one or for all: it has no colour.
    """

    title: str
    rows: Rows
    notes: Sequence[str] = ()
    shades: Sequence[Sequence[float | None]] | None = None

    def shade(self, row: int, column: int) -> float | None:
        """Of the cell at a row and a column below the heading."""
        return None if self.shades is None else self.shades[row][column]

    def show(self) -> None:
        """Prints it on stdout."""
        print(f"\n{self.title}")
        print_table(self.rows, style=lambda row, column: terminal_colour(self.shade(row, column)))
        print("\n".join(self.notes))

    def markdown(self) -> str:
        """It as a section of a page."""
        return "\n".join([f"### {self.title}", "", markdown(self.rows), "", *self.notes, ""])

    def latex(self) -> str:
        """It as a float, for the package booktabs."""
        caption = escaped(f"{self.title}. {' '.join(self.notes)}")
        begin = [r"\begin{table}", r"\centering", rf"\caption{{{caption}}}"]
        return "\n".join([*begin, latex(self.rows), r"\end{table}", ""])


def markdown(rows: Rows, left: int = 1) -> str:
    """A table in Markdown, numbers to the right of `left` columns of words.

    Example:
        >>> print(markdown([["layer", "MiB"], ["a|b", "3"]]))
        | layer | MiB |
        | --- | ---: |
        | a\\|b | 3 |
    """
    heading, *body = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [heading, ["---"] * left + ["---:"] * (len(heading) - left), *body]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)


def latex(rows: Rows) -> str:
    """A tabular in LaTeX, for the package booktabs.

    Example:
        >>> print(latex([["layer", "%"], ["s4", "3"]]).splitlines()[2])
        layer & \\% \\\\
    """
    heading, *body = [" & ".join(map(escaped, row)) + r" \\" for row in rows]
    lines = [r"\begin{tabular}{l" + "r" * (len(rows[0]) - 1) + "}", r"\toprule", heading, r"\midrule", *body, r"\bottomrule"]
    return "\n".join([*lines, r"\end{tabular}"])


def terminal_colour(shade: float | None) -> str:
    """A shade as a style of rich."""
    return "" if shade is None else "green" if shade > 0.8 else "yellow" if shade > 0.3 else "dim"


def escaped(text: str) -> str:
    """Text that LaTeX prints as it is."""
    return "".join(_SPECIAL.get(letter, letter) for letter in text)


def aligned(rows: Rows) -> str:
    """Columns side by side, two spaces between; the last is not filled up."""
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def print_table(
    rows: Rows, *, left: int | Collection[str] = 1, unbroken: Callable[[str], bool] = lambda name: False, squeeze: bool = False,
    style: Callable[[int, int], str] = lambda row, column: "",
) -> None:  # fmt: skip
    """Prints a table on stdout.

    Args:
        left: which columns stand on the left: how many, or their names; numbers stand on the right.
        unbroken: of a column's name, whether its cells stay on one line.
        squeeze: on a terminal of fewer than 100 columns put each word of a heading on a line of its own: rich would cut it.
        style: rich's, of the cell at a row and a column of the body.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    heading, *body = rows
    console = Console()
    narrow = squeeze and console.is_terminal and console.width < 100
    # Nothing but spaces between the columns, so that more of them fit.
    table = Table(box=None, pad_edge=False, padding=(0, 1 if narrow else 2, 0, 0))
    for index, name in enumerate(heading):
        is_left = index < left if isinstance(left, int) else name in left
        shown = name.replace(" ", "\n") if narrow else name
        table.add_column(shown, justify="left" if is_left else "right", no_wrap=unbroken(name), overflow="fold")
    for number, row in enumerate(body):
        table.add_row(*(Text(cell, style(number, column)) for column, cell in enumerate(row)))
    # A pipe has no width: enough for every column.
    Console(width=console.width if console.is_terminal else 180).print(table)
