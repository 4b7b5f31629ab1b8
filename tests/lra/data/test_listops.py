import hashlib
import random
import statistics
from collections import Counter

import pytest

from subquad.lra import tasks
from subquad.lra.data import floors
from subquad.lra.data.listops import expressions

SPLITS = ("train", "validation", "test")


def recursive_value(text: str) -> int:
    """An evaluator that shares nothing with the library's: recursive descent over the written expression."""
    symbols = text.split()

    def read(position):
        if symbols[position].isdigit():
            return int(symbols[position]), position + 1
        operator, values, position = symbols[position], [], position + 1
        while symbols[position] != "]":
            value, position = read(position)
            values.append(value)
        if operator == "[MED":
            result = int(statistics.median(values))
        else:
            result = {"[MIN": min, "[MAX": max, "[SM": lambda v: sum(v) % 10}[operator](values)
        return result, position + 1

    value, end = read(0)
    assert end == len(symbols)
    return value


@pytest.mark.parametrize(("config", "split"), [("tiny", "train"), ("small", "train"), ("lra", "test")])
def test_labels_agree_with_an_independent_evaluator(config, split):
    for tokens, label in _first(expressions.generate(expressions.CONFIGS[config], split), 200):
        assert recursive_value(expressions.as_text(tokens)) == label


@pytest.mark.parametrize("seed", range(20))
def test_evaluation_of_random_trees(seed):
    """A property over trees that the generator does not draw: single arguments, a digit alone, deep chains."""
    draw = random.Random(seed)

    def tree(depth):
        if depth == 0 or draw.random() < 0.3:
            return str(draw.randrange(10))
        arguments = " ".join(tree(depth - 1) for _ in range(draw.randint(1, 5)))
        return f"{draw.choice(['[MIN', '[MAX', '[MED', '[SM'])} {arguments} ]"

    for _ in range(20):
        text = tree(6)
        assert expressions.evaluate(expressions.tokenise(text)) == recursive_value(text)


def test_evaluation_ignores_padding_and_refuses_what_is_malformed():
    assert expressions.evaluate([*expressions.tokenise("[MED 1 2 4 9 ]"), 0, 0, 0]) == 3
    for broken in ("", "[MAX 1 2", "1 2", "[MAX ]", "]", "3 ]", "[MAX 1 ] ]"):
        with pytest.raises(ValueError, match="listops: tokens must be one well-formed expression"):
            expressions.evaluate(expressions.tokenise(broken))
    with pytest.raises(ValueError, match="well-formed"):
        expressions.evaluate([12, 99, 15])


# The first three examples of every split, by configuration, hashed. A change here changes the data that every published
# number was measured on: it needs a new expressions.VERSION.
GOLDEN = {
    ("1.0.0", "tiny", "validation"): "2666bb8d399f9f86",
    ("1.0.0", "tiny", "test"): "825434a451d49052",
    ("1.0.0", "small", "train"): "aa2c80e53aef7fa9",
    ("1.0.0", "small", "validation"): "96adbd9df8c55c59",
    ("1.0.0", "small", "test"): "b3733d63fb5bb9aa",
    ("1.0.0", "lra", "validation"): "1011ba4021472f69",
    ("1.0.0", "lra", "test"): "ba3c03b1ecd24d0f",
}


@pytest.mark.parametrize(("version", "config", "split"), GOLDEN)
def test_first_examples_are_golden(version, config, split):
    assert version == expressions.VERSION
    digest = hashlib.sha256()
    for tokens, label in _first(expressions.generate(expressions.CONFIGS[config], split), 3):
        digest.update(tokens + bytes([label]))
    assert GOLDEN[version, config, split] == digest.hexdigest()[:16]


def test_tokens_are_golden():
    assert list(expressions.tokenise("[MIN 0 9 [SM 1 [MED 4 5 ] ] [MAX 3 2 ] ]")) == [
        11, 1, 10, 14, 2, 13, 5, 6, 15, 15, 12, 4, 3, 15, 15
    ]  # fmt: skip
    assert expressions.VOCABULARY_SIZE == 16
    assert expressions.SYMBOLS[0] == "<pad>"


def test_the_arenas_nested_form_tokenises_to_the_same():
    """LRA's files nest every application in parentheses, which its loader drops."""
    nested = "( ( ( ( [MAX 4 ) 3 ) ( ( ( [MIN 2 ) 3 ) ] ) ) ] )"
    assert expressions.tokenise(nested) == expressions.tokenise("[MAX 4 3 [MIN 2 3 ] ]")
    assert expressions.as_text(expressions.tokenise(nested)) == "[MAX 4 3 [MIN 2 3 ] ]"


@pytest.mark.parametrize("symbol", ["[MEAN", "10", "<pad>", "x"])
def test_unknown_symbols_are_refused(symbol):
    with pytest.raises(ValueError, match="listops: symbol must be one of"):
        expressions.tokenise(f"[MAX 1 {symbol} ]")


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_sizes_bounds_and_disjoint_splits(name):
    config = expressions.CONFIGS[name]
    drawn = {split: [tokens for tokens, _ in expressions.generate(config, split)] for split in SPLITS}
    assert {split: len(examples) for split, examples in drawn.items()} == dict(config.splits)
    everything = [tokens for examples in drawn.values() for tokens in examples]
    assert len(set(everything)) == len(everything)
    assert all(config.min_length < len(tokens) < config.max_length for tokens in everything)
    assert all(tokens[0] in expressions.OPERATORS for tokens in everything)
    for tokens in everything[:500]:
        depth = deepest = 1
        for token in tokens:
            depth += (token in expressions.OPERATORS) - (token == expressions.CLOSE)
            deepest = max(deepest, depth)
        assert deepest <= config.max_depth


def test_splits_would_collide_if_they_were_not_kept_apart():
    """The disjointness above is the generator's work: independent streams of trees this small do repeat each other."""
    crowded = expressions.Config("crowded", 3, 8, max_depth=2, splits=(("train", 3000), ("validation", 2), ("test", 3000)))
    train, test = (set(tokens for tokens, _ in expressions.generate(crowded, split)) for split in ("train", "test"))
    assert not train & test
    alone = expressions.Config("alone", 3, 8, max_depth=2, splits=(("train", 3000),))
    assert set(tokens for tokens, _ in expressions.generate(alone, "train")) & test


def test_lengths_of_the_full_task_are_strictly_between_500_and_2000():
    lengths = [len(tokens) for tokens, _ in _first(expressions.generate(expressions.CONFIGS["lra"], "test"), 400)]
    assert min(lengths) > 500 and max(lengths) < 2000
    assert dict(expressions.CONFIGS["lra"].splits) == {"train": 96_000, "validation": 2_000, "test": 2_000}


def test_the_distribution_is_the_arenas():
    """Against the arena's generator written down anew, with no early abort."""
    draw = random.Random(3)

    def tree(depth):
        if depth == 10 or draw.random() > 0.25:
            return [str(draw.randint(0, 9))]
        arguments = [tree(depth + 1) for _ in range(draw.randint(2, 10))]
        return [draw.choice(["[MIN", "[MAX", "[MED", "[SM"]), *(s for argument in arguments for s in argument), "]"]

    theirs = []
    while len(theirs) < 600:
        symbols = tree(1)
        if 20 < len(symbols) < 201:
            theirs.append(symbols)
    ours = [
        expressions.as_text(tokens).split()
        for tokens, _ in _first(expressions.generate(expressions.CONFIGS["small"], "train"), 3000)
    ]
    mean = {"ours": statistics.mean(map(len, ours)), "theirs": statistics.mean(map(len, theirs))}
    error = statistics.stdev(map(len, theirs)) * (1 / 600 + 1 / 3000) ** 0.5
    assert abs(mean["ours"] - mean["theirs"]) < 4 * error
    for sample in (ours, theirs):
        counts = Counter(symbol for symbols in sample for symbol in symbols)
        operators = sum(counts[operator] for operator in ("[MIN", "[MAX", "[MED", "[SM"))
        for operator in ("[MIN", "[MAX", "[MED", "[SM"):
            assert counts[operator] / operators == pytest.approx(0.25, abs=0.03)
        digits = sum(counts[str(digit)] for digit in range(10))
        assert all(counts[str(digit)] / digits == pytest.approx(0.1, abs=0.02) for digit in range(10))


def test_a_split_is_the_same_whatever_else_is_drawn():
    config = expressions.CONFIGS["tiny"]
    once = list(expressions.generate(config, "train"))
    random.seed(0)
    assert once == list(expressions.generate(config, "train"))
    other = expressions.Config("other", 10, 31, max_depth=4, splits=config.splits, seed=1)
    assert once != list(expressions.generate(other, "train"))


def splits(train, test):
    stored = lambda examples: [{"inputs": one.tokens, "label": one.label} for one in examples]
    return {"train": stored(train), "test": stored(test)}


def test_floors_by_hand():
    example = lambda text, label: expressions.Example(expressions.tokenise(text), label)
    train = [example("[MAX 9 9 ]", 9), example("[MAX 9 1 ]", 9), example("[MAX 8 8 ]", 8), example("[MIN 0 1 ]", 0)]
    test = [example("[MAX 9 2 ]", 9), example("[MIN 0 3 ]", 0), example("[MIN 4 5 ]", 4), example("[SM 9 9 ]", 9)]
    # Majority answers 9 always: 2 of 4. The root rule answers 9 for MAX, 0 for MIN, and 9 for the unseen SM: 3 of 4.
    assert floors.root(splits(train, test)) == {"majority": 0.5, "root": 0.75}


def test_the_root_operator_alone_explains_a_third_of_the_full_task():
    drawn = _first(expressions.generate(expressions.CONFIGS["lra"], "test"), 1200)
    found = floors.root(splits(drawn[:600], drawn[600:]))
    assert 0.12 < found["majority"] < 0.22
    assert 0.30 < found["root"] < 0.42


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="listops: split must be one of train, validation, test, got 'dev'"):
        expressions.generate(expressions.CONFIGS["tiny"], "dev")


def _first(examples, count):
    return [example for example, _ in zip(examples, range(count), strict=False)]


def test_longer_trees_are_drawn_for_testing_alone():
    longer = tasks.find_task("listops", "small").at_length(400)
    lengths = [len(longer[index]["inputs"]) for index in range(40)]
    assert len(longer) == 500 and min(lengths) > 200 and max(lengths) <= 400
    assert all(expressions.evaluate(longer[index]["inputs"]) == longer[index]["label"] for index in range(40))
    with pytest.raises(ValueError, match="listops: test lengths must be >= 400, twice the longest, got 399"):
        tasks.find_task("listops", "small").at_length(399)
