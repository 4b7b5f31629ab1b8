"""The TFDS builder of `lra_text`: array_record files, written and read without TensorFlow."""

import pathlib

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from subquad.lra.data.text import imdb


class Builder(tfds.core.GeneratorBasedBuilder):
    """IMDb reviews: `text` the bytes, `label` 0 for neg and 1 for pos."""

    code_path = epath.Path(__file__)
    pkg_dir_path = epath.Path(__file__).parent
    VERSION = tfds.core.Version(imdb.VERSION)
    RELEASE_NOTES = {imdb.VERSION: "First release."}
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="imdb", description="IMDb reviews, train and test")]

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "text": tfds.features.Tensor(shape=(None,), dtype=np.uint8, encoding="bytes"),
            "label": tfds.features.ClassLabel(names=list(imdb.LABELS)),
        }
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("text", "label"),
            homepage="https://ai.stanford.edu/~amaas/data/sentiment/",
        )

    def _split_generators(self, dl_manager):
        archive = pathlib.Path(dl_manager.download(imdb.URL))
        return {split: self._generate_examples(archive, split) for split in ("train", "test")}

    def _generate_examples(self, archive: pathlib.Path, split: str):
        # Keyed by the path, as TFDS's own builder does: the key decides the order on disk.
        for path, review, label in imdb.read_reviews(archive, split):
            yield path, {"text": np.frombuffer(review, np.uint8), "label": label}
