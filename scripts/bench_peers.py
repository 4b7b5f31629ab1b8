"""Races our layers and kernels against other people's: in turn in one process, the memory of each side in its own.

`ours_ms`, `theirs_ms` and `time_ratio` are of the best call of each side; medians and quartiles stand in columns of their own.
A peer that is not installed is a row that says so. Peers: pip install -e .[bench]
"""

if __name__ == "__main__":  # before the libraries, which take seconds to load
    from subquad.lra import interrupts

    interrupts.exit_during_startup("bench_peers")

import dataclasses
import gc
import importlib.metadata
import json
import os
import subprocess
import sys

import jax
import numpy as np
from peers import Contest, contests
from peers.sides import Case

from subquad.kernels.dispatch import nearest
from subquad.lra import machine
from subquad.lra.bench import timing
from subquad.lra.cli import commands
from subquad.lra.files import one_line
from subquad.lra.report import csv_rows, text_tables

DIRECTIONS = {"forward": "forward", "both": "train"}
KEY = ("family", "contest", "device", "length", "batch", "heads", "features", "dtype", "direction", "threads")
NUMBERS = (
    *(f"{side}_{word}" for side in ("ours", "theirs") for word in ("ms", "lower_ms", "median_ms", "upper_ms")),
    "calls", "time_ratio", "ours_peak_bytes", "theirs_peak_bytes", "memory_ratio", "ours_temporary_bytes",
    "theirs_temporary_bytes", "ours_compile_seconds", "difference",
)  # fmt: skip
MACHINE = ("torch", "commit", "versions", "hardware", "processor", "finished_utc")
FIELDS = ("status", *KEY, "clock", *NUMBERS, "peer", "note", *MACHINE)
TOLERANCE = {"float32": 1e-3, "bfloat16": 4e-2, "float16": 1e-2}  # of the largest number, where both sides compute the same


def parse():
    parser = commands.Parser(prog="bench_peers", description=__doc__)
    known = list(dict.fromkeys(one.family for one in contests()))
    parser.add_argument("--device", default="cpu", choices=("cpu", "gpu"), help="default: cpu")
    parser.add_argument("--family", nargs="+", default=None, metavar="F", help=f"of {' '.join(known)}; default: all")
    usual, count, timed = [1024, 4096, 16384], commands.number(int, 1), commands.number(float, 0)
    parser.add_argument("--length", nargs="+", type=count, default=usual, help="default: 1024 4096 16384")
    parser.add_argument("--dtype", default="float32", choices=list(TOLERANCE), help="default: float32")
    words = list(DIRECTIONS)
    parser.add_argument("--direction", nargs="+", default=words, choices=words, help="both: with the backward pass")
    parser.add_argument("--match", default="", metavar="TEXT", help="only races whose name holds this")
    parser.add_argument("--threads", type=int, default=None, help="of either side; default: 1 with --device cpu, else all")
    parser.add_argument("--seconds", type=timed, default=4.0, help="of timing per race and direction; default: 4")
    parser.add_argument("--no-memory", action="store_true", help="leave the peak memory out: no further processes")
    parser.add_argument("--out", default="runs/bench/peers_DEVICE.csv", help="CSV; its other rows stay; default: %(default)s")
    parser.add_argument("--measure", default=None, help=commands.argparse.SUPPRESS)  # one side, in a process of its own
    arguments = parser.parse_args()
    for family in arguments.family or ():
        if family not in known:
            raise ValueError(f"--family must be a known name, got {family!r}. {nearest(family, known)}")
    if not any(arguments.match in one.name for one in contests()):
        raise ValueError(f"--match must be a part of a race's name, got {arguments.match!r}. Leave it out to see them all.")
    return arguments


def main() -> int:
    arguments = parse()
    if arguments.device == "cpu":
        jax.config.update("jax_platforms", "cpu")
        arguments.threads = 1 if arguments.threads is None else arguments.threads
    else:  # PyTorch needs room beside JAX, and so do the processes that observe a peak
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    arguments.threads = timing.limit_threads(arguments.threads)
    # One thread on a processor has a clock of its own, which other programs do not stretch.
    arguments.clock = timing.clock_of(arguments.threads if arguments.device == "cpu" else 0)
    if arguments.measure:
        print(json.dumps(measure(json.loads(arguments.measure))))
        return 0
    out = arguments.out.replace("DEVICE", arguments.device)
    csv_rows.check_file(out, FIELDS)
    rows = []
    try:
        for contest in contests():
            if arguments.family and contest.family not in arguments.family or arguments.match not in contest.name:
                continue
            if arguments.device not in contest.devices and contest.theirs is not None:
                continue
            for case in cases(contest, arguments):
                for row in race(contest, case, arguments):
                    rows.append(row)
                    csv_rows.write_rows(out, FIELDS, [row], KEY)
                    print(f"{row['contest']}, T = {row['length']}, {row['direction']}: {row['status']}", file=sys.stderr)
    finally:
        if rows:
            show(rows)
            print(f"{machine.hardware()}, {arguments.threads} thread(s) a side; rows in {out}.")
    return commands.FAILED if any(row["status"].startswith("failed") for row in rows) else 0


def cases(contest: Contest, arguments) -> list[Case]:
    given = dict(dtype=arguments.dtype, device=arguments.device)
    found = [Case(**{**given, "length": length, **contest.fixed}) for length in arguments.length]
    return found[:1] if "length" in contest.fixed else found


def race(contest: Contest, case: Case, arguments):
    """A row for each direction."""
    shared = dict(
        family=contest.family, contest=contest.name, **dataclasses.asdict(case), threads=arguments.threads,
        clock=arguments.clock.__name__, peer=_version(contest.peer), torch=_version("torch"),
        note=contest.note,
    )  # fmt: skip
    directions = arguments.direction if contest.theirs else ["both"]
    built = None
    for direction in directions:
        found = dict.fromkeys(NUMBERS)
        try:
            if case.device == "gpu" and jax.default_backend() != "gpu":
                raise NotRun("JAX finds no GPU on this machine")
            if contest.longest and case.length > contest.longest:
                raise NotRun(f"at most {contest.longest} tokens: {contest.why}")
            if contest.theirs is None:
                found |= facts(contest.ours(case), "train")
            else:
                built = built or (contest.ours(case), _theirs(contest, case))
                found |= compare(contest, case, built, direction, arguments)
            status = "ok"
        except NotRun as reason:
            status = f"not run: {reason}"
        except Exception as error:  # one race's fault is a row; the others still run
            status = f"failed: {one_line(error)}"
        row = dict(shared, direction=direction, status=status, **found, **machine.environment())
        row |= dict(processor=machine.processor(), finished_utc=machine.utc_now())
        yield {name: row[name] for name in FIELDS}


class NotRun(Exception):
    """A race that does not take place, and why."""


def _theirs(contest: Contest, case: Case):
    try:
        return contest.theirs(case)
    except ImportError as error:
        raise NotRun(one_line(error)) from error


def compare(contest: Contest, case: Case, sides, direction: str, arguments) -> dict:
    """The numbers of a race."""
    word = DIRECTIONS[direction]
    calls = [getattr(side, word) for side in sides]
    found = facts(sides[0], word)

    def agree(outputs):
        found["difference"] = difference(*(side.results(output) for side, output in zip(sides, outputs, strict=True)))
        if not found["difference"] <= TOLERANCE[case.dtype]:
            raise ValueError(f"results differ by {found['difference']:.1e} of the largest")

    inspect = agree if contest.same else None
    spreads = timing.time_alternately(calls, seconds=arguments.seconds, clock=arguments.clock, inspect=inspect)
    for side, spread in zip(("ours", "theirs"), spreads, strict=True):
        for name in ("lower", "median", "upper"):
            found[f"{side}_{name}_ms"] = round(1e3 * getattr(spread, name), 4)
        found[f"{side}_ms"] = round(1e3 * spread.best, 4)
    found |= dict(calls=spreads[0].calls, time_ratio=round(spreads[0].best / spreads[1].best, 3))
    if theirs := sides[1].facts(word):  # both are compiled, so the compiler knows
        found["theirs_temporary_bytes"] = theirs["temporary_bytes"]
        found["memory_ratio"] = round(found["ours_temporary_bytes"] / max(theirs["temporary_bytes"], 1), 3)
    elif not arguments.no_memory:
        ours, theirs = (peak(contest, case, side, word, arguments) for side in ("ours", "theirs"))
        found |= dict(ours_peak_bytes=ours, theirs_peak_bytes=theirs, memory_ratio=round(ours / max(theirs, 1), 3))
    return found


def facts(side, direction: str) -> dict:
    return {f"ours_{name}": round(value, 2) for name, value in side.facts(direction).items()}


def difference(ours: list[np.ndarray], theirs: list[np.ndarray]) -> float:
    """The largest difference of two lists of arrays, in units of the largest number of each array."""
    if [array.shape for array in ours] != [array.shape for array in theirs]:
        shapes = [[array.shape for array in arrays] for arrays in (ours, theirs)]
        raise ValueError(f"results have the shapes {shapes[0]} and {shapes[1]}")
    # NumPy's maximum, which does not lose what is not a number.
    return float(np.max([np.abs(a - b).max() / np.abs(b).max() for a, b in zip(ours, theirs, strict=True)]))


def peak(contest: Contest, case: Case, side: str, word: str, arguments) -> int:
    """Bytes by which a fresh process grows in one call."""
    task = dict(family=contest.family, name=contest.name, case=dataclasses.asdict(case), side=side, word=word)
    words = [sys.executable, __file__, "--measure", json.dumps(task), "--device", case.device]
    words += ["--threads", str(arguments.threads)]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **timing.PLAIN_MALLOC})
    if done.returncode:
        raise RuntimeError(f"memory of {side}: {one_line(RuntimeError(done.stderr[-300:]))}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(task: dict) -> int:
    """What the process that `peak` starts does."""
    contest = next(one for one in contests() if (one.family, one.name) == (task["family"], task["name"]))
    case = Case(**task["case"])
    side = getattr(contest, task["side"])(case)
    call = getattr(side, task["word"])
    if case.device == "cpu":
        return timing.memory_growth(call)
    if task["side"] == "theirs" and "torch" in sys.modules:
        from torch import cuda

        return growth(call, cuda.memory_allocated, cuda.max_memory_allocated, cuda.reset_peak_memory_stats)
    memory = lambda name: jax.devices()[0].memory_stats()[name]
    return growth(call, lambda: memory("bytes_in_use"), lambda: memory("peak_bytes_in_use"))


def growth(call, in_use, peak, reset=lambda: None) -> int:
    """Bytes by which a GPU's allocator holds more at its largest while `call` runs than before: temporaries and results.

    JAX cannot `reset` the peak of the process. If building our side and compiling took more than the call, that counts.
    """
    call()  # so that code and lasting caches do not count
    gc.collect()
    before = in_use()
    reset()
    call()
    return peak() - before


def _version(name: str) -> str:
    if not name:
        return ""
    try:
        return f"{name} {importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{name}, not installed"


def show(rows) -> None:
    heading = "family,race,T,direction,ours best ms,theirs best ms,time,ours MiB,theirs MiB,memory,compiled MiB".split(",")
    body = []
    for row in rows:
        mebi = lambda name, row=row: "" if row[name] is None else f"{row[name] / 2**20:.0f}"
        number = lambda name, row=row: "" if row[name] is None else f"{row[name]:.3g}"
        ratio = lambda name, row=row: "" if row[name] is None else f"{row[name]:.2f}x"
        body.append([
            row["family"], row["contest"] if row["status"] == "ok" else f"{row['contest']}: {row['status']}",
            str(row["length"]), row["direction"], number("ours_ms"), number("theirs_ms"), ratio("time_ratio"),
            mebi("ours_peak_bytes"), mebi("theirs_peak_bytes"), ratio("memory_ratio"), mebi("ours_temporary_bytes"),
        ])  # fmt: skip
    text_tables.print_table([heading, *body], left=2)


if __name__ == "__main__":
    commands.run("bench_peers", main)
