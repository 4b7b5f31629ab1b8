"""The TFDS builder of `offline`: array_record files, written and read without TensorFlow."""

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from subquad.lra.data.offline import corpora


class Builder(tfds.core.GeneratorBasedBuilder):
    """Stand-ins for the arena's tasks out of installed packages; the features differ by configuration."""

    code_path = epath.Path(__file__)
    pkg_dir_path = epath.Path(__file__).parent
    VERSION = tfds.core.Version(corpora.VERSION)
    RELEASE_NOTES = {"1.0.0": "First release.", "1.1.0": "bbc_halves: lengths do not tell the label any more."}
    BUILDER_CONFIGS = [
        tfds.core.BuilderConfig(name="bbc_text", description="BBC news, five sections"),
        tfds.core.BuilderConfig(name="bbc_halves", description="Halves of BBC news: of one article or of two"),
        tfds.core.BuilderConfig(name="photo_patches", description="Grey patches of ten photographs"),
        tfds.core.BuilderConfig(name="digits", description="Written digits of 8 x 8 pixels"),
        tfds.core.BuilderConfig(name="pylib_lm", description="Python's standard library, byte by byte"),
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Tensor(shape=(None,), dtype=np.uint8, encoding="bytes")
        picture = lambda side: tfds.features.Tensor(shape=(side, side, 1), dtype=np.uint8, encoding="bytes")
        label = lambda count: tfds.features.ClassLabel(num_classes=count)
        features = {
            "bbc_text": {"text": text, "label": tfds.features.ClassLabel(names=list(corpora.SECTIONS))},
            "bbc_halves": {"text1": text, "text2": text, "label": label(2)},
            "photo_patches": {"image": picture(32), "label": tfds.features.ClassLabel(names=list(corpora.PHOTOS))},
            "digits": {"image": picture(8), "label": label(10)},
            "pylib_lm": {"text": text},
        }[self.builder_config.name]
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(features),
            metadata=tfds.core.MetadataDict({"origin": corpora.origin(self.builder_config.name)}),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in corpora.SPLITS}

    def _generate_examples(self, split: str):
        yield from enumerate(corpora.examples(self.builder_config.name, split))
