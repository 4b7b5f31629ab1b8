"""From what is stored to tokens: {"inputs": ids, "label"}.

A pair has "inputs1" and "inputs2" in place of "inputs", a language model "targets" in place of "label".

Id 0 is padding everywhere and nothing else, so that a byte or pixel of value v has the id v + 1.
"""

import numpy as np

from subquad.lra.data.image import cifar10

# Of bytes and of pixels alike: 256 values and padding.
VOCABULARY_SIZE = 257


def shifted(values: np.ndarray) -> np.ndarray:
    """Token ids of bytes or pixels, flattened row by row: value + 1.

    Example:
        >>> shifted(np.array([[0, 255]], np.uint8)).tolist()
        [1, 256]
    """
    return np.asarray(values).reshape(-1).astype(np.uint16) + np.uint16(1)


def tokens(example: dict) -> dict:
    """Ids that are stored as they are."""
    return {"inputs": example["inputs"], "label": int(example["label"])}


def text(example: dict) -> dict:
    """A document's bytes."""
    return {"inputs": shifted(example["text"]), "label": int(example["label"])}


def pair(example: dict) -> dict:
    """Two documents' bytes."""
    return {"inputs1": shifted(example["text1"]), "inputs2": shifted(example["text2"]), "label": int(example["label"])}


def pixels(example: dict) -> dict:
    """An image of one channel, row by row."""
    return {"inputs": shifted(example["image"]), "label": int(example["label"])}


def colours(example: dict) -> dict:
    """An image of three channels, turned grey."""
    return {"inputs": shifted(cifar10.grey(example["image"])), "label": int(example["label"])}


def next_byte(example: dict) -> dict:
    """T + 1 bytes of a text: T inputs, and for each the byte that follows."""
    ids = shifted(example["text"])
    return {"inputs": ids[:-1], "targets": ids[1:]}
