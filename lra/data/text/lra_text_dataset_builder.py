"""The TFDS builder of `lra_text`."""

import tensorflow_datasets as tfds

from subquad.lra.data import builder
from subquad.lra.data.text import imdb


class Builder(builder.Builder):
    """IMDb reviews: `text` the bytes, `label` 0 for neg and 1 for pos."""

    VERSION = tfds.core.Version(imdb.VERSION)
    RELEASE_NOTES = {imdb.VERSION: "First release."}
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="imdb", description="IMDb reviews, train and test")]
    homepage = "https://ai.stanford.edu/~amaas/data/sentiment/"
    keeps_order = False

    def features(self) -> dict:
        return {"text": builder.BYTES, "label": tfds.features.ClassLabel(names=list(imdb.LABELS))}

    def examples(self, dl_manager) -> dict:
        archive = self._download(dl_manager, imdb.URL)
        # Keyed by the path, as TFDS's own builder does: the key decides the order on disk.
        return {split: imdb.read_reviews(archive, split) for split in ("train", "test")}
