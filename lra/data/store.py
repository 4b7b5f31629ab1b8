"""Data sets by name, prepared on disk through TFDS."""

import contextlib
import hashlib
import io
import os
import pathlib
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence

from subquad.lra.data import catalogue, sources
from subquad.lra.data.sources import DatasetError, size
from subquad.lra.files import explained, one_line, write_whole

# Beside the files: their checksums when they were written.
CHECKSUMS = "SHA256SUMS"


class Split(Sequence):
    """Random access to one split: `[i]` is an example as `encodings` makes it, unpadded.

    Args:
        examples: what TFDS or a generator gives.
        encode: from a stored example to tokens.
        folder: named when an example turns out to be unreadable.
    """

    def __init__(self, examples: Sequence, encode: Callable[[dict], dict], folder: pathlib.Path | None = None):
        self.examples, self.encode, self.folder = examples, encode, folder

    def __len__(self) -> int:
        return len(self.examples)

    def stored(self, index: int) -> dict:
        """The example as it is on disk."""
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        if self.folder is None:
            return self.examples[index]
        with _explained(self.folder):
            return self.examples[index]

    def __getitem__(self, index) -> dict:
        return self.encode(self.stored(index))


def default_folder() -> pathlib.Path:
    """Where TFDS keeps data sets: TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    return pathlib.Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def manual_folder(data_dir: str | os.PathLike | None = None, manual_dir: str | os.PathLike | None = None) -> pathlib.Path:
    """Where files that were fetched by hand are looked for: `manual_dir`, else downloads/manual in `data_dir`."""
    if manual_dir is not None:
        return pathlib.Path(manual_dir).expanduser()
    return _root(data_dir) / "downloads" / "manual"


def dataset_folder(name: str, data_dir: str | os.PathLike | None = None) -> pathlib.Path:
    """The folder that a data set is in, or will be."""
    found = catalogue.find_dataset(name)
    return _root(data_dir) / found.builder / found.config / found.version


def is_prepared(name: str, data_dir: str | os.PathLike | None = None) -> bool:
    """Whether a data set is on disk, or needs no disk."""
    return catalogue.find_dataset(name).drawn is not None or (dataset_folder(name, data_dir) / "dataset_info.json").exists()


def _root(data_dir: str | os.PathLike | None) -> pathlib.Path:
    return pathlib.Path(data_dir or default_folder()).expanduser()


def prepare(name: str, data_dir: str | os.PathLike | None = None, manual_dir: str | os.PathLike | None = None):
    """Builds a data set unless it is there already: array_record files, no TensorFlow.

    A build goes into a folder of its own that gets its name at the end, so a killed one leaves no data set behind.

    Args:
        name: data set and configuration, as "lra_listops/small".
        data_dir: the folder that holds data sets; None takes `default_folder()`.
        manual_dir: the folder of files fetched by hand; None takes `manual_folder(data_dir)`.
    Returns: the TFDS builder.
    Raises:
        ValueError: unknown name.
        MissingSource: a file is not here and cannot be downloaded; said within 10 seconds.
        DatasetError: a file has the wrong checksum or form, the folder cannot be written, the data set in it is not whole.
    """
    import tensorflow_datasets as tfds

    found = catalogue.find_dataset(name)
    root, manual = _root(data_dir), manual_folder(data_dir, manual_dir)
    folder = dataset_folder(name, data_dir)
    make = lambda: found.module().Builder(config=found.config, data_dir=root, file_format="array_record")
    with _explained(folder):
        builder = make()
    if folder.exists():
        return builder
    if found.source is not None:
        found.source.require(name, manual, root / "downloads")
    _check_room(name, found, root)
    print(f"{'Generating' if found.source is None else 'Preparing'} {name} into {folder}", file=sys.stderr, flush=True)
    download = tfds.download.DownloadConfig(
        try_download_gcs=False, manual_dir=manual if manual.is_dir() else None, force_checksums_validation=True
    )
    tfds.disable_progress_bar()
    builder.counts = {part: found.sizes[split] for split, part in found.slices.items()}
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare(download_config=download)
            _write_checksums(folder)
    except DatasetError:
        raise
    except Exception as error:
        if isinstance(found.source, sources.Download) and _is_of_the_network(error):
            raise found.source.missing(name, manual, one_line(error)) from error
        if type(error).__name__ == "NonMatchingChecksumError":
            raise DatasetError(_wrong_checksum(name, found, builder, manual)) from error
        # Another process may have finished the same data set meanwhile: then theirs is as good as ours.
        if not (folder / "dataset_info.json").exists():
            raise DatasetError(
                f"{name}: folder {root} must be writable and have room, got {one_line(error)}. "
                "Choose another with --data-dir or TFDS_DATA_DIR."
            ) from error
        builder = make()
    finally:
        if hasattr(builder, "scratch"):
            builder.scratch.cleanup()
    return builder


def preparing(words: str, data_dir: str | os.PathLike | None = None) -> str:
    """The command that prepares tasks, in a folder of data sets.

    Example:
        >>> preparing("text/lra", "my data")
        "subquad prepare prepare text/lra --data-dir 'my data'"
    """
    return f"subquad prepare prepare {words}" + (f" --data-dir {shlex.quote(str(data_dir))}" if data_dir is not None else "")


def _is_of_the_network(error: Exception) -> bool:
    """Whether TFDS, or what it fetches with, raised it: an answer that is no file, a connection that broke."""
    return type(error).__name__ == "DownloadError" or type(error).__module__.partition(".")[0] in ("requests", "urllib3")


def _check_room(name: str, found: catalogue.Dataset, root: pathlib.Path) -> None:
    """What is downloaded lies beside what is made of it."""
    needed = found.disk + getattr(found.source, "size", 0)
    there = next((parent for parent in (root, *root.parents) if parent.exists()), root)
    free = shutil.disk_usage(there).free
    if free < needed:
        raise DatasetError(
            f"{name}: folder {root} must have room for about {size(needed)}, got {size(free)}. "
            "Choose another with --data-dir or TFDS_DATA_DIR."
        )


def _wrong_checksum(name: str, found: catalogue.Dataset, builder, manual: pathlib.Path) -> str:
    wanted, file = builder.url_infos[found.source.url], manual / found.source.file
    got = f"{file.stat().st_size:,} bytes, sha256 {sha256(file)}" if file.is_file() else "another file from the server"
    return (
        f"{name}: file {file if file.is_file() else found.source.file} must have {wanted.size:,} bytes, sha256 "
        f"{wanted.checksum}, got {got}. Delete it and fetch {found.source.url} again."
    )


def sha256(path: pathlib.Path) -> str:
    """The checksum of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_checksums(folder: pathlib.Path) -> None:
    lines = [f"{sha256(path)}  {path.name}\n" for path in sorted(folder.iterdir()) if path.name != CHECKSUMS]
    write_whole(folder / CHECKSUMS, "".join(lines).encode())


def _splits(builder, found: catalogue.Dataset) -> dict[str, Split]:
    folder, splits = pathlib.Path(builder.data_dir), {}
    with _explained(folder):
        for split, part in found.slices.items():
            splits[split] = Split(builder.as_data_source(part), found.encode, folder)
            count = len(splits[split])
            if found.exact and count != found.sizes[split]:
                raise ValueError(f"{count} examples in {split} where {found.sizes[split]} belong")
            splits[split].stored(0), splits[split].stored(count - 1)
    return splits


def load(name: str, data_dir: str | os.PathLike | None = None) -> tuple[Mapping[str, Sequence[dict]], str]:
    """The splits of a data set, prepared first if it is not there or drawn, and in words where they came from.

    Raises: ValueError: unknown name.  DatasetError: as `prepare`, and where a file is missing, cut short or damaged.
    """
    found = catalogue.find_dataset(name)
    if found.drawn is not None:
        return found.drawn(), f"{name}:{found.version} drawn"
    builder = prepare(name, data_dir)
    splits = _splits(builder, found)
    origin = (builder.info.metadata or {}).get("origin")
    return splits, f"{name}:{found.version} array_record" + (f", from {origin}" if origin else "")


def _explained(folder: pathlib.Path):
    """Turns whatever a damaged data set makes the readers raise into one line that says what to do."""
    what, cure = f"data set: folder {folder} must hold a whole data set", f"Delete it and run again: rm -r {folder}"
    return explained(what, cure, raised=DatasetError)
