"""Train a run: the only loop.

`train(run, out=...)` leaves in `out`: `checkpoint/` (the training state, the best parameters, the data's position),
`run.json` (the resolved configuration), `history.csv` (losses and validations so far), and at the end `result.json`.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import signal
import threading
import time
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from subquad.lra import collapse, models, parallel, sizes, tasks
from subquad.lra.bench import measure
from subquad.lra.checkpoints import Checkpoints, Interrupted, claim, occupied, open_folder, write_history, write_json
from subquad.lra.data import pipeline, store
from subquad.lra.objectives import OBJECTIVES, Objective
from subquad.lra.optim import after_validation, apply_gradient, evaluated, initial_state, learning_rate, make_optimiser
from subquad.lra.progress import Board, Progress, Stopwatch, Work, over
from subquad.lra.report import results
from subquad.lra.run import Run

# Steps between looks at the loss. Each look waits for the device.
LOOK = 10
# Values of a run that are columns of its result.
SHARED = ("layer", "task", "config", "recipe", "protocol", "seed", "selection", "steps", "batch_size")


def train(
    run: Run,
    *,
    out: str | os.PathLike,
    data_dir: str | os.PathLike | None = None,
    task: tasks.Task | None = None,
    splits: Mapping[str, Iterable[dict]] | None = None,
    resume: bool = False,
    quiet: bool = False,
    devices: int | None = None,
    shard: parallel.Shard = "batch",
    tensorboard: bool = False,
    checkpoint_minutes: float = 10,
) -> results.Result:
    """Trains a run and tests it.

    The run is validated every `run.evaluate_every` steps, and saved then and every `checkpoint_minutes`. The test split is
    read once, at the end, with the parameters that were best on validation and with the last ones. A run that had
    learned and falls back to chance says so at once and goes on; `collapsed_step` of its result keeps it, see `collapse`.

    On several devices each takes its rows of every batch, and the sum of their gradients is applied: the same numbers as on
    one, but for rounding and for the draws of dropout. A checkpoint resumes on any number of devices. In several processes
    (`parallel.start`) each calls this with the same arguments, `out` is a folder that all of them see, and process 0 writes.

    Args:
        run: see `plan.plan`.
        out: the run's folder; made if it is not there.
        data_dir: where data sets are; None takes TFDS's own.
        task: the task that the run was planned for, where it is none of `tasks.TASKS`.
        splits: the examples of "train", "validation" and "test" as `data.encodings` makes them; None: the task's data set.
        resume: go on from the checkpoint in `out`, or return the result that is there; with neither, start.
        quiet: no progress on stderr.
        devices: how many devices share a batch; None: one, or in several processes all of them.
        shard: "zero" also cuts parameters, moments and averages among the devices, which then gather parameters for a step.
        tensorboard: also log to `out/tensorboard`, by tensorboardX.
        checkpoint_minutes: between checkpoints, at the next tenth step; 0: at every one, inf: only at validations. They
            change no number.
    Returns: a `Result`; status is "failed: ..." where the loss stopped being a number. Memory is that of one device.
    Raises:
        ValueError: unknown task, another than the run's; a batch larger than the data, or a run larger than the memory;
            devices that do not divide the batch; "zero" on one device; tensorboard without tensorboardX; a negative
            checkpoint_minutes.
        RunError: `out` cannot be written, is full, or holds another run; a run in it and not `resume`; another process that
            trains in it; a file in it that cannot be read.
        Interrupted: Ctrl-C or SIGTERM; the checkpoint of that step is saved.
        DatasetError: the data set is damaged or cannot be written.
    """
    task = tasks.of(run.task, run.config, task)
    if splits is not None:
        splits = tasks.check_splits(task, splits)
    if not checkpoint_minutes >= 0:
        raise ValueError(f"train: checkpoint_minutes must be >= 0, got {checkpoint_minutes}. Leave it out for 10.")
    mesh = parallel.make_mesh(devices, run.batch_size, run.accumulate)
    parallel.check_shard(shard, mesh)
    devices, sharded = 1 if mesh is None else mesh.size, shard == "zero"
    sizes.check(run, task, splits, devices=devices, sharded=sharded)
    parameter_count = models.count_parameters(run, task)
    # Parameters, two moments, their average and the best parameters, 4 bytes each, in the old checkpoint and the new.
    needed = 2 * 4 * (4 + (run.ema is not None)) * parameter_count
    with contextlib.ExitStack() as held:

        def enter():
            folder = open_folder(out, needed)
            held.enter_context(occupied(folder))
            return str(folder), claim(folder, dataclasses.asdict(run), resume, results.Result)

        folder, finished = parallel.told(enter)
        if finished:
            return results.Result(**finished)
        return _train(
            run, task, splits, pathlib.Path(folder), parameter_count, data_dir=data_dir, mesh=mesh, shard=shard, quiet=quiet,
            tensorboard=tensorboard, checkpoint_minutes=checkpoint_minutes,
        )  # fmt: skip


def _train(
    run, task, splits, out, parameter_count, *, data_dir, mesh, shard, quiet, tensorboard, checkpoint_minutes
) -> results.Result:
    """`train` in a folder that is this process's."""
    objective = OBJECTIVES[task.kind]
    board = Board(out / "tensorboard", tensorboard and parallel.is_first())
    if splits is None:
        with parallel.first_alone():
            splits, source = store.load(task.dataset, data_dir)
    else:
        source = f"{task.dataset} as passed to train"
    batches = pipeline.training_batches(splits["train"], batch_size=run.batch_size, length=task.length, seed=run.seed)
    held_out = pipeline.evaluation_batches(splits["validation"], batch_size=run.batch_size, length=task.length)
    quiet = quiet or not parallel.is_first()
    floor, spread = collapse.chance(over(held_out, f"{run.layer}: floor of validation", quiet=quiet), objective.column)

    graph, parameters, fixed = nnx.split(models.build(run, task), nnx.Param, ...)
    optimiser = make_optimiser(run)
    state = parallel.place(initial_state(run, optimiser, parameters), mesh, shard)
    best, fixed, progress = state["parameters"], parallel.place(fixed, mesh), _fresh_progress(run)
    checkpoints = Checkpoints(out / "checkpoint")
    if checkpoints.latest() is not None:
        progress = checkpoints.progress()
        saved = checkpoints.state({"state": state, "best": best, "fixed": fixed})
        state, best, fixed = saved["state"], saved["best"], saved["fixed"]
        batches.set_state(progress["data"])
    step, watch = progress["step"], Stopwatch(progress["seconds"], progress["timed_steps"])

    with Progress(run.layer, run.steps, step, quiet=quiet) as shown, _stop_on_signal(shown) as stop, board.open(step):
        began = time.perf_counter()
        with shown.during("compiling"):
            update = functools.partial(train_step, run, objective, graph, optimiser)
            first = next(iter(held_out))
            example = {name: array for name, array in first.items() if name != "weights"}
            flops = _flops(shown, update, state, fixed, example)
            arguments = (state, fixed, parallel.feed(example, mesh))
            update = parallel.compile(functools.partial(update, mesh=mesh), arguments, mesh, shard, donate_argnums=0)
            # A copy, because it outlives the state, whose buffers the next step reuses.
            averaged = lambda state: jax.tree.map(jnp.copy, evaluated(run, state))
            averaged = parallel.compile(averaged, (state,), mesh, shard)
            scoring = jax.jit(functools.partial(eval_step, objective, graph, mesh=mesh))
            evaluate = functools.partial(_evaluate, scoring, mesh, fixed)
            best = averaged(state) if progress["best"][0] is None else best
            evaluate(best, [first])
            del first, example, arguments  # the batch is not held while the run trains
        compile_seconds = time.perf_counter() - began

        saved_at = time.monotonic()

        def save():
            nonlocal saved_at
            progress.update(step=step, seconds=watch.seconds, timed_steps=watch.steps, data=batches.get_state())
            checkpoints.save(step, {"state": state, "best": best, "fixed": fixed}, progress)
            if parallel.is_first():
                write_history(out / "history.csv", progress, objective.column)
            saved_at = time.monotonic()

        failure, note = None, ""
        # Processes stop and save at the same step: those that agree on it, at the next look.
        stopping = stop.is_set if jax.process_count() == 1 else lambda: False
        while step < run.steps and not failure:
            # As far as the next look at the loss, or the next validation.
            until = min(run.steps, step + LOOK - step % LOOK, step + run.evaluate_every - step % run.evaluate_every)
            losses, before = [], step
            watch.start()
            while step < until and not stopping():
                state, loss = update(state, fixed, parallel.feed(next(batches), mesh))
                losses.append(loss)
                step += 1
            losses = [float(loss) for loss in losses]  # waits for the device
            watch.stop(step - before)
            if not all(map(math.isfinite, losses)):
                failure = f"failed: non-finite loss by step {step}"
                break
            progress["losses"] += losses
            board.add(before + 1, "train/loss", *losses)
            if step == until and (step % run.evaluate_every == 0 or step == run.steps):
                now = averaged(state)
                score, loss = evaluate(now, shown.over(held_out, "validation"))
                progress["validation"].append([step, score, loss])
                board.add(step, f"validation/{objective.column}", score)
                board.add(step, "validation/loss", loss)
                if tensorboard:
                    board.add(step, "train/learning_rate", learning_rate(run, state))
                note = f"validation {objective.describe(score)}"
                collapsed = collapse.collapsed_step(progress["validation"], floor, spread, objective.sign)
                if collapsed == step:
                    shown.say(f"{run.layer}: collapsed: {note} at step {step} is chance, after having been above.")
                rank = objective.rank(score, loss)
                if progress["best"][0] is None or rank > progress["best"][1:]:
                    progress["best"], best = [step, *rank], now
                state = parallel.place(after_validation(run, state, loss), mesh, shard)
                save()
            if losses:
                shown.update(step, losses[-1], watch.rate, note)
            if step == run.steps:
                break
            stopped = parallel.agree(stop.is_set())
            if parallel.agree(time.monotonic() - saved_at >= 60 * checkpoint_minutes) or stopped:
                save()
            if stopped:
                number = signal.SIGTERM if parallel.agree(stop.number == signal.SIGTERM) else signal.SIGINT
                words = f"Stopped at step {step} of {run.steps}; saved in {out}. Go on with --resume."
                raise Interrupted(words, number)

    scores = {"accuracy": None, "accuracy_best": None, "accuracy_last": None}
    if not failure:

        def scored(parameters, split, count=None):
            some = dict(batch_size=run.batch_size, length=task.length, count=count)
            return evaluate(parameters, over(pipeline.evaluation_batches(splits[split], **some), split, quiet=quiet))[0]

        now = averaged(state)
        last = scored(now, "test")
        same = progress["best"][0] == run.steps
        found = {"best": last if same else scored(best, "test"), "last": last}
        seen = scored(best if run.selection == "best" else now, "train", len(splits["test"]))
        scores |= objective.columns(selected=found[run.selection], train=seen, **found)
    checkpoints.close()
    memory = measure.memory_of(update)
    result = results.Result(
        status=failure or "ok",
        **scores,
        **_told_by_the_run(run),
        **_told_by_progress(run, objective, progress),
        **_floors(task, splits, quiet),
        split="test",
        test_examples=len(splits["test"]),
        parameters=parameter_count,
        steps_per_second=watch.rate,
        train_seconds=watch.seconds,
        compile_seconds=compile_seconds,
        flops_per_step=flops,
        memory_temporary_bytes=memory.temporary,
        memory_peak_bytes=memory.peak,
        data=f"{source}, batches by {batches.kind}",
        source=task.source,
        finished_utc=results.now(),
        collapsed_step=collapse.collapsed_step(progress["validation"], floor, spread, objective.sign),
        **{**results.environment(), "hardware": parallel.hardware(results.environment()["hardware"], mesh)},
    )
    if parallel.is_first():
        write_history(out / "history.csv", progress, objective.column)
        write_json(out / "result.json", dataclasses.asdict(result))
    return result


def _told_by_the_run(run: Run) -> dict:
    """Columns of the result that the run decides."""
    configuration = json.dumps(dataclasses.asdict(run), sort_keys=True)
    return dict(
        **{name: getattr(run, name) for name in SHARED},
        configuration=configuration,
        configuration_hash=results.configuration_hash(configuration),
    )


def _told_by_progress(run: Run, objective: Objective, progress: dict) -> dict:
    """Columns of the result that the losses and validations decide."""
    judged = objective.column == "accuracy"
    tail = progress["losses"][-max(1, run.steps // 10) :]
    return dict(
        best_step=progress["best"][0],
        validation_accuracy_best=progress["best"][1] if judged and progress["best"][0] is not None else None,
        validation_accuracy_last=progress["validation"][-1][1] if judged and progress["validation"] else None,
        train_loss_last=float(np.mean(tail)) if tail else None,
    )


def _floors(task: tasks.Task, splits: Mapping, quiet: bool) -> dict:
    """Columns of the result that simple rules reach; None for those that the task has not."""
    with Work(f"{task.name}/{task.config}: floors", quiet=quiet):
        floors = {"network": results.network_floor(task.name, task.config), **task.floors(splits)}
    return {name: floors.get(name.removeprefix("floor_")) for name in results.FIELDS if name.startswith("floor_")}


def train_step(run: Run, objective: Objective, graph, optimiser, state, fixed, batch, *, mesh=None):
    """One step of the optimiser: (state, fixed, batch) -> (state, loss). Its inputs' buffers may be reused."""
    key = jax.random.fold_in(jax.random.key(run.seed), state["step"])
    total = parallel.over_batch(functools.partial(batch_gradient, run, objective, graph), mesh)
    (value, count), gradient = total(state["parameters"], fixed, key, batch)
    # Sums until here, because parts of a batch may have different numbers of targets.
    value, gradient = jax.tree.map(lambda a: a / jnp.maximum(count, 1), (value, gradient))
    return apply_gradient(run, optimiser, state, gradient), value


def batch_gradient(run: Run, objective: Objective, graph, parameters, fixed, key, batch):
    """((sum of losses, number of targets), gradient of the sum) over a batch, in run.accumulate parts."""

    def loss(parameters, part, key):
        return objective.loss(nnx.merge(graph, parameters, fixed), part, rngs=nnx.Rngs(dropout=key))

    def accumulate(total, part):
        part, index = part
        return jax.tree.map(jnp.add, total, one(part, jax.random.fold_in(key, index))), None

    one = lambda part, key: jax.value_and_grad(loss, has_aux=True)(parameters, part, key)
    if run.accumulate == 1:
        return one(batch, key)
    parts = jax.tree.map(lambda a: a.reshape(run.accumulate, -1, *a.shape[1:]), batch)
    zeros = ((jnp.zeros(()), jnp.zeros(())), jax.tree.map(jnp.zeros_like, parameters))
    return jax.lax.scan(accumulate, zeros, (parts, jnp.arange(run.accumulate)))[0]


def eval_step(objective: Objective, graph, parameters, fixed, batch, *, mesh=None):
    """Sums over a batch's real targets: [scores, losses, targets]."""
    sums = lambda parameters, fixed, _, batch: objective.sums(nnx.merge(graph, parameters, fixed), batch)
    return parallel.over_batch(sums, mesh)(parameters, fixed, None, batch)


def _evaluate(step, mesh, fixed, parameters, batches) -> tuple[float, float]:
    """(score, mean loss) over batches."""
    sums = (step(parameters, fixed, parallel.feed(batch, mesh)) for batch in batches)
    score, loss, count = sum(np.asarray(one, np.float64) for one in sums)
    return float(score / count), float(loss / count)


def _flops(shown: Progress, *call) -> int | None:
    try:
        return measure.flops(*call)
    except ValueError as error:  # a kernel that no jaxpr shows: the run is as good without this number
        shown.say(f"FLOPs per step are left blank: {error}")
        return None


def _fresh_progress(run: Run) -> dict:
    """The plain data of a checkpoint; `best` is [step, *the objective's rank of its validation]."""
    return {"step": 0, "seconds": 0.0, "timed_steps": 0, "losses": [], "validation": [], "best": [None]}


class _Stop(threading.Event):
    """Set by a signal, whose number it keeps."""

    number = signal.SIGINT


@contextlib.contextmanager
def _stop_on_signal(shown: Progress):
    """An event that Ctrl-C and SIGTERM set.

    A second Ctrl-C stops at once, as Python does. A second SIGTERM changes nothing: schedulers send several, and then SIGKILL.
    """
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handler(number, frame):
        if number == signal.SIGINT:
            signal.signal(number, before[number])
        if not stop.is_set():
            stop.number = number
            stop.set()
            shown.say("Stopping after this step, to save the checkpoint; Ctrl-C again stops without.")

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, usual in before.items():
            signal.signal(number, signal.SIG_DFL if usual is None else usual)  # None: it was not of Python
