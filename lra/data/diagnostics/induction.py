"""Induction heads, of the paper on Mamba."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from subquad.lra.data.diagnostics.drawing import Diagnostic, silent


@dataclass(frozen=True, kw_only=True)
class Induction(Diagnostic):
    """What stood after the special token, the time before?

        c a b # d b a ... c #   ->   d

    Random tokens, and among them once the special one, at any place; it stands again at the end, and is asked for the token
    that followed it. Every head that finds "the same token, before" and reads one further solves it at every length.
    Chance: one of the tokens.

    Args:
        length: tokens, the last of which is the question.
        vocabulary: tokens, the special one among them: it is 1.
    Source: Gu and Dao 2023, arXiv 2312.00752, section 4.1.2; Olsson et al. 2022, arXiv 2209.11895.
    """

    length: int = 256
    vocabulary: int = 16
    source: ClassVar[str] = "Gu and Dao 2023, arXiv 2312.00752"

    def __post_init__(self):
        self.check_least(length=3, vocabulary=3)

    vocabulary_size = property(lambda self: 1 + self.vocabulary)
    num_classes = property(lambda self: self.vocabulary - 1)
    chance = property(lambda self: 1 / self.num_classes)

    def at_length(self, length: int) -> "Induction":
        return replace(self, length=length)

    def draw(self, rng: np.random.Generator, split: str) -> tuple[np.ndarray, np.ndarray]:
        tokens = rng.integers(self.num_classes, size=self.length)
        place = rng.integers(self.length - 2)
        inputs, targets = 2 + tokens, silent(self.length)
        inputs[[place, -1]] = 1
        targets[-1] = tokens[place + 1]
        return inputs, targets
