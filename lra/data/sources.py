"""Where data sets come from: files to download, archives that a user has to fetch, installed packages.

Each source is asked before anything is built, and says within seconds what is missing: which file, how large, from
where, into which folder.
"""

import contextlib
import errno
import gzip
import importlib.util
import json
import os
import pathlib
import shutil
import tarfile
import threading
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO

from subquad.lra.files import one_line
from subquad.lra.progress import Work

# The whole archive of the arena, in fact a gzipped tar.
RELEASE_URL = "https://storage.googleapis.com/long-range-arena/lra_release.gz"
RELEASE_FILES = ("lra_release.gz", "lra_release.tar.gz", "lra_release.tgz")
RELEASE_BYTES = 7_700_000_000
# Seconds that a host is given to answer. TFDS itself would retry for minutes.
PATIENCE = 6.0


class DatasetError(Exception):
    """A data set that cannot be prepared or read; the message names the folder and the cure, on one line."""


class MissingSource(DatasetError):
    """What a data set is made of is not here and cannot be fetched."""


@dataclass(frozen=True)
class Download:
    """One file at an address, with its size in bytes; its checksum stands in the builder's checksums.tsv."""

    url: str
    size: int

    @property
    def file(self) -> str:
        return self.url.rsplit("/", 1)[-1]

    def __str__(self) -> str:
        return f"{self.file}, {size(self.size)}, {urllib.parse.urlsplit(self.url).hostname}"

    def require(self, name: str, manual_dir: pathlib.Path, downloads: pathlib.Path) -> None:
        """The file is in manual_dir or among the downloads, or its host begins to send it; else `MissingSource`."""
        if (manual_dir / self.file).is_file() or _downloaded(self.url, downloads):
            return
        reason = why_unreachable(self.url)
        if reason:
            raise self.missing(name, manual_dir, f"no file from there: {reason}")

    def missing(self, name: str, manual_dir: pathlib.Path, got: str) -> MissingSource:
        """The error that says where the file is to be put, when `got` is what came of fetching it."""
        return MissingSource(
            f"{name}: file {self.file} ({size(self.size)}) must be downloadable or in {manual_dir}, got {got}. Fetch "
            f"{self.url} on another machine and put it into {manual_dir}"
        )


@dataclass(frozen=True)
class Release:
    """Files or folders of the arena's own release, in an unpacked tree or inside lra_release.gz.

    The release holds some folders twice, and one outer copy was faulty: the most deeply nested of several counts.

    Attributes:
        paths: the ends of their paths.
        largest, total: bytes of a file, and of all of them in both copies, at most.
    """

    paths: tuple[str, ...]
    largest: int
    total: int

    def __str__(self) -> str:
        return f"{RELEASE_FILES[0]}, {size(RELEASE_BYTES)}, by hand"

    def require(self, name: str, manual_dir: pathlib.Path, downloads: pathlib.Path | None = None) -> None:
        """The paths are in manual_dir, at any depth, or the archive is; else `MissingSource`."""
        found = self._find(manual_dir)
        missing = [path for path in self.paths if path not in found]
        if missing and _release_archive(manual_dir) is None:
            raise MissingSource(
                f"{name}: {missing[0]} must be under {manual_dir}, got nothing of that name there. Put {', '.join(self.paths)} "
                f"or the whole {RELEASE_FILES[0]} ({size(RELEASE_BYTES)}, {RELEASE_URL}) into that folder, or name yours by "
                "--manual-dir"
            )

    def fetch(self, name: str, manual_dir: str | os.PathLike, scratch: pathlib.Path) -> dict[str, pathlib.Path]:
        """The places of the paths: in the tree, else copied out of the archive, which is read once, into `scratch`.

        Raises: DatasetError: neither is there; the archive is damaged, lacks a path, or holds more than it can.
        """
        self.require(name, pathlib.Path(manual_dir))
        found = self._find(pathlib.Path(manual_dir))
        if len(found) == len(self.paths):
            return found
        packed = _release_archive(pathlib.Path(manual_dir))
        largest = lambda member: self.largest if any(f"/{path}/" in f"/{member}/" for path in self.paths) else None
        with Work(f"{name}: reading {packed.name}"), archive_members(packed, largest, self.total) as members:
            for member, stream in members:
                target = scratch / member
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("wb") as output:
                    shutil.copyfileobj(stream, output, 1 << 20)
        found = self._find(scratch)
        for path in self.paths:
            if path not in found:
                raise DatasetError(f"release: archive {packed} must hold {path}, got nothing of that name in it.")
        return found

    def _find(self, folder: pathlib.Path) -> dict[str, pathlib.Path]:
        found: dict[str, pathlib.Path] = {}
        for parent, folders, names in os.walk(folder):
            for path in (pathlib.Path(parent, name) for name in ("", *folders, *names)):
                for wanted in self.paths:
                    deeper = wanted not in found or len(path.parts) > len(found[wanted].parts)
                    if deeper and f"/{path.as_posix()}".endswith(f"/{wanted}"):
                        found[wanted] = path
            folders[:] = [one for one in folders if one not in ("imgs", "metadata")]  # of millions of files
        return found


def _release_archive(folder: pathlib.Path) -> pathlib.Path | None:
    return next((folder / name for name in RELEASE_FILES if (folder / name).is_file()), None)


@dataclass(frozen=True)
class Package:
    """Files that an installed package carries."""

    module: str
    project: str

    def __str__(self) -> str:
        return f"package {self.project}"

    def require(self, name: str, manual_dir: pathlib.Path, downloads: pathlib.Path) -> None:
        """The package is installed; else `MissingSource`."""
        self.folder(name)

    def folder(self, name: str) -> pathlib.Path:
        """The package's folder; the package itself is not imported."""
        spec = importlib.util.find_spec(self.module)
        if spec is None or spec.origin is None:
            raise MissingSource(
                f"{name}: package {self.project} must be installed, got none. Install the extra that has it: "
                "pip install 'subquad[offline]'"
            )
        return pathlib.Path(spec.origin).parent


Source = Download | Release | Package


def size(count: float) -> str:
    """Bytes in words.

    Example:
        >>> size(84_125_825), size(7_700_000_000), size(900)
        ('84 MB', '7.7 GB', '1 kB')
    """
    for unit, word in ((1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{count / unit:.{int(count < 10 * unit)}f} {word}"
    return f"{count / 1e3:.0f} kB"


def _downloaded(url: str, downloads: pathlib.Path) -> bool:
    """Whether TFDS has the file already: it keeps a note beside each, which names the address."""
    for note in downloads.rglob("*.INFO"):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            if url in json.loads(note.read_text()).get("urls", ()) and note.with_suffix("").exists():
                return True
    return False


def why_unreachable(url: str, patience: float | None = None) -> str | None:
    """Why no file begins to come from an address within `patience` seconds, or None where it does. Proxies are honoured."""
    patience = PATIENCE if patience is None else patience
    answer: list[str | None] = [f"no answer within {patience:.0f} seconds"]

    def ask():
        try:
            # Not HEAD: some hosts refuse that and give the file, others answer it and refuse the file.
            with urllib.request.urlopen(url, timeout=patience) as file:
                file.read(1)
            answer[0] = None
        except urllib.error.HTTPError as error:
            answer[0] = f"{url} answers {error.code} {error.reason}"
        except (OSError, ValueError) as error:
            answer[0] = one_line(getattr(error, "reason", None) or error)

    # In a thread, because looking up a name knows no timeout.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(patience)
    return answer[0]


@contextlib.contextmanager
def archive_members(
    packed: str | os.PathLike, largest: Callable[[str], int | None], total: int
) -> Iterator[Iterator[tuple[str, IO[bytes]]]]:
    """Gives (path, open file) of every file in a gzipped tar that is wanted, in the archive's order, read as a stream.

    A member is judged by its header, before any of it is given out; what is not wanted is not looked at.

    Args:
        largest: of a path, the bytes that its file has at most, or None where it is not wanted.
        total: bytes that all wanted files have at most.
    Raises: DatasetError: it is no gzipped tar, or cut short; a path in it is absolute or has ".."; a wanted file is a link, or
        larger than it can be.
    """
    try:
        # Not tarfile's own "r|gz", which takes a file that is cut short for one that ends there.
        with gzip.open(packed) as plain, tarfile.open(fileobj=plain, mode="r|") as opened:
            yield _wanted(opened, packed, largest, total)
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise
        raise DatasetError(f"archive: {packed} must be a whole gzipped tar, got {one_line(error)}. Fetch it again.") from error


def _wanted(opened: tarfile.TarFile, packed, largest, total: int) -> Iterator[tuple[str, IO[bytes]]]:
    def refuse(wanted: str, got: str):
        raise DatasetError(f"archive: {packed} must hold {wanted}, got {got}. Fetch it again.")

    left = total
    for one in opened:
        if one.name.startswith("/") or ".." in one.name.split("/"):
            refuse("paths inside it", f"{one.name!r:.100}")
        path = one.name.removeprefix("./")
        bound = None if one.isdir() else largest(path)
        if bound is None:
            continue
        if not one.isreg():
            refuse(f"{path} as a plain file", "a link or a device")
        left -= one.size
        if one.size > bound:
            refuse(f"files such as this one of at most {bound:,} bytes", f"{path} of {one.size:,}")
        if left < 0:
            refuse(f"files of this data set of at most {total:,} bytes", "more")
        yield path, opened.extractfile(one)
