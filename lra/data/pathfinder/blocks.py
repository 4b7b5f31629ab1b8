"""Pathfinder's images drawn on every core, in blocks that are kept as files until the data set is whole.

A block is a range of indices. Its file, a compressed npz, appears under its name only when it is complete, so a killed build
leaves whole blocks and the next one draws the others. As an image is a function of its index, neither the number of processes
nor a restart changes any.
"""

import functools
import hashlib
import io
import multiprocessing
import os
import pathlib
import signal
import threading
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple

import numpy as np

from subquad.lra import machine
from subquad.lra.data.pathfinder import pictures
from subquad.lra.files import write_whole
from subquad.lra.progress import Work, say


def working_folder(parent: pathlib.Path, config: pictures.Config) -> pathlib.Path:
    """The folder in `parent` for a configuration's blocks; another configuration or version has another."""
    fingerprint = hashlib.sha256(repr((pictures.VERSION, astuple(config))).encode()).hexdigest()[:8]
    return parent / f"unfinished-{pictures.VERSION}-{fingerprint}"


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
    processes = machine.cores() if processes is None else processes
    if min(processes, block) < 1:
        raise ValueError(f"pathfinder: processes and block must be at least 1, got {processes} and {block}.")
    folder.mkdir(parents=True, exist_ok=True)
    ranges = _ranges(config, block)
    missing = [indices for indices in ranges if _load(folder, indices) is None]
    total, drawn = sum(map(len, ranges)), sum(map(len, missing))
    if drawn < total:
        say(f"pathfinder/{config.name}: {total - drawn:,} of {total:,} images are there from an earlier run")
    with Work(f"pathfinder/{config.name}", drawn) as work:
        render = functools.partial(_render_block, config, folder)
        if processes == 1:
            for indices in missing:
                render(indices)
                work.advance(len(indices))
            return
        # Spawned, because the process may hold threads and devices that do not survive a fork.
        pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _follow_parent)
        try:
            for indices, _ in zip(missing, pool.map(render, missing), strict=True):
                work.advance(len(indices))
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
    return folder / f"{indices.start:07}-{indices.stop:07}.npz"


def _render_block(config: pictures.Config, folder: pathlib.Path, indices: range) -> None:
    """Draws one block into its file."""
    drawings, content = pictures.draw(config, indices), io.BytesIO()
    images, labels = np.stack([one.image for one in drawings]), np.array([one.label for one in drawings], np.uint8)
    np.savez_compressed(content, images=images, labels=labels)
    write_whole(_file(folder, indices), content.getvalue())


def _load(folder: pathlib.Path, indices: range) -> tuple[np.ndarray, np.ndarray] | None:
    """Images [n, S, S] and labels [n] of a block, or None where its file is missing or fails its checksums."""
    try:
        with np.load(_file(folder, indices)) as content:
            return content["images"], content["labels"]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error):
        return None


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
        loaded = _load(folder, indices)
        if loaded is None:
            raise OSError(f"pathfinder: {_file(folder, indices)} must be a whole block, got none. Run again to draw it anew.")
        for image, label in zip(*(part[shared.start - indices.start :][: len(shared)] for part in loaded), strict=True):
            yield pictures.Example(image, int(label))
