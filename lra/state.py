"""The state of a run between two steps, which is its checkpoint."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Counts up when a checkpoint of an older version would no longer resume to the same numbers.
FORMAT = 3


@dataclass
class TrainState:
    """All that a checkpoint holds: a run goes on from it to the same numbers.

    Attributes:
        learner: what a step replaces, see `optim`: parameters, optimiser, step, and where the run has them plateau, average,
            statistics.
        best: the parameters that were best on validation, and the statistics of batch norms then.
        fixed: what the model has drawn and nothing trains, as hash rotations.
        step: steps that are done.
        data: the position in the training data.
        losses: of all steps.
        validations: [step, score, loss] each.
        best_validation: [step, *rank] of the best, see `Objective.rank`; [None] before the first.
        seconds: that the steps took; timed_steps: how many these were.
    """

    learner: dict[str, Any]
    best: Any
    fixed: Any
    step: int = 0
    data: dict = field(default_factory=dict)
    losses: list = field(default_factory=list)
    validations: list = field(default_factory=list)
    best_validation: list = field(default_factory=lambda: [None])
    seconds: float = 0.0
    timed_steps: int = 0

    def arrays(self) -> dict[str, Any]:
        """The part that is arrays."""
        return {name: getattr(self, name) for name in ARRAYS}

    def record(self) -> dict[str, Any]:
        """The part that is plain data, as JSON has it."""
        return {"format": FORMAT, **{name: getattr(self, name) for name in RECORD}}

    def restore(self, arrays: Mapping[str, Any], record: Mapping[str, Any]) -> None:
        """Takes over what `arrays` and `record` gave."""
        for name, value in {**arrays, **{name: record[name] for name in RECORD}}.items():
            setattr(self, name, value)

    @property
    def rate(self) -> float:
        """Steps per second."""
        return self.timed_steps / self.seconds if self.seconds else 0.0


ARRAYS = ("learner", "best", "fixed")
# Name -> type.
RECORD = {one.name: one.type for one in dataclasses.fields(TrainState) if one.name not in ARRAYS}
