"""Recall: key and value in one token."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from subquad.lra.data.diagnostics.drawing import Diagnostic, silent


@dataclass(frozen=True, kw_only=True)
class Recall(Diagnostic):
    """Which value has this key? Both are one token, and one layer of content-based reading answers.

        (k_3, v) (k_1, v') (k_2, v'') ... | k_2 k_3 k_1 ...

    Every key stands `writes` times, in any order, each time in one token with a value drawn for it; then all keys are asked
    for, in another order, and the last value counts. With several writes a layer has to forget what it wrote under a key
    before: delta rules do it in one layer, and sums over all that was written cannot.
    Chance: one of the values.

    Args:
        keys, values: how many there are. Token 1 + key * values + value is a pair, 1 + keys * values + key a question.
        writes: of each key.
    Source: ours; the easiest form of associative recall, Ba et al. 2016, arXiv 1610.06258; that values are overwritten as in
        Schlag et al. 2021, arXiv 2102.11174, section 6.1.
    """

    keys: int = 16
    values: int = 8
    writes: int = 1
    source: ClassVar[str] = "ours, after Ba et al. 2016, arXiv 1610.06258"

    def __post_init__(self):
        self.check_least(keys=1, values=2, writes=1)

    length = property(lambda self: self.keys * (self.writes + 1))
    vocabulary_size = property(lambda self: 1 + self.keys * self.values + self.keys)
    num_classes = property(lambda self: self.values)
    chance = property(lambda self: 1 / self.values)

    def draw(self, rng: np.random.Generator, split: str) -> tuple[np.ndarray, np.ndarray]:
        pairs = self.keys * self.writes
        values, shown, asked = rng.integers(self.values, size=pairs), rng.permutation(pairs), rng.permutation(self.keys)
        written = shown % self.keys
        last = dict(zip(written.tolist(), values[shown].tolist(), strict=True))
        inputs = np.concatenate([1 + written * self.values + values[shown], 1 + self.keys * self.values + asked])
        return inputs, np.concatenate([silent(pairs), [last[key] for key in asked.tolist()]])
