"""Selective copying, of the paper on Mamba."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from subquad.lra.data.diagnostics.drawing import Diagnostic, silent


@dataclass(frozen=True, kw_only=True)
class SelectiveCopy(Diagnostic):
    """Copy the data in their order, and leave the noise out.

        . . a . . . b . c . | > > >   ->   a b c

    Symbols stand at places drawn for them among noise; as many markers follow, and each is asked for the symbol that is its
    turn. What tells the places apart is content alone, so that no fixed spacing helps.
    Chance: one of the symbols.

    Args:
        context: tokens before the markers.
        data: symbols that are copied.
        vocabulary: tokens, noise and marker among them: 1 is noise, 2 the marker.
    Source: Gu and Dao 2023, arXiv 2312.00752, section 4.1.1 and appendix E.1.
    """

    context: int = 4096
    data: int = 16
    vocabulary: int = 16
    source: ClassVar[str] = "Gu and Dao 2023, arXiv 2312.00752"

    def __post_init__(self):
        self.check_least(data=1, vocabulary=4)
        if self.context < self.data:
            self.refuse("context", f"be >= data = {self.data}", self.context, "Make it longer, or copy fewer.")

    length = property(lambda self: self.context + self.data)
    vocabulary_size = property(lambda self: 1 + self.vocabulary)
    num_classes = property(lambda self: self.vocabulary - 2)
    chance = property(lambda self: 1 / self.num_classes)

    def at_length(self, length: int) -> "SelectiveCopy":
        """As many data in a context of `length` - data."""
        return replace(self, context=length - self.data)

    def draw(self, rng: np.random.Generator, split: str) -> tuple[np.ndarray, np.ndarray]:
        symbols = rng.integers(self.num_classes, size=self.data)
        context = np.ones(self.context, int)
        context[np.sort(rng.choice(self.context, self.data, replace=False))] = 3 + symbols
        inputs = np.concatenate([context, np.full(self.data, 2)])
        return inputs, np.concatenate([silent(self.context), symbols])
