"""What takes over two seconds is shown, and what does not is not. Seconds are made by hand."""

import io
import re
import sys
import threading

import pytest

from subquad.lra import progress

TENTHS = re.compile(r"^counting: (\d+)/100  0:\d\d", re.M)


@pytest.fixture
def patience(monkeypatch):
    """Shows work at once, and looks at it all the time."""
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    monkeypatch.setattr(progress, "BEAT", 0.001)


class Said(io.StringIO):
    """What is written to stderr, and an event for each part of it."""

    def __init__(self, terminal=False):
        super().__init__()
        self.terminal, self.news = terminal, threading.Condition()

    def isatty(self):
        return self.terminal

    def write(self, text):
        with self.news:
            written = super().write(text)
            self.news.notify_all()
        return written

    def wait_for(self, text):
        with self.news:
            assert self.news.wait_for(lambda: text in self.getvalue(), 60), self.getvalue()


def test_quick_work_says_nothing(monkeypatch):
    said = Said()
    monkeypatch.setattr(sys, "stderr", said)
    with progress.Work("quick", 3) as work:
        work.advance(3)
    assert list(progress.over("abc", "quick")) == ["a", "b", "c"] and said.getvalue() == ""
    assert not progress.Work._shown.locked()


@pytest.mark.usefixtures("patience")
def test_long_work_is_a_line_at_every_tenth(monkeypatch):
    said = Said()
    monkeypatch.setattr(sys, "stderr", said)
    with progress.Work("counting", 100, note=lambda: "a note") as work:
        said.wait_for("counting: 0/100  0:00  a note\n")
        for done in range(1, 101):
            work.advance()
            if done % 10 == 0:
                said.wait_for(f"counting: {done}/100")
    seen = [int(number) for number in TENTHS.findall(said.getvalue())]
    # A look may come some steps after the tenth, but no tenth has two lines.
    assert len(seen) == 11 and [number // 10 for number in seen] == list(range(11))
    assert "about 0:00 left" in said.getvalue()
    with progress.Work("quiet", quiet=True):
        pass
    assert "quiet" not in said.getvalue()


@pytest.mark.usefixtures("patience")
def test_work_without_steps_is_a_line_every_half_minute(monkeypatch):
    said, now = Said(), [0.0]
    monkeypatch.setattr(sys, "stderr", said)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.Work("compiling"):
        said.wait_for("compiling: 0:00\n")
        now[0] = 29.0
        now[0] = 31.0
        said.wait_for("compiling: 0:31\n")
    assert said.getvalue().count("compiling") == 2


@pytest.mark.usefixtures("patience")
def test_of_works_in_each_other_one_is_shown(monkeypatch):
    said = Said()
    monkeypatch.setattr(sys, "stderr", said)
    with progress.Work("outer"):
        said.wait_for("outer: ")
        with progress.Work("inner") as inner:
            inner._thread.join()
    assert "inner" not in said.getvalue()
    with pytest.raises(KeyError), progress.Work("failed"):  # whatever ends it
        raise KeyError
    assert not progress.Work._shown.locked()


@pytest.mark.usefixtures("patience")
def test_a_terminal_gets_a_bar(monkeypatch):
    said = Said(terminal=True)
    monkeypatch.setattr(sys, "stderr", said)
    monkeypatch.setenv("TERM", "xterm")
    with progress.Work("generating", 4) as work:
        work.advance(2)
        said.wait_for("2/4")
    assert "generating" in said.getvalue() and "\x1b[" in said.getvalue()


@pytest.mark.usefixtures("patience")
def test_a_runs_progress_shows_what_it_waits_for(monkeypatch):
    said = Said()
    monkeypatch.setattr(sys, "stderr", said)
    shown = progress.Progress("softmax", 10)
    with shown:
        with shown.work("compiling"):
            said.wait_for("softmax: compiling: 0:00\n")
        for _ in shown.work("validation", 2).over(range(2)):
            said.wait_for("softmax: validation: 0/2")
    with progress.Progress("softmax", 10, quiet=True) as shown, shown.work("hidden"):
        assert list(shown.work("hidden").over([1])) == [1]
    assert "hidden" not in said.getvalue()


def test_a_board_shows_its_cells_and_no_work_within_it(patience, monkeypatch):
    said = Said(terminal=True)
    monkeypatch.setattr(sys, "stderr", said)
    monkeypatch.setenv("TERM", "xterm")
    with progress.Board(("layer", "recall"), ["softmax", "s4"]) as board:
        board.cell("s4", "recall")("[1/3]")
        said.wait_for("[1/3]")
        with progress.Work("counting", 100) as work:
            work.advance(50)
    assert "softmax" in said.getvalue() and "recall" in said.getvalue() and "counting" not in said.getvalue()
    with progress.Work("counting again", 2) as work:
        said.wait_for("counting again")
        work.advance(2)


def test_without_a_terminal_a_board_shows_nothing(capsys):
    with progress.Board(("layer", "recall"), ["softmax"]) as board:
        assert board.cell("softmax", "recall") is None
        board.show("softmax", "recall", "done")
    assert capsys.readouterr().err == ""
