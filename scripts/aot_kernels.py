"""Compiles every Triton kernel for real GPUs, on a machine that needs none, and writes what the machine code takes as CSV.

python scripts/aot_kernels.py --spec softmax.attention/causal --target sm_90
"""

if __name__ == "__main__":  # before the libraries, which take seconds to load
    from subquad.lra import starting

    starting.begin("aot_kernels")

import csv
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from rich.console import Console  # noqa: E402
from rich.progress import track  # noqa: E402

from subquad.kernels import dispatch, launch, machine_code, specs  # noqa: E402
from subquad.lra import commands, racing  # noqa: E402

OUT = pathlib.Path(__file__).parents[1] / "kernels" / "results" / "aot.csv"
DTYPES = ("bfloat16", "float32")
COUNTS = ("registers", "stack", "spills", "shared", "tensor_core", "fma", "transposes")
FIELDS = ("spec", "dtype", "kernel", "configuration", "target", *COUNTS, "fits", "refused", "triton")


def parse():
    parser = commands.Parser(prog="aot_kernels", description=__doc__)
    parser.add_argument("--spec", nargs="+", help="names such as softmax.attention/causal; default: all")
    parser.add_argument("--target", nargs="+", help=f"of {', '.join(machine_code.TARGETS)}; default: all")
    parser.add_argument("--length", type=int, help="of the sequences; default: the middle one of each operation's benchmarks")
    parser.add_argument("--out", default=str(OUT), help="the CSV; default: kernels/results/aot.csv")
    return parser.parse_args()


def describe(config: launch.Config) -> str:
    blocks = [f"{name.removeprefix('BLOCK_').lower()}={size}" for name, size in config.blocks.items()]
    return " ".join([*blocks, f"warps={config.num_warps}", f"stages={config.num_stages}"])


def rows_of(spec: specs.Spec, targets, length: int | None):
    """One row per kernel, dtype and target; a target whose compiler refuses is a row that says so."""
    import triton

    for dtype in DTYPES:
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
    chosen = [specs.find(name) for name in arguments.spec] if arguments.spec else list(specs.load().values())
    chosen = [spec for spec in chosen if "triton" in spec.implementations]
    out = pathlib.Path(arguments.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    shown = []
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        for spec in track(chosen, description="Compiling", console=Console(stderr=True)):
            for row in rows_of(spec, targets, arguments.length):
                writer.writerow(row)
                file.flush()
                if row["refused"]:
                    shown.append([row["spec"], row["kernel"], row["dtype"], row["target"], *4 * ["-"], "refused"])
                    continue
                shown.append([
                    row["spec"], row["kernel"], row["dtype"], row["target"], str(row["registers"]), str(row["spills"]),
                    str(row["shared"] >> 10), str(row["tensor_core"]), "yes" if row["fits"] else "no",
                ])  # fmt: skip
    heading = "spec", "kernel", "dtype", "target", "registers", "spills", "shared KiB", "tensor cores", "fits"
    racing.show(heading, shown, left=4)
    print(f"Wrote {out}.")
    return 0


if __name__ == "__main__":
    commands.run("aot_kernels", main)
