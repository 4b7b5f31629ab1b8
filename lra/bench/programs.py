"""The programs that `subquad bench` measures: a model forward, with gradient, and in a training step.

Everything is compiled from shapes alone, so that what a program needs is known before any of it is allocated.
"""

import dataclasses
import functools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from subquad.lra import layers, models, optim, recipes, tasks
from subquad.lra.bench import measure, timing
from subquad.lra.files import one_line
from subquad.lra.objectives import OBJECTIVES
from subquad.lra.plan import plan as plan_run
from subquad.lra.run import Run
from subquad.lra.step import batch_gradient, train_step
from subquad.lra.tasks import Task
from subquad.zoo import registry


@dataclass(frozen=True)
class Model:
    """A model whose layer and length are exchanged.

    Attributes:
        recipe, task, config: what `plan.plan` takes: the sizes, and the options of the layers that the recipe lists.
        num_heads: of layers that have heads and are not listed.
        options: length in tokens -> options that depend on it, by layer.
        source: where the sizes come from.
    """

    recipe: str
    task: str
    config: str
    num_heads: int
    options: Callable[[int], Mapping[str, Mapping[str, Any]]]
    source: str


# Softmax attention with all its logits in memory, as the papers' Transformers keep them.
PLAIN = "plain_softmax"
# Sequences in a batch of the tables that ratios are published in.
PAPERS_BATCH = 32
MODELS = {
    "lra-text": Model(
        "lra-2020", "text", "lra", 4,
        # Ten chunks, however long the sequence.
        lambda length: {"reformer": dict(chunk_size=math.ceil(length / 10))},
        "Tay et al. 2020, arXiv 2011.04006, table 2: the released Text model of 4 layers and 256 features",
    ),
    "small": Model(
        "nystromformer", "text", "modern", 2, lambda length: {},
        "Xiong et al. 2021, arXiv 2102.03902: 2 layers and 64 features",
    ),
}  # fmt: skip


def plan(
    model: str, layer: str, length: int, *, implementation: str | None = None, options: Mapping[str, Any] = {}, **values: Any
) -> tuple[Run, Task]:
    """The run of a layer in a model at a length, and the task with sequences of that length.

    Args:
        model: a key of `MODELS`.
        layer: a key of `zoo.LAYERS`, package.module:ClassName, or `PLAIN`.
        length: tokens of a sequence.
        implementation: what the layer is to run; None: its own choice.
        options: of the layer's constructor, before those of the model; "local.window_size" is for that layer alone.
        values: of `Run`, before those of the model. Attention dropout, which only some layers can have, is off.
    Raises: ValueError, TypeError: what `plan.plan` raises.
    """
    if layer == PLAIN:
        layer, implementation = "softmax", "reference"
    rules = MODELS[model]
    task = replace(tasks.find_task(rules.task, rules.config), length=length)
    known = registry.options(layer) if layer in registry.LAYERS else signature(layers.find_layer(layer).__init__).parameters
    usual = {} if layer in recipes.RECIPES[rules.recipe].layers else {"num_heads": rules.num_heads, "max_length": "{length}"}
    given = {name: value for name, value in usual.items() if name in known}
    given |= rules.options(length).get(layer, {})
    for name, value in options.items():
        whose, dot, word = name.rpartition(".")
        if not dot or whose == layer:
            given[word] = value
    if implementation is not None and "implementation" in known:
        given["implementation"] = implementation
    return plan_run(rules.recipe, layer, task=task, layer_options=given, **{"attention_dropout_rate": 0.0, **values}), task


def usual_batch_size() -> int:
    """Sequences that a program takes where nothing else is said."""
    return 1 if jax.default_backend() == "cpu" else 32


def fitting_batch_size(model: str, length: int, limit: int) -> int:
    """`PAPERS_BATCH`, or half of it as often as a training step of `PLAIN` needs to fit into so many bytes; 1 in any case.

    Its memory is taken to grow with the batch, and a tenth is left to parameters, and to the layers beside it.
    """
    run, task = plan(model, PLAIN, length, batch_size=PAPERS_BATCH)
    excess = compile_program(run, task, "train").memory.peak / (0.9 * limit)
    halved = max(0, math.ceil(math.log2(excess)))
    return max(1, PAPERS_BATCH >> halved)


class Program(NamedTuple):
    """A compiled program, and what is known without running it."""

    run: Run
    task: Task
    mode: str
    compiled: Any
    compile_seconds: float
    memory: measure.Memory


def compile_program(run: Run, task: Task, mode: str) -> Program:
    """Compiles a mode of a run's model from shapes; nothing is allocated or run.

    Raises: ValueError: the layer refuses the length.  Exception: the compiler gives up.
    """
    function, arguments = _function(run, task, mode, _abstract(run, task))
    donated = dict(donate_argnums=0) if mode == "train" else {}
    began = time.perf_counter()
    found = jax.jit(function, **donated).lower(*arguments).compile()
    return Program(run, task, mode, found, time.perf_counter() - began, measure.memory_of(found))


def start_program(program: Program) -> Callable[[], Any]:
    """Allocates a program's arguments. Returns: a call of it that waits for its results."""
    model = models.split(models.build(program.run, program.task))
    _, (first, *rest) = _function(program.run, program.task, program.mode, model, _batch(program.run, program.task))
    if program.mode != "train":
        return lambda: jax.block_until_ready(program.compiled(first, *rest))
    held = [first]

    def step():
        # The state's buffers are the program's to write into, as in training.
        held[0], *seen = jax.block_until_ready(program.compiled(held[0], *rest))
        return seen

    return step


def _abstract(run: Run, task: Task):
    return models.split(nnx.eval_shape(lambda: models.build(run, task)))


def _function(run: Run, task: Task, mode: str, model, batch=None) -> tuple[Callable, tuple]:
    """(function, its arguments): arrays where `model` and `batch` are, else shapes."""
    (graph, parameters, statistics, fixed), objective = model, OBJECTIVES[task.kind]
    if mode != "train":
        fixed = nnx.merge_state(fixed, statistics)
    if batch is None:
        batch = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, _batch(run, task)))
    if mode == "forward":
        inputs = {name: batch[name] for name in objective.inputs}
        return lambda parameters, fixed, inputs: nnx.merge(graph, parameters, fixed)(**inputs), (parameters, fixed, inputs)
    if mode == "gradient":

        def gradient(parameters, fixed, batch):
            # As the first training step draws.
            key = jax.random.fold_in(jax.random.key(run.seed), 0)
            ((value, (count, _)), found), _ = batch_gradient(run, objective, graph, parameters, fixed, key, batch)
            return value / count, found

        return gradient, (parameters, fixed, batch)
    optimiser = optim.make_optimiser(run)
    state = functools.partial(optim.initial_state, run, optimiser)
    concrete = isinstance(jax.tree.leaves(parameters)[0], jax.Array)
    state = state(parameters, statistics) if concrete else jax.eval_shape(state, parameters, statistics)
    return lambda *words: train_step(run, objective, graph, optimiser, *words), (state, fixed, batch)


def _batch(run: Run, task: Task) -> dict[str, np.ndarray]:
    """Random tokens, none of them padding, and random labels."""
    random = np.random.default_rng(run.seed)
    shape, batch = (run.batch_size, task.length), {}
    for ending in ("1", "2") if task.kind == "pair" else ("",):
        batch[f"inputs{ending}"] = random.integers(1, task.vocabulary_size, shape, dtype=np.int32)
        batch[f"mask{ending}"] = np.ones(shape, bool)
    targets = shape if OBJECTIVES[task.kind].per_token else run.batch_size
    return {**batch, "targets": random.integers(0, task.num_classes, targets, dtype=np.int32)}


def count_flops(run: Run, task: Task, mode: str) -> dict[str, Any]:
    """FLOPs of a program: {"flops", "flops_source", "model_flops"}, None where no jaxpr shows them."""
    for source, variant in (("jaxpr", run), ("jaxpr of the XLA path", _with_implementation(run, "xla"))):
        try:
            function, arguments = _function(variant, task, mode, _abstract(variant, task))
            found = measure.flops(function, *arguments)
            forward, arguments = _function(variant, task, "forward", _abstract(variant, task))
            needed = measure.flops(forward, *arguments)
        except (ValueError, NotImplementedError, TypeError):  # a kernel or a loop that shows nothing; no such path
            continue
        # A backward pass needs two products for each of the forward pass; what is computed again is no need of the model.
        return dict(flops=found, flops_source=source, model_flops=needed * (1 if mode == "forward" else 3))
    return dict(flops=None, flops_source=None, model_flops=None)


def _with_implementation(run: Run, implementation: str) -> Run:
    return replace(run, layer_options={**run.layer_options, "implementation": implementation})


def compiler_counts(program: Program) -> dict[str, int | None]:
    """XLA's own counts, which take the body of a loop once."""
    try:
        found = program.compiled.cost_analysis() or {}
    except Exception:  # not every back end counts
        found = {}
    found = found[0] if isinstance(found, list | tuple) else found
    number = lambda name: round(found[name]) if name in found else None
    return dict(compiler_flops=number("flops"), compiler_bytes=number("bytes accessed"))


def largest_that_fits(
    peak: Callable[[int], int | None], limit: int, start: int, most: int, grain: int = 1
) -> tuple[int | None, str]:
    """The largest number whose peak memory fits, to a twentieth: upwards in proportion, then by bisection.

    Args:
        peak: bytes that a number needs, None where the compiler gives up; more for larger numbers, or nearly so.
        limit: bytes that there are.
        start: the first try.
        most: the search goes no further.
        grain: tries are its multiples.
    Returns: (number, what bounded it); (None, why) where not even `grain` fits.
    Example:
        >>> largest_that_fits(lambda n: 1000 + 8 * n, 100_000, 64, 10**6)
        (12141, 'to a twentieth')
    """
    low, high, tried = 0, None, min(max(start // grain * grain, grain), most)
    while True:
        size = peak(tried)
        low, high = (tried, high) if size is not None and size <= limit else (low, tried)
        if low >= most:
            return low, f"at least: the search ends at {most}"
        if high is not None and high - low <= max(grain, low // 20):
            return (low, "to a twentieth") if low else (None, f"not even {high} fits")
        if high is None:  # twice at least, or where a peak that is proportional to the number would reach the limit
            tried = min(max(2 * low, low * limit // size // grain * grain), most)
        else:
            tried = max((low + high) // 2 // grain * grain, low + grain)


def observe_peak(text: str) -> int:
    """Bytes at the peak of a program's call, in this process: what `observed_peak` starts runs this.

    A GPU's allocator knows; on a CPU it is what the process grows by, without its arguments.
    """
    words = json.loads(text)
    run = Run(**words["run"])
    task = replace(tasks.find_task(run.task, run.config), length=words["length"])
    call = start_program(compile_program(run, task, words["mode"]))
    if jax.default_backend() == "cpu":
        return timing.memory_growth(call)
    call()
    return jax.devices()[0].memory_stats()["peak_bytes_in_use"]


def observed_peak(program: Program) -> tuple[int | None, str]:
    """(bytes at the peak, what observed them) of a program that runs alone in a process of its own; (None, why not)."""
    words = dict(run=dataclasses.asdict(program.run), length=program.task.length, mode=program.mode)
    code = "import sys; from subquad.lra.bench import programs; print(programs.observe_peak(sys.argv[1]))"
    environment = {**os.environ, **timing.PLAIN_MALLOC, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(words)], capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode:
        return None, f"not observed: {one_line(RuntimeError(done.stderr[-300:]))}"
    on_cpu = jax.default_backend() == "cpu"
    source = "growth of the process, arguments not counted" if on_cpu else "the device's allocator, arguments counted"
    return int(done.stdout.splitlines()[-1]), source
