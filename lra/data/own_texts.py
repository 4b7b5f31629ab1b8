"""Text for language models: documents one after another, each ended by a zero byte, cut into sequences of one length."""

import hashlib
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from subquad.lra.data import encodings
from subquad.lra.files import refuse

LM_LENGTH, SHORT_LENGTH = 2048, 256
_LEAST = 20  # sequences: one to validate on, one to test on


def sequences(documents: Iterable[bytes], length: int = LM_LENGTH) -> Iterator[np.ndarray]:
    """The documents in a row, cut: each time `length` bytes and the one that follows, which is the next's first."""
    text = np.frombuffer(b"".join(document + b"\0" for document in documents), np.uint8)
    for start in range(0, len(text) - length, length):
        yield text[start : start + length + 1]


def read(paths: Sequence[str | os.PathLike], length: int) -> tuple[dict[str, list[dict]], str]:
    """Splits of files, and a name for their contents: the last twentieth to test on, that before it to validate."""
    if length < 2:
        refuse("text-length", "be at least 2 bytes", length, "Sequences of 256 to 2048 bytes are usual.")
    documents = []
    for path in paths:
        try:
            document = pathlib.Path(path).read_bytes()
        except OSError as error:
            cure = "Check the name; the files of a folder are folder/*."
            refuse("text", "be files that can be read", f"{path}: {error.strerror}", cure)
        if b"\0" in document:
            at = f"one at byte {document.index(0):,} of {path}"
            refuse("text", "hold no zero byte, which ends a document", at, "Save it as UTF-8; UTF-16 is full of them.")
        documents.append(document)
    rows = [encodings.next_byte({"text": bytes_}) for bytes_ in sequences(documents, length)]
    if len(rows) < _LEAST:
        found = f"{len(rows)} from {', '.join(map(str, paths[:3]))}"
        refuse("text", f"hold at least {_LEAST} sequences of {length} bytes", found, "Name more files, or a smaller length.")
    held_out = max(1, len(rows) // 20)
    cuts = {"train": slice(-2 * held_out), "validation": slice(-2 * held_out, -held_out), "test": slice(-held_out, None)}
    digest = hashlib.sha256(b"\0".join(documents)).hexdigest()[:10]
    return {name: rows[part] for name, part in cuts.items()}, digest
