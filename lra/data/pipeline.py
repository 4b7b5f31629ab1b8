"""Batches: shuffled anew every epoch and resumable exactly for training, in order and complete for evaluation.

A batch is a dict of numpy arrays: inputs int32 [B, T], padded with 0; mask bool [B, T], True = a real token; targets
int32 [B]; weights float32 [B], 0 for the rows that only fill the last evaluation batch. Pairs have inputs1, mask1,
inputs2 and mask2 instead; a language model's targets are int32 [B, T], the token after each input, and count where mask is
True.

Training batches come from grain. Where it is not installed a small numpy iterator of the same interface takes its
place; the two shuffle differently, and a checkpoint of one does not resume in the other.
"""

import dataclasses
import sys
from collections.abc import Iterator, Sequence

import numpy as np


def pad(example: dict, length: int) -> dict[str, np.ndarray]:
    """One example at a fixed length: every sequence in it cut or padded with 0 at the end."""
    row = {}
    for name in ("inputs", "inputs1", "inputs2"):
        if name in example:
            row[name] = _cut(example[name], length)
            row[name.replace("inputs", "mask")] = np.arange(length) < len(example[name])
    row["targets"] = np.int32(example["label"]) if "label" in example else _cut(example["targets"], length)
    return row


def _cut(tokens: np.ndarray, length: int) -> np.ndarray:
    cut = np.zeros(length, np.int32)
    cut[: len(tokens)] = tokens[:length]
    return cut


def _stack(examples: Sequence[dict], length: int) -> dict[str, np.ndarray]:
    padded = [pad(example, length) for example in examples]
    return {key: np.stack([one[key] for one in padded]) for key in padded[0]}


class GrainBatches:
    """Endless training batches through grain.

    Args:
        source: random access to examples.
        batch_size: examples per batch; those that do not fill a batch are left out of that epoch.
        length: every row is cut or padded to it.
        seed: of the order.
    """

    kind = "grain"

    def __init__(self, source: Sequence, batch_size: int, length: int, seed: int):
        import grain

        dataset = grain.MapDataset.source(source).seed(seed).shuffle().map(lambda example: pad(example, length))
        dataset = dataset.batch(batch_size, drop_remainder=True).repeat()
        # The default of 500 batches ahead costs seconds at the start on a small machine.
        self._iterator = iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))

    def __iter__(self):
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        return self._iterator.__next__()

    def get_state(self) -> dict:
        """Where the iterator stands, as plain data that JSON can hold."""
        return {"kind": self.kind, "state": self._iterator.get_state()}

    def set_state(self, state: dict) -> None:
        """Goes to where `get_state` was taken; the next batch is the one that followed then."""
        _check_kind(self.kind, state)
        self._iterator.set_state(state["state"])


class NumpyBatches:
    """The same in numpy: epoch e has the order of `default_rng([seed, e]).permutation`."""

    kind = "numpy"

    def __init__(self, source: Sequence, batch_size: int, length: int, seed: int):
        self._source, self._batch_size, self._length, self._seed = source, batch_size, length, seed
        self._next, self._epoch, self._order = 0, None, None

    def __iter__(self):
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        epoch, batch = divmod(self._next, len(self._source) // self._batch_size)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self._seed, epoch]).permutation(len(self._source))
        rows = self._order[batch * self._batch_size : (batch + 1) * self._batch_size]
        self._next += 1
        return _stack([self._source[int(row)] for row in rows], self._length)

    def get_state(self) -> dict:
        return {"kind": self.kind, "state": {"next_index": self._next}}

    def set_state(self, state: dict) -> None:
        _check_kind(self.kind, state)
        self._next = state["state"]["next_index"]


def _check_kind(kind: str, state: dict) -> None:
    if state["kind"] != kind:
        raise ValueError(
            f"batches: state must be of the {kind} pipeline, got one of {state['kind']}. "
            "Resume where the same packages are installed (grain or not), or start anew."
        )


def training_batches(source: Sequence, *, batch_size: int, length: int, seed: int) -> GrainBatches | NumpyBatches:
    """Endless shuffled batches, by grain where it is installed, else by numpy, which is said on stderr.

    Raises: ValueError: batch_size is not in 1..len(source).
    """
    if not 1 <= batch_size <= len(source):
        raise ValueError(f"batches: batch_size must be in 1..{len(source)}, the examples there are, got {batch_size}.")
    try:
        import grain  # noqa: F401
    except ImportError as error:
        print(f"Batches are drawn by numpy, because grain is not installed ({error}).", file=sys.stderr)
        return NumpyBatches(source, batch_size, length, seed)
    return GrainBatches(source, batch_size, length, seed)


@dataclasses.dataclass(frozen=True)
class EvaluationBatches:
    """Batches of a split, made anew by every loop over them, so that one is held at a time. See `evaluation_batches`."""

    source: Sequence
    batch_size: int
    length: int
    count: int | None = None

    def __len__(self) -> int:
        examples = len(self.source) if self.count is None else min(self.count, len(self.source))
        return -(-examples // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        chosen: Sequence[int] = range(len(self.source))
        if self.count is not None:  # drawn: sets of data may be sorted by label
            chosen = sorted(np.random.default_rng(0).permutation(len(self.source))[: self.count].tolist())
        for start in range(0, len(chosen), self.batch_size):
            rows = list(chosen[start : start + self.batch_size])
            missing = self.batch_size - len(rows)
            batch = _stack([self.source[row] for row in rows + rows[-1:] * missing], self.length)
            batch["weights"] = np.array([1.0] * len(rows) + [0.0] * missing, np.float32)
            yield batch


def evaluation_batches(
    source: Sequence, *, batch_size: int, length: int, count: int | None = None
) -> EvaluationBatches:
    """Every example once, or `count` drawn ones, in order. The last batch is filled up with its last row, at weight 0.

    Returns: what can be looped over again and again; each loop reads and pads its batches anew, one at a time.
    """
    return EvaluationBatches(source, batch_size, length, count)
