"""Progress on stderr, of runs and of whatever takes over two seconds: a bar on a terminal, a line now and then elsewhere."""

import contextlib
import functools
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

# Seconds that work may take before it is shown, between two looks at it, and between two lines where there is no terminal.
PATIENCE, BEAT, SILENCE = 2.0, 0.25, 30.0


class Progress:
    """Shows step, loss, steps/s and time left of one run.

    On a terminal it draws a bar; else it prints a line every tenth of the way, so that logs stay readable.

    Args:
        label: what is trained.
        steps: number of steps.
        start: step that the run starts at.
        quiet: show nothing.
        show: is given the words instead, as a cell of a `Board` is.
    """

    def __init__(
        self, label: str, steps: int, start: int = 0, *, quiet: bool = False, show: Callable[[str], None] | None = None
    ):
        self.label, self.steps, self._next = label, steps, 0
        self.quiet, self._show = quiet or show is not None, show or (lambda text: None)
        self.on_terminal = not self.quiet and start < steps and sys.stderr.isatty()
        self._bar = _bar("{task.description:>15}", "{task.completed:,}/{task.total:,}", disable=not self.on_terminal)
        self._row = self._bar.add_task(label, total=steps, completed=start, text="compiling")

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    def update(self, step: int, loss: float, steps_per_second: float, note: str = "") -> None:
        """Step `step` is done. `note` is what the last validation found."""
        left = (self.steps - step) / steps_per_second if steps_per_second else math.nan
        text = f"loss {loss:.3f}  {steps_per_second:.1f} steps/s  {clock(left)} left  {note}".rstrip()
        self._bar.update(self._row, completed=step, text=text)
        self._show(f"{step}/{self.steps}  {note or f'loss {loss:.3f}'}")
        if not self.on_terminal and (step >= self._next or step == self.steps):
            # After the step that is due, so that a resumed run keeps the same beat.
            self._next = (step * 10 // self.steps + 1) * self.steps / 10
            self.say(f"{self.label}: step {step}/{self.steps}  {text}")

    def work(self, name: str, total: int | None = None) -> "Work":
        """`Work` within the run: on a terminal its name stands in place of the loss."""
        self._bar.update(self._row, text=name)
        self._show(name)
        return Work(f"{self.label}: {name}", total, quiet=self.quiet or self.on_terminal)

    def say(self, text: str) -> None:
        """One line, above the bar."""
        if self.on_terminal:
            self._bar.console.print(text, highlight=False)
        elif not self.quiet:
            say(text)


class Board:
    """A table on the terminal of what is at work in each cell, drawn anew twice a second; nothing where there is none.

    While it is there it alone is shown, and no `Work` within it.

    Args:
        heading: of the columns, the first that of the rows' names.
        rows: their names.
    """

    def __init__(self, heading: Sequence[str], rows: Sequence[str]):
        self.heading, self.cells = heading, {row: dict.fromkeys(heading[1:], "") for row in rows}
        self.on_terminal = sys.stderr.isatty()

    def __enter__(self) -> "Board":
        from rich.console import Console
        from rich.live import Live

        if self.on_terminal:
            Work._shown.acquire()
            self._live = Live(get_renderable=self._table, console=Console(stderr=True), refresh_per_second=2)
            self._live.start()
        return self

    def __exit__(self, *_) -> None:
        if self.on_terminal:
            self._live.stop()
            Work._shown.release()

    def show(self, row: str, column: str, text: str) -> None:
        """Writes a cell."""
        self.cells[row][column] = text

    def cell(self, row: str, column: str) -> Callable[[str], None] | None:
        """What writes a cell; None where there is no terminal."""
        return functools.partial(self.show, row, column) if self.on_terminal else None

    def _table(self):
        from rich.table import Table
        from rich.text import Text

        table = Table(*self.heading, box=None, padding=(0, 2, 0, 0))
        for row, cells in self.cells.items():
            table.add_row(row, *map(Text, cells.values()))
        return table


def _bar(*texts: str, **words: Any):
    """A bar of rich on stderr, between the first of these texts and the others, and the field "text" at its end."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    first, *others = map(TextColumn, (*texts, "{task.fields[text]}"))
    return Progress(first, BarColumn(20), *others, console=Console(stderr=True), **words)


class Work:
    """Shows work that is not done within two seconds, whatever it waits for: a thread looks at it.

    On a terminal it draws a bar, which goes when the work is done; else it prints a line at first, one at every tenth of the
    way, and one after every half minute without. Of works within each other the outermost that takes so long is shown.

    Args:
        label: what is done.
        total: how many steps it has; None: only the time is shown.
        note: more words, asked for at every look.
        quiet: show nothing.
    Example:
        >>> with Work("counting", 3) as work:
        ...     work.advance(3)
    """

    _shown = threading.Lock()

    def __init__(
        self, label: str, total: int | None = None, *, note: Callable[[], str] = lambda: "", quiet: bool = False
    ):
        self.label, self.total, self.note, self.quiet, self.done = label, total, note, quiet, 0
        self._ended, self._thread = threading.Event(), threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Work":
        self._began = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._ended.set()
        self._thread.join()

    def advance(self, steps: int = 1) -> None:
        """So many more steps are done."""
        self.done += steps

    def over(self, items: Iterable) -> Iterator:
        """The items, one step each."""
        with self:
            for item in items:
                yield item
                self.advance()

    def _watch(self) -> None:
        if self.quiet or self._ended.wait(PATIENCE) or not Work._shown.acquire(blocking=False):
            return
        tenth, said, on_terminal = -1, -math.inf, sys.stderr.isatty()
        try:
            with _bar("{task.description}", transient=True, disable=not on_terminal) as bar:
                row = bar.add_task(self.label, total=self.total, text=self._words())
                while not self._ended.wait(BEAT):
                    bar.update(row, completed=self.done, text=self._words())
                    reached = 10 * self.done // self.total if self.total else -1
                    if not on_terminal and (reached > tenth or time.monotonic() - said >= SILENCE):
                        tenth, said = reached, time.monotonic()
                        say(f"{self.label}: {self._words()}")
        finally:
            Work._shown.release()

    def _words(self) -> str:
        taken = time.monotonic() - self._began
        words = [f"{self.done:,}/{self.total:,}", clock(taken)] if self.total else [clock(taken)]
        if self.total and 0 < self.done < self.total:
            words.append(f"about {clock(taken * (self.total - self.done) / self.done)} left")
        return "  ".join(filter(None, [*words, self.note()]))


def say(text: str) -> None:
    """One line on stderr."""
    print(text, file=sys.stderr, flush=True)


def over(items: Iterable, label: str, total: int | None = None, *, quiet: bool = False) -> Iterator:
    """The items, shown as `Work` where they take longer than two seconds; `total`: how many there are, None: their len."""
    return Work(label, len(items) if total is None and hasattr(items, "__len__") else total, quiet=quiet).over(items)


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss.

    Example:
        >>> clock(3671), clock(59.6)
        ('1:01:11', '1:00')
    """
    if not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


@contextlib.contextmanager
def tensorboard(folder: str | os.PathLike, step: int, wanted: bool) -> Iterator[Callable[[str, float, int], None]]:
    """A function of (name, value, step) that logs a number for TensorBoard, or where it is not wanted does nothing.

    What an earlier life of the run logged later than `step` no longer counts.
    """
    if not wanted:
        yield lambda name, value, step: None
        return
    import tensorboardX

    with tensorboardX.SummaryWriter(str(folder), purge_step=step + 1) as writer:
        yield writer.add_scalar
