"""The tasks: what goes in, what comes out, and what a rule that computes nothing would reach."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from subquad.kernels.dispatch import nearest
from subquad.lra.data import catalogue, encodings, floors
from subquad.lra.data.listops import expressions
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
        floors: the splits -> scores on test of rules that see (almost) nothing of the input, by name; a result keeps those
            that it has a column for: majority, root, bag, network, unigram, bigram.
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
    sizes = dict(catalogue.find_dataset(dataset).sizes)
    return Task(name, config, dataset, length=length, num_classes=num_classes, splits=sizes, source=source, **words)


def _listops(config: str, length: int) -> Task:
    return _task(
        "listops", config, f"lra_listops/{config}", length, expressions.NUM_CLASSES,
        f"Nangia and Bowman 2018, arXiv 1804.06028; {_ARENA}", floors=floors.root,
        # The arena's vocabulary has one more symbol, for unknown ones, which never occurs.
        vocabulary_size=expressions.VOCABULARY_SIZE + (config not in ("small", "tiny")),
        note="the arena's own files" if config == "release" else "",
    )  # fmt: skip


def _every() -> list[Task]:
    # The longest expression, but in the arena's form the round number above it, which the arena pads to.
    lengths = {name: config.max_length - (name in ("small", "tiny")) for name, config in expressions.CONFIGS.items()}
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
            note="256 grey values as symbols 1 to 256; black is no padding, unlike in the arena",
        ),
        *map(_pathfinder, catalogue.PATHFINDER_CONFIGS + catalogue.PATHFINDER_RELEASES),
        *_offline(),
    ]  # fmt: skip


def _pathfinder(config: str) -> Task:
    side = 32 if config == "tiny" else int(config.removeprefix("release_").partition("_")[0])
    note = "Path-X of the arena" if config.endswith("128_hard") else ""
    return _task(
        "pathfinder", config, f"lra_pathfinder/{config}", side * side, 2, f"Linsley et al. 2018, arXiv 1805.08315; {_ARENA}",
        image_shape=(side, side), note=note or "black is no padding, unlike in the arena",
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


def tasks_named(words: Sequence[str]) -> list[Task]:
    """The tasks that words name: "text/modern", or "text" for its usual configuration.

    Raises: ValueError: an unknown task or configuration; the nearest is named.
    Example:
        >>> [task.config for task in tasks_named(["listops/small", "text"])]
        ['small', 'lra']
    """
    found = []
    for word in words:
        name, slash, config = word.partition("/")
        if not slash and name in TASKS:
            config = next(iter(TASKS[name]))
        found.append(find(name, config))
    return found


def of(name: str, config: str, task: Task | None = None) -> Task:
    """The task of a run: `task` where it is given and has this name and configuration, else `find`.

    Raises: ValueError: `task` is another; or as `find`.
    """
    if task is None:
        return find(name, config)
    if (task.name, task.config) != (name, config):
        raise ValueError(
            f"train: task must be the run's, {name}/{config}, got {task.name}/{task.config}. "
            "Plan the run with the same record: plan(task=task)."
        )
    return task


# Arrays of an example, by kind of task, and its label.
FIELDS: dict[Kind, tuple[str, ...]] = {
    "classification": ("inputs", "label"),
    "pair": ("inputs1", "inputs2", "label"),
    "language_model": ("inputs", "targets"),
}
_LOOKED_AT = 1000


def check_splits(task: Task, splits: Mapping[str, Iterable[dict]]) -> dict[str, Sequence[dict]]:
    """A user's own examples, as sequences: what has no length is read into a list.

    Up to 1,000 examples of each split, evenly spread, are looked at.

    Raises: ValueError: a split is missing or empty; an example has other fields than the task's kind, ids outside of
        1..vocabulary_size-1, or a label outside of 0..num_classes-1.
    """
    found: dict[str, Sequence[dict]] = {}
    for split in ("train", "validation", "test"):
        if split not in splits:
            raise ValueError(f"train: splits must have {split!r}, got {sorted(splits)}. Hold some examples out for it.")
        given = splits[split]
        examples = given if hasattr(given, "__len__") and hasattr(given, "__getitem__") else list(given)
        if not len(examples):
            raise ValueError(f"train: splits[{split!r}] must have examples, got none. An iterator can be read only once.")
        for index in range(0, len(examples), max(1, len(examples) // _LOOKED_AT)):
            _check_example(task, f"splits[{split!r}][{index}]", examples[index])
        found[split] = examples
    return found


def _check_example(task: Task, name: str, example: dict) -> None:
    wanted = FIELDS[task.kind]
    if set(example) != set(wanted):
        raise ValueError(f"train: {name} must have the fields {wanted} of kind {task.kind}, got {sorted(example)}.")
    bounds = {"label": (0, task.num_classes), "targets": (0, task.num_classes)}
    for field in wanted:
        low, high = bounds.get(field, (1, task.vocabulary_size))
        values = np.asarray(example[field])
        if values.dtype.kind not in "iu" or values.ndim != (field != "label") or not values.size:
            raise ValueError(
                f"train: {name}[{field!r}] must be {'an integer' if field == 'label' else 'a sequence of integers'}, "
                f"got {values.dtype} of shape {values.shape}."
            )
        if values.min() < low or values.max() >= high:
            raise ValueError(
                f"train: {name}[{field!r}] must be in {low}..{high - 1}, got {values.min()}..{values.max()}. "
                "Id 0 is padding: shift yours by one, or set the task's vocabulary_size and num_classes."
            )
    if task.kind == "language_model" and len(example["inputs"]) != len(example["targets"]):
        raise ValueError(
            f"train: {name} must have as many targets as inputs, got {len(example['targets'])} and {len(example['inputs'])}."
        )
