"""A run's progress on stderr: a bar on a terminal, a line now and then elsewhere."""

import contextlib
import importlib.util
import math
import os
import sys
import time


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
        if not self.quiet and sys.stderr.isatty():
            self._bar = _bar(self.label, self.steps, self.start)
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar[0].stop()

    def update(self, step: int, loss: float, steps_per_second: float, note: str = "") -> None:
        """Step `step` is done. `note` is what the last validation found."""
        left = (self.steps - step) / steps_per_second if steps_per_second else math.nan
        if self._bar is not None:
            bar, row = self._bar
            text = f"loss {loss:.3f}  {steps_per_second:5.1f} steps/s  {clock(left)} left  {note}"
            bar.update(row, completed=step, text=text)
        elif not self.quiet and (step >= self._next or step == self.steps):
            # After the step that is due, so that a resumed run keeps the same beat.
            self._next = (step * 10 // self.steps + 1) * self.steps / 10
            print(
                f"{self.label}: step {step}/{self.steps}  loss {loss:.3f}  {steps_per_second:.1f} steps/s  "
                f"{clock(left)} left  {note}".rstrip(),
                file=sys.stderr,
                flush=True,
            )

    def say(self, text: str) -> None:
        """One line, above the bar."""
        if self._bar is not None:
            self._bar[0].console.print(text, highlight=False)
        elif not self.quiet:
            print(text, file=sys.stderr, flush=True)


def _bar(label: str, steps: int, start: int):
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn
    except ImportError:
        return None
    columns = (TextColumn("{task.description:>15}"), BarColumn(20), TextColumn("{task.completed}/{task.total}"))
    bar = Progress(*columns, TextColumn("{task.fields[text]}"), console=Console(stderr=True))
    bar.start()
    return bar, bar.add_task(label, total=steps, completed=start, text="compiling")


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


class Stopwatch:
    """Adds up the seconds between `start` and `stop`, and how many steps they held."""

    def __init__(self, seconds: float = 0.0, steps: int = 0):
        self.seconds, self.steps, self._began = seconds, steps, None

    def start(self) -> None:
        self._began = time.perf_counter()

    def stop(self, steps: int) -> None:
        self.seconds += time.perf_counter() - self._began
        self.steps += steps

    @property
    def rate(self) -> float:
        """Steps per second."""
        return self.steps / self.seconds if self.seconds else 0.0


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
