"""The TFDS builder of `offline`."""

import tensorflow_datasets as tfds

from subquad.lra.data import builder
from subquad.lra.data.offline import corpora


class Builder(builder.Builder):
    """Stand-ins for the arena's tasks out of installed packages; the features differ by configuration."""

    VERSION = tfds.core.Version(corpora.VERSION)
    RELEASE_NOTES = {"1.0.0": "First release.", "1.1.0": "bbc_halves: lengths do not tell the label any more."}
    BUILDER_CONFIGS = [
        tfds.core.BuilderConfig(name="bbc_text", description="BBC news, five sections"),
        tfds.core.BuilderConfig(name="bbc_halves", description="Halves of BBC news: of one article or of two"),
        tfds.core.BuilderConfig(name="photo_patches", description="Grey patches of ten photographs"),
        tfds.core.BuilderConfig(name="digits", description="Written digits of 8 x 8 pixels"),
        tfds.core.BuilderConfig(name="pylib_lm", description="Python's standard library, byte by byte"),
        tfds.core.BuilderConfig(name="pylib_lm_short", description="The same in shorter sequences"),
    ]
    homepage = None

    @property
    def metadata(self) -> dict:
        return {"origin": corpora.origin(self.builder_config.name)}

    def features(self) -> dict:
        label = tfds.features.ClassLabel
        return {
            "bbc_text": {"text": builder.BYTES, "label": label(names=list(corpora.SECTIONS))},
            "bbc_halves": {"text1": builder.BYTES, "text2": builder.BYTES, "label": label(num_classes=2)},
            "photo_patches": {"image": builder.picture(corpora.SIDE), "label": label(names=list(corpora.PHOTOS))},
            "digits": {"image": builder.picture(corpora.DIGIT_SIDE), "label": label(num_classes=10)},
            "pylib_lm": {"text": builder.BYTES},
            "pylib_lm_short": {"text": builder.BYTES},
        }[self.builder_config.name]

    def examples(self, dl_manager) -> dict:
        return {split: enumerate(corpora.examples(self.builder_config.name, split)) for split in corpora.SPLITS}
