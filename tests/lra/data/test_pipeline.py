import itertools
import json

import numpy as np
import pytest

from subquad.lra.data import pipeline
from tests.lra.data import in_memory

LENGTH, BATCH = 30, 32


@pytest.fixture(scope="module")
def splits():
    return in_memory.generate("lra_listops/tiny")


def batches_of(splits, seed=0):
    return pipeline.training_batches(splits["train"], batch_size=BATCH, length=LENGTH, seed=seed)


def take(batches, count):
    return list(itertools.islice(batches, count))


def rows(batches):
    return [row.tobytes() for batch in batches for row in batch["inputs"]]


def same(first, second):
    return len(first) == len(second) and all(
        np.array_equal(one[key], two[key]) for one, two in zip(first, second, strict=True) for key in one
    )


def test_shapes_padding_and_labels(splits):
    batch = next(batches_of(splits))
    described = {key: (value.dtype.name, value.shape) for key, value in batch.items()}
    assert described == {
        "inputs": ("int32", (BATCH, LENGTH)), "mask": ("bool", (BATCH, LENGTH)), "targets": ("int32", (BATCH,))
    }  # fmt: skip
    assert np.array_equal(batch["mask"], batch["inputs"] != 0)
    known = {one["inputs"].tobytes(): one["label"] for one in splits["train"]}
    for inputs, mask, target in zip(batch["inputs"], batch["mask"], batch["targets"], strict=True):
        assert known[inputs[mask].astype(np.uint8).tobytes()] == target


def test_the_order_is_the_seeds(splits):
    make = lambda seed: take(batches_of(splits, seed), 10)
    assert same(make(3), make(3))
    assert not same(make(3), make(4))


def test_every_epoch_has_every_example_in_a_new_order(splits):
    epochs = len(splits["train"]) // BATCH
    batches = batches_of(splits)
    first, second = rows(take(batches, epochs)), rows(take(batches, epochs))
    assert sorted(first) == sorted(second) and len(set(first)) == len(splits["train"])
    assert first != second


@pytest.mark.parametrize("stop", [0, 1, 7, 8, 21])
def test_resume_is_exact(splits, stop):
    batches = batches_of(splits, 5)
    take(batches, stop)
    state = json.loads(json.dumps(batches.get_state()))
    expected = take(batches, 20)
    resumed = batches_of(splits, 5)
    take(resumed, 2)
    resumed.set_state(state)
    assert same(expected, take(resumed, 20))


def test_long_examples_are_cut():
    batch = pipeline.pad({"inputs": np.arange(1, 9, dtype=np.uint8), "label": 3}, 5)
    assert batch["inputs"].tolist() == [1, 2, 3, 4, 5] and batch["mask"].all()


def test_evaluation_sees_every_example_once_and_weighs_the_fillers_0(splits):
    batches = list(pipeline.EvaluationBatches(splits["test"], batch_size=24, length=LENGTH))
    assert [len(batch["inputs"]) for batch in batches] == [24, 24, 24]
    assert [batch["weights"].sum() for batch in batches] == [24, 24, 16]
    real = np.concatenate([batch["inputs"][batch["weights"] > 0] for batch in batches])
    expected = [pipeline.pad(one, LENGTH)["inputs"] for one in splits["test"]]
    assert np.array_equal(real, np.stack(expected))
    assert all(batch["mask"].any(axis=1).all() for batch in batches)  # no filler is a row of padding alone


def test_a_part_of_a_set_sorted_by_label_has_its_labels():
    source = [{"inputs": np.full(3, 1 + at), "label": at // 50} for at in range(100)]
    part = list(pipeline.EvaluationBatches(source, batch_size=24, length=LENGTH, count=30))
    assert [batch["weights"].sum() for batch in part] == [24, 6]
    seen = np.concatenate([batch["inputs"][batch["weights"] > 0, 0] for batch in part])
    assert len(set(seen)) == 30 and (np.diff(seen) > 0).all() and 10 <= (seen > 50).sum() <= 20


@pytest.mark.parametrize("batch_size", [0, -1, 257])
def test_impossible_batch_sizes_are_refused(splits, batch_size):
    with pytest.raises(ValueError, match=r"batches: batch_size must be in 1\.\.256"):
        pipeline.training_batches(splits["train"], batch_size=batch_size, length=LENGTH, seed=0)


def test_nothing_is_asked_of_padding():
    row = pipeline.pad({"inputs": np.arange(1, 4), "targets": np.array([-1, 2, 0])}, 5)
    assert row["targets"].tolist() == [-1, 2, 0, -1, -1] and row["inputs"].tolist() == [1, 2, 3, 0, 0]


def numbered(count):
    """Two tokens of a text that is 1 2 3 ..., and those after them."""
    return [{"inputs": np.arange(2 * at, 2 * at + 2) + 1, "targets": np.arange(2 * at, 2 * at + 2) + 2} for at in range(count)]


def test_streams_go_on_from_batch_to_batch_and_begin_anew_with_an_epoch():
    source = numbered(11)
    make = lambda: pipeline.training_batches(source, batch_size=3, length=2, seed=1, streams=True)
    batches = take(make(), 7)  # an epoch is three
    for step, batch in enumerate(batches):
        places = [3 * row + step % 3 for row in range(3)]  # the last two examples fill no batch
        assert batch["inputs"].tolist() == [source[place]["inputs"].tolist() for place in places]
        assert batch["begins"].tolist() == [step % 3 == 0] * 3
        if step % 3:
            assert (batch["inputs"][:, 0] == batches[step - 1]["targets"][:, -1]).all()
    begun = make()
    take(begun, 4)
    resumed = make()
    resumed.set_state(json.loads(json.dumps(begun.get_state())))
    assert same(take(resumed, 3), batches[4:])


@pytest.mark.parametrize("count,size", [(11, 3), (5, 4), (4, 4), (2, 4), (12, 1)])
def test_evaluation_in_streams_sees_every_example_once(count, size):
    source = numbered(count)
    whole = pipeline.EvaluationBatches(source, batch_size=size, length=2, streams=True)
    batches, seen = list(whole), []
    assert len(batches) == len(whole)
    for before, batch in itertools.pairwise([None, *batches]):
        real = batch["weights"] > 0
        assert batch["begins"].tolist() == [before is None] * size
        if before is not None:
            assert (batch["inputs"][real, 0] == before["targets"][real, -1]).all()
        seen += batch["inputs"][real, 0].tolist()
    places = whole.places()
    places = places[places >= 0].tolist()
    assert seen == [source[place]["inputs"][0] for place in places] and sorted(places) == [*range(count)]
