"""The TFDS builder of `lra_listops`."""

import numpy as np
import tensorflow_datasets as tfds

from subquad.lra.data import builder, sources
from subquad.lra.data.listops import expressions, released_files


def _described(config: expressions.Config) -> str:
    sizes = ", ".join(f"{size} {split}" for split, size in config.splits)
    return f"{config.min_length} < length < {config.max_length}, {sizes}"


class Builder(builder.Builder):
    """ListOps, generated or read: `inputs` the token ids without padding, `label` the value."""

    VERSION = tfds.core.Version(expressions.VERSION)
    RELEASE_NOTES = {expressions.VERSION: "First release."}
    BUILDER_CONFIGS = [
        *(tfds.core.BuilderConfig(name=name, description=_described(one)) for name, one in expressions.CONFIGS.items()),
        tfds.core.BuilderConfig(name="release", description="The arena's own basic_{train,val,test}.tsv"),
    ]
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        f"For `release` put {', '.join(released_files.FILES.values())} or {sources.RELEASE_URL} there."
    )

    def features(self) -> dict:
        return {"inputs": builder.BYTES, "label": tfds.features.ClassLabel(num_classes=expressions.NUM_CLASSES)}

    def examples(self, dl_manager) -> dict:
        config = expressions.CONFIGS.get(self.builder_config.name)
        if config is not None:
            drawn = {split: expressions.generate(config, split) for split, _ in config.splits}
        else:
            found = released_files.SOURCE.fetch(self.name, dl_manager.manual_dir, self._folder_of_scratch(dl_manager))
            drawn = {split: released_files.read_examples(found[file]) for split, file in released_files.FILES.items()}
        stored = lambda one: {"inputs": np.frombuffer(one.tokens, np.uint8), "label": one.label}
        return {split: enumerate(map(stored, examples)) for split, examples in drawn.items()}
