"""What the TFDS builders share: array_record files, written and read without TensorFlow."""

import inspect
import pathlib
import tempfile
from collections.abc import Iterable, Mapping

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from subquad.lra.data.sources import size
from subquad.lra.progress import Work, over

BYTES = tfds.features.Tensor(shape=(None,), dtype=np.uint8, encoding="bytes")


def picture(side: int, channels: int = 1, encoding: str = "bytes") -> tfds.features.Tensor:
    """A plain tensor: TFDS's image features would need TensorFlow to be written."""
    return tfds.features.Tensor(shape=(side, side, channels), dtype=np.uint8, encoding=encoding)


class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A builder of stored examples, which gives `features` and `examples`.

    Attributes:
        homepage: of the data.
        keeps_order: examples are stored in the order in which they come; else their keys decide it.
        metadata: what is filed with the data.
        counts: how many examples a split has, where that is known; to show how far it is.
    """

    homepage = "https://github.com/google-research/long-range-arena"
    keeps_order = True
    metadata = None
    counts: Mapping[str, int] = {}

    def __init_subclass__(cls, **words):
        # Set here, because TFDS would look them up from the root package, which in an editable install has no folder.
        cls.code_path = epath.Path(inspect.getfile(cls))
        cls.pkg_dir_path = cls.code_path.parent
        super().__init_subclass__(**words)

    def features(self) -> dict:
        """The arrays of an example by name."""
        raise NotImplementedError

    def examples(self, dl_manager) -> dict[str, Iterable[tuple]]:
        """Split -> (key, example) of each."""
        raise NotImplementedError

    def _info(self) -> tfds.core.DatasetInfo:
        features = self.features()
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(features), homepage=self.homepage, disable_shuffling=self.keeps_order,
            supervised_keys=tuple(features) if len(features) == 2 else None,
            metadata=self.metadata and tfds.core.MetadataDict(self.metadata),
        )  # fmt: skip

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split, found) for split, found in self.examples(dl_manager).items()}

    def _generate_examples(self, split: str, examples: Iterable[tuple]):
        yield from over(examples, f"{self.name}/{self.builder_config.name}: {split}", self.counts.get(split))

    def _download(self, dl_manager, url: str) -> pathlib.Path:
        arrived = lambda: sum(path.stat().st_size for path in pathlib.Path(dl_manager.download_dir).glob("*.tmp.*/*"))
        with Work(f"{self.name}: download", note=lambda: size(arrived())):
            return pathlib.Path(dl_manager.download(url))

    def _folder_of_scratch(self, dl_manager) -> pathlib.Path:
        """Beside the data set, where there is room; whoever prepares removes it."""
        self.scratch = tempfile.TemporaryDirectory(dir=pathlib.Path(dl_manager.download_dir))
        return pathlib.Path(self.scratch.name)
