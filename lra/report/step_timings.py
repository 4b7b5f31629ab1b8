"""Some steps of a run timed on this machine, on random tokens, for the hours that all of it will take."""

import dataclasses
import time
from collections.abc import Callable

from subquad.lra import machine, sizes
from subquad.lra.bench import programs
from subquad.lra.progress import Work
from subquad.lra.report.costs import training_flops
from subquad.lra.report.ledger import StepTiming, hash_without_seed
from subquad.lra.run import Run
from subquad.lra.tasks import Task


def time_steps(run: Run, task: Task, steps: int, clock: Callable[[], float] = time.perf_counter) -> StepTiming:
    """Times `steps` training steps and as many batches of validation; no data are needed.

    Raises: ValueError: the run cannot fit into memory.
    """
    sizes.check(run, task)
    seconds, compiling = {}, 0.0
    for mode in ("train", "forward"):
        with Work(f"{run.layer} on {task.name}: timing {steps} steps"):
            program = programs.compile_program(run, task, mode)
            call = programs.start_program(program)
            call()
            began = clock()
            for _ in range(steps):
                call()
            seconds[mode] = (clock() - began) / steps
        compiling += program.compile_seconds
        del call  # its arrays, before those of the other program are made
    return StepTiming(
        hash_without_seed(dataclasses.asdict(run)), run.recipe, run.layer, run.task, run.config, steps, seconds["train"],
        seconds["forward"], compiling, training_flops(run, task) / run.steps, machine.hardware(), machine.utc_now(),
    )  # fmt: skip
