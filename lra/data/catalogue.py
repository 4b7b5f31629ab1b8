"""The data sets that there are: how each is stored, where it comes from, how it is cut into splits and read.

Several entries may read one set of files: `lra_text/lra` and `lra_text/modern` both stand on lra_text/imdb.
"""

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from subquad.kernels.dispatch import nearest
from subquad.lra.data import encodings, image, listops, release, retrieval, sources, text

THREE = {"train": "train", "validation": "validation", "test": "test"}


@dataclass(frozen=True)
class Dataset:
    """One way to read one set of files.

    Attributes:
        name: what `store.load` takes.
        builder, config: the TFDS builder and its configuration.
        version: of what is stored; another one is another folder.
        sizes: examples per split, as published or as generated.
        encode: from a stored example to tokens, see `encodings`.
        slices: split -> slice of the stored splits, in TFDS's notation.
        source: where it comes from; None: it is generated.
        exact: a split of another size than `sizes` is damaged.
        draw: split -> stored examples, for those that can do without files.
        seconds, disk: to prepare it on two cores, without the download, and bytes it then takes; both roughly.
    """

    name: str
    builder: str
    config: str
    version: str
    sizes: Mapping[str, int]
    encode: Callable[[dict], dict]
    slices: Mapping[str, str] = field(default_factory=lambda: THREE)
    source: sources.Source | None = None
    exact: bool = False
    draw: Callable[[str], Iterable[dict]] | None = None
    seconds: float = 60.0
    disk: float = 0.0

    def module(self):
        """The module that defines the builder; needs tensorflow-datasets."""
        return importlib.import_module(f"subquad.lra.data.{self.builder}.{self.builder}_dataset_builder")


def _drawn_listops(config: listops.Config) -> Callable[[str], Iterable[dict]]:
    import numpy as np

    def draw(split: str) -> Iterable[dict]:
        for tokens, label in listops.generate(config, split):
            yield {"inputs": np.frombuffer(tokens, np.uint8), "label": label}

    return draw


def _listops() -> Iterable[Dataset]:
    costs = {"lra": (72, 65e6), "small": (5, 1e6), "tiny": (1, 1e5)}
    for name, config in listops.CONFIGS.items():
        yield Dataset(
            f"lra_listops/{name}", "lra_listops", name, listops.VERSION, dict(config.splits), encodings.tokens, exact=True,
            draw=_drawn_listops(config), seconds=costs[name][0], disk=costs[name][1],
        )  # fmt: skip
    yield Dataset(
        "lra_listops/release", "lra_listops", "release", listops.VERSION, dict(listops.CONFIGS["lra"].splits),
        encodings.tokens, source=sources.Release(tuple(release.FILES.values())), seconds=120, disk=65e6,
    )  # fmt: skip


def _text() -> Iterable[Dataset]:
    cuts = {
        "lra": ({"train": "train", "validation": "test", "test": "test"}, (25_000, 25_000, 25_000)),
        "modern": ({"train": "train[:90%]", "validation": "train[90%:]", "test": "test"}, (22_500, 2_500, 25_000)),
    }
    for name, (slices, sizes) in cuts.items():
        yield Dataset(
            f"lra_text/{name}", "lra_text", "imdb", text.VERSION, dict(zip(THREE, sizes, strict=True)), encodings.text, slices,
            sources.Download(text.URL, text.SIZE), seconds=30, disk=70e6,
        )  # fmt: skip


DATASETS: dict[str, Dataset] = {
    one.name: one
    for one in (
        *_listops(),
        *_text(),
        Dataset(
            "lra_image/lra", "lra_image", "cifar10", image.VERSION,
            {"train": 45_000, "validation": 5_000, "test": 10_000}, encodings.colours,
            {"train": "train[:90%]", "validation": "train[90%:]", "test": "test"},
            sources.Download(image.URL, image.SIZE), seconds=30, disk=190e6,
        ),
        Dataset(
            "lra_retrieval/lra", "lra_retrieval", "aan", retrieval.VERSION,
            {"train": 147_086, "validation": 18_090, "test": 17_437}, encodings.pair,
            source=sources.Release(tuple(retrieval.FILES.values())), seconds=900, disk=3.6e9,
        ),
    )
}  # fmt: skip


def find(name: str) -> Dataset:
    """The data set of a name.

    Raises: ValueError: unknown; the nearest known one is named.
    Example:
        >>> find("lra_text/modern").slices["validation"]
        'train[90%:]'
    """
    if name not in DATASETS:
        raise ValueError(f"prepare: name must be a known data set, got {name!r}. {nearest(name, DATASETS)}")
    return DATASETS[name]
