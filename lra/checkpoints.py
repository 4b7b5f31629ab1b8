"""What a run leaves in its folder while it trains: one whole checkpoint at any time, whatever kills it."""

import contextlib
import csv
import dataclasses
import io
import json
import logging
import os
import pathlib
import signal
import socket
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from subquad.lra.files import RunError, explained, locked, write_whole
from subquad.lra.state import FORMAT, RECORD


class Interrupted(RunError):
    """A run that was stopped by a signal, SIGINT (Ctrl-C) or SIGTERM (a scheduler's), after its checkpoint was saved."""

    def __init__(self, message: str, number: int = signal.SIGINT):
        super().__init__(message)
        self.number = number


def open_folder(folder: str | os.PathLike, needed_bytes: int = 0) -> pathlib.Path:
    """Makes a folder and tries that it can be written and has room.

    Raises: RunError: it has no name, cannot be made or written, or has no room for needed_bytes.
    """
    if not os.fspath(folder):
        raise RunError("out: folder must have a name, got ''. Write . for this one.")
    folder = pathlib.Path(folder).expanduser().absolute()
    what = f"out: folder {folder} must be writable, with {needed_bytes / 1e6:.1f} MB for checkpoints"
    with explained(what, "Choose another with --out."):
        folder.mkdir(parents=True, exist_ok=True)
        _reserve(folder, needed_bytes)
    return folder


def _reserve(folder: pathlib.Path, size: int) -> None:
    """Raises OSError where `size` bytes cannot be written into a folder now: full, over quota, read-only."""
    trial = folder / f".trial-{uuid.uuid4().hex}"
    try:
        with trial.open("wb") as file:
            file.write(b"\0" * 4096)
            file.flush()
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, max(size, 4096))
    finally:
        trial.unlink(missing_ok=True)


@contextlib.contextmanager
def occupied(folder: pathlib.Path) -> Iterator[None]:
    """Keeps other processes from training in a folder meanwhile. A process that died keeps nobody out.

    Raises: RunError: another process trains there, or the folder does not let itself be locked.
    """
    note, trainer = folder / ".trainer", "another process"
    with contextlib.suppress(OSError, ValueError):
        trainer = note.read_text() or trainer
    busy = f"out: folder {folder} must be free, got one that {trainer} trains in. Wait for it or choose another with --out."
    with contextlib.ExitStack() as held:
        with explained(f"out: folder {folder} must be lockable", "Choose another with --out.", OSError):
            held.enter_context(locked(folder / "run", 0, busy))
            note.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        held.callback(note.unlink, missing_ok=True)
        yield


def begin_or_resume(folder: pathlib.Path, configuration: dict, resume: bool, result_type: type) -> dict | None:
    """Makes sure that a folder is this run's to write, and marks it with the run's configuration.

    Returns: the result that the folder holds, if the run is finished and resume is True.
    Raises: RunError: the folder holds another run, or this one and not `resume`, or a file that cannot be read.
    """
    mark = folder / "run.json"
    if mark.exists():
        _check_same(folder, configuration, read_configuration(folder))
    else:
        write_json(mark, configuration)
    if not resume and is_saved(folder):
        raise RunError(f"out: folder {folder} must be empty to start anew, got this run, saved. Pass --resume.")
    return read_result(folder, configuration, result_type)


def saved_steps(folder: pathlib.Path) -> list[int]:
    """The steps of the checkpoints in a run's folder."""
    return [int(path.name) for path in folder.glob("checkpoint/*") if path.name.isdigit()]


def is_saved(folder: pathlib.Path) -> bool:
    """Whether a run's folder holds anything that `resume` goes on from: a checkpoint, or a result."""
    return bool(saved_steps(folder)) or (folder / "result.json").exists()


def nothing_to_resume(folder: pathlib.Path, runs: Mapping[str, dict]) -> str:
    """What is to be said where `resume` finds none of some runs in a folder of runs; "" where it finds one.

    Args:
        runs: the name of each run's folder -> its configuration.
    """
    if any(is_saved(folder / name) for name in runs):
        return ""
    differing: dict[str, list[str]] = {}
    for path in sorted(folder.glob("*/run.json")):
        with contextlib.suppress(RunError):
            theirs = read_configuration(path.parent) if is_saved(path.parent) else None
            for ours in runs.values() if theirs else ():
                names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
                differing[path.parent.name] = min(differing.get(path.parent.name, names), names, key=len)
    said = f"Nothing to resume in {folder}; beginning anew."
    if differing:
        nearest = min(differing, key=lambda name: len(differing[name]))
        said += f" The folder holds {nearest}, which differs in {', '.join(differing[nearest])}."
    return said


def read_configuration(
    folder: pathlib.Path,
    name: str = "out",
    cure: str = "Delete it if the run in that folder is this one, and pass --resume; else choose another --out.",
) -> dict:
    """The configuration of the run in a folder.

    Args:
        name: what the folder is an argument for; cure: what a caller is told to do.
    Raises: RunError: it cannot be read.
    """
    return read_record(folder / "run.json", cure, name)


def read_record(path: pathlib.Path, cure: str, name: str = "out") -> dict:
    """The object in a JSON file of a run's folder, which is an argument called `name`. Raises: RunError: it cannot be read."""
    with _whole(path, cure, name):
        return _read_json(path)


def read_result(folder: pathlib.Path, configuration: dict, result_type: type) -> dict | None:
    """The result of the run in a folder, as values of `result_type`, a dataclass; None where there is none.

    Raises: RunError: it cannot be read, has other fields or types, or is of another configuration.
    """
    result = folder / "result.json"
    if not result.exists():
        return None
    with _whole(result, "Delete it and pass --resume: the run goes on from its checkpoint."):
        finished = _read_json(result)
        _check_record(finished, result_type)
        if json.loads(finished["configuration"]) != configuration:
            raise ValueError("the result of another configuration")
    return finished


def _check_same(folder: pathlib.Path, ours: dict, theirs: dict) -> None:
    for name, value in {**dict.fromkeys(theirs), **ours}.items():
        if name not in ours or theirs.get(name) != value:
            got = f"{name}={theirs[name]!r}" if name in theirs else f"no {name}"
            instead = f"instead of {value!r}" if name in ours else "which this version does not know"
            raise RunError(
                f"out: folder {folder} must hold this run or none, got one with {got} {instead}. Choose another with --out."
            )


def _whole(path: pathlib.Path, cure: str, name: str = "out"):
    """Turns what is wrong with a file into one line."""
    what = f"{name}: file {path} must be a whole one that was written here"
    return explained(what, cure, (OSError, ValueError, RecursionError))


def _read_json(path: pathlib.Path) -> dict:
    """The object in a JSON file. Raises: ValueError: it is no object of finite numbers."""

    def refuse(constant: str):
        raise ValueError(f"the number {constant}")

    found = json.loads(path.read_bytes(), parse_constant=refuse)
    if not isinstance(found, dict):
        raise ValueError(json.dumps(found)[:60])
    return found


def _check_record(values: Mapping[str, Any], record: type) -> None:
    """Raises: ValueError: the values are no `record`, a dataclass: other fields, or values of another type."""
    fields = {one.name: one for one in dataclasses.fields(record)}
    for name, one in fields.items():
        if one.default is dataclasses.MISSING and name not in values:
            raise ValueError(f"no {name}")
    for name, value in values.items():
        if name not in fields:
            raise ValueError(f"a field {name!r:.60}, which this version does not know")
        kinds = getattr(fields[name].type, "__args__", (fields[name].type,))
        whole = isinstance(value, int) and not isinstance(value, bool) and float in kinds
        if not whole and type(value) not in kinds:
            raise ValueError(f"{name}={value!r:.60}")


def write_json(path: pathlib.Path, values: dict) -> None:
    """Writes an object as JSON, whole or not at all."""
    with explained(f"out: file {path} must be writable", "Make room and run again with --resume."):
        write_whole(path, (json.dumps(values, indent=1) + "\n").encode())


def write_history(path: pathlib.Path, losses: Sequence, validations: Sequence, score: str = "accuracy") -> None:
    """Writes the losses of all steps, and the validations, as CSV; `score` names what validation measures."""
    validation = {step: (value, loss) for step, value, loss in validations}
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["step", "train_loss", f"validation_{score}", "validation_loss"])
    for step, loss in enumerate(losses, 1):
        rows.writerow([step, loss, *validation.get(step, ("", ""))])
    with explained(f"out: file {path} must be writable", "Make room and run again with --resume."):
        write_whole(path, text.getvalue().encode())


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

    def save(self, step: int, arrays: Any, record: dict) -> None:
        """Saves a pytree of arrays and plain data; the older checkpoint goes when this one is whole."""
        if self.latest() == step:
            return
        kept = self.latest()
        kept = "Nothing was saved before." if kept is None else f"The checkpoint of step {kept} is whole."
        with self._explained("save into", f"{kept} Make room and run again with --resume."):
            # Tried first, because a write that fails inside Orbax leaves threads behind that print their own traces.
            size = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays)) + len(json.dumps(record))
            _reserve(self.folder, size + size // 4)
            items = dict(arrays=self._orbax.args.StandardSave(arrays), record=self._orbax.args.JsonSave(record))
            self._manager.save(step, args=self._orbax.args.Composite(**items), force=True)

    def record(self) -> dict:
        """The plain data of the checkpoint.

        Raises: RunError: it cannot be read, or another version wrote it.
        """
        if not (self.folder / str(self.latest()) / "record").exists():
            raise self._other_format("an older one")
        record = self._restore(record=self._orbax.args.JsonRestore())["record"]
        if record.get("format") != FORMAT:
            raise self._other_format(f"format {record.get('format')!r:.60}")
        with self._explained("read", "Delete it and start anew."):
            for name, kind in RECORD.items():
                if not isinstance(record[name], (int, float) if kind is float else kind):
                    raise TypeError(f"{name}={record[name]!r:.60}")
        return record

    def _other_format(self, got: str) -> RunError:
        return RunError(
            f"checkpoint: folder {self.folder} must have format {FORMAT} of this version, got {got}. Finish the run with the "
            "version that began it, or delete the folder and start anew."
        )

    def arrays(self, like: Any) -> Any:
        """The arrays of the checkpoint, in the structure and with the shardings of `like`."""
        abstract = jax.tree.map(self._orbax.utils.to_shape_dtype_struct, like)
        return self._restore(arrays=self._orbax.args.StandardRestore(abstract))["arrays"]

    def _restore(self, **items):
        with self._explained("read", "Delete it and start anew."):
            return self._manager.restore(self.latest(), args=self._orbax.args.Composite(**items))

    def close(self) -> None:
        self._manager.close()

    def _explained(self, verb: str, cure: str):
        return explained(f"checkpoint: folder {self.folder} must be whole and writable to {verb} it", cure)
