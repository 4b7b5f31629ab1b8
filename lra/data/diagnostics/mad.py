"""The six tasks of mechanistic architecture design (MAD).

Source: Poli et al. 2024, arXiv 2403.17844; baselines and details as in athms/mad-lab, configs/tasks and mad/data/instances.py.
Token ids are theirs + 1, and classes are theirs.
"""

import functools
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from subquad.lra.data.diagnostics.drawing import SILENT, Diagnostic, silent


@dataclass(frozen=True, kw_only=True)
class Mad(Diagnostic):
    """One of the six: `length` tokens of a vocabulary, 12,800 examples to train on, and 1,280 to test.

    Args:
        length: tokens that are drawn.
        vocabulary: tokens, special ones and noise among them.
    """

    train: int = 12_800
    validation: int = 1_280
    test: int = 1_280
    length: int = 128
    vocabulary: int = 16
    source: ClassVar[str] = "Poli et al. 2024, arXiv 2403.17844"

    vocabulary_size = property(lambda self: 1 + self.vocabulary)
    num_classes = property(lambda self: self.vocabulary)

    def at_length(self, length: int) -> "Mad":
        return replace(self, length=length)


@dataclass(frozen=True, kw_only=True)
class InContextRecall(Mad):
    """Pairs of key and value: a key that was there before is asked for its value, which then follows.

        k_3 v_1 k_1 v_5 k_3 v_1 ...   ->   v_1 at the second k_3

    Keys are the lower half of the vocabulary, values the upper, both drawn uniformly; which value a key has is drawn anew for
    each sequence. The last pair repeats one. Its value is no input, so that there are length - 1 tokens. In training every next
    token is asked (`accuracy_train` is of these), in validation and test the values of keys that were shown. With noise, a
    share of the pairs is two noise tokens.
    Chance: one of the values.

    Args:
        noise: tokens of the vocabulary's end that are noise.
        noise_share: of the pairs.
    """

    noise: int = 0
    noise_share: float = 0.0
    causal: ClassVar[bool] = True

    def __post_init__(self):
        self.check_least(noise=0)
        if self.length % 2 or self.length < 4:
            self.refuse("length", "be even and >= 4", self.length, "A pair has two tokens.")
        if self.vocabulary - self.noise < 4:
            self.refuse("vocabulary", f"be >= noise + 4 = {self.noise + 4}", self.vocabulary, "Make it larger.")
        if not 0 <= self.noise_share < 1 or (self.noise_share and not self.noise):
            self.refuse("noise_share", "be in [0, 1), and 0 without noise tokens", self.noise_share, "The paper has 0.2 of 16.")

    keys = property(lambda self: (self.vocabulary - self.noise) // 2)
    values = property(lambda self: self.vocabulary - self.noise - self.keys)
    chance = property(lambda self: 1 / self.values)

    def draw(self, rng: np.random.Generator, split: str) -> tuple[np.ndarray, np.ndarray]:
        pairs = self.length // 2 - 1
        value_of = self.keys + rng.integers(self.values, size=self.keys)
        keys = rng.integers(self.keys, size=pairs)
        noisy = rng.random(pairs) < self.noise_share
        noisy[rng.integers(pairs)] = False  # one pair at least
        keys = np.append(keys, rng.choice(np.unique(keys[~noisy])))
        shown = np.stack([keys, value_of[keys]], 1)
        noisy = np.append(noisy, False)
        shown[noisy] = self.vocabulary - self.noise + rng.integers(max(1, self.noise), size=(noisy.sum(), 2))
        tokens = shown.reshape(-1)
        if split == "train":
            return 1 + tokens[:-1], tokens[1:]
        targets, seen = silent(self.length - 1), set()
        for at, (key, value) in enumerate(shown.tolist()):
            if not noisy[at] and key in seen:
                targets[2 * at] = value
            seen.add(key)
        return 1 + tokens[:-1], targets


@dataclass(frozen=True, kw_only=True)
class FuzzyRecall(Mad):
    """In-context recall whose keys and values are groups of one to three tokens.

    A group is drawn uniformly among those of its size, none of which repeats a token; sizes are drawn uniformly. In
    validation and test keys have the largest size. Each token of the value of a group that was shown before is asked, from
    the last token of the key on, and in training every next token. The last pair repeats one that is in the sequence, which is
    filled up in front with a token of its own. The last value token is no input; sequences have `length` tokens.
    Chance: one of the tokens of values.

    Args:
        key_size, value_size: the largest.
    """

    key_size: int = 3
    value_size: int = 3
    causal: ClassVar[bool] = True

    def __post_init__(self):
        self.check_least(key_size=1, value_size=1)
        if min(self.keys, self.values) < max(self.key_size, self.value_size):
            self.refuse("vocabulary", "hold as many keys and values as a group has tokens", self.vocabulary, "Make it larger.")
        if self.length <= 3 * (self.key_size + self.value_size):
            self.refuse("length", f"be > {3 * (self.key_size + self.value_size)}", self.length, "Three pairs must fit.")

    keys = property(lambda self: (self.vocabulary - 1) // 2)
    values = property(lambda self: self.vocabulary - 1 - self.keys)
    chance = property(lambda self: 1 / self.values)

    def draw(self, rng: np.random.Generator, split: str) -> tuple[np.ndarray, np.ndarray]:
        def group(first: int, count: int, size: int) -> tuple[int, ...]:
            return tuple((first + rng.choice(count, size, replace=False)).tolist())

        key = lambda: group(0, self.keys, rng.integers(1, self.key_size + 1) if split == "train" else self.key_size)
        value = lambda: group(self.keys, self.values, rng.integers(1, self.value_size + 1))
        asked, answer = key(), value()
        size = len(asked) + len(answer)
        largest = self.key_size + self.value_size
        room = self.length - size - largest
        place = rng.integers(room - largest)  # no step is longer, so that the pair is put in before the room ends
        value_of, tokens, targets = {asked: answer}, [], []
        shown: set[tuple[int, ...]] = set()

        def put(one: tuple[int, ...]) -> None:
            tokens.extend((*one, *value_of[one]))
            known = one in shown
            targets.extend([SILENT] * len(one) + [each if known else SILENT for each in value_of[one]])
            shown.add(one)

        while len(tokens) < room:
            one = asked if len(tokens) >= place and asked not in shown else key()
            value_of.setdefault(one, value())
            put(one)
        put(asked)
        filler = [self.vocabulary - 1] * (self.length + 1 - len(tokens))
        tokens, targets = np.array(filler + tokens), np.array([SILENT] * len(filler) + targets)
        return 1 + tokens[:-1], tokens[1:] if split == "train" else targets[1:]


@dataclass(frozen=True, kw_only=True)
class MadSelectiveCopy(Mad):
    """Copy the data in their order at the end, and leave the blanks between them out.

        . . a . b c | > . . .   ->   a b c

    Each blank stands before one of the data, which one is drawn uniformly; a copy token and as many blanks as data follow, and
    these are asked.
    Chance: one of the data tokens.

    Args:
        data: tokens that are copied.
    """

    length: int = 256
    data: int = 16

    def __post_init__(self):
        self.check_least(data=1, vocabulary=4)
        if self.length <= 2 * self.data + 1:
            self.refuse("length", f"be > 2 * data + 1 = {2 * self.data + 1}", self.length, "Make it longer.")

    chance = property(lambda self: 1 / (self.vocabulary - 2))

    def draw(self, rng: np.random.Generator, split: str) -> tuple[np.ndarray, np.ndarray]:
        blank, data = self.vocabulary - 2, rng.integers(self.vocabulary - 2, size=self.data)
        blanks = np.bincount(rng.integers(self.data, size=self.length - 2 * self.data - 1), minlength=self.data)
        context = np.full(self.length - self.data - 1, blank)
        context[np.cumsum(blanks + 1) - 1] = data
        inputs = np.concatenate([context, [self.vocabulary - 1], np.full(self.data, blank)])
        return 1 + inputs, np.concatenate([silent(len(context) + 1), data])


@dataclass(frozen=True, kw_only=True)
class Compression(Mad):
    """Write a random sequence into the features of its last token, from which all of it is read.

        a b c d >   ->   a b c d > from the features of > alone

    The last token is the same everywhere; what every place had is asked of those features and the place.
    Chance: one of the tokens, but for the last place, which is known.
    """

    length: int = 32
    bottleneck: ClassVar[bool] = True

    def __post_init__(self):
        self.check_least(length=2, vocabulary=3)

    chance = property(lambda self: ((self.length - 1) / (self.vocabulary - 1) + 1) / self.length)

    def draw(self, rng: np.random.Generator, split: str) -> tuple[np.ndarray, np.ndarray]:
        tokens = np.append(rng.integers(self.vocabulary - 1, size=self.length - 1), self.vocabulary - 1)
        return 1 + tokens, tokens


@dataclass(frozen=True, kw_only=True)
class Memorisation(Mad):
    """Which value has this key, in all sequences alike? What is in the weights answers, not what is in the sequence.

        k_3 ? k_1 ? ...   ->   v of k_3 and of k_1 at the ?

    Keys are the lower half of the vocabulary but its last token, which stands for the value; the map from keys to values is
    drawn once, without repetition, and is that of all splits.
    Chance: one of the values that a key has.
    """

    train: int = 256
    length: int = 32
    vocabulary: int = 256

    def __post_init__(self):
        self.check_least(vocabulary=5)
        if self.length % 2 or self.length < 2:
            self.refuse("length", "be even and >= 2", self.length, "A key and the place of its value are two tokens.")

    keys = property(lambda self: (self.vocabulary - 1) // 2)
    chance = property(lambda self: 1 / self.keys)

    def draw(self, rng: np.random.Generator, split: str) -> tuple[np.ndarray, np.ndarray]:
        keys = rng.integers(self.keys, size=self.length // 2)
        inputs, targets = np.full(self.length, self.vocabulary - 1), silent(self.length)
        inputs[::2], targets[1::2] = keys, memory(self.keys, self.vocabulary - 1 - self.keys, self.seed)[keys]
        return 1 + inputs, targets


@functools.cache
def memory(keys: int, values: int, seed: int) -> np.ndarray:
    """The value of each key."""
    return keys + np.random.default_rng([seed, keys, values]).permutation(values)[:keys]
