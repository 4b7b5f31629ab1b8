import contextlib
import dataclasses
import functools
import http.server
import shutil
import socket
import threading

import numpy as np
import pytest
import tensorflow_datasets as tfds

from subquad.lra import tasks
from subquad.lra.data import catalogue, pipeline, sources, store
from subquad.lra.data.text import imdb
from tests.lra.data import archives


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imdb")
    with archives.trusted("lra_text", imdb.URL, archives.imdb(folder / "manual")):
        store.prepare("lra_text/lra", folder / "data", folder / "manual")
    return folder / "data"


def documents(split):
    return sorted((bytes((one["inputs"] - 1).astype(np.uint8)), one["label"]) for one in split)


def expected(split):
    return sorted(
        (data.strip(), int("/pos/" in name)) for name, data in archives.REVIEWS.items() if name.startswith(f"aclImdb/{split}")
    )


def test_every_labelled_review_and_no_other(built):
    splits, source = store.load("lra_text/lra", built)
    assert documents(splits["train"]) == expected("train") and len(expected("train")) == 20
    assert documents(splits["test"]) == expected("test")
    assert source == f"lra_text/lra:{imdb.VERSION} array_record"


def test_tokens_are_bytes_plus_one(built):
    example = store.load("lra_text/lra", built)[0]["train"][0]
    stored = store.load("lra_text/lra", built)[0]["train"].stored(0)
    assert bytes(stored["text"]).startswith(b"train ")
    assert example["inputs"].tolist() == [byte + 1 for byte in bytes(stored["text"])]
    assert 0xC3 + 1 in example["inputs"]  # UTF-8 of an accent: two bytes, two tokens
    task = tasks.find_task("text", "lra")
    assert task.vocabulary_size == 257 and task.num_classes == 2 and task.length == 1000


def test_the_two_ways_to_validate(built):
    arena, modern = store.load("lra_text/lra", built)[0], store.load("lra_text/modern", built)[0]
    assert documents(arena["validation"]) == documents(arena["test"]) == documents(modern["test"])
    assert {split: len(part) for split, part in modern.items()} == {"train": 18, "validation": 2, "test": 20}
    assert sorted(documents(modern["train"]) + documents(modern["validation"])) == documents(arena["train"])
    assert "validation is the test set" in tasks.find_task("text", "lra").note
    assert "held out" in tasks.find_task("text", "modern").note


def test_batches_are_cut_and_padded(built):
    splits, _ = store.load("lra_text/lra", built)
    batch = next(pipeline.training_batches(splits["train"], batch_size=4, length=25, seed=0))
    assert batch["inputs"].shape == (4, 25) and batch["inputs"].dtype == np.int32
    assert np.array_equal(batch["mask"], batch["inputs"] != 0)
    assert set(batch["targets"]) <= {0, 1}


def test_a_wrong_checksum_is_reported_and_leaves_no_data_set(tmp_path):
    archives.imdb(tmp_path / "manual")
    with pytest.raises(sources.DatasetError) as caught:
        store.prepare("lra_text/modern", tmp_path / "data", tmp_path / "manual")
    message = str(caught.value)
    assert "\n" not in message
    file = f"lra_text/modern: file {tmp_path}/manual/aclImdb_v1.tar.gz"
    assert message.startswith(f"{file} must have 84,125,825 bytes, sha256 c40f74a1")
    assert f"got {(tmp_path / 'manual' / 'aclImdb_v1.tar.gz').stat().st_size:,} bytes" in message
    assert message.endswith(f"Delete it and fetch {imdb.URL} again.")
    assert not store.dataset_folder("lra_text/modern", tmp_path / "data").exists()


@pytest.mark.parametrize("keep", [0.5, 0.8])
def test_an_archive_cut_short_is_reported(tmp_path, keep):
    path = archives.imdb(tmp_path / "manual")
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with archives.trusted("lra_text", imdb.URL, path), pytest.raises(sources.DatasetError, match="whole gzipped tar|got none"):
        store.prepare("lra_text/lra", tmp_path / "data", tmp_path / "manual")
    assert not store.dataset_folder("lra_text/lra", tmp_path / "data").exists()


def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def elsewhere(monkeypatch, url):
    """The data set's file at another address."""
    found = catalogue.DATASETS["lra_text/lra"]
    moved = dataclasses.replace(found, source=sources.Download(url, imdb.SIZE))
    monkeypatch.setitem(catalogue.DATASETS, "lra_text/lra", moved)
    monkeypatch.setattr(imdb, "URL", url)
    monkeypatch.setattr(sources.urllib.request, "getproxies", dict)


def test_without_a_network_it_is_said_at_once_which_file_to_put_where(tmp_path, monkeypatch):
    url = f"http://127.0.0.1:{closed_port()}/aclImdb_v1.tar.gz"
    elsewhere(monkeypatch, url)
    # TFDS itself would try again for minutes.
    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", lambda *_, **__: pytest.fail("TFDS was asked"))
    with pytest.raises(sources.MissingSource) as caught:
        store.prepare("lra_text/lra", tmp_path)
    message, folder = str(caught.value), tmp_path / "downloads" / "manual"
    assert "\n" not in message and "Connection refused" in message
    assert message.startswith(f"lra_text/lra: file aclImdb_v1.tar.gz (84 MB) must be downloadable or in {folder}, got no")
    assert message.endswith(f"Fetch {url} on another machine and put it into {folder}")


def test_a_host_that_accepts_and_says_nothing_is_given_up(monkeypatch):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        # The listener is there all the time: that the call returns is by its patience.
        reason = sources.why_unreachable(f"http://127.0.0.1:{listener.getsockname()[1]}/file", patience=0.5)
    assert "timed out" in reason or "no answer within" in reason


def test_a_name_that_is_looked_up_for_ever_is_given_up(monkeypatch):
    asked, over = [], threading.Event()

    def silent(url, timeout):
        asked.append(timeout)
        over.wait()
        raise OSError("nobody there")

    monkeypatch.setattr(sources.urllib.request, "urlopen", silent)
    assert sources.why_unreachable("http://nowhere/file", patience=0.25) == "no answer within 0 seconds" and asked == [0.25]
    over.set()


def test_a_download_is_checked_kept_and_not_repeated(tmp_path, monkeypatch):
    archive = archives.imdb(tmp_path / "server")
    with serving(Quiet, archive.parent) as url:
        elsewhere(monkeypatch, url)
        assert "404" in sources.why_unreachable(url.replace("v1", "v2"))
        with archives.trusted("lra_text", url, archive):
            store.prepare("lra_text/lra", tmp_path / "data")
            assert len(store.load("lra_text/lra", tmp_path / "data")[0]["test"]) == 20
    # The server is gone; what was downloaded serves again.
    shutil.rmtree(tmp_path / "data" / "lra_text")
    with archives.trusted("lra_text", url, archive):
        assert len(store.load("lra_text/lra", tmp_path / "data")[0]["test"]) == 20


@pytest.mark.parametrize("answer", ["403", "nothing", "403 after the first bytes"])
def test_a_host_that_refuses_the_file_is_told_as_one_that_is_not_there(answer, tmp_path, monkeypatch):
    asked = []

    class Refusing(Quiet):
        def do_GET(self):
            asked.append(self.path)
            if answer == "403 after the first bytes" and len(asked) == 1:
                super().do_GET()
            elif answer != "nothing":
                self.send_error(403)
            self.close_connection = True

    archive = archives.imdb(tmp_path / "server")
    with serving(Refusing, archive.parent) as url:
        elsewhere(monkeypatch, url)
        with archives.trusted("lra_text", url, archive):
            with pytest.raises(sources.MissingSource) as caught:
                store.prepare("lra_text/lra", tmp_path)
        assert len(asked) <= 2  # TFDS is not asked where nothing came, and does not try again
    message, folder = str(caught.value), tmp_path / "downloads" / "manual"
    assert message.startswith(f"lra_text/lra: file aclImdb_v1.tar.gz (84 MB) must be downloadable or in {folder}, got ")
    assert message.endswith(f"Fetch {url} on another machine and put it into {folder}") and "\n" not in message
    # The address holds a random port, which may be 40321, and the folder the number of pytest's run.
    reason = message.replace(url, "").replace(str(folder), "")
    assert ("403" in reason) == (answer != "nothing")


@contextlib.contextmanager
def serving(kind, folder):
    """The address at which a server of this kind has the archive in the folder."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(kind, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/aclImdb_v1.tar.gz"
        finally:
            server.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass
