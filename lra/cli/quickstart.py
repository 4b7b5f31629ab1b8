"""Trains several layers under one recipe and compares them in a table, a CSV, Markdown and a plot.

Finished layers are kept: the same command goes on where an earlier one was stopped.
"""

import sys
import time
from collections.abc import Sequence

from subquad import zoo
from subquad.lra import checkpoints, files, recipes, sizes, tasks, train
from subquad.lra.cli import commands, report
from subquad.lra.plan import plan
from subquad.lra.progress import Work, clock
from subquad.lra.report import csv_rows, results
from subquad.lra.run import Run


def parse(command_line: Sequence[str] | None, program: str):
    parser = commands.Parser(prog=program, description=__doc__)
    every = list(recipes.RECIPES["quickstart"].layers)
    listed = f"of {' '.join(every)}; default: all that the task admits"
    parser.add_argument("--layers", nargs="+", default=None, metavar="LAYER", help=listed)
    parser.add_argument("--steps", type=int, default=Run.steps, help=f"of each layer; default: {Run.steps}")
    parser.add_argument("--seed", type=int, default=0, help="of parameters and order; default: 0")
    parser.add_argument("--task", default="listops", help=f"one of {', '.join(tasks.TASKS)}; default: listops")
    parser.add_argument("--config", help="of the task; of listops small, or lra, the full one; default: the task's usual one")
    parser.add_argument("--out", default="runs/quickstart", help="folder of all results; default: runs/quickstart")
    parser.add_argument("--data-dir", default=None, help="folder of data sets; default: TFDS's own")
    arguments = parser.parse_args(command_line)
    if arguments.layers is not None and not layer_names(arguments.layers):
        parser.error(f"--layers must name at least one, got {' '.join(arguments.layers)!r}. Leave it out for all.")
    return arguments


def layer_names(given: list[str]) -> list[str]:
    return list(dict.fromkeys(name for word in given for name in word.split(",") if name))


def admitted(shared: dict) -> list[str]:
    """The recipe's layers, for a language model those that can be causal."""
    every = list(recipes.RECIPES["quickstart"].layers)
    first = plan("quickstart", every[0], **shared)
    needs_causal = tasks.find_task(first.task, first.config).needs_causal
    if not needs_causal:
        return every
    causal = [name for name in every if zoo.LAYERS[name].supports.causal]
    left_out = [name for name in every if name not in causal]
    print(f"Left out, because {needs_causal} must be causal: {', '.join(left_out)}.", file=sys.stderr)
    return causal


def main(command_line: Sequence[str] | None = None, program: str = "quickstart") -> int:
    """Does what the words of a command line say; None: of this process."""
    arguments = parse(command_line, program)
    began = time.monotonic()
    shared = {name: getattr(arguments, name) for name in ("steps", "seed", "task")}
    shared |= {} if arguments.config is None else {"config": arguments.config}
    try:
        layers = admitted(shared) if arguments.layers is None else layer_names(arguments.layers)
        # All of them first: a wrong word is reported before anything is trained.
        with Work("planning"):
            runs = [plan("quickstart", layer, **shared) for layer in layers]
    except ValueError as error:
        where = " The protocol is an option of scripts/train.py." if "protocol=" in str(error) else ""
        raise ValueError(f"{error}{where}") from None
    for run in runs:  # and what cannot fit before a folder is made
        sizes.check(run, tasks.find_task(run.task, run.config))
    out = checkpoints.open_folder(arguments.out)
    csv_rows.check_file(out / "quickstart.csv", results.Result)
    rows = []
    for run in runs:
        folder = out / "runs" / run.id
        if (folder / "result.json").exists():
            print(f"{run.layer}: finished before, kept ({folder}).", file=sys.stderr)
        try:
            row = train.train(run, out=folder, data_dir=arguments.data_dir, resume=True)
        except checkpoints.Interrupted as stopped:
            saved = str(stopped).partition(" Go on")[0]
            raise checkpoints.Interrupted(f"{saved} The same command goes on from there.", stopped.number) from None
        except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
            # One layer's fault is a row of the table; the others still run.
            reason = commands.memory_error(error) or files.one_line(error)
            row = results.failure(run, tasks.find_task(run.task, run.config), reason)
            print(f"{run.layer}: {row.status}", file=sys.stderr)
        results.append(row, out / "quickstart.csv")
        rows.append(row)
    written = [str(out / "quickstart.csv"), *report.write_results([rows], out / "quickstart")]
    results.show(rows)
    took = clock(time.monotonic() - began)
    print(f"{took} in all. {', '.join(written)}; each layer's losses in {out}/runs.")
    return commands.FAILED if any(row.status != "ok" for row in rows) else 0
