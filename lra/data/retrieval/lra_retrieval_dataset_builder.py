"""The TFDS builder of `lra_retrieval`."""

import tensorflow_datasets as tfds

from subquad.lra.data import builder, sources
from subquad.lra.data.retrieval import paper_pairs


class Builder(builder.Builder):
    """Pairs of papers: `text1` and `text2` their bytes, `id1` and `id2` their names, `label` 1 where one cites the other."""

    VERSION = tfds.core.Version(paper_pairs.VERSION)
    RELEASE_NOTES = {paper_pairs.VERSION: "First release."}
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="aan", description="Pairs of papers of the ACL Anthology Network")]
    MANUAL_DOWNLOAD_INSTRUCTIONS = f"Put {', '.join(paper_pairs.FILES.values())} or {sources.RELEASE_URL} there."

    def features(self) -> dict:
        names = {"id1": tfds.features.Text(), "id2": tfds.features.Text()}
        return {"text1": builder.BYTES, "text2": builder.BYTES, **names, "label": tfds.features.ClassLabel(num_classes=2)}

    def examples(self, dl_manager) -> dict:
        found = paper_pairs.SOURCE.fetch(self.name, dl_manager.manual_dir, self._folder_of_scratch(dl_manager))
        return {split: enumerate(paper_pairs.read_pairs(found[file])) for split, file in paper_pairs.FILES.items()}
