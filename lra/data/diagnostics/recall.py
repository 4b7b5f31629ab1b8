"""Recall: key and value in one token."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from subquad.lra.data.diagnostics.drawing import Diagnostic, silent


@dataclass(frozen=True, kw_only=True)
class Recall(Diagnostic):
    """Which value has this key? Both are one token, and one layer of content-based reading answers.

        (k_3, v) (k_1, v') (k_2, v'') ... | k_2 k_3 k_1 ...

    Every key stands once, in any order, in one token with a value drawn for it; then all keys are asked for, in another order.
    Chance: one of the values.

    Args:
        keys, values: how many there are. Token 1 + key * values + value is a pair, 1 + keys * values + key a question.
    Source: ours; the easiest form of associative recall, Ba et al. 2016, arXiv 1610.06258.
    """

    keys: int = 16
    values: int = 8
    source: ClassVar[str] = "ours, after Ba et al. 2016, arXiv 1610.06258"

    def __post_init__(self):
        self.check_least(keys=1, values=2)

    length = property(lambda self: 2 * self.keys)
    vocabulary_size = property(lambda self: 1 + self.keys * self.values + self.keys)
    num_classes = property(lambda self: self.values)
    chance = property(lambda self: 1 / self.values)

    def draw(self, rng: np.random.Generator, split: str) -> tuple[np.ndarray, np.ndarray]:
        values, shown, asked = rng.integers(self.values, size=self.keys), rng.permutation(self.keys), rng.permutation(self.keys)
        inputs = np.concatenate([1 + shown * self.values + values[shown], 1 + self.keys * self.values + asked])
        return inputs, np.concatenate([silent(self.keys), values[asked]])
