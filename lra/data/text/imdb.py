"""IMDb reviews as bytes: is the film liked (1) or not (0)?

The archive holds 25,000 reviews to train on and 25,000 to test on, half of each liked, of different films; HTML line
breaks are in the text and stay there. A token is a byte plus 1, and 0 is padding.

Two ways to validate: `lra`, as the arena does, on the test set itself, so that a model chosen by validation is chosen
on test; `modern` on a tenth of the training reviews, held out. The hold-out is by review, so a film may have reviews
on both sides of it; the films of the test set are its own.

Source: Maas et al., Learning Word Vectors for Sentiment Analysis, ACL 2011.
"""

import pathlib
from collections.abc import Iterator

import numpy as np

from subquad.lra.data import sources

VERSION = "1.0.0"
URL = "http://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"
SIZE = 84_125_825
LABELS = ("neg", "pos")
LARGEST, REVIEWS = 100_000, 25_000  # bytes of a review (the longest has 14,000), reviews of a split


def read_reviews(archive: pathlib.Path, split: str) -> Iterator[tuple[str, dict]]:
    """(path in the archive, {"text": bytes as uint8, "label"}) of every labelled review of a split, "train" or "test".

    Raises: DatasetError: the archive is damaged or holds no such review.
    """
    def largest(path: str) -> int | None:
        parts = path.split("/")
        return LARGEST if len(parts) == 4 and parts[:2] == ["aclImdb", split] and parts[2] in LABELS else None

    count = 0
    with sources.archive_members(archive, largest, LARGEST * REVIEWS) as members:
        for path, stream in members:
            count += 1
            text = np.frombuffer(stream.read().strip(), np.uint8)
            yield path, {"text": text, "label": LABELS.index(path.split("/")[2])}
    if not count:
        raise sources.DatasetError(f"lra_text: archive {archive} must hold aclImdb/{split}/pos and neg, got none.")
