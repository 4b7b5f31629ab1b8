"""The TFDS builder of `lra_retrieval`: array_record files, written and read without TensorFlow."""

import pathlib
import tempfile

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from subquad.lra.data import sources
from subquad.lra.data.retrieval import paper_pairs


class Builder(tfds.core.GeneratorBasedBuilder):
    """Pairs of papers: `text1` and `text2` their bytes, `id1` and `id2` their names, `label` 1 where one cites the other."""

    code_path = epath.Path(__file__)
    pkg_dir_path = epath.Path(__file__).parent
    VERSION = tfds.core.Version(paper_pairs.VERSION)
    RELEASE_NOTES = {paper_pairs.VERSION: "First release."}
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="aan", description="Pairs of papers of the ACL Anthology Network")]
    MANUAL_DOWNLOAD_INSTRUCTIONS = f"Put {', '.join(paper_pairs.FILES.values())} or {sources.RELEASE_URL} there."

    def _info(self) -> tfds.core.DatasetInfo:
        document = tfds.features.Tensor(shape=(None,), dtype=np.uint8, encoding="bytes")
        features = {
            "text1": document,
            "text2": document,
            "id1": tfds.features.Text(),
            "id2": tfds.features.Text(),
            "label": tfds.features.ClassLabel(num_classes=2),
        }
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(features),
            homepage="https://github.com/google-research/long-range-arena",
            disable_shuffling=True,  # the files' order
        )

    def _split_generators(self, dl_manager):
        # Beside the data set, where there is room; whoever prepares removes it.
        self.scratch = tempfile.TemporaryDirectory(dir=pathlib.Path(dl_manager.download_dir))
        manual_dir = pathlib.Path(dl_manager.manual_dir)
        found = sources.fetch_files(manual_dir, tuple(paper_pairs.FILES.values()), pathlib.Path(self.scratch.name))
        return {split: self._generate_examples(found[file]) for split, file in paper_pairs.FILES.items()}

    def _generate_examples(self, path: pathlib.Path):
        for index, (label, id1, id2, text1, text2) in enumerate(paper_pairs.read_pairs(path)):
            first, second = (np.frombuffer(text, np.uint8) for text in (text1, text2))
            yield index, {"text1": first, "text2": second, "id1": id1, "id2": id2, "label": label}
