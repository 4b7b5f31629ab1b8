"""Pathfinder's images drawn on every core, in blocks that are kept as files until the data set is whole.

A block is a range of indices. Its file is the SHA-256 of what follows, and that the compressed labels and images. It appears
under its name only when it is complete, so a killed build leaves whole blocks and the next one draws the others. As an
image is a function of its index, neither the number of processes nor a restart changes any.
"""

import contextlib
import hashlib
import multiprocessing
import os
import pathlib
import signal
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import astuple

import numpy as np

from subquad.lra.data.pathfinder import pictures
from subquad.lra.progress import Work, say


def working_folder(parent: pathlib.Path, config: pictures.Config) -> pathlib.Path:
    """The folder in `parent` for a configuration's blocks; another configuration or version has another."""
    fingerprint = hashlib.sha256(repr((pictures.VERSION, astuple(config))).encode()).hexdigest()[:8]
    return parent / f"unfinished-{pictures.VERSION}-{fingerprint}"


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def render_blocks(
    config: pictures.Config, folder: pathlib.Path, *, processes: int | None = None, block: int = pictures.BLOCK
) -> None:
    """Draws all images of a configuration into `folder`; whole blocks in it are kept.

    Progress and the time left, as measured on the images drawn so far, go to stderr.

    Args:
        processes: None takes every core.
        block: images per file. One folder keeps to one size.
    Raises: ValueError: processes or block is less than 1.
    """
    processes = cores() if processes is None else processes
    if min(processes, block) < 1:
        raise ValueError(f"pathfinder: processes and block must be at least 1, got {processes} and {block}.")
    folder.mkdir(parents=True, exist_ok=True)
    ranges = _ranges(config, block)
    missing = [indices for indices in ranges if _load(config, folder, indices) is None]
    processes = min(processes, len(missing))
    total, drawn = sum(map(len, ranges)), sum(map(len, missing))
    if drawn < total:
        say(f"pathfinder/{config.name}: {total - drawn:,} of {total:,} images are there from an earlier run")
    with Work(f"pathfinder/{config.name}", drawn) as work:
        if processes > 1:
            with contextlib.suppress(BrokenProcessPool):  # the others can go on without it, only slower
                _render_on_many(config, folder, missing, processes, work)
                return
            say("pathfinder: the worker processes died or could not start; going on in one process.")
        for indices in missing:
            if _load(config, folder, indices) is None:
                _render_block(config, folder, indices)
                work.advance(len(indices))


def _render_on_many(config, folder, missing, processes, work) -> None:
    # Spawned, because the process may hold threads and devices that do not survive a fork.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_follow_parent)
    try:
        futures = {pool.submit(_render_block, config, folder, indices): len(indices) for indices in missing}
        for future in as_completed(futures):
            future.result()
            work.advance(futures[future])
    finally:
        pool.shutdown(cancel_futures=True)


def _follow_parent() -> None:
    """A worker leaves the keyboard's interrupt to its parent, and does not outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def watch():
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _ranges(config: pictures.Config, block: int) -> list[range]:
    total = sum(size for _, size in config.splits)
    return [range(start, min(start + block, total)) for start in range(0, total, block)]


def _file(folder: pathlib.Path, indices: range) -> pathlib.Path:
    return folder / f"{indices.start:07}-{indices.stop:07}.block"


def _render_block(config: pictures.Config, folder: pathlib.Path, indices: range) -> None:
    """Draws one block into its file."""
    drawings = pictures.draw(config, indices)
    payload = bytes(one.label for one in drawings) + b"".join(one.image.tobytes() for one in drawings)
    packed = zlib.compress(payload)
    path = _file(folder, indices)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_bytes(hashlib.sha256(packed).digest() + packed)
    os.replace(partial, path)


def _load(config: pictures.Config, folder: pathlib.Path, indices: range) -> tuple[np.ndarray, np.ndarray] | None:
    """Images [n, S, S] and labels [n] of a block, or None where its file is missing or damaged."""
    try:
        content = _file(folder, indices).read_bytes()
    except FileNotFoundError:
        return None
    if hashlib.sha256(content[32:]).digest() != content[:32]:
        return None
    values = np.frombuffer(zlib.decompress(content[32:]), np.uint8)
    return values[len(indices) :].reshape(-1, config.size, config.size), values[: len(indices)]


def read_blocks(
    config: pictures.Config, folder: pathlib.Path, split: str, *, block: int = pictures.BLOCK
) -> Iterator[pictures.Example]:
    """One split's examples out of the blocks that `render_blocks` wrote.

    Raises: OSError: a block is missing or damaged.
    """
    wanted = pictures.split_range(config, split)
    for indices in _ranges(config, block):
        shared = range(max(indices.start, wanted.start), min(indices.stop, wanted.stop))
        if not shared:
            continue
        loaded = _load(config, folder, indices)
        if loaded is None:
            raise OSError(f"pathfinder: {_file(folder, indices)} must be a whole block, got none. Run again to draw it anew.")
        for image, label in zip(*(part[shared.start - indices.start :][: len(shared)] for part in loaded), strict=True):
            yield pictures.Example(image, int(label))
