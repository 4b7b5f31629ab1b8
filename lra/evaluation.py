"""Scores on held-out data: on validation while a run trains, on test once, at its end."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from subquad.lra import collapse, parallel
from subquad.lra.data import pipeline
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
        program = jax.jit(functools.partial(eval_step, self.objective, graph, mesh=mesh))
        self.score = lambda parameters, batches: mean_score(program, mesh, fixed, parameters, batches)

    def collapsed_step(self, validations: Sequence[Sequence[float]]) -> int | None:
        """See `collapse.collapsed_step`."""
        return collapse.collapsed_step(validations, self.floor, self.spread, self.objective.sign)

    def test(self, best: Any, last: Any) -> dict[str, float]:
        """The columns of a result. The test split is read here and nowhere else; `best` is `last` where they are the same."""
        scores = {"last": self._split(last, "test")}
        scores["best"] = scores["last"] if best is last else self._split(best, "test")
        selected = {"best": best, "last": last}[self.run.selection]
        train = self._split(selected, "train", len(self.splits["test"]))
        return self.objective.columns(selected=scores[self.run.selection], train=train, **scores)

    def _split(self, parameters: Any, split: str, count: int | None = None) -> float:
        return self.score(parameters, over(self._batches(split, count), split, quiet=self.quiet))[0]

    def _batches(self, split: str, count: int | None = None):
        return pipeline.EvaluationBatches(self.splits[split], self.run.batch_size, self.task.length, count)


def mean_score(program, mesh: Mesh | None, fixed: Any, parameters: Any, batches: Iterable[dict]) -> tuple[float, float]:
    """(score, mean loss) over batches."""
    sums = (program(parameters, fixed, parallel.shard_batch(batch, mesh)) for batch in batches)
    score, loss, count = sum(np.asarray(one, np.float64) for one in sums)
    return float(score / count), float(loss / count)


def eval_step(objective: Objective, graph, parameters, fixed, batch, *, mesh: Mesh | None = None) -> jax.Array:
    """Sums over a batch's real targets: [scores, losses, targets]."""
    sums = lambda parameters, fixed, _, batch: objective.sums(nnx.merge(graph, parameters, fixed), batch)
    return parallel.over_batch(sums, mesh)(parameters, fixed, None, batch)
