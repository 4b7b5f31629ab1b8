"""The TFDS builder of `lra_listops`: array_record files, written and read without TensorFlow."""

import dataclasses

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from subquad.lra.data import listops


@dataclasses.dataclass
class BuilderConfig(tfds.core.BuilderConfig):
    """A `listops.Config` under the name that TFDS files it by."""

    drawn: listops.Config = listops.CONFIGS["lra"]


class Builder(tfds.core.GeneratorBasedBuilder):
    """ListOps, generated: `inputs` the token ids without padding, `label` the value."""

    # Told, because TFDS would look them up from the root package, which in an editable install has no folder.
    code_path = epath.Path(__file__)
    pkg_dir_path = epath.Path(__file__).parent
    VERSION = tfds.core.Version(listops.VERSION)
    RELEASE_NOTES = {listops.VERSION: "First release."}
    BUILDER_CONFIGS = [
        BuilderConfig(
            name=name,
            description=f"{config.min_length} < length < {config.max_length}, "
            + ", ".join(f"{size} {split}" for split, size in config.splits),
            drawn=config,
        )
        for name, config in listops.CONFIGS.items()
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "inputs": tfds.features.Tensor(shape=(None,), dtype=np.uint8, encoding="bytes"),
            "label": tfds.features.ClassLabel(num_classes=listops.NUM_CLASSES),
        }
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("inputs", "label"),
            homepage="https://github.com/google-research/long-range-arena",
            disable_shuffling=True,  # the generator's order, so that the files hold what it yields, in that order
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split, _ in self.builder_config.drawn.splits}

    def _generate_examples(self, split: str):
        for index, (tokens, label) in enumerate(listops.generate(self.builder_config.drawn, split)):
            yield index, {"inputs": np.frombuffer(tokens, np.uint8), "label": label}
