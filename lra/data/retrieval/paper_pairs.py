"""Pairs of papers of the ACL Anthology Network as bytes: does one cite the other (1) or not (0)?

The arena's files new_aan_pairs.{train,eval,test}.tsv have a pair per line and five columns, with no header: the label
written as a float, two identifiers, two texts. Quote marks are part of the texts. A text is cut at 10,000 bytes, and
a sequence at the task's 4,000. A token is a byte plus 1, and 0 is padding.

The texts may not be handed on, so there is nothing to download: fetch the arena's release yourself.

Source: Radev et al., The ACL Anthology Network Corpus, LREC 2013; Tay et al., Long Range Arena, arXiv 2011.04006.
"""

import pathlib
from collections.abc import Iterator

import numpy as np

from subquad.lra.data import sources

VERSION = "1.0.0"
FILES = {split: f"new_aan_pairs.{word}.tsv" for split, word in
         (("train", "train"), ("validation", "eval"), ("test", "test"))}  # fmt: skip
SOURCE = sources.Release(tuple(FILES.values()), largest=50_000_000_000, total=300_000_000_000)
MAX_BYTES = 10_000
LONGEST = 50_000_000  # bytes of a line: a file without line ends would fill the memory


def read_pairs(path: pathlib.Path) -> Iterator[dict]:
    """{"text1", "text2": bytes as uint8, "id1", "id2", "label"} of every line of a file.

    Raises: DatasetError: a line has not five columns, or its label is neither 0 nor 1.
    """
    with path.open("rb") as file:  # in bytes: Python's text mode would end lines where these files do not
        for number, line in enumerate(iter(lambda: file.readline(LONGEST), b""), 1):
            if len(line) == LONGEST:
                raise sources.DatasetError(f"lra_retrieval: {path}:{number} must be shorter than {LONGEST:,} bytes.")
            columns = line.rstrip(b"\r\n").split(b"\t")
            if len(columns) != 5:
                raise sources.DatasetError(f"lra_retrieval: {path}:{number} must have 5 columns, got {len(columns)}.")
            if columns[0] not in (b"0", b"0.0", b"1", b"1.0"):
                got = columns[0][:20]
                raise sources.DatasetError(f"lra_retrieval: {path}:{number} must begin with 0.0 or 1.0, got {got!r}.")
            label, id1, id2, *texts = columns
            text1, text2 = (np.frombuffer(text[:MAX_BYTES], np.uint8) for text in texts)
            yield {"text1": text1, "text2": text2, "id1": id1, "id2": id2, "label": int(float(label))}
