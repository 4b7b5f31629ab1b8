"""Trains one layer on one task under a recipe. Every value of the run is an option; the recipe gives the rest.

subquad train --layer performer --config lra --steps 5000 --layer-options num_features=128 --seeds 0 1 2

A language model on text of your own; then subquad generate goes on from what it is given:
subquad train --layer softmax --text my/notes/*.txt --text-length 256

The text in order, each sequence from the state that the one before it left:
subquad train --layer transformer_xl --text my/notes/*.txt --text-length 256 --carry-state

Several devices share a batch by --devices 8; several processes by srun, or each started with its own number:
subquad train --coordinator 10.0.0.1:1234 --num-processes 2 --process-id 0
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence

from subquad.lra import checkpoints, parallel, recipes, tasks, train
from subquad.lra.cli import commands
from subquad.lra.plan import explain, plan
from subquad.lra.report import csv_rows, results
from subquad.lra.run import Run


def parse(command_line: Sequence[str] | None, program: str):
    parser = commands.Parser(prog=program, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    named = f"one of {', '.join(recipes.RECIPES)}; default: quickstart"
    parser.add_argument("--recipe", default="quickstart", help=named)
    parser.add_argument("--layer", default="softmax", help="in zoo.LAYERS, or package.module:ClassName; default: softmax")
    parser.add_argument("--layer-options", nargs="+", default=[], metavar="NAME=VALUE", help="of its constructor")
    parser.add_argument("--out", default="runs/train", help="folder of results and checkpoints; default: runs/train")
    parser.add_argument("--text", nargs="+", metavar="FILE", help="a language model's task on the bytes of these files")
    usual = f"of a sequence of --text, in bytes; default: {tasks.LM_LENGTH}"
    parser.add_argument("--text-length", type=int, metavar="N", help=usual)
    parser.add_argument("--data-dir", default=None, help="folder of data sets; default: TFDS's own")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoints in --out, keep what is finished")
    parser.add_argument("--explain", action="store_true", help="print each value of the run and where it came from, no more")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="several runs, one after the other")
    parser.add_argument("--devices", type=int, help="that share a batch; default: one, or all of several processes")
    parser.add_argument("--shard", default="batch", metavar="batch|zero", help="zero: parameters and moments, too")
    parser.add_argument("--tensorboard", action="store_true", help="log to tensorboard/ in each run's folder, too")
    minutes = "between checkpoints, beside those at validations; default: 10"
    parser.add_argument("--checkpoint-minutes", type=float, default=10, metavar="M", help=minutes)
    parser.add_argument("--test-lengths", type=commands.parse_lengths, default=(), metavar="N", help="to test at, too: 256,1K")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0, of several; SLURM's are found without")
    parser.add_argument("--num-processes", type=int, help="how many run this command")
    parser.add_argument("--process-id", type=int, help="which of them this is, from 0")
    commands.add_options(
        parser, Run, leave_out=("recipe", "layer", "layer_options"), task=f"one of {', '.join(tasks.TASKS)}",
        config="of the task, as subquad prepare lists them", seed="of parameters and order; default: 0",
    )  # fmt: skip
    return parser.parse_args(command_line)


def main(command_line: Sequence[str] | None = None, program: str = "train") -> int:
    """Does what the words of a command line say; None: of this process."""
    arguments = parse(command_line, program)
    words = commands.given_fields(Run, arguments)
    if arguments.seeds and "seed" in words:
        raise ValueError(f"seed must be left out beside --seeds, got {words['seed']}. Add it to --seeds.")
    parallel.start(arguments.coordinator, arguments.num_processes, arguments.process_id)
    words["layer_options"] = commands.assignments(arguments.layer_options)
    seeds = [{"seed": seed} for seed in dict.fromkeys(arguments.seeds or [])] or [{}]
    recipe, layer = words.pop("recipe"), words.pop("layer")
    task, splits = own_text(arguments, words)
    runs = [plan(recipe, layer, **words, **seed) for seed in seeds]
    if arguments.explain:
        for name, (value, level) in explain(recipe, layer, **words, **seeds[0]).items():
            print(f"{name:32} {value!s:24} {level}")
        return 0
    limits = {name: getattr(arguments, name) for name in ("devices", "shard", "checkpoint_minutes", "test_lengths")}
    for one in runs:  # what cannot be is reported before a folder is made
        train.check(one, task or tasks.find_task(one.task, one.config), splits, **limits)
    out = checkpoints.open_folder(arguments.out)
    csv_rows.check_file(out / "results.csv", results.Result)
    shared = {**limits, **{name: getattr(arguments, name) for name in ("data_dir", "resume", "tensorboard")}}
    if arguments.resume and parallel.is_first():
        if said := checkpoints.nothing_to_resume(out / "runs", {one.id: dataclasses.asdict(one) for one in runs}):
            print(said, file=sys.stderr)
    rows = []
    for one in runs:
        if parallel.is_first():
            print(json.dumps(dataclasses.asdict(one)), file=sys.stderr)
        rows.append(train.train(one, out=out / "runs" / one.id, task=task, splits=splits, **shared))
        if parallel.is_first():
            results.append(rows[-1], out / "results.csv")
    if parallel.is_first():
        results.show(rows)
        for row in rows:
            show_events(row)
        print(f"Added to {out}/results.csv; losses and checkpoints in {out}/runs.")
    return 0 if all(row.status == "ok" for row in rows) else commands.FAILED


def show_events(row: results.Result) -> None:
    """Prints what the table does not show of a run: its scores by length, and whether it stopped early or collapsed."""
    if row.scores_by_length:
        found = json.loads(row.scores_by_length).items()
        words = [f"{length}: {score if isinstance(score, str) else f'{score:.3f}'}" for length, score in found]
        print(f"Seed {row.seed} by length: {'; '.join(words)}.")
    if row.stopped_step is not None:
        print(f"Seed {row.seed} stopped at step {row.stopped_step}: its validations had become no better.")
    if row.collapsed_step is not None:
        print(f"Seed {row.seed} collapsed: by step {row.collapsed_step} it was back at chance, having been above.")


def own_text(arguments, words: dict) -> tuple[tasks.Task | None, dict | None]:
    """The task on --text and its splits, of which `words` then tells; (None, None) without."""
    if arguments.text is None:
        if arguments.text_length is not None:
            raise ValueError(f"text-length must be left out without --text, got {arguments.text_length}.")
        return None, None
    for name in {"task", "config"} & words.keys():
        raise ValueError(f"{name} must be left out beside --text, got {words[name]!r}. The files are the task.")
    length = tasks.LM_LENGTH if arguments.text_length is None else arguments.text_length
    task, splits = tasks.own_text(arguments.text, length)
    words["task"] = task
    return task, splits
