"""Scores on held-out data: on validation while a run trains, on test once, at its end."""

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from subquad.lra import collapse, models, parallel
from subquad.lra.data import pipeline
from subquad.lra.files import one_line
from subquad.lra.objectives import Objective
from subquad.lra.progress import over
from subquad.lra.run import Run
from subquad.lra.tasks import Task


@dataclass
class Evaluation:
    """Scores parameters on the splits of a task.

    Attributes:
        validation: the batches of the validation split.
        floor, spread: what chance scores on them, see `collapse.chance`.
    """

    run: Run
    task: Task
    objective: Objective
    splits: Mapping[str, Sequence[dict]]
    quiet: bool

    def __post_init__(self):
        self.validation = self._batches("validation")
        counted = over(self.validation, f"{self.run.layer}: floor of validation", quiet=self.quiet)
        self.floor, self.spread = collapse.chance(counted, self.objective.column)

    def build(self, graph: Any, fixed: Any, mesh: Mesh | None) -> None:
        """Makes the program for a model; it is compiled with the first batch."""
        self.mesh = mesh
        program = jax.jit(functools.partial(eval_step, self.objective, graph, mesh=mesh))

        def score(parameters, batches):
            empty = parallel.shard_batch(models.empty_carried(self.run, graph, parameters, fixed), mesh)
            return mean_score(program, mesh, fixed, parameters, batches, empty)

        self.score = score

    def collapsed_step(self, validations: Sequence[Sequence[float]]) -> int | None:
        """See `collapse.collapsed_step`."""
        return collapse.collapsed_step(validations, self.floor, self.spread, self.objective.sign)

    def test(self, best: Any, last: Any, lengths: Sequence[int] = ()) -> tuple[dict[str, Any], np.ndarray]:
        """(the columns of a result, the score of each example of test with the parameters that are reported).

        The test split is read here and nowhere else; `best` is `last` where they are the same.
        """
        scores = {"last": self.score_split(last, "test")}
        scores["best"] = scores["last"] if best is last else self.score_split(best, "test")
        chosen, selected = scores[self.run.selection], {"best": best, "last": last}[self.run.selection]
        train = self.score_split(selected, "train", len(self.splits["test"]))
        columns = self.objective.columns(
            selected=chosen.score, train=train.score, **{name: one.score for name, one in scores.items()}
        )
        if self.task.kind == "tagging":
            columns["accuracy_sequences"] = chosen.whole
        if lengths:
            columns["scores_by_length"] = json.dumps(self.at_lengths(selected, lengths))
        return columns, chosen.rows

    def at_lengths(self, parameters: Any, lengths: Sequence[int]) -> dict[str, float | str]:
        """A length in digits -> the score on test examples of it, or why the model has none there."""
        return {str(length): self._at_length(parameters, length) for length in lengths}

    def score_split(self, parameters: Any, split: str, count: int | None = None) -> "Scores":
        """Scores parameters on a split, or on `count` examples of it."""
        batches = self._batches(split, count)
        found = self.score(parameters, over(batches, split, quiet=self.quiet))
        if not self.run.carry_state:
            return found
        places = batches.places()  # rows come stream by stream
        return found._replace(rows=found.rows[np.argsort(places[places >= 0])])

    def _batches(self, split: str, count: int | None = None):
        run = self.run
        return pipeline.EvaluationBatches(self.splits[split], run.batch_size, self.task.length, count, run.carry_state)

    def _at_length(self, parameters: Any, length: int) -> float | str:
        examples = self.task.at_length(length)
        # As many tokens in a batch as in training; a mesh shares a whole batch.
        rows = self.run.batch_size if self.mesh else max(1, min(self.run.batch_size * self.task.length // length, 512))
        batches = over(pipeline.EvaluationBatches(examples, rows, length), f"length {length:,}", quiet=self.quiet)
        try:
            return self.score(parameters, batches).score
        except (ValueError, NotImplementedError) as error:
            return f"cannot: {one_line(error)}"


class Scores(NamedTuple):
    """Means over batches: the score and the loss of a target, the share of rows whose every target scores 1.

    `rows` has the score of each row.
    """

    score: float
    loss: float
    whole: float
    rows: np.ndarray


def mean_score(
    program, mesh: Mesh | None, fixed: Any, parameters: Any, batches: Iterable[dict], carried: Any
) -> Scores:  # fmt: skip
    """Scores parameters on batches, but for the rows of weight 0; what is `carried` goes from batch to batch."""
    found = []
    for batch in batches:
        of_rows, carried = program(parameters, fixed, parallel.shard_batch(batch, mesh), carried)
        found.append(parallel.gathered(of_rows)[batch["weights"] > 0])
    rows = np.concatenate(found).astype(np.float64)
    (score, loss, count), right = rows.sum(0), rows[:, 0] == rows[:, 2]
    return Scores(score / count, loss / count, right.mean().item(), rows[:, 0] / np.maximum(rows[:, 2], 1))


def eval_step(objective: Objective, graph, parameters, fixed, batch, carried=None, *, mesh: Mesh | None = None):
    """(see `Objective.rows`, the state after the batch where one is carried)."""

    def rows(parameters, fixed, _, batch):
        model = models.carrying(nnx.merge(graph, parameters, fixed), batch)
        return (), (objective.rows(model, batch), getattr(model, "carried", None))

    return parallel.over_batch(rows, mesh)(parameters, fixed, None, {**batch, "carried": carried})[1]
