"""Floors of prepared tasks as rows of a CSV: majority class, root operator, bag of bytes, a small network for pictures."""

import os

from subquad.lra import machine, tasks
from subquad.lra.data import small_network, store
from subquad.lra.progress import Work
from subquad.lra.report.ledger import Floor


def measure_floors(word: str, data_dir: str | os.PathLike | None = None, *, cnn_steps: int = 400) -> list[Floor]:
    """What rules reach on a task that see next to nothing of the input.

    Args:
        word: "listops/lra", or "listops" for its usual configuration.
        data_dir: where data sets are; one that is generated is made there if it is missing.
        cnn_steps: batches of 64 that the network of pictures is trained for; 0 leaves it out.
    Raises: ValueError: unknown task.  DatasetError: its data is not here and cannot be made.
    """
    (task,) = tasks.tasks_named([word])
    splits, source = store.load(task.dataset, data_dir)
    shared = dict(
        task=task.name, config=task.config, data=source, finished_utc=machine.utc_now(), **machine.environment(),
        command=f"subquad table --floors {task.name}/{task.config}",
    )  # fmt: skip
    # A rule that counts is read off up to 10,000 examples, see `data.floors`; that of ListOps off all.
    examples = len(splits["test"])
    with Work(f"{task.name}/{task.config}: floors"):
        found = [Floor(floor=name, value=value, examples=examples, **shared) for name, value in task.floors(splits).items()]
    if task.image_shape and cnn_steps:
        levels = task.vocabulary_size - 1
        with Work(f"{task.name}/{task.config}: a small network"):
            value, count = small_network.accuracy(splits, task.image_shape, task.num_classes, levels, steps=cnn_steps)
        found.append(Floor(floor="network", value=value, examples=count, **shared))
    return found
