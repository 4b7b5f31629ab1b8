"""State tracking: the product of the elements of a group so far."""

import functools
import itertools
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np

from subquad.lra.data.diagnostics.drawing import SILENT, Diagnostic


@dataclass(frozen=True, kw_only=True)
class WordProblem(Diagnostic):
    """What is the product of all elements of a group so far?

        Z_2:   1 0 1 1   ->   1 1 0 1

    Each token is an element, and each is asked. They are drawn uniformly. In commutative groups, Z_n, the order of the tokens
    does not matter: parity is that of 2, addition modulo n that of n. In S_5 it does, and no model of constant depth whose
    state is updated by diagonal matrices tracks it at every length, unless TC0 = NC1; what such a model reaches at one length
    it loses at longer ones.
    Chance: the first product is its own element, and the others are guessed.

    Args:
        length: elements, at most.
        shortest: lengths are drawn uniformly from `shortest` to `length`, and of `at_length(n)` from `length` to n; None: each
            sequence has `length`.
        asked: "each" product so far, or only that of the whole, at the "last" element.
        group: "cyclic": 0..order-1, added; "symmetric": the permutations of `order` things in lexicographic order; of these
            "alternating": the even ones. The product of p and then q is q[p]: first p is applied, then q.
        order: n of the group.
    Source: Merrill et al. 2024, arXiv 2404.08819, whose groups are Z_60, A_4 x Z_5 and A_5. Of 2 to 39 bits whose last alone
        is asked, tested on 39 to 255: Beck et al., xLSTM, 2024, arXiv 2405.04517, as in NX-AI/xlstm.
    """

    length: int = 24
    shortest: int | None = None
    asked: Literal["each", "last"] = "each"
    group: Literal["cyclic", "symmetric", "alternating"] = "symmetric"
    order: int = 5
    source: ClassVar[str] = "Merrill et al. 2024, arXiv 2404.08819"

    def __post_init__(self):
        self.check_least(length=1, order=2, shortest=1)
        if self.shortest is not None and self.shortest > self.length:
            self.refuse("shortest", f"be at most length={self.length}", self.shortest, "Leave it out for one length.")
        if self.asked not in ("each", "last"):
            self.refuse("asked", "be each or last", repr(self.asked), "Leave it out for each.")
        if self.group not in ("cyclic", "symmetric", "alternating"):
            self.refuse("group", "be cyclic, symmetric or alternating", repr(self.group), "S_5 is symmetric, of order 5.")
        if self.group != "cyclic" and self.order > 6:
            self.refuse("order", f"be at most 6 where the group is {self.group}", self.order, "7! elements are too many.")

    vocabulary_size = property(lambda self: 1 + self.num_classes)
    num_classes = property(lambda self: len(products(self.group, self.order)))

    @property
    def chance(self) -> float:
        lengths = np.arange(self.shortest or self.length, self.length + 1)
        if self.asked == "last":
            return float(np.where(lengths == 1, 1, 1 / self.num_classes).mean())
        return float((1 + (lengths - 1) / self.num_classes).sum() / lengths.sum())

    def at_length(self, length: int) -> "WordProblem":
        return replace(self, length=length, shortest=self.shortest and min(self.length, length))

    def draw(self, rng: np.random.Generator, split: str) -> tuple[np.ndarray, np.ndarray]:
        count = rng.integers(self.shortest, self.length + 1) if self.shortest else self.length
        elements = rng.integers(self.num_classes, size=count)
        answers = self._products(elements)
        if self.asked == "last":
            answers[:-1] = SILENT
        return 1 + elements, answers

    def _products(self, elements: np.ndarray) -> np.ndarray:
        if self.group == "cyclic":
            return np.cumsum(elements) % self.order
        table = products(self.group, self.order)
        return np.array(list(itertools.accumulate(elements.tolist(), lambda one, two: table[one, two])))


@functools.cache
def products(group: str, order: int) -> np.ndarray:
    """[a, b] -> the index of the product of elements a and then b."""
    if group == "cyclic":
        return np.add.outer(np.arange(order), np.arange(order)) % order
    elements = [one for one in itertools.permutations(range(order)) if group == "symmetric" or _is_even(one)]
    index = {one: at for at, one in enumerate(elements)}
    return np.array([[index[tuple(second[i] for i in first)] for second in elements] for first in elements])


def _is_even(permutation: tuple[int, ...]) -> bool:
    return sum(one > two for one, two in itertools.combinations(permutation, 2)) % 2 == 0
