"""What a run will take: hours of this machine, validation included, so that cells can be put in order of cost.

Where some steps of the run were timed here (`step_timings`), they are those steps'. Else they come from the rate of other
runs that were measured here, good to a factor of two or three; where there is none, from what is published, and say of which
machine.
"""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import jax

from subquad.lra import layers, machine
from subquad.lra.report.ledger import Ledger
from subquad.lra.run import Run
from subquad.lra.tasks import Task

# FLOPs per second that small models reach. On a V100, what Skyformer's table 2 comes to: self-attention, 50,000 steps of
# 16 texts of 4096 bytes through 2 layers of 64 features in 4.3 hours. On a CPU, what the quickstart's rows come to.
GPU, CPU = 1.4e12, 4e10
# Hours that authors state: seconds or minutes per epoch times the epochs of their configuration.
STATED = {
    ("s4", "listops"): (10.0, "one T4"),
    ("s4", "text"): (9.0, "one T4"),
    ("s4", "retrieval"): (7.7, "one A100"),
    ("s4", "image"): (6.7, "one A100"),
    ("s4", "pathfinder"): (23.0, "one A100"),
    ("s4", "pathfinder/128_hard"): (47.0, "one A100"),
}


class Cost(NamedTuple):
    """Hours, on what, and where that comes from."""

    hours: float
    hardware: str
    source: str

    def __str__(self) -> str:
        return f"{self.hours:.3g} h on {self.hardware} ({self.source})"


_ELSEWHERE = "--probe measures this machine's"


def forecast(
    run: Run, task: Task, known: Ledger, *, here: bool = False, hardware: str | None = None, lengths: Sequence[int] = ()
) -> Cost:  # fmt: skip
    """Hours on this machine where anything was measured on it, or `here` in any case; else those of others.

    Args:
        known: what was measured, on whatever machine. Steps of this very run on this one are what counts.
        hardware: the name of this machine; None: `machine.hardware()`.
        lengths: that it is tested at, too. Hours that authors state are as they are.
    """
    hardware = hardware or machine.hardware()
    further = sum(forward_flops(run, len(task.at_length(length)) * length, length) for length in lengths)
    timed = known.timed_steps(run, hardware)
    if timed is not None:
        seconds = timed.compile_seconds + run.steps * timed.step_seconds
        batches = evaluation_batches(run, task) + further / (evaluation_flops(run, task) / evaluation_batches(run, task))
        seconds += batches * timed.evaluation_seconds
        return Cost(seconds / 3600, hardware, f"from {timed.probe_steps} steps timed on it, validation included")
    rates, flops = _rates(known, hardware), training_flops(run, task) + evaluation_flops(run, task) + further
    if rates:
        hours = flops / statistics.median(rates) / 3600
        return Cost(hours, hardware, f"estimate from {len(rates)} runs on it, validation included")
    if here:
        source = f"rough estimate, nothing was measured on it; {_ELSEWHERE}, validation included"
        return Cost(flops / (CPU if jax.default_backend() == "cpu" else GPU) / 3600, hardware, source)
    for key in (f"{run.task}/{run.config}", run.task):
        if (run.recipe, key) in STATED:
            return Cost(*STATED[run.recipe, key], f"as its authors state; {_ELSEWHERE}")
    return Cost(flops / GPU / 3600, "one V100", f"estimate from published hours, validation included; {_ELSEWHERE}")


def _rates(known: Ledger, hardware: str) -> list[float]:
    """FLOPs per second of the runs that were measured on a machine."""
    rows = [row for row in known.rows() if row.hardware == hardware and row.flops_per_step and row.steps_per_second]
    timed = [one for one in known.step_timings if one.hardware == hardware and one.step_seconds > 0]
    return [row.flops_per_step * row.steps_per_second for row in rows] + [one.step_flops / one.step_seconds for one in timed]


def evaluation_batches(run: Run, task: Task) -> int:
    """Batches that a run scores: validation now and again, and test with two sets of parameters and as many of train."""
    count = lambda split: math.ceil(task.splits[split] / run.batch_size)
    return math.ceil(run.steps / run.evaluate_every) * count("validation") + 3 * count("test")


def evaluation_flops(run: Run, task: Task) -> float:
    """FLOPs of a run's `evaluation_batches`: a forward pass, a third of a step, each."""
    return evaluation_batches(run, task) * training_flops(run, task) / run.steps / 3


def training_flops(run: Run, task: Task) -> float:
    """FLOPs of all steps: three forward passes each."""
    tokens = run.steps * run.batch_size * (2 if task.kind == "pair" else 1) * task.length
    return 3 * forward_flops(run, tokens, task.length)


def forward_flops(run: Run, tokens: int, length: int) -> float:
    """FLOPs of a forward pass over sequences of a length: linear maps, and attention to as many keys as `keys_seen` says."""
    features, inside = run.in_features, run.layer_options.get("qkv_features", run.in_features)
    maps = 2 * 4 * features * inside + 2 * 2 * features * run.mlp_features
    return tokens * run.num_layers * (maps + 4 * inside * keys_seen(run.layer, length))


def keys_seen(layer: str, length: int) -> float:
    """How many keys a query is compared with, or what costs as much: a guess by how the layer's cost grows with the length."""
    cost = getattr(layers.find_layer(layer), "supports", None)
    guessed = {"T": 512, "T log T": 64 * math.log2(length), "T^1.5": 4 * math.sqrt(length)}
    return min(length, guessed.get(cost and cost.cost, length))
