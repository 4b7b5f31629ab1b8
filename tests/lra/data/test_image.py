import numpy as np
import pytest

from subquad.lra import tasks
from subquad.lra.data import sources, store
from subquad.lra.data.image import cifar10
from tests.lra.data import archives


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cifar")
    with archives.trusted("lra_image", cifar10.URL, archives.cifar(folder / "manual")):
        store.prepare("lra_image/lra", folder / "data", folder / "manual")
    return folder / "data"


@pytest.fixture(scope="module")
def splits(built):
    return store.load("lra_image/lra", built)[0]


def test_every_image_in_colour_on_disk(splits):
    stored = [splits["test"].stored(index) for index in range(10)]
    images, labels = archives.cifar_images(5)
    assert sorted((one["label"], one["image"].tobytes()) for one in stored) == sorted(
        (int(label), picture.tobytes()) for label, picture in zip(labels, images, strict=True)
    )
    assert all(one["image"].shape == (32, 32, 3) for one in stored)


def test_a_tenth_of_train_validates_and_no_image_is_in_both(splits):
    assert {split: len(part) for split, part in splits.items()} == {"train": 45, "validation": 5, "test": 10}
    task = tasks.find_task("image", "lra")
    assert task.splits == {"train": 45_000, "validation": 5_000, "test": 10_000}
    # By hand: each image's label and the file that it is in.
    packed = [pair for number in range(5) for pair in zip(*archives.cifar_images(number), strict=True)]
    every = sorted((int(label), picture.tobytes()) for picture, label in packed)
    read = [splits[split].stored(index) for split in ("train", "validation") for index in range(len(splits[split]))]
    assert sorted((one["label"], one["image"].tobytes()) for one in read) == every


def test_tokens_are_grey_values_plus_one_row_by_row(splits):
    task = tasks.find_task("image", "lra")
    for index in range(10):
        stored, tokens = splits["test"].stored(index)["image"], splits["test"][index]["inputs"]
        assert tokens.shape == (task.length,) and tokens.min() >= 1 and tokens.max() < task.vocabulary_size
        assert tokens[33] == cifar10.grey(stored[1, 1]) + 1


def test_black_is_no_padding(splits):
    """The arena's fault: there a black pixel is token 0, which the models leave out of attention."""
    black = [one["inputs"] for one in splits["test"] if len(set(one["inputs"].tolist())) == 1]
    assert black and all((tokens == 1).all() for tokens in black)


def test_grey_by_the_formula():
    draw = np.random.default_rng(0).integers(0, 256, (500, 3), np.uint8)
    exact = 255.5 * (draw @ np.array([0.2989, 0.5870, 0.1140])) / 255
    assert np.abs(cifar10.grey(draw) - np.floor(exact)).max() <= (np.abs(exact - np.round(exact)) < 1e-3).any()
    assert cifar10.grey(np.array([[255, 255, 255], [0, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8)).tolist() == [
        255,
        0,
        149,
        29,
    ]


def test_the_file_that_is_published():
    builder = store.catalogue.find_dataset("lra_image/lra").module().Builder
    (url,) = builder.url_infos
    assert url == cifar10.URL and builder.url_infos[url].size == cifar10.SIZE
    assert builder.url_infos[url].checksum.startswith("c4a38c50a1bc5f3a")


@pytest.mark.parametrize("damage", ["a file is missing", "half a record", "a label of 200"])
def test_what_is_not_whole_is_refused(tmp_path, damage):
    files = {f"data_batch_{k}.bin": bytes(3073 * 2) for k in range(1, 6)}
    if damage == "a file is missing":
        del files["data_batch_4.bin"]
    elif damage == "half a record":
        files["data_batch_4.bin"] = bytes(4000)
    else:
        files["data_batch_4.bin"] = bytes([200]) + bytes(3072)
    path = archives.pack(tmp_path / "cifar-10-binary.tar.gz", files)
    with pytest.raises(sources.DatasetError, match=r"lra_image: .*data_batch_4\.bin"):
        list(cifar10.read_images(path, "train"))
