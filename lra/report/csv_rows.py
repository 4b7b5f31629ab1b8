"""Rows in CSV files that several processes write: locked, whole at every moment, and a damaged line costs no other.

Rows are of a dataclass, whose fields are the columns, or plain dicts of text. A row is one line. What would break a line
inside a cell is written as a space, so that a damaged line is seen as such, by its number, and never swallows those after it.
"""

import csv
import dataclasses
import io
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from subquad.lra.files import RunError, explained, locked, one_line, write_whole

T = TypeVar("T")
Columns = type | Sequence[str]  # a dataclass, or the names
# Seconds to wait for another process that writes the same file, which takes it milliseconds.
PATIENCE = 60.0


class Fault(NamedTuple):
    """A line that cannot be read."""

    path: pathlib.Path
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line} {self.reason}"


class Line(NamedTuple):
    """A line after the header: its number from 1, its bytes, and its cells by column, or why they cannot be had."""

    number: int
    text: bytes
    cells: dict[str, str]
    reason: str = ""


def read_lines(path: str | os.PathLike) -> tuple[list[str], list[Line]]:
    """(columns, lines) of a CSV file; ([], []) where there is none, or an empty one. Blank lines do not count.

    Raises: RunError: it cannot be read.
    """
    with explained(f"table: file {path} must be readable", "Choose another.", OSError):
        try:
            content = pathlib.Path(path).read_bytes()
        except FileNotFoundError:
            return [], []
    if not content:
        return [], []
    head, *others = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    header = head.rstrip(b"\r").decode(errors="replace").split(",")
    found = []
    for number, text in enumerate(others, 2):
        text = text.rstrip(b"\r")
        if not text:
            continue
        try:
            found.append(Line(number, text, dict(zip(header, _cells(text, len(header)), strict=True))))
        except (ValueError, csv.Error) as error:
            found.append(Line(number, text, {}, one_line(error)))
    return header, found


def _cells(text: bytes, count: int) -> list[str]:
    cells = next(csv.reader([text.decode()], strict=True))
    if len(cells) != count:
        raise ValueError(f"{len(cells)} cells, as of a line that was cut short")
    if b"\0" in text:
        raise ValueError("a zero byte")
    return cells


def column_names(columns: Columns) -> list[str]:
    """The names of the columns."""
    return [one.name for one in dataclasses.fields(columns)] if isinstance(columns, type) else list(columns)


def holds(header: Sequence[str], columns: Columns) -> bool:
    """Whether a file of this header holds rows of these columns. Those of a dataclass that have defaults may be absent."""
    if not isinstance(columns, type):
        return list(header) == list(columns)
    needed = {one.name for one in dataclasses.fields(columns) if one.default is dataclasses.MISSING}
    return needed <= set(header) <= set(column_names(columns))


def parse(record: type[T], cells: Mapping[str, str]) -> T:
    """The record of the cells of a row, each as the type of its field; an empty cell is None where that may be.

    Raises: ValueError: a cell that cannot be read, or what the record's own method `check` finds.  TypeError: a column that is
        missing.
    """
    values = {}
    for one in dataclasses.fields(record):
        if one.name in cells:
            kinds = getattr(one.type, "__args__", (one.type,))
            values[one.name] = None if cells[one.name] == "" and type(None) in kinds else kinds[0](cells[one.name])
    if values.get("configuration") is not None and not isinstance(json.loads(values["configuration"]), dict):
        raise ValueError(f"a configuration that is no JSON object, {values['configuration']:.60}")
    found = record(**values)
    if hasattr(found, "check"):
        found.check()
    return found


def sort_out_rows(path: str | os.PathLike, make: Callable[[dict[str, str]], T]) -> tuple[list[T], list[Fault]]:
    """What `make` makes of the rows of a file, and the lines that it raises ValueError or TypeError for."""
    path = pathlib.Path(path)
    header, lines = read_lines(path)
    good, bad = [], []
    for one in lines:
        reason = one.reason
        if not reason:
            try:
                good.append(make(one.cells))
                continue
            except (ValueError, TypeError) as error:
                reason = one_line(error)
        bad.append(Fault(path, one.number, f"must be a row of {len(header)} readable cells, got {reason}."))
    return good, bad


def read_rows(path: str | os.PathLike, columns: type[T] | None = None) -> list[T]:
    """The rows of a file, as records of a dataclass, or as dicts; none where there is no file.

    Each line that cannot be read is reported on stderr, once, and passed over.

    Raises: RunError: the file cannot be read, or has other columns.
    """
    if columns is not None:
        _check_header(path, read_lines(path)[0], columns)
    good, bad = sort_out_rows(path, dict if columns is None else lambda cells: parse(columns, cells))
    for fault in bad:
        warn_once(fault, "The line is passed over; mend or delete it.")
    return good


def rows_that_agree(rows: Iterable[T], columns: Sequence[str]) -> list[list[T]]:
    """Records that have the same values in some columns, together."""
    found: dict[tuple, list[T]] = {}
    for row in rows:
        found.setdefault(tuple(getattr(row, name) for name in columns), []).append(row)
    return list(found.values())


def warn_once(fault: Fault, cure: str) -> None:
    """Warns of a fault on stderr, the first time that this process meets it."""
    if fault not in _warned:
        _warned.add(fault)
        print(f"warning: {fault} {cure}", file=sys.stderr, flush=True)


_warned: set[Fault] = set()


def check_file(path: str | os.PathLike, columns: Columns) -> None:
    """Refuses a file that `write_rows` would refuse. Call it before the work whose rows it is to hold.

    Raises: RunError: the file has other columns, or its folder cannot be made.
    """
    path = pathlib.Path(path)
    with explained(f"table: file {path} must be writable", "Choose another.", OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
        if path.is_dir():
            raise IsADirectoryError("a folder")
    _check_header(path, read_lines(path)[0], columns)


def _check_header(path: str | os.PathLike, header: list[str], columns: Columns) -> None:
    if header and not holds(header, columns):
        raise RunError(
            f"table: file {path} must have the columns of this version in its first line, got "
            f"{' '.join(','.join(header).split())[:80]!r}... Mend that line, move the file away or choose another --out."
        )


def write_rows(path: str | os.PathLike, columns: Columns, rows: Iterable[Any], key: Sequence[str]) -> None:
    """Writes rows into a CSV file beside those it holds; one with the same `key` cells takes the older one's place.

    The file is replaced as a whole while its lock is held: processes that write it wait for each other, and who reads it
    meanwhile reads all of the old one or all of the new one. Lines that cannot be read stay as they are. Values of None are
    empty cells. A file of an earlier version gets the columns that it lacks, empty.

    Args:
        columns: the dataclass that the rows are of, or the names of the columns of dicts.
        key: columns that tell rows apart.
    Raises: RunError: the file cannot be written, has other columns, or stays locked for `PATIENCE`.
    """
    shown, path, fields = pathlib.Path(path), pathlib.Path(os.path.realpath(path)), column_names(columns)
    busy = f"table: file {shown} must be free, got another process that has held its lock for {PATIENCE:.0f} s. Try again."
    with explained(f"table: file {shown} must be writable", "Choose another --out.", OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path, PATIENCE, busy):
            header, lines = read_lines(path)
            _check_header(shown, header, columns)
            found: dict[Any, bytes] = {}
            for one in lines:
                name = one.number if one.reason else tuple(one.cells.get(column, "") for column in key)
                found[name] = one.text if one.reason or header == fields else row_as_line(one.cells, fields).encode()
            for row in rows:
                row = dataclasses.asdict(row) if isinstance(columns, type) else row
                found[tuple(_cell(row[column]) for column in key)] = row_as_line(row, fields).encode()
            content = b"".join(one + b"\n" for one in (",".join(fields).encode(), *found.values()))
            if not path.exists() or path.read_bytes() != content:
                write_whole(path, content)


def row_as_line(row: Mapping[str, Any], fields: Sequence[str]) -> str:
    """The line of a row, without its end; None and what is missing are empty cells."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="").writerow([_cell(row.get(name)) for name in fields])
    return buffer.getvalue()


def _cell(value: Any) -> str:
    return "" if value is None else " ".join(str(value).splitlines())
