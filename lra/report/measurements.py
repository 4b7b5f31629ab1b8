"""What a layer's model costs at a length: one CSV row for each measurement."""

import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from subquad.lra.report import csv_rows
from subquad.lra.report.text_tables import Table

MODES = ("forward", "gradient", "train")


@dataclass(frozen=True)
class Measurement:
    """One model in one mode at one length. The fields are the columns of the CSV; what does not apply is None, an empty cell.

    Times are milliseconds of one call, memory is bytes of one device, ratios are to the baseline (softmax) measured in
    turn with this row, in the same process.
    """

    status: str  # "ok"; "skipped: " why it was not run; "failed: " what it ended with
    model: str  # a key of `programs.MODELS`, and what was changed in it: "lra-text, in_features=512"
    layer: str
    layer_options: str  # JSON
    length: int  # tokens of one sequence, as the task has them
    batch_size: int
    mode: str  # "forward"; "gradient": loss and gradient; "train": with the optimiser's step
    dtype: str
    implementation: str | None  # what the layer was to run; None: its own choice
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


# A later row with the same cells takes the place of the older.
KEY = (
    "model", "layer", "layer_options", "length", "batch_size", "mode", "dtype", "implementation", "threads", "hardware",
    "baseline",
)  # fmt: skip


def write_measurements(rows: Iterable[Measurement], path: str | os.PathLike) -> None:
    """Writes rows into a CSV file beside those it holds, see `csv_rows.write_rows`."""
    csv_rows.write_rows(path, Measurement, rows, KEY)


def read_measurements(path: str | os.PathLike) -> list[Measurement]:
    """The rows of a CSV file, see `csv_rows.read_rows`."""
    return csv_rows.read_rows(path, Measurement)


def groups(rows: Iterable[Measurement]) -> list[list[Measurement]]:
    """Rows that one picture holds: of one model, batch size, dtype, implementation, number of threads, machine and baseline."""
    shared = ("model", "batch_size", "dtype", "implementation", "threads", "hardware", "baseline")
    return csv_rows.rows_that_agree(rows, shared)


def layer_label(row: Measurement, rows: Sequence[Measurement]) -> str:
    """The layer, with its options where the rows have it with several at one length."""
    like = {other.layer_options for other in rows if (other.layer, other.length) == (row.layer, row.length)}
    return f"{row.layer} {row.layer_options}" if len(like) > 1 else row.layer


def length_label(count: int) -> str:
    """A length as people say it.

    Example:
        >>> length_label(4096), length_label(1000)
        ('4K', '1000')
    """
    return f"{count // 1024}K" if count >= 1024 and count % 1024 == 0 else str(count)


def tables(rows: Iterable[Measurement]) -> list[Table]:
    """Speed and memory against length, as in the Long Range Arena's table 2, and what else is known: one of each per mode."""
    found = []
    for group in groups(rows):
        one = group[0]
        implementation = f", {one.implementation}" if one.implementation else ""
        shared = f"{one.model}, batch {one.batch_size}, {one.dtype}{implementation}"
        for mode in MODES:
            chosen = [row for row in group if row.mode == mode]
            if chosen:
                found += [_speed(f"{shared}, {mode}", chosen), *_rest(f"{shared}, {mode}", chosen)]
    return found


def _speed(title: str, rows: Sequence[Measurement]) -> Table:
    lengths = sorted({row.length for row in rows})
    heading = ["layer", *(f"calls/s {length_label(n)}" for n in lengths), *(f"MiB {length_label(n)}" for n in lengths)]
    body, notes = [], []
    for name in dict.fromkeys(layer_label(row, rows) for row in rows):
        at = {row.length: row for row in rows if layer_label(row, rows) == name}
        for row in at.values():
            if row.status != "ok":
                notes.append(f"{name} at {length_label(row.length)}: {row.status}.")
        speed = [_speed_cell(at.get(length)) for length in lengths]
        body.append([name, *speed, *(_memory_cell(at.get(length)) for length in lengths)])
    return Table(title, [heading, *body], [_caption(rows), *notes])


def _speed_cell(row: Measurement | None) -> str:
    if row is None:
        return ""
    if row.steps_per_second is None:
        return row.status.partition(":")[0]
    return f"{row.steps_per_second:.3g}" + (f" ({row.speed_ratio:.2f})" if row.speed_ratio else "")


def _memory_cell(row: Measurement | None) -> str:
    if row is None or row.peak_bytes is None:
        return ""
    size = row.peak_bytes / 2**20
    return (f"{size:.3g}" if size < 100 else f"{size:,.0f}") + (f" ({row.memory_ratio:.2f})" if row.memory_ratio else "")


# Heading, cell of a row, and what the numbers rest on.
_REST: tuple[tuple[str, Callable, Callable], ...] = (
    ("parameters", lambda row: row.parameters and f"{row.parameters:,}", lambda row: None),
    ("compile s", lambda row: row.compile_seconds and f"{row.compile_seconds:.1f}", lambda row: None),
    ("tokens/s", lambda row: row.tokens_per_second and f"{row.tokens_per_second:,.0f}", lambda row: None),
    (
        "GFLOP", lambda row: row.flops and f"{row.flops / 1e9:.2f}",
        lambda row: row.flops_source and f"FLOPs from the {row.flops_source}",
    ),
    (
        "utilisation", lambda row: row.utilisation and f"{100 * row.utilisation:.1f} %",
        lambda row: row.utilisation and "utilisation: FLOPs that the model needs in a second, of the "
        f"{row.matmul_flops_per_second / 1e9:,.0f}e9 of a square matrix product",
    ),
    (
        "observed peak MiB", lambda row: row.device_peak_bytes and f"{row.device_peak_bytes / 2**20:,.1f}",
        lambda row: row.device_peak_source and f"observed peak: {row.device_peak_source}",
    ),
    (
        "largest length", lambda row: row.largest_length and f"{row.largest_length:,}",
        lambda row: row.largest_length and f"limits: {row.memory_limit_bytes / 2**30:.1f} GiB, {row.memory_limit_source}",
    ),
    ("largest batch", lambda row: row.largest_batch and f"{row.largest_batch:,}", lambda row: row.limits_note),
    ("J/call", lambda row: row.energy_joules and f"{row.energy_joules:.3g}", lambda row: row.energy_source),
    ("g CO2e/call", lambda row: row.co2e_grams and f"{row.co2e_grams:.3g}", lambda row: row.co2e_assumption),
    ("price/call", lambda row: row.price and f"{row.price:.3g}", lambda row: row.price_assumption),
)  # fmt: skip


def _rest(title: str, rows: Sequence[Measurement]) -> list[Table]:
    """What else is known, each layer at the longest length that it ran at; columns that no row fills are left out."""
    longest: dict[str, Measurement] = {}
    for row in sorted(rows, key=lambda row: row.length):
        if row.status == "ok":
            longest[layer_label(row, rows)] = row
    columns = [column for column in _REST if any(column[1](row) for row in longest.values())]
    if not longest or not columns:
        return []
    body = [
        [name, length_label(row.length), *(cell(row) or "" for _, cell, _ in columns)] for name, row in longest.items()
    ]
    notes = dict.fromkeys(note(row) for _, _, note in columns for row in longest.values())
    heading = ["layer", "at", *(name for name, _, _ in columns)]
    sentences = [f"{note[0].upper()}{note[1:]}." for note in notes if note]
    return [Table(f"{title}, at the longest length", [heading, *body], sentences)]


def _caption(rows: Sequence[Measurement]) -> str:
    one = next((row for row in rows if row.status == "ok"), rows[0])
    others = r"(?<=in turn with )\d+"  # layers, not as many in every session
    beside = _span(int(count) for row in rows for count in re.findall(others, row.protocol or ""))
    protocol, calls = re.sub(others, beside, one.protocol or "nothing was run"), _span(row.calls for row in rows if row.calls)
    counted = f" of {calls} calls" if calls else ""
    threads = f", {one.threads} processors used" if one.threads else ""
    ratios = f" In brackets: ratio to {one.baseline} measured in turn; speed above 1 is faster, memory below 1 is less."
    sessions = len({row.session for row in rows})
    several = f" Measured in {sessions} sessions; each ratio is of one." if sessions > 1 else ""
    return (
        f"{protocol[0].upper()}{protocol[1:]}{counted}. MiB: peak of the compiled program, its arguments counted."
        f"{ratios if one.baseline else ''}{several} {one.hardware}{threads}; {one.versions}; {commits(rows)}."
    )


def commits(rows: Iterable[Measurement]) -> str:
    """Which commits rows are of, in words."""
    return f"commit {', '.join(dict.fromkeys((row.commit or '')[:12] for row in rows))}"


def _span(numbers: Iterable[int]) -> str:
    """The smallest and the largest, or what all are; "" of none."""
    found = sorted(set(numbers))
    return "-".join(map(str, dict.fromkeys((found[0], found[-1])))) if found else ""
