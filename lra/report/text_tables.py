"""Tables as text, for README files and papers: rows of cells, the first row is the heading, the first column its names."""

from collections.abc import Sequence

Rows = Sequence[Sequence[str]]

_SPECIAL = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", **{c: f"\\{c}" for c in "&%$#_{}"},
    "<": r"\textless{}", ">": r"\textgreater{}", "±": r"$\pm$",
}  # fmt: skip


def markdown(rows: Rows) -> str:
    """A table in Markdown, numbers to the right.

    Example:
        >>> print(markdown([["layer", "MiB"], ["a|b", "3"]]))
        | layer | MiB |
        | --- | ---: |
        | a\\|b | 3 |
    """
    heading, *body = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [heading, ["---"] + ["---:"] * (len(heading) - 1), *body]
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


def escaped(text: str) -> str:
    """Text that LaTeX prints as it is."""
    return "".join(_SPECIAL.get(letter, letter) for letter in text)
