import io
import pathlib
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from subquad.lra.data import catalogue, sources
from subquad.lra.data.pathfinder import blocks, pictures, released_folders
from subquad.lra.data.pathfinder.lra_pathfinder_dataset_builder import Builder, BuilderConfig
from tests.lra.data import in_memory

MANY = replace(pictures.CONFIGS["tiny"], name="many", splits=(("train", 560), ("validation", 20), ("test", 20)))
SCRIPT = """
import dataclasses, pathlib, sys
import tensorflow_datasets as tfds
from subquad.lra.data.pathfinder import pictures
from subquad.lra.data.pathfinder.lra_pathfinder_dataset_builder import Builder, BuilderConfig

if __name__ == "__main__":
    splits = (("train", 560), ("validation", 20), ("test", 20))
    config = dataclasses.replace(pictures.CONFIGS["tiny"], name="many", splits=splits)
    config = BuilderConfig(name="many", drawn=config, processes=2, block=16)
    Builder(config=config, data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
    assert "tensorflow" not in sys.modules
"""


def build(data_dir, config, manual_dir=None):
    tfds.disable_progress_bar()
    builder = Builder(config=config, data_dir=data_dir, file_format="array_record")
    download = tfds.download.DownloadConfig(try_download_gcs=False, manual_dir=manual_dir)
    try:
        builder.download_and_prepare(download_config=download)
    finally:
        if hasattr(builder, "scratch"):
            builder.scratch.cleanup()
    return builder


def same(first, second):
    """Whether two sequences of examples, dicts or tuples, are equal; and how many there are."""
    pairs = [
        [(np.squeeze(one["image"]), one["label"]) if isinstance(one, dict) else one for one in examples]
        for examples in (first, second)
    ]
    assert len(pairs[0]) == len(pairs[1])
    return all(np.array_equal(one[0], other[0]) and one[1] == other[1] for one, other in zip(*pairs, strict=True))


def test_the_builder_stores_what_the_generator_draws(tmp_path, capfd):
    builder = build(tmp_path, "tiny")
    for split in ("train", "validation", "test"):
        source = builder.as_data_source(split)
        assert same(source, in_memory.draw_pictures(pictures.CONFIGS["tiny"], split))
    assert source[0]["image"].shape == (32, 32, 1) and source[0]["image"].dtype == np.uint8
    assert [path.name for path in (tmp_path / "lra_pathfinder" / "tiny").iterdir()] == [pictures.VERSION]
    assert "script 6" in builder.info.description.replace("\n", " ") and "2011.04006" in builder.info.citation


def test_the_catalogue_tells_what_is_drawn():
    listed = [one for one in catalogue.DATASETS.values() if one.builder == "lra_pathfinder" and one.source is None]
    assert {one.config for one in listed} == set(pictures.CONFIGS)
    for one in listed:
        assert dict(one.sizes) == dict(pictures.CONFIGS[one.config].splits)
        assert one.version == pictures.VERSION


def test_a_killed_build_goes_on_and_two_processes_draw_what_one_does(tmp_path, monkeypatch):
    """Also: its workers do not outlive it, a damaged block is drawn anew, and TensorFlow is not imported."""
    parent = tmp_path / "lra_pathfinder" / "many"
    folder = blocks.working_folder(parent, MANY)
    script = tmp_path / "build.py"
    script.write_text(SCRIPT)
    process = subprocess.Popen([sys.executable, script, tmp_path], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    finished = lambda: list(folder.glob("*.npz")) if folder.is_dir() else []
    while len(finished()) < 5:
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.005)
    children = _children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 30
    while any(_alive(child) for child in children):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.01)
    assert not (parent / pictures.VERSION).exists()
    kept = sorted(finished())
    assert 5 <= len(kept) < 38
    content = bytearray(kept[0].read_bytes())
    content[len(content) // 2] ^= 1
    kept[0].write_bytes(content)

    drawn, render = [], blocks._render_block
    monkeypatch.setattr(blocks, "_render_block", lambda *words: drawn.append(words[2]) or render(*words))
    builder = build(tmp_path, BuilderConfig(name="many", drawn=MANY, processes=1, block=16))
    names = {f"{indices.start:07}-{indices.stop:07}.npz" for indices in drawn}
    assert kept[0].name in names and not names & {path.name for path in kept[1:]}
    assert len(drawn) == -(-600 // 16) - len(kept) + 1
    assert not folder.exists()
    # The first images are two processes' work, the last are one's; the split's edges cut through blocks.
    for split in ("train", "validation"):
        assert same(builder.as_data_source(split), in_memory.draw_pictures(MANY, split))


def _children(pid: int) -> list[int]:
    path = pathlib.Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []


def _alive(pid: int) -> bool:
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_whole_run_on_two_processes(tmp_path):
    """To its end, and the same files as from one process."""
    config = replace(MANY, splits=(("train", 40),))
    for processes in (1, 2):
        blocks.render_blocks(config, tmp_path / str(processes), processes=processes, block=16)
    assert same(list(blocks.read_blocks(config, tmp_path / "2", "train", block=16)), in_memory.draw_pictures(config, "train"))
    content = lambda name: {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
    assert content("1") == content("2") and len(content("1")) == 3


def test_wrong_numbers_and_a_missing_block_are_told(tmp_path):
    config = replace(MANY, splits=(("train", 20),))
    with pytest.raises(ValueError, match="pathfinder: processes and block must be at least 1, got 0 and 8"):
        blocks.render_blocks(config, tmp_path, processes=0, block=8)
    blocks.render_blocks(config, tmp_path, processes=1, block=8)
    next(tmp_path.glob("*.npz")).unlink()
    with pytest.raises(OSError, match="must be a whole block"):
        list(blocks.read_blocks(config, tmp_path, "train", block=8))


def test_other_configurations_have_other_folders(tmp_path):
    folders = {blocks.working_folder(tmp_path, replace(MANY, seed=seed)) for seed in range(3)}
    assert len(folders) == 3


HARD = "pathfinder32/curv_contour_length_14"


def picture(shade: int, size: int = 32) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((size, size), shade, np.uint8)).save(file, "PNG")
    return file.getvalue()


def make_release(root: pathlib.Path, shades: dict[int, list[int]], folder: str = HARD) -> pathlib.Path:
    """A folder of the release: for every metadata file the shades of its images; 0 makes an empty file. Labels are
    the parity of the shade."""
    root = root / folder
    (root / "metadata").mkdir(parents=True)
    for batch, row in shades.items():
        lines = []
        (root / "imgs" / str(batch)).mkdir(parents=True)
        for index, shade in enumerate(row):
            (root / "imgs" / str(batch) / f"sample_{index}.png").write_bytes(picture(shade) if shade else b"")
            lines.append(f"imgs/{batch} sample_{index}.png {index} {shade % 2} 1.0 14 4 2 0.5 1 1")
        (root / "metadata" / f"{batch}.npy").write_text("\n".join(lines) + "\n")
    return root


SHADES = {10: [31, 32, 33, 34, 35], 2: [21, 22, 0, 23, 24], 0: [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]}
ORDER = [*range(1, 12), 21, 22, 23, 24, 31, 32, 33, 34, 35]


def shades(source) -> list[int]:
    assert all(one["label"] == one["image"][0, 0, 0] % 2 and np.ptp(one["image"]) == 0 for one in source)
    return [int(one["image"][0, 0, 0]) for one in source]


@pytest.mark.parametrize("packed", [False, True], ids=["unpacked", "archive"])
def test_the_release_is_read_from_its_inner_tree(tmp_path, packed):
    tree = tmp_path / "tree"
    make_release(tree / "lra_release", {0: [99] * 10})  # the outer copy
    make_release(tree / "lra_release" / "lra_release", SHADES)
    make_release(tree / "lra_release" / "lra_release", {0: [77] * 10}, HARD.replace("32", "64"))
    manual = tree
    if packed:
        manual = tmp_path / "manual"
        manual.mkdir()
        with tarfile.open(manual / "lra_release.gz", "w:gz") as archive:
            archive.add(tree / "lra_release", "lra_release")
    builder = build(tmp_path / "data", "release_32_hard", manual)
    parts = {split: shades(builder.as_data_source(split)) for split in ("train", "validation", "test")}
    assert parts == {"train": ORDER[:16], "validation": ORDER[16:18], "test": ORDER[18:]}
    assert not list((tmp_path / "data" / "downloads").glob("tmp*"))


def test_metadata_as_the_original_generator_writes_it(tmp_path):
    root = make_release(tmp_path, {0: [1, 2, 3]})
    lines = [line.split() for line in (root / "metadata" / "0.npy").read_text().splitlines()]
    np.save(root / "metadata" / "0.npy", np.array(lines))
    assert [label for _, label in released_folders.read_samples(root)] == [1, 0, 1]


def test_a_missing_release_says_what_to_put_where(tmp_path):
    said = f"{HARD} must be under .*the whole lra_release.gz .7.7 GB, https.*lra_release"
    with pytest.raises(sources.MissingSource, match=said):
        released_folders.release(32, "hard").require("pathfinder", tmp_path, tmp_path)
    make_release(tmp_path / "other", {0: [1]}, HARD.replace("32", "128"))
    with pytest.raises(sources.MissingSource, match=said):
        build(tmp_path / "data", "release_32_hard", tmp_path / "other")
    assert not (tmp_path / "data" / "lra_pathfinder" / "release_32_hard" / pictures.VERSION).exists()
    released_folders.release(128, "hard").require("pathfinder", tmp_path, tmp_path)


def test_a_damaged_release_is_named(tmp_path):
    root = make_release(tmp_path, {0: [1, 2, 3]})
    first, metadata = root / "imgs" / "0" / "sample_0.png", root / "metadata" / "0.npy"
    good = first.read_bytes()
    for content in (good[:40], b"no image", picture(1, 64)):
        first.write_bytes(content)
        with pytest.raises(sources.DatasetError, match="sample_0.png must be an image of 32 x 32"):
            list(released_folders.read_images(released_folders.read_samples(root), 32))
    first.unlink()
    with pytest.raises(sources.DatasetError, match="sample_0.png must be there"):
        released_folders.read_samples(root)
    for line in ("imgs/0 sample_1.png 1", "imgs/0 sample_1.png 1 2", "imgs/0 sample_1.png 1 one"):
        metadata.write_text(line)
        with pytest.raises(sources.DatasetError, match="0.npy:1 must be a folder, a file, an index and a label 0 or 1"):
            released_folders.read_samples(root)
    metadata.unlink()
    with pytest.raises(sources.DatasetError, match="must list images"):
        released_folders.read_samples(root)
