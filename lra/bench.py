"""What a layer's model costs at a length: one CSV row for each measurement."""

import csv
import dataclasses
import os
import pathlib
from collections.abc import Iterable
from dataclasses import dataclass

from subquad.lra import racing
from subquad.lra.checkpoints import RunError, line
from subquad.lra.results import _parse

MODES = ("forward", "gradient", "train")


@dataclass(frozen=True)
class Measurement:
    """One model in one mode at one length. The fields are the columns of the CSV; what does not apply is None, an empty cell.

    Times are milliseconds of one call, memory is bytes of one device, ratios are to the baseline (softmax) measured in
    turn with this row, in the same process.
    """

    status: str  # "ok"; "skipped: " why it was not run; "failed: " what it ended with
    model: str  # a key of `programs.MODELS`
    layer: str
    layer_options: str  # JSON
    length: int  # tokens of one sequence, as the task has them
    batch_size: int
    mode: str  # "forward"; "gradient": loss and gradient; "train": with the optimiser's step
    dtype: str
    implementation: str | None  # what the layer was told to run; None: its own choice
    threads: int | None  # processors; None on a GPU or TPU
    hardware: str
    parameters: int | None = None
    compile_seconds: float | None = None  # tracing and compiling, no cache
    best_ms: float | None = None
    lower_ms: float | None = None  # quartile
    median_ms: float | None = None
    upper_ms: float | None = None  # quartile
    calls: int | None = None  # timed ones
    clock: str | None = None  # "perf_counter": the time of day; "process_time": of one thread's processor
    steps_per_second: float | None = None  # of the median
    tokens_per_second: float | None = None  # of the median
    baseline: str | None = None  # the layer that the ratios are to
    speed_ratio: float | None = None  # the baseline's median time over this one's: above 1 is faster
    memory_ratio: float | None = None  # this peak over the baseline's: below 1 is less
    argument_bytes: int | None = None
    temporary_bytes: int | None = None
    peak_bytes: int | None = None  # compiled: arguments, results and temporaries, donated buffers counted once
    device_peak_bytes: int | None = None  # observed in a process of its own
    device_peak_source: str | None = None  # what observed it
    flops: int | None = None  # of the program that ran, from its jaxpr: what is computed twice counts twice
    flops_source: str | None = None  # "jaxpr", or "jaxpr of the XLA path" where the program's kernels show none
    model_flops: int | None = None  # of the forward pass, times three with gradients: what the model needs
    compiler_flops: int | None = None  # XLA's own count, the body of a loop once
    compiler_bytes: int | None = None  # read and written by XLA's own count, the body of a loop once
    utilisation: float | None = None  # model_flops per second over matmul_flops_per_second, a fraction
    matmul_flops_per_second: float | None = None  # of a square matrix product in this dtype on this machine
    largest_length: int | None = None  # at this batch size, by compiled memory
    largest_batch: int | None = None  # at this length, by compiled memory
    limits_note: str | None = None  # how the largest ones were bounded
    memory_limit_bytes: int | None = None
    memory_limit_source: str | None = None
    energy_joules: float | None = None  # of one call
    energy_source: str | None = None  # what was read; "estimated from ... W" where nothing tells
    co2e_grams: float | None = None  # of one call
    co2e_assumption: str | None = None
    price: float | None = None  # of one call
    price_assumption: str | None = None
    configuration: str | None = None  # JSON of every value of the model
    protocol: str | None = None  # how it was measured
    session: str | None = None  # the command that measured it: rows of one session were measured side by side
    commit: str | None = None
    versions: str | None = None
    finished_utc: str | None = None


FIELDS = [one.name for one in dataclasses.fields(Measurement)]
# A later row with the same cells takes the place of the older.
KEY = ("model", "layer", "layer_options", "length", "batch_size", "mode", "dtype", "implementation", "threads", "hardware")


def write(rows: Iterable[Measurement], path: str | os.PathLike) -> None:
    """Writes rows into a CSV file beside those it holds; one with the same `KEY` takes the older one's place.

    Raises: RunError: the file cannot be written, or has other columns.
    """
    racing.write_rows(path, [dataclasses.asdict(row) for row in rows], KEY)


def read(path: str | os.PathLike) -> list[Measurement]:
    """The rows of a CSV file; none where there is no file.

    Raises: RunError: the file has other columns, or a cell that cannot be read.
    """
    kinds = {one.name: one.type for one in dataclasses.fields(Measurement)}
    try:
        rows = racing.read_rows(path)
        return [Measurement(**{name: _parse(row[name], kinds[name]) for name in FIELDS}) for row in rows]
    except (KeyError, ValueError, TypeError, csv.Error) as error:
        raise RunError(
            f"bench: file {pathlib.Path(path)} must have the columns of this version, got {line(error)}. Move it away."
        ) from error
