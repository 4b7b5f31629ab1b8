"""Time, memory, FLOPs and energy of every layer's model against length: forward, with gradient, and in a training step.

subquad bench --lengths 1024,4096,16384

Layers are timed in turn with the baseline, softmax, so that ratios are of one run. The CSV keeps its other rows; tables
(Markdown, LaTeX) and plots of all its rows are written beside it. Nothing is run that compiled memory shows not to fit.
"""

import dataclasses
import math
import os
from collections.abc import Iterable, Sequence

import jax

from subquad.kernels import dispatch
from subquad.lra import machine, models, progress, sizes
from subquad.lra.bench import energy, programs, speed, timing
from subquad.lra.cli import commands, report
from subquad.lra.data.sources import size
from subquad.lra.files import one_line
from subquad.lra.report import csv_rows, measurements
from subquad.lra.report.measurements import MODES
from subquad.lra.run import Run
from subquad.zoo import LAYERS

LIMITS = ("length", "batch")
# What the model, or another option, decides.
FIXED = ("recipe", "task", "config", "layer", "layer_options")


def parse(command_line: Sequence[str] | None, program: str):
    parser = commands.Parser(prog=program, description=__doc__)
    add = parser.add_argument
    count, positive, amount = commands.number(int, 1), commands.number(float, 0, above=True), commands.number(float, 0)
    add("--model", default="lra-text", choices=list(programs.MODELS), help="lra-text: the arena's, of its table 2; default")
    add("--layers", nargs="+", action=commands.Words, metavar="LAYER", help="default: all")
    usual = [1024, 2048, 3072, 4096]
    add("--lengths", type=commands.parse_lengths, default=usual, metavar="N,N", help="in tokens; default: 1K,2K,3K,4K")
    modes = dict(nargs="+", action=commands.Words, metavar="MODE")
    add("--modes", **modes, default=list(MODES), help=f"of {','.join(MODES)}; default: all")
    add("--batch-size", type=count, default=None, help="default: 1 on a CPU, else 32")
    add("--dtype", default="float32", choices=("float32", "bfloat16"), help="of activations; default: float32")
    add("--implementation", default=None, metavar="NAME", help="of the layers' kernels; default: their own choice")
    add("--layer-options", nargs="+", default=[], metavar="NAME=VALUE", help="for all layers, or LAYER.NAME=VALUE for one")
    add("--override", nargs="+", default=[], metavar="NAME=VALUE", help="values of the run, as in_features=512")
    plain = f"what ratios are to; {programs.PLAIN}: one that keeps all logits in memory; default: softmax"
    add("--baseline", default="softmax", metavar="LAYER", help=plain)
    add("--seconds", type=positive, default=2.0, help="of timing for each layer, mode and length; default: 2")
    add("--repeats", type=count, default=None, help="timed calls of each, instead")
    add("--threads", type=int, default=None, help="default: all processors")
    add("--memory-limit", type=commands.parse_size, default=None, metavar="SIZE", help="as 16G; default: what is free")
    limits = "of length,batch: find the largest that fit; compiles a lot"
    add("--limits", nargs="+", action=commands.Words, default=[], metavar="LIMIT", help=limits)
    peaks = "observe each peak of memory in a process of its own; default: on a GPU"
    add("--peaks", action=commands.argparse.BooleanOptionalAction, default=None, help=peaks)
    add("--energy-seconds", type=amount, default=2.0, help="of reading the meter for each; 0: not; default: 2")
    add("--watts", type=positive, default=None, help="power to estimate energy from where no meter is")
    add("--grid-intensity", type=amount, default=None, metavar="G", help="grams of CO2e per kWh; default: no CO2e")
    add("--price-per-hour", type=amount, default=None, metavar="P", help="of the machine; default: no price")
    add("--currency", default="USD", help="of that price; default: USD")
    add("--out", default="runs/bench/lra.csv", metavar="CSV", help="default: %(default)s")
    return check_arguments(parser.parse_args(command_line))


def check_arguments(arguments):
    arguments.layers = list(LAYERS) if arguments.layers is None else arguments.layers
    # A layer of the user's own is package.module:Class.
    named = lambda layers: [name for name in layers if ":" not in name]
    for option, given, known in (
        ("--layers", named(arguments.layers), (*LAYERS, programs.PLAIN)),
        ("--baseline", named([arguments.baseline]), (*LAYERS, programs.PLAIN)),
        ("--modes", arguments.modes, MODES), ("--limits", arguments.limits, LIMITS),
    ):  # fmt: skip
        check_known(f"{option} must be a known name", given, known)
    if arguments.implementation is not None:
        dispatch.check_name("--implementation", arguments.implementation)
    return arguments


def main(command_line: Sequence[str] | None = None, program: str = "bench_lra") -> int:
    """Does what the words of a command line say; None: of this process."""
    arguments = parse(command_line, program)
    csv_rows.check_file(arguments.out, measurements.Measurement)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # processes that observe a peak need room, too
    jax.config.update("jax_enable_compilation_cache", False)  # it would make compiling look free
    layers = list(dict.fromkeys([arguments.baseline, *arguments.layers]))
    settings = prepare(arguments, layers)
    races, measured = [(length, mode) for length in sorted(arguments.lengths) for mode in arguments.modes], []
    try:
        # Time left is guessed from the lengths that are done.
        with progress.Work("all measurements", sum(length for length, _ in races)) as work:
            for number, (length, mode) in enumerate(races, 1):
                title = f"[{number}/{len(races)}] {measurements.length_label(length)}, {mode}"
                rows = speed.race(layers, length, mode, settings, lambda text, title=title: progress.say(f"{title}: {text}"))
                measurements.write_measurements(rows, arguments.out)
                measured += rows
                for row in rows:
                    if row.status != "ok":
                        progress.say(f"{title}: {row.layer}: {row.status}")
                work.advance(length)
    finally:
        if measured:
            report.show_measurements(arguments.out, measured)
    return commands.FAILED if any(row.status.startswith("failed") for row in measured) else 0


def prepare(arguments, layers: list[str]) -> speed.Settings:
    """Looks at the machine, and says what it finds, once every layer is known to have a model."""
    threads = timing.limit_threads(arguments.threads)  # before JAX starts
    on_cpu = jax.default_backend() == "cpu"
    limit, source = machine.available_memory()
    if arguments.memory_limit is not None:
        limit, source = arguments.memory_limit, "--memory-limit"
    meter, reason = energy.meter(jax.devices()[0])
    values = commands.assignments(arguments.override, "--override", "in_features=512")
    chosen = lambda *names: {name: getattr(arguments, name) for name in names}
    settings = speed.Settings(
        **chosen("model", "implementation", "baseline", "seconds", "repeats", "limits", "energy_seconds"),
        rates=chosen("watts", "grid_intensity", "price_per_hour", "currency"), dtype=values.pop("dtype", arguments.dtype),
        batch_size=values.pop("batch_size", arguments.batch_size or programs.usual_batch_size()), values=values,
        options=commands.assignments(arguments.layer_options), threads=threads if on_cpu else None, memory_limit=limit,
        memory_source=source, matmul_rate=math.nan, peaks=not on_cpu if arguments.peaks is None else arguments.peaks,
        meter=meter, session=machine.utc_now(),
    )  # fmt: skip
    for length in arguments.lengths:
        check_length(settings, layers[0], length, arguments.modes)
    check_models(settings, layers, max(arguments.lengths))
    rate = timing.matmul_rate(settings.dtype, clock=timing.clock_of(threads if on_cpu else 0))
    progress.say(f"{machine.hardware()}: matrix product {rate / 1e9:,.0f} GFLOP/s in {settings.dtype}")
    progress.say(f"Memory for programs: {limit / 2**30:.1f} GiB, {source}")
    instead = f"estimated from {arguments.watts:g} W" if arguments.watts else "unknown; --watts estimates it"
    progress.say(f"Energy: {meter.source if meter else f'{instead} (no meter: {reason})'}")
    return dataclasses.replace(settings, matmul_rate=rate)


def check_models(settings: speed.Settings, layers: list[str], length: int) -> None:
    """Refuses --override and --layer-options that no model can be built with.

    Raises: ValueError.
    """
    known = [one.name for one in dataclasses.fields(Run) if one.name not in FIXED]
    check_known("--override must be a value that can be changed", settings.values, known)
    of_layers = [name.rpartition(".")[0] for name in settings.options if "." in name]
    check_known("--layer-options must be of a layer that is measured", of_layers, layers)
    for layer in progress.over(layers, "Models"):
        try:
            models.count_parameters(*settings.plan(layer, length))
        except (ValueError, TypeError) as error:
            got = one_line(error)
            raise ValueError(f"layer {layer} must take its options and the values of the run, got {got}.") from error


def check_known(condition: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raises: ValueError: a name that is not known, with the nearest that is."""
    for name in given:
        if name not in known:
            raise ValueError(f"{condition}, got {name!r}. {dispatch.nearest(name, known)}")


def check_length(settings: speed.Settings, layer: str, length: int, modes: list[str]) -> None:
    """Refuses a length of which no mode of any layer fits into memory, whatever its layers do.

    Raises: ValueError.
    """
    try:
        run, task = settings.plan(layer, length)
    except (ValueError, TypeError):  # which `check_models` explains
        return
    needed = min(sizes.least(run, task, mode, counted=False).total for mode in modes)
    if needed > settings.memory_limit:
        raise ValueError(
            f"--lengths must fit into {size(settings.memory_limit)} ({settings.memory_source}), got {length:,}: a batch of "
            f"{run.batch_size:,} at {run.in_features:,} features takes {size(needed)} at the least. Leave it out."
        )
