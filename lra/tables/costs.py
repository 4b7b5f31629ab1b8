"""What a run will take: hours before it is started, roughly, so that cells can be put in order of cost and fit a budget.

Good to a factor of two or three. What was measured is in `results` and `bench`.
"""

import statistics
from collections.abc import Iterable
from typing import NamedTuple

from subquad.lra.recipes import Run
from subquad.lra.results import Result
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


def of_run(run: Run, task: Task) -> Cost:
    """Hours on a GPU: those that its authors state, else an estimate from the FLOPs."""
    for key in (f"{run.task}/{run.config}", run.task):
        if (run.recipe, key) in STATED:
            return Cost(*STATED[run.recipe, key], "as its authors state")
    return Cost(training_flops(run, task) / GPU / 3600, "one V100", "estimate")


def here(run: Run, task: Task, rows: Iterable[Result], hardware: str, is_cpu: bool) -> Cost:
    """Hours on this machine, by the rate of the runs that were measured on it, else by a usual rate."""
    rates = [row.flops_per_step * row.steps_per_second for row in rows if row.hardware == hardware and _timed(row)]
    rate = statistics.median(rates) if rates else CPU if is_cpu else GPU
    source = f"estimate from {len(rates)} runs on it" if rates else "estimate"
    return Cost(training_flops(run, task) / rate / 3600, hardware, source)


def _timed(row: Result) -> bool:
    return bool(row.flops_per_step and row.steps_per_second)


def training_flops(run: Run, task: Task) -> float:
    """FLOPs of all steps: three forward passes each, attention by what a query sees."""
    sequences = 2 if task.kind == "pair" else 1
    tokens = run.steps * run.batch_size * sequences * task.length
    return 3 * tokens * run.num_layers * (_maps(run) + mixing(run, task.length))


def _maps(run: Run) -> float:
    """FLOPs of a block's linear maps for a token."""
    features, inside = run.in_features, run.layer_options.get("qkv_features", run.in_features)
    mixer = 2 * features * features * 2 if run.layer == "s4" else 2 * 4 * features * inside
    return mixer + 2 * 2 * features * run.mlp_features


def mixing(run: Run, length: int) -> float:
    """FLOPs that a layer spends on mixing tokens, for a token of a sequence of `length`."""
    options, features = run.layer_options, run.layer_options.get("qkv_features", run.in_features)
    number = lambda name, default: min(length, options[name]) if isinstance(options.get(name), int) else default
    if run.layer == "s4":
        return 30 * features * (1 if options.get("is_causal") else 2) + 8 * features * number("state_size", 64) / 4
    if run.layer == "performer":
        return 6 * features * options.get("num_features", 256)
    seen = {
        "softmax": length,
        "blockwise": number("block_size", 128),
        "local": 2 * number("window_size", 256),
        "strided": number("stride", 128) * 2 + length / number("stride", 128) * options.get("num_summary", 1),
        "reformer": 2 * number("chunk_size", 64) * options.get("num_hashes", 4),
        "linformer": 2 * number("num_landmarks", 256),
        "transformer_xl": 2 * number("segment_length", 512) + number("memory_length", 512),
    }.get(run.layer, length)
    return 4 * features * min(seen, 4 * length)
