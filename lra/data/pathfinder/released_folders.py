"""Pathfinder's images in the arena's own release, lra_release.gz: unpacked folders, or the archive itself.

A folder pathfinder<size>/curv_<...> holds imgs/<n>/sample_<k>.png and metadata/<n>.npy. The latter are plain text in spite of
their name, a line per image: folder, file, index, label, and parameters. The archive holds pathfinder128 twice, and the outer
one was faulty: the most deeply nested counts. An empty image, as there is one in pathfinder32/curv_baseline, is left out.
"""

import io
import os
import pathlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from subquad.lra.data import sources
from subquad.lra.data.pathfinder import pictures

# Images of a folder, bytes of a picture's file beside its pixels, bytes of a file of metadata, which lists a thousand.
IMAGES, SPARE, LARGEST_LIST = 200_000, 4_096, 10_000_000
FOLDERS = {"easy": "curv_baseline", "intermediate": "curv_contour_length_9", "hard": "curv_contour_length_14"}


@dataclass(frozen=True)
class Source:
    """The release's folder of one size and level, as a source of a catalogue."""

    size: int
    level: str

    @property
    def folder(self) -> str:
        return f"pathfinder{self.size}/{FOLDERS[self.level]}"

    def __str__(self) -> str:
        return f"{sources.RELEASE_FILES[0]}, {sources.size(sources.RELEASE_BYTES)}, by hand"

    def require(self, name: str, manual_dir: pathlib.Path, downloads: pathlib.Path) -> None:
        """The folder is in manual_dir, at any depth, or the archive is; else `MissingSource`."""
        if find_folder(manual_dir, self.folder) is None and sources.release_archive(manual_dir) is None:
            raise sources.MissingSource(
                f"{name}: folder {self.folder} with imgs/ and metadata/ must be under {manual_dir}, got no such folder there. "
                f"Put it, or the whole {sources.RELEASE_FILES[0]} ({sources.size(sources.RELEASE_BYTES)}, "
                f"{sources.RELEASE_URL}), into that folder, or name yours by --manual-dir"
            )


class Sample(NamedTuple):
    """An image's file and its label."""

    path: pathlib.Path
    label: int


def find_folder(manual_dir: pathlib.Path, folder: str) -> pathlib.Path | None:
    """A folder with metadata/ by the end of its path, at any depth of manual_dir; of several the most deeply nested."""
    found = []
    for parent, folders, _ in os.walk(manual_dir):
        if f"/{pathlib.Path(parent).as_posix()}".endswith(f"/{folder}") and "metadata" in folders:
            found.append(pathlib.Path(parent))
        folders[:] = sorted(one for one in folders if one not in ("imgs", "metadata"))  # millions of files
    return max(found, key=lambda path: len(path.parts), default=None)


def fetch_folder(source: Source, manual_dir: pathlib.Path, scratch: pathlib.Path) -> pathlib.Path:
    """The source's folder: the unpacked one, else unpacked out of the archive, which is read once, into `scratch`.

    Raises: DatasetError: neither is there, or the archive is damaged or lacks the folder.
    """
    found = find_folder(manual_dir, source.folder)
    if found is not None:
        return found
    source.require(f"lra_pathfinder/release_{source.size}_{source.level}", manual_dir, scratch)
    packed, pixels = sources.release_archive(manual_dir), source.size**2
    inside = lambda member: f"/{member}".rpartition(f"/{source.folder}/")

    def largest(member: str) -> int | None:
        _, found, tail = inside(member)
        return (LARGEST_LIST if tail.startswith("metadata/") else 4 * pixels + SPARE) if found else None

    # Twice, because the release holds some folders twice.
    with sources.archive_members(packed, largest, 2 * IMAGES * (pixels + SPARE)) as members:
        for member, stream in members:
            before, _, tail = inside(member)
            # As deep as in the archive, so that `find_folder` prefers the inner tree.
            target = scratch.joinpath(*["_"] * before.count("/"), source.folder, *tail.split("/"))
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as output:
                shutil.copyfileobj(stream, output)
    found = find_folder(scratch, source.folder)
    if found is None:
        raise sources.DatasetError(f"release: archive {packed} must hold {source.folder}, got no such folder in it.")
    return found


def read_samples(folder: pathlib.Path) -> list[Sample]:
    """What the metadata list, in the order of the files' numbers and of their lines; empty images are left out.

    Raises: DatasetError: a line is not as described above, or its image is missing.
    """
    found = []
    files = sorted((folder / "metadata").glob("*.npy"), key=lambda path: (len(path.stem), path.stem))
    for path in files:
        try:
            listed = _lines(path)
        except (OSError, ValueError, MemoryError, EOFError) as error:
            raise sources.DatasetError(
                f"release: {path} must list images as text or as an array of it, got {error!s:.100}. Unpack the archive again."
            ) from None
        for number, fields in enumerate(listed, 1):
            try:
                image, label = folder / fields[0] / fields[1], int(float(fields[3]))
                if label not in (0, 1):
                    raise ValueError(f"label {label}")
                if image.stat().st_size:
                    found.append(Sample(image, label))
            except FileNotFoundError:
                raise sources.DatasetError(f"release: {image} must be there, for {path} lists it, got no such file.") from None
            except (IndexError, ValueError) as error:
                raise sources.DatasetError(
                    f"release: {path}:{number} must be a folder, a file, an index and a label 0 or 1, got {error!s:.100}."
                ) from None
    if not found:
        raise sources.DatasetError(f"release: {folder} must list images in metadata/*.npy, got none.")
    return found


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
        try:
            with Image.open(path) as opened:
                # Looked at before it is unpacked: a small file may hold a huge picture.
                if opened.size != (size, size):
                    raise ValueError(f"an image of {opened.size[0]} x {opened.size[1]}")
                image = np.asarray(opened.convert("L"))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise sources.DatasetError(
                f"release: {path} must be an image of {size} x {size}, got {error!s:.100}. Unpack the archive again."
            ) from None
        yield pictures.Example(image, label)
