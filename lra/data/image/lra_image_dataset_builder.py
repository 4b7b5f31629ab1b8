"""The TFDS builder of `lra_image`."""

import tensorflow_datasets as tfds

from subquad.lra.data import builder
from subquad.lra.data.image import cifar10


class Builder(builder.Builder):
    """CIFAR-10: `image` uint8 [32, 32, 3], red, green, blue; `label` 0 to 9."""

    VERSION = tfds.core.Version(cifar10.VERSION)
    RELEASE_NOTES = {cifar10.VERSION: "First release."}
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="cifar10", description="CIFAR-10 in colour, train and test")]
    homepage = "https://www.cs.toronto.edu/~kriz/cifar.html"
    keeps_order = False

    def features(self) -> dict:
        return {"image": builder.picture(cifar10.SIDE, 3), "label": tfds.features.ClassLabel(names=list(cifar10.LABELS))}

    def examples(self, dl_manager) -> dict:
        archive = self._download(dl_manager, cifar10.URL)
        # Keyed by the index, as TFDS's own builder does: the key decides the order on disk, and so what train[:90%] is.
        return {split: enumerate(cifar10.read_images(archive, split)) for split in ("train", "test")}
