"""The tasks: what goes in, what comes out, and what a rule that computes nothing would reach."""

import functools
import os
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from subquad.kernels.dispatch import nearest
from subquad.lra.data import catalogue, encodings, floors, own_texts
from subquad.lra.data.diagnostics import configs as diagnostics
from subquad.lra.data.diagnostics.drawing import Diagnostic, Drawn
from subquad.lra.data.listops import expressions
from subquad.lra.data.offline import corpora
from subquad.lra.data.own_texts import LM_LENGTH, SHORT_LENGTH
from subquad.lra.data.pathfinder import pictures, released_folders

Kind = Literal["classification", "pair", "language_model", "tagging"]


def tokens_of(example: dict) -> dict[str, str | int]:
    """How long an example is; of a pair both together."""
    return {"tokens": sum(len(example[name]) for name in ("inputs", "inputs1", "inputs2") if name in example)}


def _expression(example: dict) -> dict[str, str | int]:
    return {**tokens_of(example), **expressions.shape(example["inputs"])}


@dataclass(frozen=True)
class Task:
    """One configuration of one task.

    Attributes:
        name, config: what `find_task` takes.
        dataset: what `data.store.load` takes.
        vocabulary_size: token ids are 0..vocabulary_size-1; 0 is padding, and nothing else.
        length: what sequences are padded or cut to, in tokens.
        num_classes: labels are 0..num_classes-1; for a language model the tokens that it chooses from.
        splits: examples per split, as published or generated.
        floors: the splits -> scores on test of rules that see (almost) nothing of the input, by name; a result keeps those
            that it has a column for: majority, root, bag, network, unigram, bigram, chance.
        source: where the task comes from.
        metric: of the predicted class; "bits per byte" for a language model.
        kind: "classification": one sequence, one label. "pair": two sequences, one label. "language_model": every
            token predicts the next. "tagging": one sequence, a label for each token that is asked.
        image_shape: (rows, columns) of the picture that the tokens are, row by row; None for other tasks. Token - 1 is
            the pixel.
        note: what a reader of its numbers has to know.
        answers_ahead: answers stand in the inputs after their questions, so that the model must be causal.
        bottleneck: of a tagging task: all answers are read from the features of the last token.
        groups: an example -> what examples are grouped by, beside the score of each: name -> value.
        at_length: a length -> test examples of that length, for lengths that were not trained on; None: there are none.
        end_of_document: the token after which a language model's text goes on with another document; None: there is none.
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
    answers_ahead: bool = False
    bottleneck: bool = False
    at_length: Callable[[int], Sequence[dict]] | None = None
    groups: Callable[[dict], dict[str, str | int]] = tokens_of
    end_of_document: int | None = None

    @property
    def needs_causal(self) -> str:
        """What the model is needed for that must be causal; "" where it need not be."""
        if self.kind == "language_model":
            return "a language model"
        return "a task with the answers in its inputs" if self.answers_ahead else ""


_ARENA = "Tay et al. 2020, arXiv 2011.04006"
_BYTES = encodings.VOCABULARY_SIZE


OWN_TEXT = "own_text"
# Name -> configuration -> task; the first configuration is the usual one.
TASKS: dict[str, dict[str, Task]] = {}


def _add(name: str, config: str, length: int, num_classes: int, source: str, dataset: str = "", **words) -> None:
    """Lists a task, on bytes or pixels where nothing else is said."""
    dataset = dataset or f"lra_{name}/{config}"
    words = {"vocabulary_size": _BYTES, "floors": floors.bag_of_tokens, **words}
    sizes = dict(catalogue.find_dataset(dataset).sizes)
    task = Task(name, config, dataset, length=length, num_classes=num_classes, splits=sizes, source=source, **words)
    TASKS.setdefault(name, {})[config] = task


def _expressions_at(config: expressions.Config, length: int) -> Sequence[dict]:
    longer = expressions.at_length(config, length)
    drawn = functools.cache(lambda: list(expressions.generate(longer, "test")))
    example = lambda index: {"inputs": np.frombuffer(drawn()[index].tokens, np.uint8), "label": drawn()[index].label}
    return Drawn(example, dict(longer.splits)["test"])


def _test_at(generator: Diagnostic, length: int) -> Sequence[dict]:
    longer = generator.at_length(length)
    return Drawn(functools.partial(longer.example, "test"), longer.test, kept=False)


# The longest expression, but in the arena's form the round number above it, which the arena pads to.
_LENGTHS = {name: config.max_length - (name in ("small", "tiny")) for name, config in expressions.CONFIGS.items()}
for _config, _length in (_LENGTHS | {"release": 2000}).items():
    _add(
        "listops", _config, _length, expressions.NUM_CLASSES, f"Nangia and Bowman 2018, arXiv 1804.06028; {_ARENA}",
        floors=floors.root, groups=_expression, note="the arena's own files" if _config == "release" else "",
        # The arena's vocabulary has one more symbol, for unknown ones, which never occurs.
        vocabulary_size=expressions.VOCABULARY_SIZE + (_config not in ("small", "tiny")),
        at_length=functools.partial(_expressions_at, expressions.CONFIGS.get(_config, expressions.CONFIGS["lra"])),
    )  # fmt: skip
_add(
    "text", "lra", 1000, 2, f"Maas et al. 2011, IMDb; {_ARENA}",
    note="validation is the test set, as in the arena: a model chosen by it is chosen on test",
)  # fmt: skip
_add(
    "text", "modern", 4096, 2, f"Maas et al. 2011, IMDb; {_ARENA}",
    note="validation is a tenth of the training reviews, held out",
)  # fmt: skip
_add("retrieval", "lra", 4000, 2, f"Radev et al. 2013, AAN; {_ARENA}", kind="pair")
_add(
    "image", "lra", 1024, 10, f"Krizhevsky 2009, CIFAR-10; {_ARENA}", image_shape=(32, 32),
    note="256 grey values as symbols 1 to 256; black is no padding, unlike in the arena",
)  # fmt: skip
_SIDES = {name: config.size for name, config in pictures.CONFIGS.items()}
_SIDES |= {f"release_{side}_{level}": side for side in pictures.SIZES for level in released_folders.FOLDERS}
for _config, _side in _SIDES.items():
    _note = "Path-X of the arena" if _config.endswith("128_hard") else "black is no padding, unlike in the arena"
    _source = f"Linsley et al. 2018, arXiv 1805.08315; {_ARENA}"
    _add("pathfinder", _config, _side * _side, 2, _source, image_shape=(_side, _side), note=_note)
# A zero byte ends a document, and ids are bytes + 1.
_LANGUAGE: dict = dict(kind="language_model", metric="bits per byte", floors=floors.next_token, end_of_document=1)
_BBC, _SIDE, _DIGIT = "Greene and Cunningham 2006, BBC news", corpora.SIDE, corpora.DIGIT_SIDE
_NOTE, _PYTHON = "a stand-in that needs no network; no task of the arena", "the standard library of Python"
for _name, _length, _classes, _source, _words in (
    ("bbc_text", 2048, len(corpora.SECTIONS), _BBC, {}),
    ("bbc_halves", 2048, 2, _BBC, dict(kind="pair")),
    ("photo_patches", _SIDE**2, len(corpora.PHOTOS), "photographs of scikit-image", dict(image_shape=(_SIDE, _SIDE))),
    ("digits", _DIGIT**2, 10, "Alpaydin and Kaynak 1998, UCI", dict(image_shape=(_DIGIT, _DIGIT), vocabulary_size=18)),
    ("pylib_lm", LM_LENGTH, _BYTES, _PYTHON, _LANGUAGE),
):
    _add(_name, "offline", _length, _classes, _source, f"offline/{_name}", note=_NOTE, **_words)
_add("pylib_lm", "short", SHORT_LENGTH, _BYTES, _PYTHON, "offline/pylib_lm_short", note=_NOTE, **_LANGUAGE)
for _name, _configs in diagnostics.CONFIGS.items():
    for _config, _one in _configs.items():
        _add(
            _name, _config, _one.length, _one.num_classes, _one.source, f"diagnostics/{_name}_{_config}", kind="tagging",
            vocabulary_size=_one.vocabulary_size, floors=functools.partial(floors.chance, _one.chance),
            answers_ahead=_one.causal, bottleneck=_one.bottleneck,
            at_length=functools.partial(_test_at, _one) if _one.at_length else None,
        )  # fmt: skip


def find_task(name: str, config: str) -> Task:
    """The task `name` in the configuration `config`.

    Raises: ValueError: either is unknown; the nearest known one is named.
    Example:
        >>> find_task("listops", "small").length
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
        found.append(find_task(name, config))
    return found


def own_text(paths: Sequence[str | os.PathLike], length: int = LM_LENGTH) -> tuple[Task, dict[str, list[dict]]]:
    """A language model's task on text files of the user's, byte by byte, and its splits.

    Args:
        paths: the files, in UTF-8 or any other bytes, each a document.
        length: bytes of a sequence.
    Returns: the task, whose configuration names the text by a hash of it and its length; {"train", "validation", "test"}: the
        sequences, the last tenth of which is held out.
    Raises: ValueError: a file that cannot be read; a length below 2; fewer than 20 sequences.
    """
    splits, digest = own_texts.read(paths, length)
    return own_text_task(f"{digest}-{length}", {name: len(rows) for name, rows in splits.items()}), splits


def own_text_task(config: str, splits: Mapping[str, int] = types.MappingProxyType({})) -> Task:
    """The record of a task that `own_text` made, by its configuration."""
    length = int(config.partition("-")[2])
    return Task(
        OWN_TEXT, config, "the files", _BYTES, length, _BYTES, splits, source="your files",
        note="the first nine tenths are trained on, the last twentieth is tested", **_LANGUAGE,
    )  # fmt: skip


# Arrays of an example, by kind of task, and its label.
FIELDS: dict[Kind, tuple[str, ...]] = {
    "classification": ("inputs", "label"),
    "pair": ("inputs1", "inputs2", "label"),
    "language_model": ("inputs", "targets"),
    "tagging": ("inputs", "targets"),
}
_LOOKED_AT = 1000


def check_splits(task: Task, splits: Mapping[str, Iterable[dict]]) -> dict[str, Sequence[dict]]:
    """A user's own examples, as sequences: what has no length is read into a list.

    Up to 1,000 examples of each split, evenly spread, are looked at.

    Raises: ValueError: a split is missing or empty; an example has other fields than the task's kind, ids outside of
        1..vocabulary_size-1, a label outside of 0..num_classes-1, but for the -1 of a token that is not asked, or asks none.
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


def check_goes_on(splits: Mapping[str, Sequence[dict]]) -> None:
    """Refuses splits of a language model whose examples do not follow each other in one text. Raises: ValueError."""
    for split, examples in splits.items():
        for index in range(0, len(examples) - 1, max(1, len(examples) // _LOOKED_AT)):
            last, first = int(examples[index]["targets"][-1]), int(examples[index + 1]["inputs"][0])
            if last != first:
                raise ValueError(
                    f"train: splits[{split!r}][{index + 1}] must begin with the last target before it, {last}, with "
                    f"carry_state, got {first}. Cut the text into sequences in order, or leave carry_state out."
                )


def check_lengths(task: Task, lengths: Sequence[int]) -> None:
    """Refuses lengths that a task cannot be tested at. Raises: ValueError."""
    if lengths and task.at_length is None:
        able = ", ".join(name for name, configs in TASKS.items() if any(one.at_length for one in configs.values()))
        raise ValueError(
            f"test lengths must be left out for {task.name}/{task.config}, whose examples are of one length, got {lengths[0]}. "
            f"Tasks of other lengths are {able}."
        )
    for length in lengths:
        task.at_length(length)


def _check_example(task: Task, name: str, example: dict) -> None:
    wanted = FIELDS[task.kind]
    if set(example) != set(wanted):
        raise ValueError(f"train: {name} must have the fields {wanted} of kind {task.kind}, got {sorted(example)}.")
    bounds = {"label": (0, task.num_classes), "targets": (-(task.kind == "tagging"), task.num_classes)}
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
    if task.kind == "tagging" and max(example["targets"][: task.length]) < 0:
        raise ValueError(
            f"train: {name}['targets'] must ask at least one of the first {task.length} tokens, got -1 for all. Leave that "
            "example out, or make the task's length larger."
        )
    if "targets" in wanted and len(example["inputs"]) != len(example["targets"]):
        raise ValueError(
            f"train: {name} must have as many targets as inputs, got {len(example['targets'])} and {len(example['inputs'])}."
        )
