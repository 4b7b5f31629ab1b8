"""The least memory that a run can take: what cannot fit is refused before anything is made."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp

from subquad.lra import machine, models
from subquad.lra.data import catalogue
from subquad.lra.data.sources import size
from subquad.lra.files import refuse
from subquad.lra.run import Run
from subquad.lra.tasks import Task

# Numbers of 4 bytes for each parameter: itself, the two moments of Adam, its gradient; a run's best ones are a copy.
COPIES = {"forward": 1, "gradient": 2, "train": 4, "run": 5}


class TooLarge(ValueError):
    """A program that does not fit into memory."""


class Least(NamedTuple):
    """Bytes that are needed at least, on one device.

    Attributes:
        parameters: how many there are, or at least are.
        state: bytes of parameters, their gradient, moments, average and best copy.
        inputs: of a batch of tokens and their mask.
        activations: of the inputs of all blocks, which a backward pass reads; of one where there is none.
    """

    parameters: int
    state: int
    inputs: int
    activations: int

    @property
    def total(self) -> int:
        return self.state + self.inputs + self.activations


def least(run: Run, task: Task, mode: str = "run", *, devices: int = 1, sharded: bool = False, counted: bool = True) -> Least:
    """A lower bound of the memory that a run's program needs; nothing is allocated or compiled.

    Args:
        mode: a key of `COPIES`: one of `bench.MODES`, or "run" for all of a training run.
        devices: that share a batch; sharded: and the training state.
        counted: count the parameters by the shapes of the model; else the embeddings and feed-forward networks alone are.
    """
    features, blocks = run.in_features, run.num_layers
    if counted:
        parameters = models.count_parameters(run, task)
    else:
        embedded = task.vocabulary_size if run.inputs == "tokens" else 1
        networks = (run.layer_groups or blocks) * max(run.num_experts, 1)
        parameters = features * (embedded + 2 * run.mlp_features * networks)
    copies = COPIES[mode] + (run.ema is not None and mode in ("train", "run"))
    sequences = 2 if task.kind == "pair" else 1
    rows = sequences * run.batch_size / devices
    # One part of a batch is computed at a time.
    held = (blocks / run.accumulate if mode != "forward" else 1) * jnp.dtype(run.dtype).itemsize
    return Least(
        parameters, round(4 * copies * parameters / (devices if sharded else 1)), round(5 * rows * task.length),
        round(held * rows * task.length * features),
    )  # fmt: skip


def check(
    run: Run, task: Task, splits: Mapping[str, Sequence] | None = None, *, devices: int = 1, sharded: bool = False
) -> None:
    """Refuses a run that cannot be trained here, whatever is free now.

    Args:
        splits: the examples that it is given; None: those of the task's record, as published or generated.
    Raises: ValueError: more memory is needed at least than there is, or a batch is larger than the training split.
    """
    known = catalogue.DATASETS.get(task.dataset)
    # What is made from the packages at hand has about so many examples; training looks again.
    if splits is not None or known is None or known.exact or known.source is not None:
        examples = task.splits["train"] if splits is None else len(splits["train"])
        if run.batch_size > examples:
            refuse("batches: batch_size", f"be in 1..{examples}, the training examples of {task.name}/{task.config}",
                   run.batch_size, "Choose a smaller one.")
    check_fits(run, task, "run", *machine.memory(), devices=devices, sharded=sharded)


def check_fits(run: Run, task: Task, mode: str, memory: int, owner: str, **words) -> None:
    """Refuses a program that needs more than `memory` bytes of `owner` at least; the other words are those of `least`.

    Raises: TooLarge.
    """
    for counted in (False, True):  # what is absurd is not even counted
        needed = least(run, task, mode, counted=counted, **words)
        if needed.total > memory:
            named = max(("state", "inputs", "activations"), key=lambda name: getattr(needed, name))
            cure = {
                "state": "Make in_features, num_layers, mlp_features or the layer's own sizes smaller.",
                "inputs": "Choose a smaller batch_size or length.",
                "activations": "Choose a smaller batch_size, length, in_features or num_layers, or accumulate more.",
            }[named]
            least_of = "" if counted else "at least "
            raise TooLarge(
                f"memory: run must fit into {size(memory)} of {owner}, got {least_of}{needed.parameters:,} parameters, whose "
                f"{'state takes' if mode in ('train', 'run') else 'arrays take'} {size(needed.state)}, and a batch of "
                f"{run.batch_size:,} x {task.length:,} tokens of {run.in_features:,} features, which takes "
                f"{size(needed.inputs + needed.activations)} at the least. {cure}"
            )
