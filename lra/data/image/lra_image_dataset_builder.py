"""The TFDS builder of `lra_image`: array_record files, written and read without TensorFlow."""

import pathlib

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from subquad.lra.data.image import cifar10


class Builder(tfds.core.GeneratorBasedBuilder):
    """CIFAR-10: `image` uint8 [32, 32, 3], red, green, blue; `label` 0 to 9."""

    code_path = epath.Path(__file__)
    pkg_dir_path = epath.Path(__file__).parent
    VERSION = tfds.core.Version(cifar10.VERSION)
    RELEASE_NOTES = {cifar10.VERSION: "First release."}
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="cifar10", description="CIFAR-10 in colour, train and test")]

    def _info(self) -> tfds.core.DatasetInfo:
        # A plain tensor: TFDS's image features would need TensorFlow to be written.
        features = {
            "image": tfds.features.Tensor(shape=(cifar10.SIDE, cifar10.SIDE, 3), dtype=np.uint8, encoding="bytes"),
            "label": tfds.features.ClassLabel(names=list(cifar10.LABELS)),
        }
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
            homepage="https://www.cs.toronto.edu/~kriz/cifar.html",
        )

    def _split_generators(self, dl_manager):
        archive = pathlib.Path(dl_manager.download(cifar10.URL))
        return {split: self._generate_examples(archive, split) for split in ("train", "test")}

    def _generate_examples(self, archive: pathlib.Path, split: str):
        # Keyed by the index, as TFDS's own builder does: the key decides the order on disk, and so what train[:90%] is.
        for index, (pixels, label) in enumerate(cifar10.read_images(archive, split)):
            yield index, {"image": pixels, "label": label}
