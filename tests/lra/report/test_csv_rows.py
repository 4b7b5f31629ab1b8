"""Files that several processes write at once, and files that were damaged."""

import csv
import pathlib
import subprocess
import sys

import filelock
import pytest

from subquad.lra.files import RunError
from subquad.lra.report import csv_rows, ledger
from tests.lra.report.test_results import row

FIELDS = ("name", "length", "ms")


def write(path, *rows):
    csv_rows.write_rows(path, FIELDS, [dict(zip(FIELDS, cells, strict=True)) for cells in rows], ("name", "length"))


def cells(path):
    with path.open(newline="") as file:
        return [tuple(one) for one in csv.reader(file)][1:]


def test_a_row_takes_the_place_of_the_one_with_its_key_and_leaves_the_others(tmp_path):
    path = tmp_path / "new" / "rows.csv"
    write(path, ("a", 1, 1.0), ("b", 1, None))
    write(path, ("a", 1, 0.5), ("a", 2, 'a "quoted", cell\nof two lines'))
    assert cells(path) == [("a", "1", "0.5"), ("b", "1", ""), ("a", "2", 'a "quoted", cell of two lines')]
    assert sorted(file.name for file in path.parent.iterdir()) == [".rows.csv.lock", "rows.csv"]


def test_a_link_and_the_rights_of_a_file_stay(tmp_path):
    write(tmp_path / "rows.csv", ("a", 1, 1))
    (tmp_path / "rows.csv").chmod(0o640)
    (tmp_path / "link.csv").symlink_to("rows.csv")
    write(tmp_path / "link.csv", ("b", 1, 1))
    assert (tmp_path / "link.csv").is_symlink() and len(cells(tmp_path / "rows.csv")) == 2
    assert (tmp_path / "rows.csv").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("content", [b"other\n1\n", b"a line\n", b"no line", b"\n", b"\x89PNG\xff\x00\n"])
def test_a_file_with_other_columns_is_left_alone(tmp_path, content):
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    for refused in (lambda: write(path, ("a", 1, 1)), lambda: csv_rows.read_rows(path, ledger.Floor)):
        with pytest.raises(RunError, match="must have the columns of this version in its first line, got '.*Mend that line"):
            refused()
    assert path.read_bytes() == content


def test_a_file_that_cannot_be_written_is_told_before_any_work(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "rows.csv", tmp_path):
        with pytest.raises(RunError, match="must be writable"):
            csv_rows.check_file(path, FIELDS)
        with pytest.raises(RunError, match="must be writable|must be readable"):
            write(path, ("a", 1, 1))


WRITER = """
import sys
from subquad.lra.report import results
from tests.lra.report.test_results import row
path, name = sys.argv[1:]
print("ready", flush=True)
sys.stdin.read()  # until all of them are
for seed in range(8):
    results.append(row(name, seed=seed, source="s" * 20_000), path)  # longer than what a system writes at once
    results.append(row("shared", seed=seed), path, ("configuration", "status"))
"""


def test_rows_of_processes_that_write_at_once_are_all_there(tmp_path):
    path, names = tmp_path / "ledger.csv", ("softmax", "local", "s4")
    root = pathlib.Path(__file__).parents[3]
    words = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=root)
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), name], **words) for name in names]
    assert [writer.stdout.readline() for writer in writers] == ["ready\n"] * 3
    for writer in writers:
        writer.stdin.close()
    while any(writer.poll() is None for writer in writers):
        # Who reads without the lock never meets a part of a row.
        assert not csv_rows.sort_out_rows(path, dict)[1]
    assert [(writer.wait(), writer.stderr.read()) for writer in writers] == [(0, "")] * 3
    found = [(one["layer"], one["seed"]) for one in csv_rows.read_rows(path)]
    wanted = [(name, str(seed)) for name in (*names, "shared") for seed in range(8)]
    assert sorted(found) == sorted(wanted)


def test_a_lock_that_is_never_released_is_told_and_one_of_the_dead_is_none(tmp_path, monkeypatch):
    path = tmp_path / "rows.csv"
    code = "import sys, filelock\nwith filelock.FileLock(sys.argv[1]): print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(tmp_path / ".rows.csv.lock")]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    monkeypatch.setattr(csv_rows, "PATIENCE", 0.0)
    with pytest.raises(RunError, match="must be free, got another process that has held its lock for 0 s. Try again"):
        write(path, ("a", 1, 1))
    holder.kill()
    holder.wait()
    write(path, ("a", 1, 1))
    assert cells(path) == [("a", "1", "1")]


def test_a_system_without_locks_is_told(tmp_path, monkeypatch):
    def refuse(self):
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    with pytest.raises(RunError, match="must be writable, got FileSystem does not appear to support flock"):
        write(tmp_path / "rows.csv", ("a", 1, 1))


DAMAGES = {
    "cut short": lambda text: text[: len(text) // 2],
    "a quote that never closes": lambda text: text.replace(b'"', b"", 1),
    "a bad byte": lambda text: text.replace(b"softmax", b"soft\xffax", 1),
    "zeros": lambda text: b"\0" * len(text),
    "a cell too many": lambda text: text + b",1",
    "no number": lambda text: text.replace(b",500,", b",5oo,", 1),
    "no object": lambda text: text.replace(b'"{', b'"[{', 1).replace(b'}"', b'}]"', 1),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_row_is_told_once_kept_and_costs_no_other(damage, tmp_path, capsys):
    from subquad.lra.report import results

    path = tmp_path / "table.csv"
    for one in (row("local"), row(), row("s4")):
        results.append(one, path)
    lines = path.read_bytes().splitlines()
    lines[2] = DAMAGES[damage](lines[2])
    path.write_bytes(b"\n".join(lines) + b"\n")
    for _ in range(2):
        assert [one.layer for one in results.read_results(path)] == ["local", "s4"]
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"warning: {path}:3 must be a row of") and said.endswith("passed over; mend or delete it.")
    results.append(row("strided"), path)
    assert path.read_bytes().splitlines()[:4] == lines
    assert [one.layer for one in results.read_results(path)] == ["local", "s4", "strided"]
    assert [(fault.path, fault.line) for fault in ledger.verify_files([path])[1]] == [(path, 3)]


def test_a_last_row_that_was_cut_is_not_glued_to_the_next(tmp_path, capsys):
    path = tmp_path / "rows.csv"
    write(path, ("a", 1, 1.0))
    for cut in (("b", 2, 2.0), ("c", 3, 3.0)):
        write(path, cut)
        path.write_bytes(path.read_bytes()[:-5])
    write(path, ("d", 4, 4.0))
    assert [one["name"] for one in csv_rows.read_rows(path)] == ["a", "d"]
    assert path.read_text().splitlines()[2:4] == ["b,2", "c,3"]
    assert "rows.csv:3 must be a row of 3 readable cells, got 2 cells, as of a line that was cut" in capsys.readouterr().err
