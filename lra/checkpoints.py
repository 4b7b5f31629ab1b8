"""What a run leaves in its folder while it trains: one whole checkpoint at any time, whatever kills it."""

import contextlib
import csv
import json
import logging
import os
import pathlib
import uuid
from typing import Any

import jax


class RunError(Exception):
    """A run that cannot start or go on; the message names the cause and the cure, on one line."""


class Interrupted(RunError):
    """A run that was stopped by the user, after its checkpoint was saved."""


def open_folder(folder: str | os.PathLike, needed_bytes: int = 0) -> pathlib.Path:
    """Makes a folder and tries that it can be written and has room.

    Raises: RunError: it cannot be made or written, or has no room for needed_bytes.
    """
    folder = pathlib.Path(folder).expanduser().absolute()
    what = f"out: folder {folder} must be writable, with {needed_bytes / 1e6:.1f} MB for checkpoints"
    with _explained(what, "Choose another with --out."):
        folder.mkdir(parents=True, exist_ok=True)
        _reserve(folder, needed_bytes)
    return folder


def _reserve(folder: pathlib.Path, size: int) -> None:
    """Raises OSError where `size` bytes cannot be written into a folder now: full, over quota, read-only."""
    probe = folder / f".probe-{uuid.uuid4().hex}"
    try:
        with probe.open("wb") as file:
            file.write(b"\0" * 4096)
            file.flush()
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, max(size, 4096))
    finally:
        probe.unlink(missing_ok=True)


def claim(folder: pathlib.Path, configuration: dict, resume: bool) -> tuple[str, dict | None]:
    """Makes sure that a folder is this run's to write, and marks it with the run's configuration.

    Returns: (the folder, the result that it holds, if the run is finished and resume is True).
    Raises: RunError: the folder holds another run, or this one and not `resume`.
    """
    mark, result = folder / "run.json", folder / "result.json"
    if not mark.exists():
        write_json(mark, configuration)
        return str(folder), None
    theirs = json.loads(mark.read_text())
    for name, value in configuration.items():
        if theirs.get(name) != value:
            raise RunError(
                f"out: folder {folder} must hold this run or none, got one with {name}={theirs.get(name)!r} "
                f"instead of {value!r}. Choose another with --out."
            )
    if not resume and ((folder / "checkpoint").exists() or result.exists()):
        raise RunError(f"out: folder {folder} must be empty to start anew, got this run, saved. Pass --resume.")
    return str(folder), json.loads(result.read_text()) if result.exists() else None


def write_json(path: pathlib.Path, values: dict) -> None:
    """Writes a file aside and renames it, so that it is whole or absent."""
    aside = path.with_suffix(".partial")
    with _explained(f"out: file {path} must be writable", "Make room and run again with --resume."):
        aside.write_text(json.dumps(values, indent=1) + "\n")
        aside.replace(path)


def write_history(path: pathlib.Path, progress: dict, score: str = "accuracy") -> None:
    """Writes the losses of all steps, and the validations, as CSV; `score` names what validation measures."""
    validation = {step: (value, loss) for step, value, loss in progress["validation"]}
    with _explained(f"out: file {path} must be writable", "Make room and run again with --resume."):
        aside = path.with_suffix(".partial.csv")
        with aside.open("w", newline="") as file:
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow(["step", "train_loss", f"validation_{score}", "validation_loss"])
            for step, loss in enumerate(progress["losses"], 1):
                rows.writerow([step, loss, *validation.get(step, ("", ""))])
        aside.replace(path)


class Checkpoints:
    """The newest checkpoint of a run: arrays and plain data, written aside and renamed when whole.

    Args:
        folder: holds the checkpoints and nothing else.
    """

    def __init__(self, folder: pathlib.Path):
        import orbax.checkpoint as orbax

        # Orbax logs what it does at every save, and traces of its threads; what a user must know is raised.
        for name in ("absl", "orbax"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self._orbax, self.folder = orbax, folder
        # Saving at once, not in the background: the next step is free to overwrite the buffers.
        options = orbax.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
        with self._explained("open", "Delete it and start anew."):
            self._manager = orbax.CheckpointManager(folder, options=options)

    def latest(self) -> int | None:
        """The step of the checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, progress: dict) -> None:
        """Saves a pytree of arrays and plain data; the older checkpoint goes when this one is whole."""
        if self.latest() == step:
            return
        kept = self.latest()
        kept = "Nothing was saved before." if kept is None else f"The checkpoint of step {kept} is whole."
        with self._explained("save into", f"{kept} Make room and run again with --resume."):
            # Tried first, because a write that fails inside Orbax leaves threads behind that print their own traces.
            size = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + len(json.dumps(progress))
            _reserve(self.folder, size + size // 4)
            items = dict(state=self._orbax.args.StandardSave(state), progress=self._orbax.args.JsonSave(progress))
            self._manager.save(step, args=self._orbax.args.Composite(**items), force=True)

    def progress(self) -> dict:
        """The plain data of the checkpoint."""
        return self._restore(progress=self._orbax.args.JsonRestore())["progress"]

    def state(self, like: Any) -> Any:
        """The arrays of the checkpoint, in the structure of `like`."""
        abstract = jax.tree.map(self._orbax.utils.to_shape_dtype_struct, like)
        return self._restore(state=self._orbax.args.StandardRestore(abstract))["state"]

    def _restore(self, **items):
        with self._explained("read", "Delete it and start anew."):
            return self._manager.restore(self.latest(), args=self._orbax.args.Composite(**items))

    def close(self) -> None:
        self._manager.close()

    def _explained(self, verb: str, cure: str):
        return _explained(f"checkpoint: folder {self.folder} must be whole and writable to {verb} it", cure)


@contextlib.contextmanager
def _explained(what: str, cure: str):
    """Turns what the storage raises into one line. Orbax and its back end raise many types."""
    try:
        yield
    except Exception as error:
        raise RunError(f"{what}, got {line(error)}. {cure}") from error


def line(error: Exception) -> str:
    """An error's text on one line of readable length."""
    return (" ".join(str(error).split()) or type(error).__name__)[:200].rstrip(".")
