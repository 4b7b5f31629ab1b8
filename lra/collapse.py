"""Detects a run that was above chance and fell back to it; reported at once and stored in the result."""

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np


def chance(batches: Iterable[dict], column: str) -> tuple[float, float]:
    """(score of the best constant answer, its spread) on evaluation batches.

    For "accuracy" the share p of the commonest target, and the standard error sqrt(p (1 - p) / n) of a share of n
    targets. For "bits_per_byte" the entropy of the targets in bits, negated so that larger is better, and 1 % of it.
    """
    total: Counter = Counter()
    for batch in batches:
        targets, weights = batch["targets"], batch["weights"]
        weights = np.broadcast_to(weights.reshape(-1, *[1] * (targets.ndim - 1)), targets.shape)
        asked = targets >= 0
        total.update(dict(enumerate(np.bincount(targets[asked], weights[asked]))))
    counts = np.array([count for count in total.values() if count])
    shares = counts / counts.sum()
    if column == "bits_per_byte":
        entropy = float(-(shares * np.log2(shares)).sum())
        return -entropy, 0.01 * entropy
    best = float(shares.max())
    return best, float(np.sqrt(best * (1 - best) / counts.sum()))


def collapsed_step(validations: Sequence[Sequence[float]], floor: float, spread: float, sign: int = 1) -> int | None:
    """The step at which a run was seen to have collapsed, or None.

    A run has *learned* at the first validation whose score is above floor + 4 spread. It has *collapsed* at the first
    validation after that whose score is at most floor + spread: no better than always giving the same answer. A later
    recovery does not take the collapse back. The two bounds lie apart so that noise around one of them is no collapse;
    a run that never learned has not collapsed, and is seen by its accuracy beside the floor.

    Args:
        validations: [step, score, ...] in order of steps.
        floor, spread: of `chance`, larger is better.
        sign: -1 where a smaller score is better.
    Example:
        >>> collapsed_step([[50, 0.2], [100, 0.5], [150, 0.45], [200, 0.19], [250, 0.4]], 0.18, 0.02)
        200
    """
    learned = False
    for step, score, *_ in validations:
        learned = learned or sign * score > floor + 4 * spread
        if learned and sign * score <= floor + spread:
            return int(step)
    return None
