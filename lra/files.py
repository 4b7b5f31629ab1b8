"""Files that are whole at every moment and have one writer at a time, and what goes wrong with them as one line."""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any, NoReturn


class RunError(Exception):
    """A run that cannot start or go on; the message names the cause and the cure, on one line."""


def write_whole(path: pathlib.Path, content: bytes) -> None:
    """Writes a file aside and renames it, so that it is all new or as it was, whatever ends the process or the machine."""
    aside = path.with_name(f".{path.name}.partial")
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: pathlib.Path, seconds: float, busy: str) -> Iterator[None]:
    """Holds the lock of a file: the operating system's, on .NAME.lock beside it. It goes when its process ends, however.

    On NFS it holds between machines too, where the server grants locks, as version 4 does.

    Args:
        seconds: to wait for another that holds it.
        busy: the message of the error after that.
    Raises: RunError: another holds it.  OSError: the folder does not let itself be locked.
    """
    import filelock

    lock = filelock.FileLock(path.with_name(f".{path.name}.lock"), timeout=seconds)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise RunError(busy) from None
    except NotImplementedError as error:
        raise OSError(one_line(error)) from error
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def explained(what: str, cure: str, kinds: type[Exception] = Exception, raised: type[Exception] = RunError) -> Iterator[None]:
    """Turns an error of these kinds into one line: what must be, what was got, what to do instead.

    The default is all kinds, because what stores checkpoints raises many.
    """
    try:
        yield
    except raised:
        raise
    except kinds as error:
        raise raised(f"{what}, got {one_line(error)}. {cure}") from error


def refuse(name: str, condition: str, got: Any, cure: str) -> NoReturn:
    """Raises the ValueError of a value that cannot be honoured."""
    raise ValueError(f"{name} must {condition}, got {got}. {cure}")


def one_line(error: Exception) -> str:
    """An error's text on one line of readable length."""
    return (" ".join(str(error).split()) or type(error).__name__)[:200].rstrip(".")
