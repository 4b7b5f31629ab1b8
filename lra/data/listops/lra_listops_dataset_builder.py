"""The TFDS builder of `lra_listops`: array_record files, written and read without TensorFlow."""

import dataclasses
import pathlib
import tempfile

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from subquad.lra.data import sources
from subquad.lra.data.listops import expressions, released_files


@dataclasses.dataclass
class BuilderConfig(tfds.core.BuilderConfig):
    """A `expressions.Config` under the name that TFDS files it by; None: the arena's own files are read."""

    drawn: expressions.Config | None = expressions.CONFIGS["lra"]


class Builder(tfds.core.GeneratorBasedBuilder):
    """ListOps, generated or read: `inputs` the token ids without padding, `label` the value."""

    # Told, because TFDS would look them up from the root package, which in an editable install has no folder.
    code_path = epath.Path(__file__)
    pkg_dir_path = epath.Path(__file__).parent
    VERSION = tfds.core.Version(expressions.VERSION)
    RELEASE_NOTES = {expressions.VERSION: "First release."}
    BUILDER_CONFIGS = [
        BuilderConfig(
            name=name,
            description=f"{config.min_length} < length < {config.max_length}, "
            + ", ".join(f"{size} {split}" for split, size in config.splits),
            drawn=config,
        )
        for name, config in expressions.CONFIGS.items()
    ] + [BuilderConfig(name="release", description="The arena's own basic_{train,val,test}.tsv", drawn=None)]
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        f"For `release` put {', '.join(released_files.FILES.values())} or {sources.RELEASE_URL} there."
    )

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "inputs": tfds.features.Tensor(shape=(None,), dtype=np.uint8, encoding="bytes"),
            "label": tfds.features.ClassLabel(num_classes=expressions.NUM_CLASSES),
        }
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("inputs", "label"),
            homepage="https://github.com/google-research/long-range-arena",
            disable_shuffling=True,  # the generator's order, so that the files hold what it yields, in that order
        )

    def _split_generators(self, dl_manager):
        drawn = self.builder_config.drawn
        if drawn is not None:
            return {split: self._generate_examples(expressions.generate(drawn, split)) for split, _ in drawn.splits}
        self.scratch = tempfile.TemporaryDirectory(dir=pathlib.Path(dl_manager.download_dir))
        manual_dir = pathlib.Path(dl_manager.manual_dir)
        found = sources.fetch_files(
            manual_dir, tuple(released_files.FILES.values()), pathlib.Path(self.scratch.name), released_files.LARGEST
        )
        return {
            split: self._generate_examples(released_files.read_examples(found[file]))
            for split, file in released_files.FILES.items()
        }

    def _generate_examples(self, examples):
        for index, (tokens, label) in enumerate(examples):
            yield index, {"inputs": np.frombuffer(tokens, np.uint8), "label": label}
