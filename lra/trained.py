"""Models that were trained, from the folders of their runs."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

from flax import nnx

from subquad.lra import checkpoints, models, optim, tasks
from subquad.lra.files import RunError
from subquad.lra.run import Run
from subquad.lra.state import TrainState


def run_of_values(values: Mapping[str, Any], where: str) -> Run:
    """The run of a configuration that was stored.

    Args:
        where: the file that it is from.
    Raises: RunError: it has a value that this version does not know.
    """
    unknown = [f"{name}={value!r:.60}" for name, value in values.items() if name not in Run.__dataclass_fields__]
    if unknown:
        raise RunError(
            f"{where} must hold the values of a run of this version, got {', '.join(unknown)}. Take the version of subquad "
            "that wrote it, or train anew."
        )
    return Run(**values)


def load(
    folder: str | os.PathLike, *, task: tasks.Task | None = None, name: str = "run"
) -> tuple[nnx.Module, Run, tasks.Task]:  # fmt: skip
    """The model of a run's folder, which `train.train` left there, with the parameters that its result is of.

    Args:
        folder: holds `run.json` and `checkpoint/`.
        task: the task that the run was planned for, where it is none of `tasks.TASKS` and no text of `tasks.own_text`.
        name: what errors call the folder.
    Returns: (model, run, task).
    Raises: RunError: there is no run, or no checkpoint of it; either cannot be read.
        ValueError: an unknown task.
    """
    folder = pathlib.Path(folder).resolve()
    if not (folder / "run.json").exists():
        cure = "Name one in runs/ of what train was given as out."
        raise RunError(f"{name}: folder {folder} must hold run.json, got none. {cure}")
    cure = "Name another run, or bring back the file that train wrote."
    run = run_of_values(checkpoints.read_configuration(folder, name, cure), f"{name}: file {folder / 'run.json'}")
    if task is None:
        task = tasks.own_text_task(run.config) if run.task == tasks.OWN_TEXT else tasks.find_task(run.task, run.config)
    if not checkpoints.saved_steps(folder):
        raise RunError(f"{name}: folder {folder} must hold a checkpoint, got none. Train it: pass --resume to what began it.")
    saved = checkpoints.Checkpoints(folder / "checkpoint")
    graph, parameters, statistics, fixed = models.split(models.build(run, task))
    carried = models.empty_carried(run, graph, parameters, statistics, fixed)
    learner = optim.initial_state(run, optim.make_optimiser(run), parameters, statistics, carried)
    arrays = saved.arrays(TrainState(learner, best=optim.evaluated(run, learner), fixed=fixed).arrays())
    saved.close()
    chosen = arrays["best"] if run.selection == "best" else optim.evaluated(run, arrays["learner"])
    return nnx.merge(graph, chosen, arrays["fixed"]), run, task
