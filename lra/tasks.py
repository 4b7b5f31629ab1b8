"""The tasks: what goes in, what comes out, and what a rule that computes nothing would reach."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from subquad.kernels.dispatch import nearest
from subquad.lra.data import listops


@dataclass(frozen=True)
class Task:
    """One configuration of one task.

    Attributes:
        name, config: what `find` takes.
        dataset: what `data.store.load` takes.
        vocabulary_size: token ids are 0..vocabulary_size-1; 0 is padding.
        length: what sequences are padded to, in tokens.
        num_classes: labels are 0..num_classes-1.
        splits: examples per split.
        floors: the splits -> accuracy on test of rules that see (almost) nothing of the input, by name.
        source: where the task comes from.
        metric: of the predicted class.
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


def _listops_floors(splits: Mapping[str, Sequence]) -> dict[str, float]:
    pairs = lambda split: ((example["inputs"], int(example["label"])) for example in splits[split])
    return listops.floors(pairs("train"), pairs("test"))


TASKS: dict[str, dict[str, Task]] = {
    "listops": {
        name: Task(
            name="listops",
            config=name,
            dataset=f"lra_listops/{name}",
            vocabulary_size=listops.VOCABULARY_SIZE,
            # The longest expression; the arena's own files are padded to 2,000.
            length=2000 if name == "lra" else config.max_length - 1,
            num_classes=listops.NUM_CLASSES,
            splits=dict(config.splits),
            floors=_listops_floors,
            source="Nangia and Bowman 2018, arXiv 1804.06028; Tay et al. 2020, arXiv 2011.04006",
        )
        for name, config in listops.CONFIGS.items()
    }
}


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
