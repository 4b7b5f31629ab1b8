"""The TFDS builder of `lra_pathfinder`."""

import dataclasses
import pathlib
import shutil

import tensorflow_datasets as tfds

from subquad.lra.data import builder, sources
from subquad.lra.data.pathfinder import blocks, pictures, released_folders


@dataclasses.dataclass
class BuilderConfig(tfds.core.BuilderConfig):
    """What to draw and on how many processes (None: every core), or which folder of the release to read."""

    size: int = 32
    drawn: pictures.Config | None = None
    source: sources.Release | None = None
    processes: int | None = None
    block: int = pictures.BLOCK


def _drawn(name: str, config: pictures.Config) -> BuilderConfig:
    splits = ", ".join(f"{size} {split}" for split, size in config.splits)
    described = f"{config.size} x {config.size}, contours of {config.contour_length} segments, {splits}"
    return BuilderConfig(name=name, description=described, size=config.size, drawn=config)


def _released(side: int, level: str) -> BuilderConfig:
    described = f"The arena's own pathfinder{side}/{released_folders.FOLDERS[level]}"
    source = released_folders.release(side, level)
    return BuilderConfig(name=f"release_{side}_{level}", description=described, size=side, source=source)


class Builder(builder.Builder):
    """Pathfinder, drawn or read: `image` uint8 [S, S, 1]; `label`, whether the discs mark the ends of one contour."""

    VERSION = tfds.core.Version(pictures.VERSION)
    RELEASE_NOTES = {pictures.VERSION: "First release."}
    BUILDER_CONFIGS = [_drawn(name, config) for name, config in pictures.CONFIGS.items()] + [
        _released(side, level) for side in pictures.SIZES for level in released_folders.FOLDERS
    ]
    MANUAL_DOWNLOAD_INSTRUCTIONS = f"For `release_*` put the unpacked folders of {sources.RELEASE_URL} there, or that file."

    def features(self) -> dict:
        image = builder.picture(self.builder_config.size, encoding="zlib")
        return {"image": image, "label": tfds.features.ClassLabel(num_classes=pictures.NUM_CLASSES)}

    @property
    def _blocks(self) -> pathlib.Path:
        parent = pathlib.Path(self._data_dir_root) / self.name / self.builder_config.name
        return blocks.working_folder(parent, self.builder_config.drawn)

    def download_and_prepare(self, **words) -> None:
        super().download_and_prepare(**words)
        # Only now: until the data set stands, a killed build goes on from these.
        if self.builder_config.drawn is not None:
            shutil.rmtree(self._blocks, ignore_errors=True)

    def examples(self, dl_manager) -> dict:
        config = self.builder_config
        if config.drawn is not None:
            blocks.render_blocks(config.drawn, self._blocks, processes=config.processes, block=config.block)
            read = lambda split: blocks.read_blocks(config.drawn, self._blocks, split, block=config.block)
        else:
            (folder,) = config.source.fetch(self.name, dl_manager.manual_dir, self._folder_of_scratch(dl_manager)).values()
            every = released_folders.read_samples(folder)
            read = lambda split: released_folders.read_images(released_folders.split_samples(every, split), config.size)
        stored = lambda one: {"image": one.image[..., None], "label": one.label}
        splits = ("train", "validation", "test") if config.drawn is None else dict(config.drawn.splits)
        return {split: enumerate(map(stored, read(split))) for split in splits}
