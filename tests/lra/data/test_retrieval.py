import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from subquad.lra import tasks
from subquad.lra.data import pipeline, sources, store
from subquad.lra.data.retrieval import paper_pairs
from tests.lra.data import archives

NAME = "lra_retrieval/lra"
WORDS = {"train": "train", "validation": "eval", "test": "test"}


def unpacked(folder):
    folder.mkdir(parents=True)
    for name, data in archives.aan_files().items():
        (folder / name).write_bytes(data)


def packed(folder):
    files = {f"lra_release/lra_release/tsv_data/{name}": data for name, data in archives.aan_files().items()}
    archives.pack(folder / "lra_release.gz", {"lra_release/README": b"", **files, "lra_release/late": b""})


FORMS = {
    "in the folder": lambda manual: unpacked(manual),
    "deep in it": lambda manual: unpacked(manual / "lra_release" / "lra_release" / "tsv_data"),
    "in the archive": packed,
}


@pytest.fixture(scope="module", params=FORMS)
def splits(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("aan")
    FORMS[request.param](folder / "manual")
    store.prepare(NAME, folder / "data", folder / "manual")
    assert not [path for path in (folder / "data" / "downloads").rglob("*") if path.is_file()]  # no scratch is left
    return store.load(NAME, folder / "data")[0]


def test_pairs_labels_and_order(splits):
    for split, word in WORDS.items():
        rows = [splits[split].stored(index) for index in range(len(splits[split]))]
        read = [(one["label"], one["id1"], one["id2"], bytes(one["text1"]), bytes(one["text2"])) for one in rows]
        assert read == [(int(float(row[0])), *row[1:4], row[4][:10_000]) for row in archives.AAN[word]]


def test_quote_marks_are_text(splits):
    """A reader with quoting swallows everything from an open quote mark to the next one, lines later."""
    assert len(splits["train"]) == 3
    assert bytes(splits["train"].stored(0)["text1"]) == b'He said "no'


def test_a_batch_has_two_sequences(splits):
    task = tasks.find_task("retrieval", "lra")
    assert task.kind == "pair" and task.length == 4000 and task.vocabulary_size == 257
    batch = next(iter(pipeline.EvaluationBatches(splits["train"], batch_size=4, length=task.length)))
    assert batch["inputs1"].shape == batch["inputs2"].shape == (4, 4000)
    assert batch["inputs1"][1, :3].tolist() == [0x100, 0xFF, 0]
    assert batch["mask2"].sum(1).tolist() == [3, 1, 4000, 4000] and batch["mask1"].sum(1).tolist() == [11, 2, 1, 1]
    assert (batch["inputs2"][2] == ord("b") + 1).all()
    assert batch["targets"].tolist() == [1, 0, 1, 1] and batch["weights"].tolist() == [1, 1, 1, 0]
    trained = next(pipeline.training_batches(splits["train"], batch_size=3, length=10, seed=0))
    assert sorted(trained) == ["inputs1", "inputs2", "mask1", "mask2", "targets"]  # a model of one sequence finds none
    assert np.array_equal(trained["mask2"], trained["inputs2"] != 0)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"1.0\ta\tb\tc", "must have 5 columns, got 4"), (b"2.0\ta\tb\tc\td", "must begin with 0.0 or 1.0, got b'2.0'"),
        (b"1.0\ta\tb\tc\td\te", "must have 5 columns, got 6"),
    ],
)  # fmt: skip
def test_a_line_of_another_form_is_named(tmp_path, line, said):
    (tmp_path / "file.tsv").write_bytes(b"1.0\ta\tb\tc\td\n" + line + b"\n")
    with pytest.raises(sources.DatasetError, match=f"file.tsv:2 {said}"):
        list(paper_pairs.read_pairs(tmp_path / "file.tsv"))


def test_missing_files_are_named_with_size_address_and_folder(tmp_path):
    with pytest.raises(sources.MissingSource) as caught:
        store.prepare(NAME, tmp_path / "data", tmp_path / "manual")
    message = str(caught.value)
    assert "\n" not in message and f"must be under {tmp_path}/manual" in message
    assert "7.7 GB, https://storage.googleapis.com/long-range-arena/lra_release.gz" in message
    assert "new_aan_pairs.train.tsv, new_aan_pairs.eval.tsv, new_aan_pairs.test.tsv" in message
    assert not (tmp_path / "data").exists()


def test_an_archive_without_the_files_is_told(tmp_path):
    archives.pack(tmp_path / "manual" / "lra_release.gz", {"lra_release/README": b""})
    with pytest.raises(sources.DatasetError, match="lra_release.gz must hold new_aan_pairs.train.tsv"):
        store.prepare(NAME, tmp_path / "data", tmp_path / "manual")


def test_a_killed_build_leaves_no_data_set(tmp_path):
    manual = tmp_path / "manual"
    unpacked(manual)
    os.remove(manual / "new_aan_pairs.test.tsv")
    os.mkfifo(manual / "new_aan_pairs.test.tsv")  # the build waits here for ever
    code = f"from subquad.lra.data import store; store.prepare({NAME!r}, {str(tmp_path / 'data')!r}, {str(manual)!r})"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    parent = tmp_path / "data" / "lra_retrieval" / "aan"
    deadline = time.time() + 60
    while not list(parent.glob("incomplete.*/*train*")):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (parent / paper_pairs.VERSION).exists()
