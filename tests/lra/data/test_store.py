import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

from subquad.lra.data import sources, store
from subquad.lra.data.listops import expressions
from tests.lra.data import in_memory

NAME = "lra_listops/tiny"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    store.prepare(NAME, folder)
    return folder


@pytest.fixture
def copy(built, tmp_path):
    shutil.copytree(built, tmp_path / "data")
    return tmp_path / "data"


def files(folder: pathlib.Path) -> pathlib.Path:
    return folder / "lra_listops" / "tiny" / expressions.VERSION


def test_disk_and_memory_hold_the_same_examples_in_the_same_order(built):
    on_disk, drawn = store.load(NAME, built)[0], in_memory.generate(NAME)
    assert list(on_disk) == list(drawn) == ["train", "validation", "test"]
    for split in on_disk:
        pairs = [(one["inputs"].tobytes(), int(one["label"])) for one in on_disk[split]]
        assert pairs == [(one["inputs"].tobytes(), one["label"]) for one in drawn[split]]
        assert pairs == list(expressions.generate(expressions.CONFIGS["tiny"], split))


def test_a_second_call_builds_nothing(built, capsys):
    before = sorted((path, path.stat().st_mtime_ns) for path in files(built).iterdir())
    store.prepare(NAME, built)
    assert before == sorted((path, path.stat().st_mtime_ns) for path in files(built).iterdir())
    assert capsys.readouterr() == ("", "")


def test_tensorflow_is_never_imported(tmp_path):
    code = (
        "import sys\n"
        "from subquad.lra.data import pipeline, store\n"
        f"splits, _ = store.load({NAME!r}, {str(tmp_path)!r})\n"
        "next(pipeline.training_batches(splits['train'], batch_size=4, length=30, seed=0))\n"
        "assert 'tensorflow_datasets' in sys.modules and 'grain' in sys.modules\n"
        "sys.exit('tensorflow' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (files(tmp_path) / "dataset_info.json").exists()


def test_the_files_beside_the_builder_are_found(built):
    info = store.prepare(NAME, built).info
    assert "minima, maxima, medians" in info.description
    assert "2011.04006" in info.citation and "1804.06028" in info.citation
    assert info.file_format.value == "array_record"


@pytest.mark.parametrize("name", ["lra_listops/smal", "listops/small"])
def test_an_unknown_name_is_refused_with_the_nearest(name, tmp_path):
    for function in (store.prepare, store.load):
        with pytest.raises(ValueError, match="prepare: name must be.*Did you mean 'lra_listops/small'"):
            function(name, tmp_path)
    assert not any(tmp_path.iterdir())


def shard(folder):
    return files(folder) / "lra_listops-test.array_record-00000-of-00001"


DAMAGES = {
    "emptied": lambda folder: shard(folder).write_bytes(b""),
    "cut short": lambda folder: shard(folder).write_bytes(shard(folder).read_bytes()[:-1]),
    "half as long": lambda folder: shard(folder).write_bytes(shard(folder).read_bytes()[:65536]),
    "a flipped byte": lambda folder: shard(folder).write_bytes(flipped(shard(folder).read_bytes(), 300)),
    "removed": lambda folder: shard(folder).unlink(),
    "no information": lambda folder: (files(folder) / "dataset_info.json").unlink(),
    "information cut short": lambda folder: (files(folder) / "dataset_info.json").write_text("{"),
    "nothing in the folder": lambda folder: [path.unlink() for path in files(folder).iterdir()],
    "another size": lambda folder: resize(files(folder) / "dataset_info.json"),
}


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :]


def resize(path):
    path.write_text(path.read_text().replace('"256"', '"255"'))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_data_set_is_named_with_the_cure(copy, damage):
    DAMAGES[damage](copy)
    with pytest.raises(sources.DatasetError) as caught:
        splits = store.load(NAME, copy)[0]
        [splits["test"][index] for index in range(64)]
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"data set: folder {files(copy)} must hold a whole data set, got ")
    assert message.endswith(f"Delete it and run again: rm -r {files(copy)}")
    shutil.rmtree(files(copy))
    assert len(store.load(NAME, copy)[0]["test"]) == 64


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(sources.DatasetError, match="must be writable.*--data-dir") as caught:
        store.prepare(NAME, tmp_path / "file" / "data")
    assert "\n" not in str(caught.value)


def test_a_full_disk_is_told_before_anything_is_built(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 50_000))
    with pytest.raises(sources.DatasetError) as caught:
        store.prepare(NAME, tmp_path / "data")
    assert str(caught.value).startswith(f"{NAME}: folder {tmp_path}/data must have room for about 100 kB, got 50 kB.")
    assert not any(tmp_path.iterdir())


def test_a_killed_build_leaves_no_data_set(tmp_path):
    code = f"from subquad.lra.data import sources, store; store.prepare('lra_listops/lra', {str(tmp_path)!r})"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    parent = tmp_path / "lra_listops" / "lra"
    deadline = time.time() + 60
    while not list(parent.glob("incomplete.*")):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.05)
    time.sleep(0.3)
    assert process.poll() is None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (parent / expressions.VERSION).exists()


def test_the_default_folder_is_that_of_tfds(monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", "/data/sets")
    assert store.default_folder() == pathlib.Path("/data/sets")
    monkeypatch.delenv("TFDS_DATA_DIR")
    assert store.default_folder() == pathlib.Path.home() / "tensorflow_datasets"
