"""Batches: shuffled anew every epoch and resumable exactly for training, in order and complete for evaluation.

A batch is a dict of numpy arrays: inputs int32 [B, T], padded with 0; mask bool [B, T], True = a real token; targets
int32 [B]; weights float32 [B], 0 for the rows that only fill an evaluation batch; begins bool [B] of batches in streams, True
where a row does not go on from that of the batch before. Pairs have inputs1, mask1,
inputs2 and mask2 instead. Where each token has a target of its own, these are int32 [B, T], and -1 where nothing is asked, as
of padding.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np


def pad(example: dict, length: int) -> dict[str, np.ndarray]:
    """One example at a fixed length: every sequence in it cut or padded with 0 at the end."""
    row = {}
    for name in ("inputs", "inputs1", "inputs2"):
        if name in example:
            row[name] = _cut(example[name], length)
            row[name.replace("inputs", "mask")] = np.arange(length) < len(example[name])
    row["targets"] = np.int32(example["label"]) if "label" in example else _cut(example["targets"], length, -1)
    return row


def _cut(tokens: np.ndarray, length: int, filler: int = 0) -> np.ndarray:
    cut = np.full(length, filler, np.int32)
    cut[: len(tokens)] = tokens[:length]
    return cut


def _stack(examples: Sequence[dict], length: int) -> dict[str, np.ndarray]:
    padded = [pad(example, length) for example in examples]
    return {key: np.stack([one[key] for one in padded]) for key in padded[0]}


def training_batches(source: Sequence, *, batch_size: int, length: int, seed: int, streams: bool = False):
    """Endless batches, shuffled anew every epoch, with rows cut or padded to a length.

    Examples that do not fill a batch are left out of that epoch. With `streams` nothing is shuffled: a row goes on where that
    of the batch before ended, and an epoch is over when batch_size streams of consecutive examples are.

    Returns: grain's iterator; `get_state` gives where it stands, as plain data that JSON can hold, and `set_state` goes there.
    Raises: ValueError: batch_size is not in 1..len(source).
    """
    import grain

    if not 1 <= batch_size <= len(source):
        raise ValueError(f"batches: batch_size must be in 1..{len(source)}, the examples there are, got {batch_size}.")
    if streams:
        order = _in_streams(np.arange(len(source) // batch_size * batch_size), batch_size).ravel()
        begins = lambda at: {"begins": np.bool_(at < batch_size)}
        dataset = grain.MapDataset.range(len(order)).map(lambda at: pad(source[int(order[at])], length) | begins(at))
    else:
        dataset = grain.MapDataset.source(source).seed(seed).shuffle().map(lambda example: pad(example, length))
    dataset = dataset.batch(batch_size, drop_remainder=True).repeat()
    # The default of 500 batches ahead costs seconds at the start on a small machine.
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))


@dataclasses.dataclass(frozen=True)
class EvaluationBatches:
    """Every example of a split once, or `count` drawn ones, in order.

    A batch is filled up with its last row, at weight 0. Each loop reads and pads them anew, one batch at a time. With `streams`
    a row goes on where that of the batch before ended; `count` examples are then the first ones.
    """

    source: Sequence
    batch_size: int
    length: int
    count: int | None = None
    streams: bool = False

    def __len__(self) -> int:
        examples = len(self.source) if self.count is None else min(self.count, len(self.source))
        return -(-examples // self.batch_size)

    def places(self) -> np.ndarray:
        """[batches, B]: which example each row is, -1 where there is none."""
        chosen = np.arange(len(self.source))
        if self.count is not None:  # drawn: sets of data may be sorted by label
            drawn = chosen if self.streams else np.random.default_rng(0).permutation(chosen)
            chosen = np.sort(drawn[: self.count])
        filled = np.pad(chosen, (0, -len(chosen) % self.batch_size), constant_values=-1)
        return _in_streams(filled, self.batch_size) if self.streams else filled.reshape(-1, self.batch_size)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        for step, rows in enumerate(self.places()):
            is_real = rows >= 0
            rows = np.where(is_real, rows, rows[is_real][-1])
            batch = _stack([self.source[row] for row in rows.tolist()], self.length)
            batch["weights"] = is_real.astype(np.float32)
            if self.streams:
                batch["begins"] = np.full(self.batch_size, step == 0)
            yield batch


def _in_streams(places: np.ndarray, batch_size: int) -> np.ndarray:
    """[batches, B]: the places cut into batch_size streams, each of which a row reads batch after batch."""
    return places.reshape(batch_size, -1).T
