"""Train a run: the only loop.

`train(run, out=...)` leaves in `out`: `checkpoint/` (a `TrainState`), `run.json` (the resolved configuration),
`history.csv` (losses and validations so far), and at the end `test.csv` (the score of each example) and `result.json`.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from subquad.lra import interrupts, models, parallel, progress, sizes, tasks
from subquad.lra.bench import measure
from subquad.lra.checkpoints import Checkpoints, Interrupted, begin_or_resume, occupied, open_folder, write_history, write_json
from subquad.lra.data import pipeline, store
from subquad.lra.evaluation import Evaluation
from subquad.lra.files import RunError, refuse
from subquad.lra.objectives import OBJECTIVES
from subquad.lra.optim import after_validation, evaluated, initial_state, learning_rate, make_optimiser
from subquad.lra.report import examples, results
from subquad.lra.run import Run
from subquad.lra.state import TrainState
from subquad.lra.step import train_step

# Steps between two looks at the losses. Each look waits for the device.
LOSS_EVERY = 10


def train(
    run: Run,
    *,
    out: str | os.PathLike,
    data_dir: str | os.PathLike | None = None,
    task: tasks.Task | None = None,
    splits: Mapping[str, Iterable[dict]] | None = None,
    model: nnx.Module | None = None,
    resume: bool = False,
    quiet: bool = False,
    devices: int | None = None,
    shard: parallel.Shard = "batch",
    tensorboard: bool = False,
    checkpoint_minutes: float = 10,
    test_lengths: Sequence[int] = (),
    show: Callable[[str], None] | None = None,
) -> results.Result:
    """Trains a run and tests it.

    The run is validated every `run.evaluate_every` steps, and saved then and every `checkpoint_minutes`. The test split is
    read once, at the end, with the parameters that were best on validation and with the last ones. A run that had
    learned and falls back to chance says so at once and goes on; `collapsed_step` of its result keeps it, see `collapse`.

    On several devices each takes its rows of every batch, and the sum of their gradients is applied: the same numbers as on
    one, but for rounding, the draws of dropout, and batch norms, whose statistics are of a part. A checkpoint resumes on any
    number of devices. In several processes (`parallel.start`) each calls this with the same arguments, `out` is a folder that
    all of them see, and process 0 writes.

    Args:
        run: see `plan.plan`.
        out: the run's folder; made if it is not there.
        data_dir: where data sets are; None takes TFDS's own.
        task: the task that the run was planned for, where it is none of `tasks.TASKS`.
        splits: the examples of "train", "validation" and "test" as `data.encodings` makes them; None: the task's data set.
        model: what training begins from, of the run's layers and sizes; it stays as it is. None: `models.build` draws it. A
            checkpoint that is resumed outranks it.
        resume: go on from the checkpoint in `out`, or return the result that is there, tested further at those `test_lengths`
            that it lacks; with neither, start.
        quiet: no progress on stderr.
        devices: how many devices share a batch; None: one, or in several processes all of them.
        shard: "zero" also cuts parameters, moments and averages among the devices, which then gather parameters for a step.
        tensorboard: also log to `out/tensorboard`, by tensorboardX.
        checkpoint_minutes: between checkpoints, at the next tenth step; 0: at every one, inf: only at validations. They
            change no number.
        test_lengths: also test on examples of these lengths, of a task that draws them.
        show: is given the progress in words, instead of stderr.
    Returns: a `Result`; status is "failed: ..." where the loss stopped being a number. Memory is that of one device.
    Raises:
        ValueError: unknown task, another than the run's; a model of other variables; a batch larger than the data, or a run
            larger than the memory; devices that do not divide the batch; "zero" on one device; a negative checkpoint_minutes;
            a length that the task cannot be tested at.
        RunError: `out` cannot be written, is full, or holds another run; a run in it and not `resume`; another process that
            trains in it; a file in it that cannot be read.
        Interrupted: Ctrl-C or SIGTERM; the checkpoint of that step is saved.
        DatasetError: the data set is damaged or cannot be written.
    """
    task = task or tasks.find_task(run.task, run.config)
    if (task.name, task.config) != (run.task, run.config):
        refuse("train: task", f"be the run's, {run.task}/{run.config}", f"{task.name}/{task.config}",
               "Plan the run with the same record: plan(task=task).")
    if splits is not None:
        splits = tasks.check_splits(task, splits)
        if run.carry_state:
            tasks.check_goes_on(splits)
    words = dict(devices=devices, shard=shard, checkpoint_minutes=checkpoint_minutes, test_lengths=test_lengths)
    mesh = check(run, task, splits, **words)
    first = None if model is None else models.split_as(run, task, model)
    # Parameters, two moments, their average and the best parameters, 4 bytes each, in the old checkpoint and the new.
    needed = 2 * 4 * (4 + (run.ema is not None)) * models.count_parameters(run, task)
    with contextlib.ExitStack() as locks:

        def enter_folder():
            folder = open_folder(out, needed)
            locks.enter_context(occupied(folder))
            return str(folder), begin_or_resume(folder, dataclasses.asdict(run), resume, results.Result)

        folder, finished = parallel.broadcast_from_first(enter_folder)
        result = results.Result(**finished) if finished else None
        lacking = [] if result is None else untested(result, test_lengths)
        if result and not lacking:
            return result
        folder, quiet = pathlib.Path(folder), quiet or not parallel.is_first()
        source = f"{task.dataset} as passed to train"
        if splits is None:
            with parallel.first_process_first():
                splits, source = store.load(task.dataset, data_dir)
        tensorboard = tensorboard and parallel.is_first()
        job = Job(
            run, task, splits, source, folder, mesh, shard, quiet, tensorboard, 60 * checkpoint_minutes, test_lengths, show,
            first,
        )  # fmt: skip
        state = job.state()
        if result:
            return job.test_further(state, result, lacking)
        with job.started(state):
            failure = fit(job, state)
        # From here on a signal raises at once. What was asked before ends the run ahead of its test; a failure has none.
        if not failure:
            job.end_if_stopped(state)
        result = job.finish(state, failure)
        job.end_if_stopped(state)
        return result


def check(
    run: Run, task: tasks.Task, splits: Mapping[str, Sequence[dict]] | None = None, *, devices: int | None,
    shard: parallel.Shard, checkpoint_minutes: float, test_lengths: Sequence[int],
) -> Mesh | None:  # fmt: skip
    """Refuses what `train` cannot do, before anything is written. Returns: the mesh of several devices.

    Raises: ValueError.
    """
    if not checkpoint_minutes >= 0:
        raise ValueError(f"train: checkpoint_minutes must be >= 0, got {checkpoint_minutes}. Leave it out for 10.")
    tasks.check_lengths(task, test_lengths)
    mesh = parallel.make_mesh(devices, run.batch_size, run.accumulate)
    parallel.check_shard(shard, mesh)
    sizes.check(run, task, splits, devices=1 if mesh is None else mesh.size, sharded=shard == "zero")
    return mesh


def untested(result: results.Result, lengths: Sequence[int]) -> list[int]:
    """Those of some lengths that a result has no score at; none of a run that failed."""
    known = json.loads(result.scores_by_length or "{}")
    return [length for length in lengths if str(length) not in known] if result.status == "ok" else []


def fit(job: "Job", state: TrainState) -> str | None:
    """The loop: steps until the next event, then what the event asks for. Returns: why it failed, or None."""
    run = job.run
    while state.step < run.steps and not has_stalled(run, state):
        losses = job.run_steps(state, next_event(run, state.step))
        if not all(map(math.isfinite, losses)):
            return f"failed: non-finite loss by step {state.step}"
        state.losses += losses
        if losses and (state.step % run.evaluate_every == 0 or state.step == run.steps):
            job.validate(state)
            job.save(state)
        job.show(state, losses)
        if state.step < run.steps:
            job.save_if_due(state)
    return None


def has_stalled(run: Run, state: TrainState) -> bool:
    """Whether run.early_stopping ends the run: so many validations were no better than the best before them."""
    if run.early_stopping is None:
        return False
    best = state.best_validation[0] or 0
    return sum(step > best for step, *_ in state.validations) >= run.early_stopping


def next_event(run: Run, step: int) -> int:
    """The step of the next look at the losses, validation or end."""
    return min(run.steps, step + LOSS_EVERY - step % LOSS_EVERY, step + run.evaluate_every - step % run.evaluate_every)


@dataclass
class Job:
    """What a run works with: data, model, programs, devices, folder. What changes from step to step is in its `TrainState`.

    Attributes:
        source: of the splits, in words.
        folder: the run's, which is this process's alone.
        checkpoint_seconds: between checkpoints.
        test_lengths: that the test is repeated at.
        first: `models.split` of the model that training begins from; None: of what `models.build` draws.
    """

    run: Run
    task: tasks.Task
    splits: Mapping[str, Sequence[dict]]
    source: str
    folder: pathlib.Path
    mesh: Mesh | None
    shard: parallel.Shard
    quiet: bool
    tensorboard: bool
    checkpoint_seconds: float
    test_lengths: Sequence[int]
    show_progress: Callable[[str], None] | None = None
    first: tuple[Any, nnx.State, nnx.State, nnx.State] | None = None

    def __post_init__(self):
        run = self.run
        self.objective, self.optimiser = OBJECTIVES[self.task.kind], make_optimiser(run)
        sizes = dict(batch_size=run.batch_size, length=self.task.length)
        self.batches = pipeline.training_batches(self.splits["train"], seed=run.seed, streams=run.carry_state, **sizes)
        self.evaluation = Evaluation(run, self.task, self.objective, self.splits, self.quiet)
        self.checkpoints = Checkpoints(self.folder / "checkpoint")

    def state(self) -> TrainState:
        """The state of the checkpoint, or where there is none the one before the first step."""
        self.graph, parameters, statistics, fixed = self.first or models.split(models.build(self.run, self.task))
        carried = models.empty_carried(self.run, self.graph, parameters, statistics, fixed)
        learner = initial_state(self.run, self.optimiser, parameters, statistics, carried)
        learner = parallel.place(learner, self.mesh, self.shard)
        state = TrainState(learner, best=evaluated(self.run, learner), fixed=parallel.place(fixed, self.mesh))
        if self.checkpoints.latest() is not None:
            record = self.checkpoints.record()
            state.restore(self.checkpoints.arrays(state.arrays()), record)
            self.batches.set_state(state.data)
        return state

    @contextlib.contextmanager
    def started(self, state: TrainState):
        """Compiles the programs; inside, progress is shown and a signal asks the run to stop."""
        with (
            progress.Progress(
                self.run.layer, self.run.steps, state.step, quiet=self.quiet, show=self.show_progress
            ) as self.progress,
            interrupts.stop_request(self.progress.say) as self.stop,
            progress.tensorboard(self.folder / "tensorboard", state.step, self.tensorboard) as self.number,
        ):
            began = time.perf_counter()
            with self.progress.work("compiling"):
                self._compile(state)
            self.compile_seconds, self.saved_at = time.perf_counter() - began, time.monotonic()
            yield

    def _compile(self, state: TrainState) -> None:
        first = next(iter(self.evaluation.validation))
        example = {name: array for name, array in first.items() if name != "weights"}
        step = functools.partial(train_step, self.run, self.objective, self.graph, self.optimiser)
        try:
            self.flops = measure.flops(step, state.learner, state.fixed, example)
        except ValueError as error:  # a kernel that no jaxpr shows: the run is as good without this number
            self.flops = None
            self.progress.say(f"FLOPs per step are left blank: {error}")
        arguments = (state.learner, state.fixed, parallel.shard_batch(example, self.mesh))
        compiled = functools.partial(parallel.compile, mesh=self.mesh, shard=self.shard)
        self.update = compiled(functools.partial(step, mesh=self.mesh), arguments, donate_argnums=0)
        # A copy, because it outlives the state, whose buffers the next step reuses.
        averaged = lambda learner: jax.tree.map(jnp.copy, evaluated(self.run, learner))
        self.averaged = compiled(averaged, (state.learner,))
        self.evaluation.build(self.graph, state.fixed, self.mesh)
        if state.best_validation[0] is None:
            state.best = self.averaged(state.learner)
        self.evaluation.score(state.best, [first])

    def run_steps(self, state: TrainState, until: int) -> list[float]:
        """Trains until a step, or until a signal. Returns: the losses."""
        # Several processes stop at the same step: the event at which they agree on it.
        stopping: Callable[[], bool] = self.stop.is_set if jax.process_count() == 1 else lambda: False
        losses, before, began = [], state.step, time.perf_counter()
        while state.step < until and not stopping():
            batch = parallel.shard_batch(next(self.batches), self.mesh)
            state.learner, loss = self.update(state.learner, state.fixed, batch)
            losses.append(loss)
            state.step += 1
        losses = [float(loss) for loss in losses]  # waits for the device
        state.seconds += time.perf_counter() - began
        state.timed_steps += state.step - before
        return losses

    def validate(self, state: TrainState) -> None:
        """Scores the validation split, and keeps the parameters where they are the best so far."""
        now, step = self.averaged(state.learner), state.step
        batches = self.evaluation.validation
        score, loss = self.evaluation.score(now, self.progress.work("validation", len(batches)).over(batches))[:2]
        state.validations.append([step, score, loss])
        self.number(f"validation/{self.objective.column}", score, step)
        self.number("validation/loss", loss, step)
        self.number("train/learning_rate", learning_rate(self.run, state.learner), step)
        if self.evaluation.collapsed_step(state.validations) == step:
            said = f"validation {self.objective.describe(score)} at step {step} is chance, after having been above"
            self.progress.say(f"{self.run.layer}: collapsed: {said}.")
        rank = self.objective.rank(score, loss)
        if state.best_validation[0] is None or rank > state.best_validation[1:]:
            state.best_validation, state.best = [step, *rank], now
        state.learner = parallel.place(after_validation(self.run, state.learner, loss), self.mesh, self.shard)

    def show(self, state: TrainState, losses: list[float]) -> None:
        """Logs the last losses, and shows the last one, the speed and the last validation."""
        for step, loss in enumerate(losses, state.step - len(losses) + 1):
            self.number("train/loss", loss, step)
        if losses:
            note = f"validation {self.objective.describe(state.validations[-1][1])}" if state.validations else ""
            self.progress.update(state.step, losses[-1], state.rate, note)

    def save(self, state: TrainState) -> None:
        """Saves a checkpoint and the history beside it."""
        state.data = self.batches.get_state()
        self.checkpoints.save(state.step, state.arrays(), state.record())
        self._write_history(state)
        self.saved_at = time.monotonic()

    def save_if_due(self, state: TrainState) -> None:
        """Saves where the clock or a signal of any process asks for it. Raises: Interrupted: a signal did."""
        stopped = parallel.any_process(self.stop.is_set())
        if parallel.any_process(time.monotonic() - self.saved_at >= self.checkpoint_seconds) or stopped:
            self.save(state)
        if stopped:
            self.end_if_stopped(state)

    def end_if_stopped(self, state: TrainState) -> None:
        """Raises: Interrupted: a signal asked any process to stop, and what there is to save is saved."""
        if parallel.any_process(self.stop.is_set()):
            number = signal.SIGTERM if parallel.any_process(self.stop.number == signal.SIGTERM) else signal.SIGINT
            where = f"step {state.step} of {self.run.steps}; saved in {self.folder}"
            raise Interrupted(f"Stopped at {where}. Go on with --resume.", number)

    def finish(self, state: TrainState, failure: str | None) -> results.Result:
        """Tests what was trained, and writes the result."""
        scores, rows = {"accuracy": None, "accuracy_best": None, "accuracy_last": None}, ()
        if not failure:
            last = self.averaged(state.learner)
            best = last if state.best_validation[0] == state.step else state.best
            found, rows = self.evaluation.test(best, last, self.test_lengths)
            scores |= found
        self.checkpoints.close()
        result = results.Result(status=failure or "ok", **scores, **self._columns(state))
        if parallel.is_first():
            self._write_history(state)
            if len(rows):
                examples.write(self.folder / examples.FILE, self.task, self.splits["test"], rows)
            write_json(self.folder / "result.json", dataclasses.asdict(result))
        return result

    def test_further(self, state: TrainState, result: results.Result, lengths: Sequence[int]) -> results.Result:
        """Tests the checkpoint of a finished run at further lengths, and writes the result anew."""
        if self.checkpoints.latest() is None:
            refused = f"out: folder {self.folder} must hold a checkpoint to be tested at length {lengths[0]}, got none."
            raise RunError(f"{refused} Leave that length out, or train anew in another folder.")
        self.evaluation.build(self.graph, state.fixed, self.mesh)
        selected = state.best if self.run.selection == "best" else evaluated(self.run, state.learner)
        scores = json.loads(result.scores_by_length or "{}") | self.evaluation.at_lengths(selected, lengths)
        self.checkpoints.close()
        result = dataclasses.replace(result, scores_by_length=json.dumps(scores))
        if parallel.is_first():
            write_json(self.folder / "result.json", dataclasses.asdict(result))
        return result

    def _write_history(self, state: TrainState) -> None:
        if parallel.is_first():
            write_history(self.folder / "history.csv", state.losses, state.validations, self.objective.column)

    def _columns(self, state: TrainState) -> dict[str, Any]:
        """What a result says beside its scores."""
        run, task, memory = self.run, self.task, measure.memory_of(self.update)
        with progress.Work(f"{task.name}/{task.config}: floors", quiet=self.quiet):
            floors = {"network": results.network_floor(task.name, task.config), **task.floors(self.splits)}
        is_accuracy = self.objective.column == "accuracy" and state.validations
        tail = state.losses[-max(1, run.steps // 10) :]
        return results.columns_of_run(run, task, 1 if self.mesh is None else self.mesh.size) | dict(
            **{f"floor_{name}": floors.get(name) for name in results.FLOORS}, best_step=state.best_validation[0],
            validation_accuracy_best=state.best_validation[1] if is_accuracy else None,
            validation_accuracy_last=state.validations[-1][1] if is_accuracy else None,
            train_loss_last=float(np.mean(tail)) if tail else None,
            collapsed_step=self.evaluation.collapsed_step(state.validations), test_examples=len(self.splits["test"]),
            parameters=sum(leaf.size for leaf in jax.tree.leaves(state.learner["parameters"])),
            steps_per_second=state.rate or None,
            stopped_step=state.step if has_stalled(run, state) and state.step < run.steps else None,
            train_seconds=state.seconds, compile_seconds=self.compile_seconds, flops_per_step=self.flops,
            memory_temporary_bytes=memory.temporary, memory_peak_bytes=memory.peak,
            data=f"{self.source}, batches by grain",
        )  # fmt: skip
