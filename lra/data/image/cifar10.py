"""CIFAR-10 as sequences of 1,024 grey pixels, row by row: which of ten kinds of thing is it?

    grey = trunc(255.5 (0.2989 red + 0.5870 green + 0.1140 blue) / 255)

On disk the images keep their colours; they turn grey when they are read. A token is the grey value plus 1, and 0 is
padding.

Differs from the original: there the token is the grey value itself while models take 0 for padding, so that black
pixels were left out of attention. Here black is 1, and no pixel is padding.

Source: Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.
"""

import pathlib
from collections.abc import Iterator

import numpy as np

from subquad.lra.data import sources

VERSION = "1.0.0"
URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
SIZE = 170_052_171
LABELS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIDE = 32
_RECORD, _IMAGES = 1 + 3 * SIDE * SIDE, 10_000  # bytes of an image, images of a file
_FILES = {"train": tuple(f"data_batch_{number}.bin" for number in range(1, 6)), "test": ("test_batch.bin",)}


def read_images(archive: pathlib.Path, split: str) -> Iterator[dict]:
    """{"image": uint8 [32, 32, 3], "label"} of a split, "train" or "test", in the order of the files' numbers.

    Raises: DatasetError: the archive is damaged, or a file in it is missing or has not whole images.
    """
    wanted, found = _FILES[split], {}
    largest = lambda path: _RECORD * _IMAGES if path.rsplit("/", 1)[-1] in wanted else None
    with sources.archive_members(archive, largest, _RECORD * _IMAGES * len(wanted)) as members:
        for path, stream in members:
            found[path.rsplit("/", 1)[-1]] = stream.read()
    for name in wanted:
        data = found.get(name, b"")
        if not data or len(data) % _RECORD:
            raise sources.DatasetError(
                f"lra_image: {name} in {archive} must hold images of {_RECORD} bytes, got {len(data)} bytes in all."
            )
        for record in np.frombuffer(data, np.uint8).reshape(-1, _RECORD):
            label = int(record[0])
            if label >= len(LABELS):
                raise sources.DatasetError(f"lra_image: labels in {name} must be below {len(LABELS)}, got {label}.")
            image = record[1:].reshape(3, SIDE, SIDE).transpose(1, 2, 0)
            yield {"image": np.ascontiguousarray(image), "label": label}


def grey(image: np.ndarray) -> np.ndarray:
    """The grey values of an image: uint8 [..., 3] -> uint8 [...], by the formula above in float32.

    Example:
        >>> grey(np.array([[0, 0, 0], [255, 255, 255], [255, 0, 0]], np.uint8)).tolist()
        [0, 255, 76]
    """
    weights = np.array([0.2989, 0.5870, 0.1140], np.float32)
    return ((image.astype(np.float32) * np.float32(1 / 255)) @ weights * np.float32(255.5)).astype(np.uint8)
