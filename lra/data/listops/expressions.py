"""ListOps as the Long Range Arena draws it, but seeded, tokenised once and for all, and free of dependencies.

    [MAX 4 3 [MIN 2 3 ] 1 0 [MED 1 5 8 9 2 ] ]  ->  5

A tree is drawn from depth 1 downwards: above `max_depth` a node is an operator with probability 0.25, else a digit; at
`max_depth` it is a digit. An operator is one of MIN, MAX, MED, SM and takes 2 to `max_args` arguments, all uniform. Its
length counts digits, operators and closing brackets. Trees are kept when `min_length` < length < `max_length`, both
exclusive, and each only once in the whole data set. MED is the median with .5 cut off, SM the sum modulo 10.

Differs from the original: it iterates an unseeded Python set, so that no two runs give the same data, and collects its
vocabulary from one, so that token ids change with every process. Here each split has its own stream, seeded with
"{seed}/{split}", and the ids are fixed: 0 padding, 1..10 the digits 0..9, 11 [MIN, 12 [MAX, 13 [MED, 14 [SM, 15 ].

Source: Nangia and Bowman, ListOps, NAACL SRW 2018, arXiv 1804.06028; Tay et al., Long Range Arena, ICLR 2021,
arXiv 2011.04006.
"""

import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

# Any change of what the generator draws is a new version, so that no data set on disk is taken for another.
VERSION = "1.0.0"
SYMBOLS = ("<pad>", *"0123456789", "[MIN", "[MAX", "[MED", "[SM", "]")
VOCABULARY_SIZE = len(SYMBOLS)
NUM_CLASSES = 10
PAD, ZERO, MIN, MAX, MED, SM, CLOSE = 0, 1, 11, 12, 13, 14, 15
OPERATORS: dict[int, Callable[[list[int]], int]] = {
    MIN: min, MAX: max, MED: lambda values: int(statistics.median(values)), SM: lambda values: sum(values) % 10,
}  # fmt: skip
OPERATOR_PROBABILITY = 0.25
_IDS = {symbol: token for token, symbol in enumerate(SYMBOLS)}


class Example(NamedTuple):
    """One expression: `tokens`, one byte per token id, unpadded; `label`, its value, 0 to 9."""

    tokens: bytes
    label: int


@dataclass(frozen=True)
class Config:
    """What is drawn. Lengths are in tokens and exclusive; `splits` gives examples per split."""

    name: str
    min_length: int
    max_length: int
    max_depth: int = 10
    max_args: int = 10
    splits: tuple[tuple[str, int], ...] = (("train", 96_000), ("validation", 2_000), ("test", 2_000))
    seed: int = 0


CONFIGS = {
    # The arena's own: 8 % of the trees drawn are kept, mean length about 1,035.
    "lra": Config("lra", min_length=500, max_length=2000),
    # The same trees, short ones kept: 20 < length <= 200, so that a laptop trains on it in a minute. The lower bound
    # leaves out trees so small that a split would soon repeat another's.
    "small": Config("small", 20, 201, splits=(("train", 8_000), ("validation", 500), ("test", 500))),
    # The same trees at other lengths, in the same ratio, to see what length alone does.
    **{
        f"length_{length}": Config(f"length_{length}", min_length=length // 4, max_length=length)
        for length in (500, 1000, 4000, 8000)
    },
    # For tests: at most 30 tokens.
    "tiny": Config("tiny", 10, 31, max_depth=4, splits=(("train", 256), ("validation", 64), ("test", 64))),
}


def generate(config: Config, split: str) -> Iterator[Example]:
    """Draws one split, always the same for a configuration and `VERSION`.

    The splits share no expression: validation leaves out what test has drawn, and train what both have, so a split
    costs those before it.

    Args:
        config: see `CONFIGS`.
        split: "train", "validation" or "test".
    Returns: an iterator over the split's examples.
    Raises: ValueError: the configuration has no such split.
    Example:
        >>> example = next(generate(CONFIGS["tiny"], "test"))
        >>> evaluate(example.tokens) == example.label
        True
    """
    sizes = dict(config.splits)
    if split not in sizes:
        raise ValueError(f"listops: split must be one of {', '.join(sizes)}, got {split!r}.")
    return _generate(config, split, sizes)


def at_length(config: Config, length: int) -> Config:
    """The same trees, longer ones for testing alone: more than length / 2 tokens, at most length, and none that is trained on.

    Raises: ValueError: a length that trees to train on may have.
    """
    if length < 2 * (config.max_length - 1):
        raise ValueError(f"listops: test lengths must be >= {2 * (config.max_length - 1)}, twice the longest, got {length}.")
    name, test = f"{config.name}_at_{length}", ("test", dict(config.splits)["test"])
    return replace(config, name=name, min_length=length // 2, max_length=length + 1, splits=(test,))


def _generate(config: Config, split: str, sizes: dict[str, int]) -> Iterator[Example]:
    seen: set[bytes] = set()
    for name in reversed(sizes):
        stream = random.Random(f"{config.seed}/{name}")
        wanted = len(seen) + sizes[name]
        while len(seen) < wanted:
            tokens = _tree(stream.random, config)
            if tokens is None or tokens in seen:
                continue
            seen.add(tokens)
            if name == split:
                yield Example(tokens, evaluate(tokens))
        if name == split:
            return


def _tree(uniform, config: Config) -> bytes | None:
    """The tokens of one tree drawn from the root, or None if its length is out of bounds."""
    tokens = bytearray()
    pending = [1]  # arguments still to come at each open level; the root is the one argument of depth 1
    shortest = 1  # the tree's length if all that is still to come were digits
    max_depth, max_args, max_length, operators = config.max_depth, config.max_args, config.max_length, tuple(OPERATORS)
    while pending:
        if not pending[-1]:
            pending.pop()
            if pending:
                tokens.append(CLOSE)
            continue
        pending[-1] -= 1
        if len(pending) < max_depth and uniform() < OPERATOR_PROBABILITY:
            arguments = 2 + int(uniform() * (max_args - 1))
            shortest += 1 + arguments
            if shortest >= max_length:  # it would be rejected anyway: stopping now changes no distribution
                return None
            tokens.append(operators[int(uniform() * len(operators))])
            pending.append(arguments)
        else:
            tokens.append(ZERO + int(uniform() * 10))
    return bytes(tokens) if len(tokens) > config.min_length else None


def evaluate(tokens: Sequence[int]) -> int:
    """The value of an expression given as token ids; padding at the end is ignored.

    Raises: ValueError: the tokens are no well-formed expression.
    Example:
        >>> evaluate(tokenise("[SM 4 [MED 1 2 ] 9 ]"))
        4
    """
    stack: list[list[int]] = [[0]]
    try:
        for token in tokens:
            if ZERO <= token < MIN:
                stack[-1].append(token - ZERO)
            elif token == CLOSE:
                operator, *arguments = stack.pop()
                if not arguments:
                    raise IndexError
                stack[-1].append(OPERATORS[operator](arguments))
            elif token in OPERATORS:
                stack.append([token])
            elif token != PAD:
                raise IndexError
        ((_, value),) = stack
    except (IndexError, ValueError):
        raise ValueError(f"listops: tokens must be one well-formed expression, got {list(tokens)[:20]}.") from None
    return value


def shape(tokens: Sequence[int]) -> dict[str, str | int]:
    """The root operator of an expression, and its depth: how many operators stand around its innermost digit.

    Example:
        >>> shape(tokenise("[SM 4 [MED 1 2 ] 9 ]"))
        {'root operator': 'SM', 'depth': 2}
    """
    depth = deepest = 0
    for token in tokens:
        depth += 1 if token in OPERATORS else -1 if token == CLOSE else 0
        deepest = max(deepest, depth)
    return {"root operator": SYMBOLS[tokens[0]].strip("["), "depth": deepest}


def tokenise(text: str) -> bytes:
    """The token ids of an expression written out; parentheses, which the arena's files carry, are left out.

    Raises: ValueError: a symbol is not in the vocabulary.
    Example:
        >>> list(tokenise("( ( [MAX 4 ) 3 ) ]"))
        [12, 5, 4, 15]
    """
    symbols = [symbol for symbol in text.split() if symbol not in "()"]
    for symbol in symbols:
        if symbol not in _IDS or symbol == SYMBOLS[PAD]:
            raise ValueError(f"listops: symbol must be one of {' '.join(SYMBOLS[1:])}, got {symbol!r}.")
    return bytes(_IDS[symbol] for symbol in symbols)


def as_text(tokens: Sequence[int]) -> str:
    """The expression as text: what `tokenise` reads."""
    return " ".join(SYMBOLS[token] for token in tokens if token != PAD)
