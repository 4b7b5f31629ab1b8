"""The tasks: what goes in, what comes out, and what a rule that computes nothing would reach."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from subquad.kernels.dispatch import nearest
from subquad.lra.data import catalogue, encodings, floors, listops
from subquad.lra.data.offline import corpora

Kind = Literal["classification", "pair", "language_model"]


@dataclass(frozen=True)
class Task:
    """One configuration of one task.

    Attributes:
        name, config: what `find` takes.
        dataset: what `data.store.load` takes.
        vocabulary_size: token ids are 0..vocabulary_size-1; 0 is padding, and nothing else.
        length: what sequences are padded or cut to, in tokens.
        num_classes: labels are 0..num_classes-1; for a language model the tokens that it chooses from.
        splits: examples per split, as published or generated.
        floors: the splits -> scores on test of rules that see (almost) nothing of the input, by name.
        source: where the task comes from.
        metric: of the predicted class; "bits per byte" for a language model.
        kind: "classification": one sequence, one label. "pair": two sequences, one label. "language_model": every
            token predicts the next.
        image_shape: (rows, columns) of the picture that the tokens are, row by row; None for other tasks. Token - 1 is
            the pixel.
        note: what a reader of its numbers has to know.
    """

    name: str
    config: str
    dataset: str
    vocabulary_size: int
    length: int
    num_classes: int
    splits: Mapping[str, int]
    floors: Callable[[Mapping[str, Sequence]], dict[str, float]]
    source: str
    metric: str = "accuracy"
    kind: Kind = "classification"
    image_shape: tuple[int, int] | None = None
    note: str = ""


_ARENA = "Tay et al. 2020, arXiv 2011.04006"
_BYTES = encodings.VOCABULARY_SIZE


def _task(name: str, config: str, dataset: str, length: int, num_classes: int, source: str, **words) -> Task:
    """A task on bytes or pixels."""
    words = {"vocabulary_size": _BYTES, "floors": floors.bag_of_tokens, **words}
    sizes = dict(catalogue.find(dataset).sizes)
    return Task(name, config, dataset, length=length, num_classes=num_classes, splits=sizes, source=source, **words)


def _listops(config: str, length: int) -> Task:
    return _task(
        "listops", config, f"lra_listops/{config}", length, listops.NUM_CLASSES,
        f"Nangia and Bowman 2018, arXiv 1804.06028; {_ARENA}", vocabulary_size=listops.VOCABULARY_SIZE, floors=floors.root,
        note="the arena's own files" if config == "release" else "",
    )  # fmt: skip


def _every() -> list[Task]:
    # The longest expression, but in the arena's form the round number above it, which the arena pads to.
    lengths = {name: config.max_length - (name in ("small", "tiny")) for name, config in listops.CONFIGS.items()}
    imdb = f"Maas et al. 2011, IMDb; {_ARENA}"
    return [
        *(_listops(config, length) for config, length in {**lengths, "release": 2000}.items()),
        _task(
            "text", "lra", "lra_text/lra", 1000, 2, imdb,
            note="validation is the test set, as in the arena: a model chosen by it is chosen on test",
        ),
        _task(
            "text", "modern", "lra_text/modern", 4096, 2, imdb, note="validation is a tenth of the training reviews, held out",
        ),
        _task("retrieval", "lra", "lra_retrieval/lra", 4000, 2, f"Radev et al. 2013, AAN; {_ARENA}", kind="pair"),
        _task(
            "image", "lra", "lra_image/lra", 1024, 10, f"Krizhevsky 2009, CIFAR-10; {_ARENA}", image_shape=(32, 32),
            note="256 grey values as symbols 1 to 256; black is no padding, as it was in the arena",
        ),
        *map(_pathfinder, catalogue.PATHFINDER_CONFIGS + catalogue.PATHFINDER_RELEASES),
        *_offline(),
    ]  # fmt: skip


def _pathfinder(config: str) -> Task:
    side = 32 if config == "tiny" else int(config.removeprefix("release_").partition("_")[0])
    note = "Path-X of the arena" if config.endswith("128_hard") else ""
    return _task(
        "pathfinder", config, f"lra_pathfinder/{config}", side * side, 2, f"Linsley et al. 2018, arXiv 1805.08315; {_ARENA}",
        image_shape=(side, side), note=note or "black is no padding, as it was in the arena",
    )  # fmt: skip


def _offline() -> list[Task]:
    def task(name: str, length: int, num_classes: int, source: str, **words) -> Task:
        note = "a stand-in that needs no network; no task of the arena"
        return _task(name, "offline", f"offline/{name}", length, num_classes, source, note=note, **words)

    bbc, side, digit = "Greene and Cunningham 2006, BBC news", corpora.SIDE, corpora.DIGIT_SIDE
    return [
        task("bbc_text", 2048, len(corpora.SECTIONS), bbc),
        task("bbc_halves", 2048, 2, bbc, kind="pair"),
        task("photo_patches", side**2, len(corpora.PHOTOS), "photographs of scikit-image", image_shape=(side, side)),
        task("digits", digit**2, 10, "Alpaydin and Kaynak 1998, UCI", image_shape=(digit, digit), vocabulary_size=18),
        task(
            "pylib_lm", corpora.LM_LENGTH, _BYTES, "the standard library of Python", kind="language_model",
            metric="bits per byte", floors=floors.next_token,
        ),
    ]  # fmt: skip


def _by_name(every: list[Task]) -> dict[str, dict[str, Task]]:
    found: dict[str, dict[str, Task]] = {}
    for one in every:
        found.setdefault(one.name, {})[one.config] = one
    return found


# Name -> configuration -> task; the first configuration is the usual one.
TASKS: dict[str, dict[str, Task]] = _by_name(_every())


def find(name: str, config: str) -> Task:
    """The task `name` in the configuration `config`.

    Raises: ValueError: either is unknown; the nearest known one is named.
    Example:
        >>> find("listops", "small").length
        200
    """
    if name not in TASKS:
        raise ValueError(f"task must be a known name, got {name!r}. {nearest(name, TASKS)}")
    if config not in TASKS[name]:
        raise ValueError(f"config must be a configuration of {name}, got {config!r}. {nearest(config, TASKS[name])}")
    return TASKS[name][config]
