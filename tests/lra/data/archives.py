"""Tiny archives in the form of the real ones, and their checksums in the real builders' tables."""

import contextlib
import importlib
import io
import pathlib
import tarfile
from unittest import mock

import numpy as np
from etils import epath
from tensorflow_datasets.core.download import checksums


def pack(path: pathlib.Path, files: dict[str, bytes]) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


REVIEWS = {
    f"aclImdb/{split}/{label}/{number}_{stars}.txt": f"{split} {label} {number}: caf\u00e9 <br />{'x' * number}\n".encode()
    for split in ("train", "test")
    for label, stars in (("neg", 2), ("pos", 9))
    for number in range(10)
}


def imdb(folder: pathlib.Path) -> pathlib.Path:
    others = {
        "aclImdb/README": b"about", "aclImdb/train/unsup/0_0.txt": b"no label", "aclImdb/train/urls_pos.txt": b"addresses",
    }  # fmt: skip
    return pack(folder / "aclImdb_v1.tar.gz", {**others, **REVIEWS})


def cifar_images(number: int, count: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Smooth pictures: label k is a ramp of its own; the first of each file is all black."""
    labels = np.arange(count) % 10
    ramp = np.arange(32, dtype=np.uint8)
    images = np.stack([ramp[:, None, None] + ramp[None, :, None] + np.arange(3) * (20 * k + number) for k in labels])
    images[0] = 0
    return images.astype(np.uint8), labels.astype(np.uint8)


def cifar(folder: pathlib.Path) -> pathlib.Path:
    files = {"cifar-10-batches-bin/batches.meta.txt": b"airplane\n"}
    for number, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
        images, labels = cifar_images(number)
        records = np.concatenate([labels[:, None], images.transpose(0, 3, 1, 2).reshape(len(images), -1)], 1)
        files[f"cifar-10-batches-bin/{name}.bin"] = records.tobytes()
    return pack(folder / "cifar-10-binary.tar.gz", files)


# Quote marks that open and never close, bytes that are no UTF-8, and a text that is cut.
AAN = {
    "train": [
        (b"1.0", b"P1", b"P2", b'He said "no', b"two"), (b"0.0", b"P3", b"P4", b"\xff\xfe", b'"'),
        (b"1.0", b"A", b"B", b"a", b"b" * 12_000),
    ],
    "eval": [(b"0.0", b"P5", b"P6", b"five", b"six")],
    "test": [(b"1.0", b"P7", b"P8", b"seven", b"eight"), (b"0.0", b"P9", b"P1", b"nine", b"one")],
}  # fmt: skip


def aan_files() -> dict[str, bytes]:
    return {f"new_aan_pairs.{name}.tsv": b"".join(b"\t".join(row) + b"\n" for row in rows) for name, rows in AAN.items()}


def listops_files(*, first: str = "( ( ( [MAX 4 ) 3 ) ] )", value: int = 4) -> dict[str, bytes]:
    """In the arena's nested form, with the last row of each file marked by its own digits."""
    files = {}
    for digit, name in enumerate(("train", "val", "test")):
        rows = [f"{first}\t{value}", f"( ( ( ( [SM 5 ) {digit} ) 1 ) ] )\t{(6 + digit) % 10}"]
        files[f"basic_{name}.tsv"] = ("Source\tTarget\r\n" + "".join(f"{row}\r\n" for row in rows)).encode()
    return files


@contextlib.contextmanager
def trusted(dataset: str, url: str, path: pathlib.Path):
    """The builder of `dataset` takes the file at `path` for what `url` gives."""
    module = importlib.import_module(f"subquad.lra.data.{dataset.removeprefix('lra_')}.{dataset}_dataset_builder")
    with mock.patch.dict(module.Builder.url_infos, {url: checksums.compute_url_info(epath.Path(path))}):
        yield
