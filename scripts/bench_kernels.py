"""Times every operation at named shapes, and prints a number only where the operation was right in this same run.

Right means by the float64 reference at that length. Where that takes more than 1 GiB, dense attention is checked with a sample
of queries at that length, and the XLA path of other operations at a shorter length: the last column says what was checked.

A time is that of one call among several in one program: what starts a program takes longer than a fast kernel. Beside it: what
part of this machine's copy bandwidth and matrix rate, both measured first, it amounts to.
"""

if __name__ == "__main__":  # before the libraries, which take seconds to load
    from subquad.lra import interrupts

    interrupts.exit_during_startup("bench_kernels")

import sys
import time

import jax

from subquad.kernels import dispatch, gate, specs
from subquad.kernels.launch import FLOATS
from subquad.lra import machine
from subquad.lra.bench import measure, timing
from subquad.lra.cli import commands
from subquad.lra.files import one_line
from subquad.lra.report import csv_rows, plots, text_tables

DIRECTIONS = ("forward", "both")
KEY = ("spec", "implementation", "device", "length", "dtype", "direction", "threads")
NUMBERS = (
    "best_ms", "lower_ms", "median_ms", "upper_ms", "calls", "calls_in_program", "compile_seconds", "temporary_bytes",
    "moved_bytes", "flops",
    "copy_percent", "matmul_percent",
)  # fmt: skip
GATE = ("error", "allowed", "against")
MACHINE = ("copy_bytes_per_second", "matmul_flops_per_second", "commit", "versions", "hardware", "processor", "finished_utc")
FIELDS = ("status", *KEY, *NUMBERS, *GATE, *MACHINE)


def parse():
    parser = commands.Parser(prog="bench_kernels", description=__doc__)
    named = "linear.attention, or one shape of it, linear.attention/causal; default: all"
    parser.add_argument("--operation", nargs="+", default=None, metavar="NAME", help=named)
    published = "the shapes of published times in place of those of the tests, as softmax.attention/causal-2x16384x16x128"
    parser.add_argument("--targets", action="store_true", help=published)
    parser.add_argument("--implementation", nargs="+", default=None, metavar="NAME", help="default: xla, and triton on a GPU")
    parser.add_argument("--length", nargs="+", type=commands.number(int, 1), default=None, help="default: those of each shape")
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=FLOATS, help="default: float32")
    parser.add_argument("--direction", nargs="+", default=DIRECTIONS, choices=DIRECTIONS, help="both: with the backward pass")
    repeats = "timed calls of each; default: what 2 seconds allow, 2 to 50"
    parser.add_argument("--repeats", type=commands.number(int, 1), default=None, help=repeats)
    parser.add_argument("--threads", type=int, default=None, help="default: all processors")
    parser.add_argument("--out", default="runs/bench/kernels.csv", help="CSV, with a plot beside it; default: %(default)s")
    arguments = parser.parse_args()
    for name in arguments.implementation or ():
        dispatch.check_name("--implementation", name)
    return arguments


def chosen(names: list[str] | None, targets: bool = False) -> list[specs.Spec]:
    """The specs of these operations or of these full names, of the usual shapes or of those that others publish."""
    known = specs.targets() if targets else specs.load()
    if names is None:
        return list(known.values())
    operations = {spec.operation for spec in known.values()}
    for name in names:
        if name not in known and name not in operations:
            hint = dispatch.nearest(name, known if "/" in name else operations)
            raise ValueError(f"--operation must be a known name, got {name!r}. {hint}")
    return [spec for spec in known.values() if spec.name in names or spec.operation in names]


def main() -> int:
    arguments = parse()
    selected = chosen(arguments.operation, arguments.targets)
    csv_rows.check_file(arguments.out, FIELDS)
    threads = timing.limit_threads(arguments.threads)  # before JAX starts
    arguments.implementation = arguments.implementation or ["xla", *["triton"] * (jax.default_backend() == "gpu")]
    rates = {dtype: timing.matmul_rate(dtype) for dtype in arguments.dtype}
    bandwidth = timing.copy_bandwidth()
    products = ", ".join(f"{dtype} {rate / 1e9:.0f} GFLOP/s" for dtype, rate in rates.items())
    print(f"Copy {bandwidth / 1e9:.1f} GB/s; matrix product {products}")
    rows = []
    try:
        for spec in selected:
            for length in arguments.length or spec.bench_lengths:
                for dtype in arguments.dtype:
                    for row in bench(spec, length, dtype, arguments):
                        row |= rating(row, bandwidth, rates[dtype])
                        row |= dict(threads=threads, device=jax.default_backend(), finished_utc=machine.utc_now())
                        row |= machine.environment() | dict(processor=machine.processor())
                        rows.append({name: row.get(name) for name in FIELDS})
                        csv_rows.write_rows(arguments.out, FIELDS, rows[-1:], KEY)
                        print(f"{spec.name}, T = {length}, {row['implementation']}: {row['status']}", file=sys.stderr)
    finally:
        if rows:
            show(rows)
            print(f"{machine.hardware()}; rows in {arguments.out}.")
    draw(arguments.out)
    return commands.FAILED if any(row["status"].startswith("failed") for row in rows) else 0


def bench(spec, length, dtype, arguments):
    """The rows of one shape: all implementations that pass, timed in turn, for each direction."""
    blank = dict(spec=spec.name, length=length, dtype=dtype)
    passed = {}
    for name in arguments.implementation:
        if name not in ("xla", "reference", *spec.implementations):
            continue
        try:
            verdict = gate.check(spec, name, length, dtype)
        except dispatch.Declined as reason:
            yield blank | dict(implementation=name, direction="both", status=f"not run: {one_line(reason)}")
        except Exception as error:  # one shape's fault is a row; the others still run
            yield blank | dict(implementation=name, direction="both", status=f"failed: {one_line(error)}")
        else:
            found = blank | dict(implementation=name) | verdict._asdict()
            if verdict.passed:
                passed[name] = found
            else:
                wrong = f"failed: wrong by {verdict.error:.1e}, allowed {verdict.allowed:.1e}"
                yield found | dict(direction="both", status=wrong)
    for direction in arguments.direction if passed else ():
        programs = {name: program(spec, name, length, dtype, direction) for name in passed}
        calls = [call for call, _ in programs.values()]
        spreads = timing.time_alternately(calls, seconds=2.0 * len(calls), repeats=arguments.repeats)
        for (name, (_, facts)), spread in zip(programs.items(), spreads, strict=True):
            scale = 1e3 / facts["calls_in_program"]
            times = {f"{word}_ms": round(scale * getattr(spread, word), 4) for word in ("best", "lower", "median", "upper")}
            yield passed[name] | facts | times | dict(calls=spread.calls, direction=direction, status="ok")


def program(spec, name, length, dtype, direction):
    """(several calls in one program that waits for its results, facts of a compiled program of one call)."""
    function, words = call_of(spec, name, length, dtype, direction)
    began = time.perf_counter()
    compiled = jax.jit(function).lower(*words).compile()
    seconds = time.perf_counter() - began
    memory = measure.memory_of(compiled)
    count = specs.repeats_for(lambda: jax.block_until_ready(compiled(*words)))
    if count > 1:
        compiled = jax.jit(specs.repeated(function, count)).lower(*words).compile()
    facts = dict(
        calls_in_program=count,
        compile_seconds=round(seconds, 3), temporary_bytes=memory.temporary, moved_bytes=memory.arguments + memory.outputs,
        flops=flops(spec, length, dtype, direction),
    )  # fmt: skip
    return lambda: jax.block_until_ready(compiled(*words)), facts


def call_of(spec, name, length, dtype, direction):
    """(function of an implementation, its arguments)."""
    inexact, cotangents, rest = gate.problem(spec, length, dtype)
    if direction == "forward":
        return specs.forward(spec, name, rest), (inexact,)
    return specs.forward_backward(spec, name, rest), (inexact, cotangents)


def flops(spec, length, dtype, direction) -> int | None:
    """Of the XLA path, whatever runs; None where a loop's trip count is not written in the program."""
    function, words = call_of(spec, "xla", length, dtype, direction)
    try:
        return measure.flops(function, *words)
    except ValueError:  # so says measure.flops
        return None


def rating(row, bandwidth: float, rate: float) -> dict:
    """The part of the machine's measured rates that the median amounts to."""
    found = dict(copy_bytes_per_second=round(bandwidth), matmul_flops_per_second=round(rate))
    if "median_ms" not in row:
        return found
    seconds = row["median_ms"] / 1e3
    found["copy_percent"] = round(100 * row["moved_bytes"] / seconds / bandwidth, 1)
    if row["flops"]:
        found["matmul_percent"] = round(100 * row["flops"] / seconds / rate, 1)
    return found


def show(rows) -> None:
    heading = "shape,implementation,T,dtype,direction,median ms,quartiles,compile s,temporary MiB,% copy,% matmul,error"
    heading += ",checked against"
    body = []
    for row in rows:
        text = lambda name, form, row=row: "" if row[name] is None else format(row[name], form)
        ok = row["status"] == "ok"
        body.append([
            row["spec"] if ok else f"{row['spec']}: {row['status']}", row["implementation"], str(row["length"]), row["dtype"],
            row["direction"], text("median_ms", ".3g"), f"{row['lower_ms']:.3g}-{row['upper_ms']:.3g}" if ok else "",
            text("compile_seconds", ".2f"), f"{row['temporary_bytes'] / 2**20:.1f}" if ok else "", text("copy_percent", ".1f"),
            text("matmul_percent", ".1f"), text("error", ".0e"), row["against"] or "",
        ])  # fmt: skip
    text_tables.print_table([heading.split(","), *body], left=2)


def draw(path: str) -> None:
    """Time and temporary memory against length, a row of panels for each operation, from all rows of the CSV."""
    rows = sorted((row for row in csv_rows.read_rows(path) if row["status"] == "ok"), key=lambda row: int(row["length"]))
    name_of = lambda row: ", ".join(row[name] for name in ("spec", "implementation", "dtype", "device", "direction"))
    panels = []
    for operation in dict.fromkeys(row["spec"].partition("/")[0] for row in rows):
        for column, label, unit in (("median_ms", "time, ms", 1), ("temporary_bytes", "temporary memory, MiB", 2**20)):
            lines: dict[str, list] = {}
            for row in rows:
                if row["spec"].partition("/")[0] == operation:
                    point = plots.Point(int(row["length"]), max(float(row[column]) / unit, 1e-3))
                    lines.setdefault(name_of(row), []).append(point)
            panels.append((operation, label, lines))
    if panels:
        plots.against_length(panels, map(name_of, rows), "", str(path).removesuffix(".csv") + ".png")


if __name__ == "__main__":
    commands.run("bench_kernels", main)
