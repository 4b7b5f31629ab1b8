"""Data sets by name: prepared on disk through TFDS, or generated in memory where TFDS is not installed."""

import contextlib
import importlib
import io
import os
import pathlib
import sys
from collections.abc import Sequence

import numpy as np

from subquad.kernels.dispatch import nearest
from subquad.lra.data import listops

# The data sets that there are, and their configurations.
DATASETS = {"lra_listops": listops.CONFIGS}


class DatasetError(Exception):
    """A data set that cannot be prepared or read; the message names the folder and the cure, on one line."""


class Split(Sequence):
    """Random access to one split: `[i]` is {"inputs": unpadded token ids (uint8 array), "label": int}.

    Args:
        examples: what TFDS or a generator gives.
        folder: named when an example turns out to be unreadable.
    """

    def __init__(self, examples: Sequence, folder: pathlib.Path | None = None):
        self.examples, self.folder = examples, folder

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index) -> dict:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        if self.folder is None:
            tokens, label = self.examples[index]
            return {"inputs": np.frombuffer(tokens, np.uint8), "label": label}
        with _explained(self.folder):
            return self.examples[index]


def default_folder() -> pathlib.Path:
    """Where TFDS keeps data sets: TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    return pathlib.Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def split_name(name: str) -> tuple[str, str]:
    """("lra_listops", "small") of "lra_listops/small", or a ValueError with the nearest known name."""
    known = [f"{dataset}/{config}" for dataset, configs in DATASETS.items() for config in configs]
    if name not in known:
        raise ValueError(f"prepare: name must be a known data set, got {name!r}. {nearest(name, known)}")
    dataset, config = name.split("/")
    return dataset, config


def prepare(name: str, data_dir: str | os.PathLike | None = None):
    """Builds a data set unless it is there already: array_record files, no TensorFlow.

    A build goes into a folder of its own that gets its name at the end, so a killed one leaves no data set behind.

    Args:
        name: data set and configuration, as "lra_listops/small".
        data_dir: the folder that holds data sets; None takes `default_folder()`.
    Returns: the TFDS builder.
    Raises:
        ValueError: unknown name.
        DatasetError: the folder cannot be written, or the data set in it is not whole.
        ImportError: tensorflow-datasets is not installed.
    """
    dataset, config = split_name(name)
    import tensorflow_datasets as tfds

    data_dir = pathlib.Path(data_dir or default_folder()).expanduser()
    module = importlib.import_module(f"subquad.lra.data.{dataset}.{dataset}_dataset_builder")
    folder = data_dir / dataset / config / str(module.Builder.VERSION)
    with _explained(folder):
        builder = module.Builder(config=config, data_dir=data_dir, file_format="array_record")
    if not folder.exists():
        print(f"Generating {name} into {folder}", file=sys.stderr, flush=True)
        download = tfds.download.DownloadConfig(try_download_gcs=False)
        tfds.disable_progress_bar()
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                builder.download_and_prepare(download_config=download)
        except Exception as error:
            # Another process may have finished the same data set meanwhile: then theirs is as good as ours.
            if not (folder / "dataset_info.json").exists():
                raise DatasetError(
                    f"{name}: folder {data_dir} must be writable and have room, got {_line(error)}. "
                    "Choose another with --data-dir or TFDS_DATA_DIR."
                ) from error
            builder = module.Builder(config=config, data_dir=data_dir, file_format="array_record")
    return builder


def read(name: str, data_dir: str | os.PathLike | None = None) -> dict[str, Split]:
    """The splits of a data set on disk, prepared first if it is not there.

    Raises: as `prepare`; DatasetError also where a file is missing, cut short or damaged.
    """
    builder = prepare(name, data_dir)
    dataset, config = split_name(name)
    folder, splits = pathlib.Path(builder.data_dir), {}
    with _explained(folder):
        for split, size in DATASETS[dataset][config].splits:
            splits[split] = Split(builder.as_data_source(split), folder)
            if len(splits[split]) != size:
                raise ValueError(f"{len(splits[split])} examples in {split} where {size} belong")
            splits[split][0], splits[split][size - 1]
    return splits


def generate(name: str) -> dict[str, Split]:
    """The same splits, in the same order, generated in memory."""
    dataset, config = split_name(name)
    drawn = DATASETS[dataset][config]
    return {split: Split(list(listops.generate(drawn, split))) for split, _ in drawn.splits}


def load(name: str, data_dir: str | os.PathLike | None = None) -> tuple[dict[str, Split], str]:
    """The splits of a data set, and in words where they came from.

    From disk through TFDS, or, where that is not installed, generated in memory, which is said on stderr.

    Raises: ValueError: unknown name.  DatasetError: see `prepare` and `read`.
    """
    split_name(name)
    try:
        import tensorflow_datasets  # noqa: F401
    except ImportError as error:
        print(f"{name}: generated in memory, because tensorflow-datasets is not installed ({error}).", file=sys.stderr)
        return generate(name), f"{name}:{listops.VERSION} generated in memory"
    return read(name, data_dir), f"{name}:{listops.VERSION} array_record"


@contextlib.contextmanager
def _explained(folder: pathlib.Path):
    """Turns whatever a damaged data set makes the readers raise into one line that says what to do."""
    try:
        yield
    except DatasetError:
        raise
    except Exception as error:
        raise DatasetError(
            f"data set: folder {folder} must hold a whole data set, got {_line(error)}. "
            f"Delete it and run again: rm -r {folder}"
        ) from error


def _line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200].rstrip(".")
