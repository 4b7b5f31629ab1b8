"""Floors: what rules reach that see almost nothing of the input. A model that is not above them has learnt nothing."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from subquad.lra.data.encodings import VOCABULARY_SIZE

# A rule of 257 counts is settled by this many examples.
MOST = 10_000


def root(splits: Mapping[str, Sequence]) -> dict[str, float]:
    """Accuracies on test of two rules for ListOps that compute nothing, both read off train.

    "majority": always the commonest value. "root": the commonest value given the first token, which is the root operator.
    """
    pairs = lambda split: ((int(example["inputs"][0]), int(example["label"])) for example in splits[split])
    values: Counter = Counter()
    by_root: dict[int, Counter] = {}
    for operator, label in pairs("train"):
        values[label] += 1
        by_root.setdefault(operator, Counter())[label] += 1
    commonest = lambda counts: counts.most_common(1)[0][0]
    majority, answers = commonest(values), {operator: commonest(counts) for operator, counts in by_root.items()}
    right = np.array([(label == majority, label == answers.get(operator, majority)) for operator, label in pairs("test")])
    return dict(zip(("majority", "root"), right.mean(0).tolist(), strict=True))


def chance(share: float, splits: Mapping[str, Sequence]) -> dict[str, float]:
    """The share of right answers that a task's own definition gives to a rule that guesses."""
    return {"chance": share}


def bag_of_tokens(splits: Mapping[str, Sequence]) -> dict[str, float]:
    """Accuracies on test of two rules that are blind to order.

    "majority": always the commonest label of train. "bag": logistic regression on how often each token occurs; for a
    pair, on how much the two differ in that. Both are read off up to 10,000 examples, evenly spread, of each split.

    Args:
        splits: "train" and "test", sequences of {"inputs", "label"}, or "inputs1" and "inputs2" for inputs.
    Returns: accuracies between 0 and 1.
    """
    (features, labels), (unseen, answers) = (_counted(splits[split]) for split in ("train", "test"))
    majority = np.bincount(labels).argmax()
    mean, scale = features.mean(0), features.std(0) + 1e-3
    weights = _logistic((features - mean) / scale, labels)
    predicted = (_with_one((unseen - mean) / scale) @ weights).argmax(1)
    return {"majority": float((answers == majority).mean()), "bag": float((predicted == answers).mean())}


def next_token(splits: Mapping[str, Sequence]) -> dict[str, float]:
    """Bits per token on test of two rules that see next to nothing: the tokens' frequencies, and those after one token.

    Returns: {"unigram", "bigram"}; both are counted on train, with one added to every count.
    """
    counts = np.zeros((VOCABULARY_SIZE, VOCABULARY_SIZE))
    for example in _spread(splits["train"]):
        np.add.at(counts, (example["inputs"], example["targets"]), 1)
    bits = lambda table: -np.log2((table + 1) / (table + 1).sum(-1, keepdims=True))
    one, two = bits(counts.sum(0)), bits(counts)
    unigram = bigram = tokens = 0
    for example in _spread(splits["test"]):
        inputs, targets = example["inputs"], example["targets"]
        unigram, bigram = unigram + one[targets].sum(), bigram + two[inputs, targets].sum()
        tokens += len(targets)
    return {"unigram": float(unigram / tokens), "bigram": float(bigram / tokens)}


def _spread(examples: Sequence):
    step = max(1, -(-len(examples) // MOST))
    return (examples[index] for index in range(0, len(examples), step))


def _counted(examples: Sequence) -> tuple[np.ndarray, np.ndarray]:
    rows, labels = [], []
    for example in _spread(examples):
        if "inputs" in example:
            rows.append(_frequencies(example["inputs"]))
        else:
            rows.append(np.abs(_frequencies(example["inputs1"]) - _frequencies(example["inputs2"])))
        labels.append(int(example["label"]))
    return np.stack(rows), np.array(labels)


def _frequencies(tokens: np.ndarray) -> np.ndarray:
    """Square roots, so that rare tokens are not drowned by common ones."""
    return np.sqrt(np.bincount(tokens, minlength=VOCABULARY_SIZE) / max(1, len(tokens))).astype(np.float32)


def _with_one(features: np.ndarray) -> np.ndarray:
    return np.concatenate([features, np.ones((len(features), 1), np.float32)], 1)


def _logistic(features: np.ndarray, labels: np.ndarray, steps: int = 200) -> np.ndarray:
    """Weights [features + 1, classes] of a regularised softmax regression, by full-batch Adam: the same every time."""
    inputs = _with_one(features)
    wanted = np.eye(labels.max() + 1, dtype=np.float32)[labels]
    weights, mean, square = (np.zeros((inputs.shape[1], wanted.shape[1]), np.float32) for _ in range(3))
    for step in range(1, steps + 1):
        logits = inputs @ weights
        chances = np.exp(logits - logits.max(1, keepdims=True))
        chances /= chances.sum(1, keepdims=True)
        slope = inputs.T @ (chances - wanted) / len(inputs) + 1e-3 * weights
        mean, square = 0.9 * mean + 0.1 * slope, 0.99 * square + 0.01 * slope**2
        weights -= 0.05 * (mean / (1 - 0.9**step)) / (np.sqrt(square / (1 - 0.99**step)) + 1e-8)
    return weights
