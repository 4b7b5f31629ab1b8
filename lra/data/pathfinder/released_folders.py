"""Pathfinder's images in the arena's own release, lra_release.gz: unpacked folders, or the archive itself.

A folder pathfinder<size>/curv_<...> holds imgs/<n>/sample_<k>.png and metadata/<n>.npy. The latter are plain text in spite of
their name, a line per image: folder, file, index, label, and parameters. The archive holds pathfinder128 twice, and the outer
one was faulty: the most deeply nested counts. An empty image, as there is one in pathfinder32/curv_baseline, is left out.
"""

import io
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from subquad.lra.data import sources
from subquad.lra.data.pathfinder import pictures
from subquad.lra.files import explained

FOLDERS = {"hard": "curv_contour_length_14", "intermediate": "curv_contour_length_9", "easy": "curv_baseline"}
# Images of a folder; bytes of a file of metadata, which lists a thousand; bytes of a picture's file beside its pixels.
IMAGES, LARGEST, SPARE = 200_000, 10_000_000, 4_096


def release(side: int, level: str) -> sources.Release:
    """The release's folder of one size and level, as a source of a catalogue."""
    return sources.Release((f"pathfinder{side}/{FOLDERS[level]}",), LARGEST, 2 * IMAGES * (side**2 + SPARE))


class Sample(NamedTuple):
    """An image's file and its label."""

    path: pathlib.Path
    label: int


def read_samples(folder: pathlib.Path) -> list[Sample]:
    """What the metadata list, in the order of the files' numbers and of their lines; empty images are left out.

    Raises: DatasetError: a line is not as described above, or its image is missing.
    """
    found = []
    files = sorted((folder / "metadata").glob("*.npy"), key=lambda path: (len(path.stem), path.stem))
    for path in files:
        unreadable = (OSError, ValueError, MemoryError, EOFError)
        with _explained(f"{path} must list images as text or as an array of it", unreadable):
            listed = _lines(path)
        for number, fields in enumerate(listed, 1):
            line = f"{path}:{number} must be a folder, a file, an index and a label 0 or 1"
            with _explained(line, (IndexError, ValueError)):
                image, label = folder / fields[0] / fields[1], int(float(fields[3]))
                if label not in (0, 1):
                    raise ValueError(f"label {label}")
            with _explained(f"{image} must be there, for {path} lists it", OSError):
                if image.stat().st_size:
                    found.append(Sample(image, label))
    if not found:
        raise sources.DatasetError(f"release: {folder} must list images in metadata/*.npy, got none.")
    return found


def _explained(what: str, kinds):
    """Turns errors of these kinds into one line."""
    return explained(f"release: {what}", "Unpack the archive again.", kinds, sources.DatasetError)


def _lines(path: pathlib.Path) -> list[list[str]]:
    content = path.read_bytes()
    if content.startswith(b"\x93NUMPY"):  # as the original generator writes them
        return np.load(io.BytesIO(content), allow_pickle=False).astype(str).tolist()
    return [line.split() for line in content.decode().splitlines() if line.strip()]


def split_samples(every: list[Sample], name: str) -> list[Sample]:
    """The first 80 percent, the next 10, or the last 10, as "train", "validation" and "test"."""
    ends = {"train": (0, 8), "validation": (8, 9), "test": (9, 10)}[name]
    return every[len(every) * ends[0] // 10 : len(every) * ends[1] // 10]


def read_images(listed: list[Sample], size: int) -> Iterator[pictures.Example]:
    """The images, in grey.

    Raises: DatasetError: a file is no image, or one of another size.
    """
    from PIL import Image

    for path, label in listed:
        unreadable = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
        with _explained(f"{path} must be an image of {size} x {size}", unreadable), Image.open(path) as opened:
            # Looked at before it is unpacked: a small file may hold a huge picture.
            if opened.size != (size, size):
                raise ValueError(f"an image of {opened.size[0]} x {opened.size[1]}")
            image = np.asarray(opened.convert("L"))
        yield pictures.Example(image, label)
