"""Compiles every Triton kernel for real GPUs, on a machine that needs none, and writes what the machine code takes as CSV.

A file that is there keeps its rows of other calls, dtypes and targets, so that one kernel can be done again.

python scripts/aot_kernels.py --spec softmax.attention/causal --target sm_90
python scripts/aot_kernels.py --grid --target sm_90 --dtype bfloat16 float16 float32 --out grid.csv
"""

if __name__ == "__main__":  # before the libraries, which take seconds to load
    from subquad.lra import interrupts

    interrupts.exit_during_startup("aot_kernels")

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from rich.console import Console  # noqa: E402
from rich.progress import track  # noqa: E402

from subquad.kernels import dispatch, machine_code, specs, tuning  # noqa: E402
from subquad.lra import files  # noqa: E402
from subquad.lra.cli import commands  # noqa: E402
from subquad.lra.report import csv_rows, text_tables  # noqa: E402

OUT = pathlib.Path(__file__).parents[1] / "kernels" / "results" / "aot.csv"
COUNTS = ("registers", "stack", "spills", "shared", "tensor_core", "fma", "transposes")
FIELDS = ("spec", "dtype", "kernel", "configuration", "target", *COUNTS, "fits", "refused", "triton")


def parse():
    parser = commands.Parser(prog="aot_kernels", description=__doc__)
    parser.add_argument("--spec", nargs="+", help="names such as softmax.attention/causal; default: all")
    parser.add_argument("--grid", action="store_true", help="the grid of head sizes by kinds of call as well: takes hours")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"], choices=specs.DTYPES)
    parser.add_argument("--target", nargs="+", help=f"of {', '.join(machine_code.TARGETS)}; default: all")
    usual = "of the sequences; default: the middle one of each operation's benchmarks"
    parser.add_argument("--length", type=commands.number(int, 1), help=usual)
    parser.add_argument("--out", default=str(OUT), help="the CSV; default: kernels/results/aot.csv")
    return parser.parse_args()


def describe(config: tuning.Config) -> str:
    blocks = [f"{name.removeprefix('BLOCK_').lower()}={size}" for name, size in config.blocks.items()]
    return " ".join([*blocks, f"warps={config.num_warps}", f"stages={config.num_stages}"])


def write(out: pathlib.Path, rows: list[dict]) -> None:
    """The rows by spec, dtype and target, in the order of those."""
    place = [{name: place for place, name in enumerate(names)} for names in (specs.load() | specs.grid(), specs.DTYPES)]
    order = lambda row: (place[0][row["spec"]], place[1][row["dtype"]], machine_code.TARGETS.index(row["target"]))
    lines = [",".join(FIELDS), *(csv_rows.row_as_line(row, FIELDS) for row in sorted(rows, key=order))]
    files.write_whole(out, "".join(f"{line}\n" for line in lines).encode())


def others(out: pathlib.Path, spec: specs.Spec, dtypes, targets) -> list[dict]:
    """What the file holds of other calls, and of this one for other dtypes and targets."""
    known = specs.load() | specs.grid()
    done_again = lambda row: row["spec"] == spec.name and row["dtype"] in dtypes and row["target"] in targets
    return [row for row in csv_rows.read_rows(out) if row["spec"] in known and not done_again(row)]


def rows_of(spec: specs.Spec, dtypes, targets, length: int | None):
    """One row per kernel, dtype and target; a target whose compiler refuses is a row that says so."""
    import triton

    for dtype in dtypes:
        for target in targets:
            for launched in specs.launches(spec, dtype, length, target=target):
                row = dict(
                    spec=spec.name, dtype=dtype, kernel=launched.name, configuration=describe(launched.config), target=target,
                    triton=triton.__version__,
                )  # fmt: skip
                try:
                    code = machine_code.compile(launched, target)
                except machine_code.Refused as refusal:
                    yield row | dict(fits=False, refused=str(refusal))
                    continue
                yield row | {name: getattr(code, name) for name in COUNTS} | dict(fits=code.fits, refused="")


def main() -> int:
    arguments = parse()
    targets = arguments.target or machine_code.TARGETS
    for target in targets:
        if target not in machine_code.TARGETS:
            raise ValueError(f"target must be a known one, got {target!r}. {dispatch.nearest(target, machine_code.TARGETS)}")
    everything = specs.load() | (specs.grid() if arguments.grid else {})
    chosen = [specs.find(name) for name in arguments.spec] if arguments.spec else list(everything.values())
    chosen = [spec for spec in chosen if "triton" in spec.implementations]
    out = pathlib.Path(arguments.out)
    csv_rows.check_file(out, FIELDS)
    shown = []
    for spec in track(chosen, description="Compiling", console=Console(stderr=True)):
        rows = list(rows_of(spec, arguments.dtype, targets, arguments.length))
        for row in rows:
            if row["refused"]:
                shown.append([row["spec"], row["kernel"], row["dtype"], row["target"], *4 * ["-"], "refused"])
                continue
            shown.append([
                row["spec"], row["kernel"], row["dtype"], row["target"], str(row["registers"]), str(row["spills"]),
                str(row["shared"] >> 10), str(row["tensor_core"]), "yes" if row["fits"] else "no",
            ])  # fmt: skip
        write(out, [*others(out, spec, arguments.dtype, targets), *rows])  # who stops it loses no row
    heading = "spec", "kernel", "dtype", "target", "registers", "spills", "shared KiB", "tensor cores", "fits"
    text_tables.print_table([heading, *shown], left=4)
    print(f"Wrote {out}.")
    return 0


if __name__ == "__main__":
    commands.run("aot_kernels", main)
