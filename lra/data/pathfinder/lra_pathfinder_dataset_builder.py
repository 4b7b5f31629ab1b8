"""The TFDS builder of `lra_pathfinder`: array_record files, written and read without TensorFlow."""

import dataclasses
import pathlib
import shutil
import tempfile

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from subquad.lra.data import sources
from subquad.lra.data.pathfinder import blocks, pictures, released_folders


@dataclasses.dataclass
class BuilderConfig(tfds.core.BuilderConfig):
    """What to draw and on how many processes (None: every core), or which folder of the release to read."""

    drawn: pictures.Config | None = None
    source: released_folders.Source | None = None
    processes: int | None = None
    block: int = pictures.BLOCK

    @property
    def size(self) -> int:
        return (self.source or self.drawn).size


def _described(config: pictures.Config) -> str:
    splits = ", ".join(f"{size} {split}" for split, size in config.splits)
    return f"{config.size} x {config.size}, contours of {config.contour_length} segments, {splits}"


class Builder(tfds.core.GeneratorBasedBuilder):
    """Pathfinder, drawn or read: `image` uint8 [S, S, 1]; `label`, whether the discs mark the ends of one contour."""

    # Told, because TFDS would look them up from the root package, which in an editable install has no folder.
    code_path = epath.Path(__file__)
    pkg_dir_path = epath.Path(__file__).parent
    VERSION = tfds.core.Version(pictures.VERSION)
    RELEASE_NOTES = {pictures.VERSION: "First release."}
    BUILDER_CONFIGS = [
        BuilderConfig(name=name, description=_described(config), drawn=config) for name, config in pictures.CONFIGS.items()
    ] + [
        BuilderConfig(
            name=f"release_{size}_{level}",
            description=f"The arena's own pathfinder{size}/{folder}",
            source=released_folders.Source(size, level),
        )
        for size in pictures.SIZES
        for level, folder in released_folders.FOLDERS.items()
    ]
    MANUAL_DOWNLOAD_INSTRUCTIONS = f"For `release_*` put the unpacked folders of {sources.RELEASE_URL} there, or that file."

    def _info(self) -> tfds.core.DatasetInfo:
        size = self.builder_config.size
        features = {
            # A plain tensor: TFDS's image features would need TensorFlow to be written.
            "image": tfds.features.Tensor(shape=(size, size, 1), dtype=np.uint8, encoding="zlib"),
            "label": tfds.features.ClassLabel(num_classes=pictures.NUM_CLASSES),
        }
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
            homepage="https://github.com/google-research/long-range-arena",
            disable_shuffling=True,  # the order of the indices
        )

    @property
    def _blocks(self) -> pathlib.Path:
        parent = pathlib.Path(self._data_dir_root) / self.name / self.builder_config.name
        return blocks.working_folder(parent, self.builder_config.drawn)

    def download_and_prepare(self, **words) -> None:
        super().download_and_prepare(**words)
        # Only now: until the data set stands, a killed build goes on from these.
        if self.builder_config.drawn is not None:
            shutil.rmtree(self._blocks, ignore_errors=True)

    def _split_generators(self, dl_manager):
        config = self.builder_config
        if config.drawn is not None:
            blocks.render_blocks(config.drawn, self._blocks, processes=config.processes, block=config.block)
            return {
                split: self._generate_examples(blocks.read_blocks(config.drawn, self._blocks, split, block=config.block))
                for split, _ in config.drawn.splits
            }
        # Beside the data set, where there is room; whoever prepares removes it.
        self.scratch = tempfile.TemporaryDirectory(dir=pathlib.Path(dl_manager.download_dir))
        folder = released_folders.fetch_folder(config.source, self._manual_dir(dl_manager), pathlib.Path(self.scratch.name))
        every = released_folders.read_samples(folder)
        of_split = lambda split: released_folders.read_images(released_folders.split_samples(every, split), config.size)
        return {split: self._generate_examples(of_split(split)) for split in ("train", "validation", "test")}

    def _manual_dir(self, dl_manager) -> pathlib.Path:
        try:
            return pathlib.Path(dl_manager.manual_dir)
        except AssertionError:  # TFDS's word for a folder that is missing or empty; `fetch_folder` says more
            return pathlib.Path(self._data_dir_root) / "downloads" / "manual"

    def _generate_examples(self, examples):
        for index, (image, label) in enumerate(examples):
            yield index, {"image": image[..., None], "label": label}
