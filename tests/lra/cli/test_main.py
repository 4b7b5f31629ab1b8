"""The console entry: `subquad COMMAND ...`."""

import pathlib
import shutil
import subprocess
import sys
import tomllib

import pytest

from subquad.lra.cli import __main__ as console
from subquad.lra.report import results

ROOT = pathlib.Path(__file__).parents[3]


def subquad(monkeypatch, *words) -> int:
    """The exit code of the command in this process."""
    monkeypatch.setattr(sys, "argv", ["subquad", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        console.main()
    return ended.value.code or 0


def test_it_is_what_the_package_installs():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"subquad": f"{console.__name__}:{console.main.__name__}"}


def test_every_command_is_listed_and_explains_itself(monkeypatch, capsys):
    assert subquad(monkeypatch) == 0
    listed = capsys.readouterr().out
    for name in console.COMMANDS:
        assert f"  {name} " in listed and subquad(monkeypatch, name, "--help") == 0
        assert capsys.readouterr().out.startswith(f"usage: subquad {name} ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("tabel",), "subquad: command must be a known one, got 'tabel'. Did you mean 'table'?"),
        (("train", "--stesp", 7), "subquad train: option must be a known one, got '--stesp'. Did you mean '--steps'?"),
        (("table", "--paper", "s44"), "subquad table: paper must be a known name, got 's44'. Did you mean 's4'?"),
        (("report", "nothing.csv"), "subquad report: file must be there, got nothing.csv, which is none."),
    ],
)
def test_a_wrong_word_is_one_line(words, said, monkeypatch, capsys):
    assert subquad(monkeypatch, *words) == 2
    error = capsys.readouterr().err
    assert error.startswith(said) and error.count("\n") == 1


def test_it_runs_outside_of_a_clone(tmp_path):
    """As the command that measures ratios for a table is run."""
    command = [sys.executable, "-m", "subquad.lra.cli", "bench", "--modes", "frward"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("subquad bench: --modes must be a known name, got 'frward'.")


def test_rows_become_tables_and_plots(monkeypatch, capsys, tmp_path, recwarn):
    for name in ("quickstart", "bench"):
        shutil.copy(ROOT / "lra" / "results" / f"{name}.csv", tmp_path)
    assert subquad(monkeypatch, "report", tmp_path / "quickstart.csv", tmp_path / "bench.csv") == 0
    assert not [one for one in recwarn.list if one.category is UserWarning]  # as of a legend that has no room
    said = capsys.readouterr().out
    assert "test accuracy" in said and "calls/s 1K" in said
    endings = {path.name for path in tmp_path.iterdir()}
    assert {"quickstart.md", "quickstart.png", "quickstart-time.png", "bench.md", "bench.tex", "bench-1.png"} <= endings
    rows = results.read_results(tmp_path / "quickstart.csv")
    assert (tmp_path / "quickstart.md").read_text() == results.markdown(rows)
