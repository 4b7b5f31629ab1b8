"""A report as one HTML file that needs nothing else: sections of a sentence, tables and pictures."""

import html
import io
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from subquad.lra.report import results
from subquad.lra.report.text_tables import Table


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
        title: of the section, which is also its anchor.
        says: what it shows, and what it does not.
        tables: of the section; pictures: matplotlib figures, and what each shows, in words.
    """

    title: str
    says: str
    tables: Sequence[Table] = ()
    pictures: Sequence[tuple[Any, str]] = ()


STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1b1b; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; border-bottom: 1px solid #ddd; }
caption { text-align: left; font-weight: 600; padding: .3rem 0; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #eee; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
.wide { overflow-x: auto; } svg { max-width: 100%; height: auto; } .note { color: #666; font-size: .85rem; margin: .2rem 0; }
"""


def render(title: str, sections: Iterable[Section], footer: str = "") -> str:
    """The page as HTML."""
    sections = list(sections)
    links = " · ".join(f'<a href="#{anchor(one.title)}">{html.escape(one.title)}</a>' for one in sections)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{html.escape(title)}</h1>\n<nav>{links}</nav>\n"
        + "\n".join(_section(one) for one in sections)
        + f'\n<footer class="note">{html.escape(footer)}</footer>\n</body>\n</html>\n'
    )


def write(title: str, sections: Iterable[Section], path: str | os.PathLike, footer: str = "") -> None:
    """Writes the page. Raises: RunError: the file cannot be written."""
    results.write_text(render(title, sections, footer), path)


def show(section: Section) -> None:
    """Prints a section's sentence and tables on stdout."""
    print(f"\n{section.title}. {section.says}")
    for table in section.tables:
        table.show()


def anchor(title: str) -> str:
    """A title as the end of an address.

    Example:
        >>> anchor("What each layer can do")
        'what-each-layer-can-do'
    """
    return re.sub(r"\W+", "-", title.lower()).strip("-")


def _section(section: Section) -> str:
    parts = [f'<section id="{anchor(section.title)}">', f"<h2>{html.escape(section.title)}</h2>"]
    parts.append(f"<p>{html.escape(section.says)}</p>")
    parts += [_picture(*one) for one in section.pictures] + [_table(one) for one in section.tables]
    return "\n".join([*parts, "</section>"])


def _table(table: Table) -> str:
    heading, *body = table.rows
    row = lambda cells: f"<tr>{''.join(cells)}</tr>"
    cell = lambda at, column, text: f"<td{_colour(table.shade(at, column))}>{html.escape(text)}</td>"
    lines = [row(cell(at, column, text) for column, text in enumerate(line)) for at, line in enumerate(body)]
    return (
        f'<div class="wide"><table>\n<caption>{html.escape(table.title)}</caption>\n'
        f"<thead>{row(f'<th>{html.escape(name)}</th>' for name in heading)}</thead>\n<tbody>{''.join(lines)}</tbody>\n"
        "</table></div>\n" + "".join(f'<p class="note">{html.escape(note)}</p>\n' for note in table.notes)
    )


def _colour(shade: float | None) -> str:
    """From white to a green on which black is read well."""
    return "" if shade is None else f' style="background: hsl(145 55% {100 - 38 * min(max(shade, 0.0), 1.0):.0f}%)"'


def _picture(figure, words: str) -> str:
    """A figure as SVG whose words are text, so that they can be searched and read aloud."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "subquad"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{html.escape(words)}"', 1)
    return f"<figure>{svg}</figure>"
