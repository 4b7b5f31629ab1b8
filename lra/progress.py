"""Progress on stderr, of runs and of whatever takes over two seconds: a bar on a terminal, a line now and then elsewhere."""

import contextlib
import importlib.util
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

    With rich and a terminal it draws a bar; else it prints a line every tenth of the way, so that logs stay readable.

    Args:
        label: what is trained.
        steps: number of steps.
        start: step that the run starts at.
        quiet: show nothing.
    """

    def __init__(self, label: str, steps: int, start: int = 0, *, quiet: bool = False):
        self.label, self.steps, self.start, self.quiet = label, steps, start, quiet
        self._bar, self._next = None, 0

    def __enter__(self) -> "Progress":
        if not self.quiet and self.start < self.steps and sys.stderr.isatty() and importlib.util.find_spec("rich"):
            counts = ("{task.description:>15}", "{task.completed:,}/{task.total:,}", "{task.fields[text]}")
            bar = _rich_bar(*counts)
            bar.start()
            self._bar = bar, bar.add_task(self.label, total=self.steps, completed=self.start, text="compiling")
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar[0].stop()

    def update(self, step: int, loss: float, steps_per_second: float, note: str = "") -> None:
        """Step `step` is done. `note` is what the last validation found."""
        left = (self.steps - step) / steps_per_second if steps_per_second else math.nan
        text = f"loss {loss:.3f}  {steps_per_second:.1f} steps/s  {clock(left)} left  {note}".rstrip()
        self.show(step, text, f"{self.label}: step {step}/{self.steps}  {text}")

    def show(self, step: int, beside_bar: str, line: str) -> None:
        """Step `step` is done: moves the bar, or prints the line where the next tenth of the way is reached."""
        if self._bar is not None:
            bar, row = self._bar
            bar.update(row, completed=step, text=beside_bar)
        elif not self.quiet and (step >= self._next or step == self.steps):
            # After the step that is due, so that a resumed run keeps the same beat.
            self._next = (step * 10 // self.steps + 1) * self.steps / 10
            say(line)

    def over(self, items: Sequence, name: str) -> Iterator:
        """The items, and how many of them are done, in place of the loss."""
        if self._bar is None:
            yield from over(items, f"{self.label}: {name}", quiet=self.quiet)
            return
        bar, row = self._bar
        for number, item in enumerate(items):
            bar.update(row, text=f"{name} {number}/{len(items)}")
            yield item

    @contextlib.contextmanager
    def during(self, name: str) -> Iterator[None]:
        """Shows `name` in place of the loss while the block runs."""
        if self._bar is not None:
            bar, row = self._bar
            bar.update(row, text=name)
            yield
        else:
            with Work(f"{self.label}: {name}", quiet=self.quiet):
                yield

    def say(self, text: str) -> None:
        """One line, above the bar."""
        if self._bar is not None:
            self._bar[0].console.print(text, highlight=False)
        elif not self.quiet:
            say(text)


def _rich_bar(*texts: str, **words: Any):
    """A bar of rich on stderr, between the first of these texts and the others."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    first, *others = map(TextColumn, texts)
    return Progress(first, BarColumn(20), *others, console=Console(stderr=True), **words)


class Work:
    """Shows work that is not done within two seconds, whatever it waits for: a thread looks at it.

    With rich and a terminal it draws a bar, which goes when the work is done; else it prints a line at first, one at every
    tenth of the way, and one after every half minute without. Of works within each other the outermost that takes so long is
    shown.

    Args:
        label: what is done.
        total: how many steps it has; None: only the time is shown.
        note: more words, asked for at every look.
        at_once: begin with the block; else with the first item of `over`.
        quiet: show nothing.
    Example:
        >>> with Work("counting", 3) as work:
        ...     work.advance(3)
    """

    _shown = threading.Lock()

    def __init__(
        self, label: str, total: int | None = None, *, note: Callable[[], str] | None = None, at_once: bool = True,
        quiet: bool = False,
    ):  # fmt: skip
        self.label, self.total, self.note, self.quiet, self.done = label, total, note, quiet, 0
        self._at_once, self._ended, self._thread = at_once, threading.Event(), None

    def __enter__(self) -> "Work":
        if self._at_once:
            self._begin()
        return self

    def _begin(self) -> None:
        if self._thread is None and not self.quiet:
            self._began = time.monotonic()
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()

    def __exit__(self, *_) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def advance(self, steps: int = 1) -> None:
        """So many more steps are done."""
        self.done += steps

    def over(self, items: Iterable) -> Iterator:
        """The items; each is a step."""
        self._begin()
        for item in items:
            yield item
            self.advance()

    def _watch(self) -> None:
        if self._ended.wait(PATIENCE) or not Work._shown.acquire(blocking=False):
            return
        try:
            (self._draw if sys.stderr.isatty() and importlib.util.find_spec("rich") else self._print)()
        finally:
            Work._shown.release()

    def _print(self) -> None:
        tenth, said = -1, -math.inf
        while True:
            reached = 10 * self.done // self.total if self.total else -1
            if reached > tenth or time.monotonic() - said >= SILENCE:
                tenth, said = reached, time.monotonic()
                say(f"{self.label}: {self._words()}")
            if self._ended.wait(BEAT):
                return

    def _draw(self) -> None:
        with _rich_bar("{task.description}", "{task.fields[text]}", transient=True) as bar:
            row = bar.add_task(self.label, total=self.total, text=self._words())
            while not self._ended.wait(BEAT):
                bar.update(row, completed=self.done, text=self._words())

    def _words(self) -> str:
        taken = time.monotonic() - self._began
        words = [clock(taken)]
        if self.total:
            words = [f"{self.done:,}/{self.total:,}", *words]
            if 0 < self.done < self.total:
                words.append(f"about {clock(taken * (self.total - self.done) / self.done)} left")
        return "  ".join([*words, *filter(None, [self.note and self.note()])])


def say(text: str) -> None:
    """One line on stderr."""
    print(text, file=sys.stderr, flush=True)


def over(items: Iterable, label: str, total: int | None = None, **words: Any) -> Iterator:
    """The items, shown as `Work` where they take longer than two seconds; `total`: how many there are, None: their len."""
    if total is None and hasattr(items, "__len__"):
        total = len(items)
    with Work(label, total, **words) as work:
        yield from work.over(items)


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


class Board:
    """Numbers by step for TensorBoard, written by tensorboardX; without `wanted` it writes nothing.

    Args:
        folder: what `tensorboard --logdir` is given.
        wanted: whether to write.
    Raises: ValueError: wanted, and tensorboardX is not installed.
    """

    def __init__(self, folder: str | os.PathLike, wanted: bool):
        self._folder, self._wanted, self._writer = folder, wanted, None
        if wanted and importlib.util.find_spec("tensorboardX") is None:
            cure = "Run pip install tensorboardX."
            raise ValueError(f"train: tensorboard must be off where tensorboardX is not installed, got True. {cure}")

    @contextlib.contextmanager
    def open(self, step: int):
        """Writes from after `step` on; what an earlier life of the run logged later than that no longer counts."""
        if not self._wanted:
            yield
            return
        import tensorboardX

        with tensorboardX.SummaryWriter(str(self._folder), purge_step=step + 1) as self._writer:
            yield
        self._writer = None

    def add(self, step: int, name: str, *values: float) -> None:
        """The values of a quantity at `step` and the steps that follow."""
        if self._writer is not None:
            for at, value in enumerate(values, step):
                self._writer.add_scalar(name, value, at)
