"""Multi-query associative recall, of the paper on Zoology."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from subquad.lra.data.diagnostics.drawing import Diagnostic, silent


@dataclass(frozen=True, kw_only=True)
class MQAR(Diagnostic):
    """Which value stood after this key? Asked several times, at gaps of a power law.

        k_1 v_1 k_2 v_2 ... | k_2 . . . k_1 . ...   ->   v_2 at k_2, v_1 at k_1

    Keys and values are drawn without repetition, keys of the lower half of the vocabulary and values of the upper. After all
    pairs each key stands once more, in one of the (length - 2 pairs) / 2 places that lie two tokens apart; place i is drawn
    with a probability proportional to i ** (power - 1), without repetition, for the pairs in order.
    Chance: one of the values that are shown.

    Args:
        length: tokens, even.
        pairs: keys and values.
        vocabulary: tokens; the answer is one of all of them.
        power: of the gaps; 1: all places are as likely.
        random_filler: between questions stand random tokens, as in the paper's first data; else one token that is no key.
    Source: Arora et al. 2023, arXiv 2312.04927; the defaults are the shortest setting of figure 2, as in
        HazyResearch/zoology, zoology/data/multiquery_ar.py.
    """

    length: int = 64
    pairs: int = 4
    vocabulary: int = 8192
    power: float = 0.01
    random_filler: bool = False
    source: ClassVar[str] = "Arora et al. 2023, arXiv 2312.04927"

    def __post_init__(self):
        self.check_least(pairs=1)
        if self.length % 2 or self.length < 4 * self.pairs:
            self.refuse("length", f"be even and >= 4 * pairs = {4 * self.pairs}", self.length, "Make it longer.")
        if self.vocabulary // 2 <= self.pairs:
            self.refuse("vocabulary", f"be > 2 * pairs = {2 * self.pairs}", self.vocabulary, "Make it larger.")
        if not 0 < self.power <= 1:
            self.refuse("power", "be in (0, 1]", self.power, "The paper has 0.01.")

    # The paper's ids 0..vocabulary-1 are 1..vocabulary here.
    vocabulary_size = property(lambda self: 1 + self.vocabulary)
    num_classes = property(lambda self: self.vocabulary)
    chance = property(lambda self: 1 / self.pairs)

    def at_length(self, length: int) -> "MQAR":
        """As many pairs, more room for gaps."""
        return replace(self, length=length)

    def draw(self, rng: np.random.Generator, split: str) -> tuple[np.ndarray, np.ndarray]:
        half, context = self.vocabulary // 2, 2 * self.pairs
        keys = 1 + rng.choice(half - 1, self.pairs, replace=False)
        values = half + rng.choice(self.vocabulary - half, self.pairs, replace=False)
        places = np.arange(1, (self.length - context) // 2 + 1)
        likely = places ** (self.power - 1)
        asked = context + 2 * rng.choice(len(places), self.pairs, replace=False, p=likely / likely.sum())
        inputs = rng.integers(self.vocabulary, size=self.length) if self.random_filler else np.zeros(self.length, int)
        inputs[:context:2], inputs[1:context:2], inputs[asked] = keys, values, keys
        targets = silent(self.length)
        targets[asked] = values
        return 1 + inputs, targets
