"""What the generators of diagnostic tasks share: an example is drawn from its split and index alone, and kept nowhere.

An example is {"inputs": token ids from 1, "targets": for each token a class, or -1 where nothing is asked}.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NoReturn

import numpy as np

from subquad.lra.files import refuse

SPLITS = ("train", "validation", "test")
# Of a token that nothing is asked of.
SILENT = -1
# The eighth of all sequences that belongs to a split other than train.
_SHARES = {0: "test", 1: "validation"}
_MOST_TRIES = 1000


@dataclass(frozen=True, kw_only=True)
class Diagnostic:
    """A generator; subclasses have the parameters, and say what is drawn.

    Attributes:
        train, validation, test: examples per split; those of train cost nothing until they are read.
        seed: of everything that is drawn.
        causal: the answers stand in the inputs after their questions, so that a model must not look ahead.
        bottleneck: all answers are read from the features of the last token alone.
        source: the paper.
        at_length: a method, length -> the same task on longer or shorter sequences; None: there are none.
    """

    train: int = 1_000_000
    validation: int = 500
    test: int = 500
    seed: int = 0
    causal: ClassVar[bool] = False
    bottleneck: ClassVar[bool] = False
    source: ClassVar[str] = ""
    at_length: ClassVar[Callable[[int], "Diagnostic"] | None] = None

    @property
    def length(self) -> int:
        """Tokens of a sequence, at most."""
        raise NotImplementedError

    @property
    def vocabulary_size(self) -> int:
        """Token ids are 1..vocabulary_size-1."""
        raise NotImplementedError

    @property
    def num_classes(self) -> int:
        """Targets are 0..num_classes-1."""
        raise NotImplementedError

    @property
    def chance(self) -> float:
        """The share of answers that the rule of the class's docstring guesses."""
        raise NotImplementedError

    def draw(self, rng: np.random.Generator, split: str) -> tuple[np.ndarray, np.ndarray]:
        """(inputs, targets) of one example."""
        raise NotImplementedError

    def example(self, split: str, index: int) -> dict[str, np.ndarray]:
        """Example `index` of a split, the same on every machine.

        A hash of the inputs says which split a sequence belongs to, so that no two splits share one: an eighth of all belong
        to test, an eighth to validation. What belongs elsewhere is drawn again.

        Raises: ValueError: there are so few sequences that none belongs to the split.
        """
        rng = np.random.default_rng([self.seed, SPLITS.index(split), index])
        for _ in range(_MOST_TRIES):
            inputs, targets = (np.asarray(part, "<i4") for part in self.draw(rng, split))
            if _SHARES.get(hashlib.blake2b(inputs.tobytes(), digest_size=1).digest()[0] % 8, "train") == split:
                return {"inputs": inputs, "targets": targets}
        self.refuse("parameters", f"allow enough sequences for some to belong to {split!r}", self, "Make them longer.")

    def splits(self) -> dict[str, "Drawn"]:
        """All examples, drawn when they are read."""
        return {split: Drawn(lambda index, split=split: self.example(split, index), getattr(self, split), split != "train")
                for split in SPLITS}  # fmt: skip

    def refuse(self, name: str, condition: str, got, cure: str) -> NoReturn:
        refuse(f"{type(self).__name__}: {name}", condition, got, cure)

    def check_least(self, **least: int) -> None:
        """Refuses a parameter below its least value; None is not one."""
        for name, bound in {"train": 1, "validation": 1, "test": 1, **least}.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                self.refuse(name, f"be >= {bound}", value, "Leave it out for its default.")


class Drawn(Sequence):
    """The examples of a split: `[i]` is drawn when it is read.

    Args:
        draw: index -> example.
        count: how many there are.
        kept: keep what was drawn, for splits that are read again and again.
    """

    def __init__(self, draw: Callable[[int], dict], count: int, kept: bool = True):
        self.draw, self.count, self.kept = draw, count, {} if kept else None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        at = range(self.count)[index]
        if self.kept is None:
            return self.draw(at)
        if at not in self.kept:
            self.kept[at] = self.draw(at)
        return self.kept[at]


def silent(length: int) -> np.ndarray:
    """Targets of which none is asked."""
    return np.full(length, SILENT)
