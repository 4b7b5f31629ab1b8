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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO

# The whole archive of the arena, in fact a gzipped tar.
RELEASE_URL = "https://storage.googleapis.com/long-range-arena/lra_release.gz"
RELEASE_FILES = ("lra_release.gz", "lra_release.tar.gz", "lra_release.tgz")
RELEASE_BYTES = 7_700_000_000
# Bounds of what an archive unpacks to, beside those of each data set: times its own size (text shrinks to a third, pictures
# hardly), bytes of a header, bytes of a file of the release.
EXPANSION, LARGEST_HEADER, LARGEST_FILE = 20, 1 << 20, 50_000_000_000
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
    """Files of the arena's own release, in an unpacked folder or inside lra_release.gz."""

    files: tuple[str, ...]

    def __str__(self) -> str:
        return f"{RELEASE_FILES[0]}, {size(RELEASE_BYTES)}, by hand"

    def require(self, name: str, manual_dir: pathlib.Path, downloads: pathlib.Path) -> None:
        """The files are in manual_dir, at any depth, or the archive is; else `MissingSource`."""
        found = find_files(manual_dir, self.files)
        missing = [file for file in self.files if file not in found]
        if missing and release_archive(manual_dir) is None:
            raise MissingSource(
                f"{name}: file {missing[0]} must be under {manual_dir}, got no such file there. Put {', '.join(self.files)} or "
                f"the whole {RELEASE_FILES[0]} ({size(RELEASE_BYTES)}, {RELEASE_URL}) into that folder, or name yours by "
                "--manual-dir"
            )


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
            reason = getattr(error, "reason", None) or error
            answer[0] = " ".join(str(reason).split()) or type(error).__name__

    # In a thread, because looking up a name knows no timeout.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(patience)
    return answer[0]


def release_archive(folder: pathlib.Path) -> pathlib.Path | None:
    """The release's archive in a folder, or None."""
    return next((folder / name for name in RELEASE_FILES if (folder / name).is_file()), None)


def find_files(folder: pathlib.Path, files: Sequence[str]) -> dict[str, pathlib.Path]:
    """Files by the end of their path, at any depth of a folder; of several the most deeply nested.

    The release holds some folders twice, and one outer copy was faulty: the inner tree, lra_release/lra_release, counts.
    """
    found: dict[str, pathlib.Path] = {}
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(one for one in folders if one != "imgs")  # a million images, none of them asked for
        for name in names:
            path = pathlib.Path(parent) / name
            for file in files:
                if f"/{path.as_posix()}".endswith(f"/{file}") and _deeper(path, found.get(file)):
                    found[file] = path
    return found


def _deeper(path: pathlib.Path, other: pathlib.Path | None) -> bool:
    return other is None or len(path.parts) > len(other.parts)


def fetch_files(
    manual_dir: pathlib.Path, files: Sequence[str], scratch: pathlib.Path, largest: int = LARGEST_FILE
) -> dict[str, pathlib.Path]:
    """The release's files: from the unpacked tree, else copied out of the archive, which is read once, into `scratch`.

    Args:
        largest: bytes that a file has at most.
    Raises: DatasetError: the archive is damaged, lacks a file, or holds more than it can.
    """
    found = find_files(manual_dir, files)
    if len(found) == len(files):
        return found
    packed = release_archive(manual_dir)
    if packed is None:
        raise MissingSource(f"release: {files[0]} must be under {manual_dir}, got no such file there.")
    depth: dict[str, int] = {}
    ends = lambda member: [file for file in files if f"/{member}".endswith(f"/{file}")]
    # Twice, because the release holds some folders twice.
    with archive_members(packed, lambda member: largest if ends(member) else None, 2 * largest * len(files)) as members:
        for member, stream in members:
            for file in ends(member):
                if member.count("/") > depth.get(file, -1):
                    depth[file] = member.count("/")
                    found[file] = scratch / file.replace("/", "_")
                    with found[file].open("wb") as output:
                        shutil.copyfileobj(stream, output, 1 << 20)
    missing = [file for file in files if file not in found]
    if missing:
        raise DatasetError(f"release: archive {packed} must hold {missing[0]}, got no such file in it.")
    return found


class _Bounded:
    """What is read of a stream until it has given more than `most` bytes."""

    def __init__(self, stream: IO[bytes], most: int, packed: pathlib.Path):
        self.stream, self.left, self.most, self.packed = stream, most, most, packed

    def read(self, count: int) -> bytes:
        data = self.stream.read(count)
        self.left -= len(data)
        if self.left < 0:
            raise _too_large(self.packed, self.most, "more")
        return data


class _Header(tarfile.TarInfo):
    """A member's header. One that only names another, or gives it attributes, is read as a whole, so it has to be small."""

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        found = super().frombuf(buf, encoding, errors)
        if found.size > LARGEST_HEADER and (not found.isreg() and not found.issym() and not found.islnk()):
            raise tarfile.ReadError(f"a header of {size(found.size)}")
        return found


@contextlib.contextmanager
def archive_members(
    packed: pathlib.Path, largest: Callable[[str], int | None], total: int
) -> Iterator[Iterator[tuple[str, IO[bytes]]]]:
    """Gives (path, open file) of every file in a gzipped tar that is wanted, in the archive's order, read as a stream.

    A member is judged by its header, before any of it is given out; what is not wanted is not looked at.

    Args:
        largest: of a path, the bytes that its file has at most, or None where it is not wanted.
        total: bytes that all wanted files have at most.
    Raises: DatasetError: it is no gzipped tar, or cut short; it unpacks to more than `EXPANSION` times its size; a path in
        it is absolute or has ".."; a wanted file is a link, or larger than it can be.
    """
    most = EXPANSION * packed.stat().st_size + LARGEST_HEADER
    try:
        # Not tarfile's own "r|gz", which takes a file that is cut short for one that ends there.
        with gzip.open(packed) as plain:
            with tarfile.open(fileobj=_Bounded(plain, most, packed), mode="r|", tarinfo=_Header) as opened:
                yield _wanted(opened, packed, largest, total)
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DatasetError(f"archive: {packed} must be a whole gzipped tar, got {reason}. Fetch it again.") from error


def _wanted(opened: tarfile.TarFile, packed: pathlib.Path, largest, total: int) -> Iterator[tuple[str, IO[bytes]]]:
    left = total
    for one in opened:
        if one.name.startswith("/") or ".." in one.name.split("/"):
            raise DatasetError(f"archive: {packed} must hold paths inside it, got {one.name!r:.100}. Fetch it again.")
        path = one.name.removeprefix("./")
        bound = None if one.isdir() else largest(path)
        if bound is None:
            continue
        if not one.isreg():
            raise DatasetError(f"archive: {packed} must hold {path} as a plain file, got a link or a device. Fetch it again.")
        left -= one.size
        if one.size > bound:
            raise _too_large(packed, bound, f"{path} of {one.size:,}", "files such as this one")
        if left < 0:
            raise _too_large(packed, total, "more", "files of this data set")
        yield path, opened.extractfile(one)


def _too_large(packed: pathlib.Path, most: int, got: str, what: str = "data") -> DatasetError:
    return DatasetError(f"archive: {packed} must hold {what} of at most {most:,} bytes, got {got}. Fetch it again.")
