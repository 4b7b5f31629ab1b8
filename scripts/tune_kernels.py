"""Finds the fastest configuration of every Triton kernel on this GPU and writes kernels/tuned/<device>.json.

Candidates are block sizes, warps and stages around the heuristic; timed are only those that compile without spills and are
as right as the tests ask.

python scripts/tune_kernels.py --spec softmax.attention/causal --length 4096
python scripts/tune_kernels.py --list --target sm_90       what would be timed, on a machine without a GPU
"""

if __name__ == "__main__":  # before the libraries, which take seconds to load
    from subquad.lra import interrupts

    interrupts.exit_during_startup("tune_kernels")

import itertools
import json

import jax
from rich.console import Console
from rich.progress import track

from subquad.kernels import dispatch, gate, gpu, launch, machine_code, specs, tuning
from subquad.lra.bench import timing
from subquad.lra.cli import commands

WARPS, STAGES = (4, 8), (1, 2, 3, 4)
SMALLEST, LARGEST = 16, 256  # sides of a block


def parse():
    parser = commands.Parser(prog="tune_kernels", description=__doc__)
    parser.add_argument("--spec", nargs="+", help="names such as softmax.attention/causal; default: all")
    parser.add_argument("--targets", action="store_true", help="the shapes of published times; default: those of the tests")
    usual, count = "of the sequences; default: those of each operation's benchmarks", commands.number(int, 1)
    parser.add_argument("--length", type=count, nargs="+", help=usual)
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"], choices=launch.FLOATS)
    parser.add_argument("--repeats", type=count, default=20, help="timed runs of each candidate; default: 20")
    parser.add_argument("--list", action="store_true", help="print the candidates that fit, time nothing")
    parser.add_argument("--target", default="sm_90", help="for --list: the GPU to compile for; default: sm_90")
    return parser.parse_args()


def around(heuristic: tuning.Config) -> list[tuning.Config]:
    """The heuristic first, then all with blocks of half, the same and twice its size."""
    names = list(heuristic.blocks)
    sides = [[s for s in (n // 2, n, 2 * n) if s == n or SMALLEST <= s <= LARGEST] for n in heuristic.blocks.values()]
    found = [
        tuning.Config(dict(zip(names, blocks, strict=True)), warps, stages)
        for blocks, warps, stages in itertools.product(itertools.product(*sides), WARPS, STAGES)
    ]
    return [heuristic, *(config for config in found if config != heuristic)]


def requests_of(spec, dtype, length, target="sm_90") -> dict[tuning.Request, tuning.Config]:
    with tuning.trying({}) as requested:
        specs.launches(spec, dtype, length, target=target)
        return dict(requested)


def fits(spec, dtype, length, target, request, config, heuristic) -> bool:
    """Whether the configuration is launched as it stands, and all that is launched because of it compiles and fits the target.

    An operation may cut blocks down to a short axis: then this is no candidate.
    """
    with tuning.trying({request: heuristic}):
        usual = specs.launches(spec, dtype, length, target=target)
    try:
        with tuning.trying({request: config}):
            tried = specs.launches(spec, dtype, length, target=target)
    except launch.Unordered:
        return False
    if config == heuristic:  # which changes nothing
        changed = [one for one in tried if uses(one, config)]
    else:
        changed = [one for one in tried if one not in usual]
    try:
        return any(uses(one, config) for one in changed) and all(machine_code.compile(one, target).fits for one in changed)
    except machine_code.Refused:
        return False


def uses(one: launch.Launch, config: tuning.Config) -> bool:
    """Whether this launch has the configuration, with any other blocks beside its own."""
    same = (one.config.num_warps, one.config.num_stages) == (config.num_warps, config.num_stages)
    return same and config.blocks.items() <= one.config.blocks.items()


def right(spec, dtype, length, request, config) -> bool:
    """Whether outputs and gradients pass the gate of the benchmarks, at this length."""
    with tuning.trying({request: config}):
        return gate.check(spec, "triton", length, dtype).passed


def seconds(spec, dtype, length, request, config, repeats) -> float:
    """The median time of a forward and backward pass, of several in one program."""
    inexact, rest = specs.split(spec.draw(length, dtype, bench=True))
    cotangents = specs.cotangents(spec, "triton", {**inexact, **rest})
    jax.clear_caches()  # of the candidate before
    with tuning.trying({request: config}):
        function = specs.forward_backward(spec, "triton", rest)
        once = jax.jit(function)
        count = specs.repeats_for(lambda: jax.block_until_ready(once(inexact, cotangents)))
        run = jax.jit(specs.repeated(function, count))
        call = lambda: jax.block_until_ready(run(inexact, cotangents))
        return timing.time_alternately([call], repeats=repeats)[0].median / count


def write(kind: str, rows: dict[tuning.Request, tuning.Config]) -> None:
    """The table of this device, with what is already in it."""
    tuning.TUNED.mkdir(exist_ok=True)
    rows = tuning.tuned(kind) | rows
    table = [
        dict(kernel=request.kernel, sizes=dict(request.sizes), blocks=dict(config.blocks), num_warps=config.num_warps,
             num_stages=config.num_stages)
        for request, config in sorted(rows.items(), key=lambda row: str(row[0]))
    ]  # fmt: skip
    (tuning.TUNED / f"{kind}.json").write_text(json.dumps(dict(device=kind, jax=jax.__version__, rows=table), indent=1) + "\n")


def main() -> int:
    arguments = parse()
    if arguments.target not in machine_code.TARGETS:
        nearest = dispatch.nearest(arguments.target, machine_code.TARGETS)
        raise ValueError(f"target must be a known one, got {arguments.target!r}. {nearest}")
    if not arguments.list:
        try:
            launch.require("triton")
        except launch.Declined as reason:
            raise ValueError(f"tuning needs an NVIDIA GPU: {reason} Use --list to see the candidates.") from None
    target = arguments.target if arguments.list else f"sm_{gpu.capability()}"
    work = {}
    for spec, dtype in itertools.product(chosen(arguments), arguments.dtype):
        for length in arguments.length or spec.bench_lengths:
            for request, heuristic in requests_of(spec, dtype, length, target).items():
                work.setdefault(request, (spec, dtype, length, heuristic))
    best = {}
    for request, (spec, dtype, length, heuristic) in track(work.items(), "Tuning", console=Console(stderr=True)):
        name, candidates = f"{request.kernel} {dict(request.sizes)}", around(heuristic)
        fitting = [c for c in candidates if fits(spec, dtype, length, target, request, c, heuristic)]
        if arguments.list:
            print(f"{name}: {len(fitting)} of {len(candidates)} fit {target}")
            for config in fitting:
                print(f"    {dict(config.blocks)} warps={config.num_warps} stages={config.num_stages}")
            continue
        passed = [c for c in fitting if right(spec, dtype, length, request, c)]
        found = f"{len(fitting)} of {len(candidates)} fit, {len(passed)} are right"
        if not passed:
            print(f"{name}: skipped, {found}")
            continue
        times = {c: seconds(spec, dtype, length, request, c, arguments.repeats) for c in passed}
        best[request] = min(times, key=times.get)
        print(f"{name}: {found}; {best[request]}, {times[best[request]] * 1e3:.3f} ms; "
              f"heuristic {times.get(heuristic, float('nan')) * 1e3:.3f} ms")  # fmt: skip
        write(gpu.device_kind(), best)
    return 0


def chosen(arguments) -> list[specs.Spec]:
    """The specs named, or all that have lengths to be tuned at."""
    usual = specs.targets() if arguments.targets else specs.load()
    found = [specs.find(name) for name in arguments.spec] if arguments.spec else list(usual.values())
    found = [spec for spec in found if "triton" in spec.implementations]
    for spec in found:
        if arguments.spec and not (arguments.length or spec.bench_lengths):
            raise ValueError(f"--length must be given for {spec.name}, got none. It is no shape of the benchmarks.")
    return [spec for spec in found if arguments.spec or spec.bench_lengths]


if __name__ == "__main__":
    commands.run("tune_kernels", main)
