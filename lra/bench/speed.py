"""Layers side by side: the programs of several layers at one length and in one mode, timed in turn, one row for each."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from subquad.lra import machine, models, sizes
from subquad.lra.bench import energy, programs, timing
from subquad.lra.files import one_line
from subquad.lra.progress import Work
from subquad.lra.report.measurements import Measurement

LONGEST, LARGEST_BATCH = 2**20, 2**14  # where the searches for limits end
GRAIN = 64  # lengths that the search tries are multiples of it


@dataclass(frozen=True)
class Settings:
    """What is measured, and how.

    Attributes:
        model: a key of `programs.MODELS`; values: of `Run`, before the model's; options: see `programs.plan`.
        batch_size, dtype, implementation: of every program.
        baseline: the layer that ratios are to.
        seconds: of timing for each layer; repeats: timed calls instead.
        threads: processors that this process may use; None on a GPU or TPU.
        memory_limit: bytes that a program may take; memory_source: what says so.
        matmul_rate: FLOP/s of a matrix product in this dtype on this machine.
        limits: of "length" and "batch": which largest ones to look for.
        peaks: observe each program's peak memory in a process of its own.
        meter: of energy, or None; energy_seconds: of reading it, for each layer; 0: not.
        rates: watts, grid_intensity, price_per_hour, currency, see `energy.cost`.
        session: names the rows that were measured by one command.
    """

    model: str
    session: str
    memory_limit: int
    memory_source: str
    matmul_rate: float
    batch_size: int = 1
    dtype: str = "float32"
    implementation: str | None = None
    values: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    baseline: str = "softmax"
    seconds: float = 2.0
    repeats: int | None = None
    threads: int | None = None
    limits: Sequence[str] = ()
    peaks: bool = False
    meter: energy.Meter | None = None
    energy_seconds: float = 2.0
    rates: Mapping[str, Any] = field(default_factory=dict)
    # The largest length of a layer in a mode does not depend on the length of the race: it is looked for once.
    found: dict[tuple[str, str, str], tuple[int | None, str]] = field(default_factory=dict, compare=False)

    @property
    def label(self) -> str:
        """The model as rows name it: one with other values is another model, and never takes the place of its rows."""
        return ", ".join([self.model, *(f"{name}={value}" for name, value in sorted(self.values.items()))])

    def plan(self, layer: str, length: int, **values):
        """The run and the task of a layer at a length."""
        values = {"batch_size": self.batch_size, "dtype": self.dtype, **self.values, **values}
        words = dict(implementation=self.implementation, options=self.options)
        return programs.plan(self.model, layer, length, **words, **values)


def race(layers: Sequence[str], length: int, mode: str, settings: Settings, say: Callable[[str], None]) -> list[Measurement]:
    """Measures layers in one mode at one length, in turn. What fails is a row that says why, and the others go on.

    Args:
        layers: names, or `programs.PLAIN`; the baseline among them, if ratios are wanted.
        say: is called with a line for whatever happens.
    """
    rows: dict[str, Measurement] = {}
    ready: dict[str, Callable[[], Any]] = {}
    held = 0
    for layer in layers:
        say(f"{layer}: compiling")
        row = _blank(layer, length, mode, settings)
        try:
            run, task = settings.plan(layer, length)
            options, configuration = (json.dumps(one, sort_keys=True) for one in (run.layer_options, dataclasses.asdict(run)))
            row = replace(
                row, layer_options=options, configuration=configuration, batch_size=run.batch_size, dtype=run.dtype
            )
            sizes.check_fits(run, task, mode, settings.memory_limit, settings.memory_source)
            with Work(f"{layer}: compiling"):
                program = programs.compile_program(run, task, mode)
                row = replace(row, **facts(program))
            _check_room(program.memory.peak, held, settings.memory_limit)
            if settings.peaks:
                with Work(f"{layer}: observing its peak of memory"):
                    peak, source = programs.observed_peak(program)
                row = replace(row, device_peak_bytes=peak, device_peak_source=source)
            with Work(f"{layer}: first call"):
                call = programs.start_program(program)
                call()  # what goes wrong in a call goes wrong here, and takes no other layer with it
            ready[layer], held = call, held + program.memory.arguments
        except sizes.TooLarge as error:
            row = replace(row, status=f"skipped: {one_line(error)}")
        except Exception as error:  # one layer's fault is a row; the others still run
            row = replace(row, status=f"failed: {one_line(error)}")
        rows[layer] = row
    if ready:
        say(f"timing {', '.join(ready)}")
        with Work("timing"):
            rows |= _timed(ready, rows, settings)
    for layer in layers:
        if settings.limits and rows[layer].parameters:
            say(f"{layer}: looking for limits")
            with Work(f"{layer}: limits"):
                rows[layer] = replace(rows[layer], **limits(layer, length, mode, settings))
    return [replace(row, finished_utc=machine.utc_now()) for row in _ratios(rows, settings).values()]


def facts(program: programs.Program) -> dict[str, Any]:
    """What is known of a program without running it, as columns of a row."""
    memory = program.memory
    return dict(
        parameters=models.count_parameters(program.run, program.task), compile_seconds=round(program.compile_seconds, 3),
        argument_bytes=memory.arguments, temporary_bytes=memory.temporary, peak_bytes=memory.peak,
        **programs.count_flops(program.run, program.task, program.mode), **programs.compiler_counts(program),
    )  # fmt: skip


def limits(layer: str, length: int, mode: str, settings: Settings) -> dict[str, Any]:
    """The largest length at this batch size and the largest batch at this length, by compiled memory; nothing runs."""

    def peak(length: int, batch_size: int) -> int | None:
        try:
            run, task = settings.plan(layer, length, batch_size=batch_size)
            return programs.compile_program(run, task, mode).memory.peak
        except Exception as error:
            if "RESOURCE_EXHAUSTED" in str(error) or isinstance(error, MemoryError):
                return None  # so says the compiler
            raise

    found, notes = {}, []
    searches = {
        "length": ("largest_length", lambda n: peak(n, settings.batch_size), length, LONGEST, GRAIN),
        "batch": ("largest_batch", lambda n: peak(length, n), settings.batch_size, LARGEST_BATCH, 1),
    }
    for name in settings.limits:
        column, search, *bounds = searches[name]
        known = (layer, mode, "length" if name == "length" else f"batch at {length}")
        if known not in settings.found:
            try:
                settings.found[known] = programs.largest_that_fits(search, settings.memory_limit, *bounds)
            except Exception as error:
                settings.found[known] = None, f"not found: {one_line(error)}"
        found[column], note = settings.found[known]
        notes.append(f"largest {name} {note}")
    return {**found, "limits_note": "; ".join(notes)}


def _blank(layer: str, length: int, mode: str, settings: Settings) -> Measurement:
    named = {name: getattr(settings, name) for name in ("batch_size", "dtype", "implementation", "threads", "session")}
    if layer == programs.PLAIN:
        layer, named["implementation"] = "softmax", "reference"
    return Measurement(
        status="ok", model=settings.label, layer=layer, layer_options="{}", length=length, mode=mode, **named,
        **machine.environment(),
        memory_limit_bytes=settings.memory_limit, memory_limit_source=settings.memory_source,
        matmul_flops_per_second=settings.matmul_rate,
    )  # fmt: skip


def _timed(ready: Mapping[str, Callable], rows: Mapping[str, Measurement], settings: Settings) -> dict[str, Measurement]:
    """The rows with their times, and energy."""
    clock = timing.clock_of(settings.threads or 0)
    try:
        seconds = settings.seconds * len(ready)
        spreads = timing.time_alternately(list(ready.values()), seconds=seconds, repeats=settings.repeats, clock=clock)
    except Exception as error:
        return {layer: replace(rows[layer], status=f"failed: {one_line(error)}") for layer in ready}
    found = {}
    for (layer, call), spread in zip(ready.items(), spreads, strict=True):
        row, rate = rows[layer], 1 / spread.median
        times = {f"{word}_ms": round(1e3 * getattr(spread, word), 4) for word in ("best", "lower", "median", "upper")}
        use = row.model_flops * rate / settings.matmul_rate if row.model_flops else None
        row = replace(
            row, **times, calls=spread.calls, clock=clock.__name__, steps_per_second=_digits(rate),
            tokens_per_second=_digits(rate * row.length * row.batch_size), utilisation=_digits(use),
            protocol=(
                "random tokens, no padding" + ", dropout on" * (row.mode != "forward") + "; warm, each call waited for, "
                f"in turn with {len(ready) - 1} other layers; medians"
            ),
        )  # fmt: skip
        found[layer] = replace(row, **_energy(call, spread.median, settings))
    return found


def _energy(call: Callable, seconds: float, settings: Settings) -> dict[str, Any]:
    joules = source = None
    if settings.meter is not None and settings.energy_seconds > 0:
        try:
            joules, source = energy.per_call(call, settings.meter, settings.energy_seconds), settings.meter.source
        except Exception as error:
            source = f"not read: {one_line(error)}"
    cost = energy.cost(seconds, joules, source, **settings.rates)
    return {name: _digits(value) if isinstance(value, float) else value for name, value in cost.items()}


def _ratios(rows: dict[str, Measurement], settings: Settings) -> dict[str, Measurement]:
    """The rows with their ratios to the baseline's."""
    base = rows.get(settings.baseline)
    if base is None:
        return rows
    found = {}
    for layer, row in rows.items():
        speed = base.median_ms / row.median_ms if base.median_ms and row.median_ms else None
        memory = row.peak_bytes / base.peak_bytes if base.peak_bytes and row.peak_bytes else None
        found[layer] = replace(row, baseline=settings.baseline, speed_ratio=_digits(speed), memory_ratio=_digits(memory))
    return found


def _check_room(peak: int, held: int, limit: int) -> None:
    """Raises: TooLarge: a compiled program does not fit beside the arguments of the others."""
    if peak + held > limit:
        mebi = lambda size: f"{size / 2**20:,.0f} MiB"
        others = f" beside the {mebi(held)} of the others' arguments" if held else ""
        raise sizes.TooLarge(f"memory: the program needs {mebi(peak)}{others}, of {mebi(limit)}")


def _digits(value: float | None) -> float | None:
    """Six significant digits."""
    return None if value is None else float(f"{value:.6g}")
