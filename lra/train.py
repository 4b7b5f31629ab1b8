"""Train a run: the only loop.

`train(run, out=...)` leaves in `out`: `checkpoint/` (parameters, optimiser, best parameters, data position), `run.json`
(the resolved configuration), and at the end `result.json` and `history.csv`.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import signal
import threading
import time
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from subquad.lra import measure, models, results, tasks
from subquad.lra.checkpoints import Checkpoints, Interrupted, claim, open_folder, write_history, write_json
from subquad.lra.data import pipeline, store
from subquad.lra.objectives import OBJECTIVES, Objective
from subquad.lra.progress import Progress, Stopwatch
from subquad.lra.recipes import Run

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
) -> results.Result:
    """Trains a run and tests it.

    The run is validated and saved every `run.evaluate_every` steps. The test split is read once, at the end, with the
    parameters that were best on validation and with the last ones.

    Args:
        run: see `recipes.plan`.
        out: the run's folder; made if it is not there.
        data_dir: where data sets are; None takes TFDS's own.
        task: the task that the run was planned for, where it is none of `tasks.TASKS`.
        splits: the examples of "train", "validation" and "test" as `data.encodings` makes them; None: the task's data set.
        resume: go on from the checkpoint in `out`, or return the result that is there; with neither, start.
        quiet: no progress on stderr.
    Returns: a `Result`; status is "failed: ..." where the loss stopped being a number.
    Raises:
        ValueError: unknown task, another than the run's, or a batch larger than the data.
        RunError: `out` cannot be written, is full, or holds another run; a run in it and not `resume`.
        Interrupted: Ctrl-C; the checkpoint of that step is saved.
        DatasetError: the data set is damaged or cannot be written.
    """
    task = tasks.of(run.task, run.config, task)
    objective = OBJECTIVES[task.kind]
    if splits is not None:
        splits = tasks.check_splits(task, splits)
    parameter_count = models.count_parameters(run, task)
    # Parameters, two moments and the best parameters, 4 bytes each, in the old checkpoint and the new.
    out = open_folder(out, needed_bytes=2 * 4 * 4 * parameter_count)
    finished = claim(out, dataclasses.asdict(run), resume)
    if finished:
        return results.Result(**finished)
    splits, source = store.load(task.dataset, data_dir) if splits is None else (splits, f"{task.dataset} as passed to train")
    batches = pipeline.training_batches(splits["train"], batch_size=run.batch_size, length=task.length, seed=run.seed)
    held_out = list(pipeline.evaluation_batches(splits["validation"], batch_size=run.batch_size, length=task.length))

    graph, parameters, fixed = nnx.split(models.build(run, task), nnx.Param, ...)
    optimiser = make_optimiser(run)
    state = {"parameters": parameters, "optimiser": optimiser.init(parameters), "step": jnp.zeros((), jnp.int32)}
    best, progress = parameters, _fresh_progress(run)
    checkpoints = Checkpoints(out / "checkpoint")
    if checkpoints.latest() is not None:
        progress = checkpoints.progress()
        saved = checkpoints.state({"state": state, "best": best, "fixed": fixed})
        state, best, fixed = saved["state"], saved["best"], saved["fixed"]
        batches.set_state(progress["data"])
    step, watch = progress["step"], Stopwatch(progress["seconds"], progress["timed_steps"])

    with Progress(run.layer, run.steps, step, quiet=quiet) as shown, _stop_on_interrupt(shown) as stop:
        began = time.perf_counter()
        update = functools.partial(train_step, run, objective, graph, optimiser)
        example = {name: array for name, array in held_out[0].items() if name != "weights"}
        flops = _flops(shown, update, state, fixed, example)
        compiled = jax.jit(update, donate_argnums=0).lower(state, fixed, example).compile()
        evaluate = functools.partial(_evaluate, jax.jit(functools.partial(eval_step, objective, graph)), fixed)
        evaluate(state["parameters"], held_out[:1])
        compile_seconds = time.perf_counter() - began

        def save():
            progress.update(step=step, seconds=watch.seconds, timed_steps=watch.steps, data=batches.get_state())
            checkpoints.save(step, {"state": state, "best": best, "fixed": fixed}, progress)

        # The best parameters outlive the donation of the buffers that they were read from.
        best, failure, note = jax.tree.map(jnp.copy, best), None, ""
        while step < run.steps and not failure:
            # As far as the next look at the loss, or the next validation.
            until = min(run.steps, step + LOOK - step % LOOK, step + run.evaluate_every - step % run.evaluate_every)
            losses, before = [], step
            watch.start()
            while step < until and not stop.is_set():
                state, loss = compiled(state, fixed, next(batches))
                losses.append(loss)
                step += 1
            losses = [float(loss) for loss in losses]  # waits for the device
            watch.stop(step - before)
            if not all(map(math.isfinite, losses)):
                failure = f"failed: non-finite loss by step {step}"
                break
            progress["losses"] += losses
            if step == until and (step % run.evaluate_every == 0 or step == run.steps):
                score, loss = evaluate(state["parameters"], held_out)
                progress["validation"].append([step, score, loss])
                note = f"validation {objective.describe(score)}"
                rank = objective.rank(score, loss)
                if progress["best"][0] is None or rank > progress["best"][1:]:
                    progress["best"], best = [step, *rank], jax.tree.map(jnp.copy, state["parameters"])
                save()
            if losses:
                shown.update(step, losses[-1], watch.rate, note)
            if stop.is_set() and step < run.steps:
                save()
                raise Interrupted(f"Stopped at step {step} of {run.steps}; saved in {out}. Go on with --resume.")

    scores = {"accuracy": None, "accuracy_best": None, "accuracy_last": None}
    if not failure:
        test = list(pipeline.evaluation_batches(splits["test"], batch_size=run.batch_size, length=task.length))
        last = evaluate(state["parameters"], test)[0]
        same = progress["best"][0] == run.steps
        found = {"best": last if same else evaluate(best, test)[0], "last": last}
        scores |= objective.columns(selected=found[run.selection], **found)
    checkpoints.close()
    configuration = json.dumps(dataclasses.asdict(run), sort_keys=True)
    memory, floors = measure.memory_of(compiled), task.floors(splits)
    judged = objective.column == "accuracy"
    tail = progress["losses"][-max(1, run.steps // 10) :]
    result = results.Result(
        status=failure or "ok",
        **{name: getattr(run, name) for name in SHARED},
        **scores,
        best_step=progress["best"][0],
        validation_accuracy_best=progress["best"][1] if judged and progress["best"][0] is not None else None,
        validation_accuracy_last=progress["validation"][-1][1] if judged and progress["validation"] else None,
        train_loss_last=float(np.mean(tail)) if tail else None,
        floor_majority=floors.get("majority"),
        floor_root=floors.get("root"),
        floor_bag=floors.get("bag"),
        split="test",
        test_examples=len(splits["test"]),
        parameters=parameter_count,
        steps_per_second=watch.rate,
        train_seconds=watch.seconds,
        compile_seconds=compile_seconds,
        flops_per_step=flops,
        memory_temporary_bytes=memory.temporary,
        memory_peak_bytes=memory.peak,
        configuration=configuration,
        configuration_hash=results.configuration_hash(configuration),
        data=f"{source}, batches by {batches.kind}",
        source=task.source,
        finished_utc=results.now(),
        **results.environment(),
    )
    write_history(out / "history.csv", progress, objective.column)
    write_json(out / "result.json", dataclasses.asdict(result))
    return result


def train_step(run: Run, objective: Objective, graph, optimiser, state, fixed, batch):
    """One step of the optimiser: (state, fixed, batch) -> (state, loss). Its inputs' buffers may be reused."""
    key = jax.random.fold_in(jax.random.key(run.seed), state["step"])

    def loss(parameters, part, key):
        return objective.loss(nnx.merge(graph, parameters, fixed), part, rngs=nnx.Rngs(dropout=key))

    def accumulate(total, part):
        part, index = part
        return jax.tree.map(jnp.add, total, one(part, jax.random.fold_in(key, index))), None

    one = lambda part, key: jax.value_and_grad(loss, has_aux=True)(state["parameters"], part, key)
    if run.accumulate == 1:
        (value, count), gradient = one(batch, key)
    else:
        parts = jax.tree.map(lambda a: a.reshape(run.accumulate, -1, *a.shape[1:]), batch)
        zeros = ((jnp.zeros(()), jnp.zeros(())), jax.tree.map(jnp.zeros_like, state["parameters"]))
        ((value, count), gradient), _ = jax.lax.scan(accumulate, zeros, (parts, jnp.arange(run.accumulate)))
    # Sums until here, because parts of a batch may have different numbers of targets.
    value, gradient = jax.tree.map(lambda a: a / jnp.maximum(count, 1), (value, gradient))
    updates, memory = optimiser.update(gradient, state["optimiser"], state["parameters"])
    parameters = optax.apply_updates(state["parameters"], updates)
    return {"parameters": parameters, "optimiser": memory, "step": state["step"] + 1}, value


def eval_step(objective: Objective, graph, parameters, fixed, batch):
    """Sums over a batch's real targets: [scores, losses, targets]."""
    return objective.sums(nnx.merge(graph, parameters, fixed), batch)


def _evaluate(step, fixed, parameters, batches) -> tuple[float, float]:
    """(score, mean loss) over batches."""
    score, loss, count = sum(np.asarray(step(parameters, fixed, batch), np.float64) for batch in batches)
    return float(score / count), float(loss / count)


def _flops(shown: Progress, *call) -> int | None:
    try:
        return measure.flops(*call)
    except ValueError as error:  # a kernel that no jaxpr shows: the run is as good without this number
        shown.say(f"FLOPs per step are left blank: {error}")
        return None


def make_schedule(run: Run) -> optax.Schedule:
    """Step -> learning rate."""
    if run.schedule == "rsqrt":
        warmup = max(run.warmup_steps, 1)
        return lambda step: run.learning_rate * jnp.minimum(1, step / warmup) / jnp.sqrt(jnp.maximum(step, warmup))
    warmup = min(run.warmup_steps, run.steps // 2)
    if run.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, run.learning_rate, warmup, run.steps)
    return optax.linear_schedule(0.0, run.learning_rate, max(warmup, 1))


def make_optimiser(run: Run) -> optax.GradientTransformation:
    """AdamW with clipping. Decay spares what is no matrix of a linear map or embedding, unless run.decay is "all"."""
    name = lambda path: [part.key for part in path if hasattr(part, "key")][-1]

    def decays(parameters):
        wanted = lambda path, _: run.decay == "all" or name(path) in ("kernel", "embedding")
        return jax.tree_util.tree_map_with_path(wanted, parameters)

    schedule = make_schedule(run)
    adam = optax.adamw(schedule, run.b1, run.b2, run.eps, weight_decay=run.weight_decay, mask=decays)
    return adam if run.clip_norm is None else optax.chain(optax.clip_by_global_norm(run.clip_norm), adam)


def _fresh_progress(run: Run) -> dict:
    """The plain data of a checkpoint; `best` is [step, *the objective's rank of its validation]."""
    return {"step": 0, "seconds": 0.0, "timed_steps": 0, "losses": [], "validation": [], "best": [None]}


@contextlib.contextmanager
def _stop_on_interrupt(shown: Progress):
    """An event that Ctrl-C sets. A second Ctrl-C stops at once, as Python does."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handler(number, frame):
        signal.signal(number, before)
        stop.set()
        shown.say("Stopping after this step, to save the checkpoint; Ctrl-C again stops without.")

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
