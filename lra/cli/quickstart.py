"""What each layer costs and what it can do, learnt on this machine in minutes: a board, then a page.

Time and memory against length; then small models, trained live on tasks that tell layers apart. What is finished is kept: the
same command goes on where an earlier one was stopped.
"""

import pathlib
import sys
import time
from collections.abc import Sequence

import jax

from subquad.lra import checkpoints, files, layers, machine, recipes, tasks, train
from subquad.lra.bench import speed, timing
from subquad.lra.cli import commands
from subquad.lra.data.diagnostics import configs as diagnostics
from subquad.lra.plan import plan
from subquad.lra.progress import Board, clock, say
from subquad.lra.report import csv_rows, ledger, measurements, overview, page, results
from subquad.lra.report.measurements import Measurement
from subquad.lra.run import Run

DRAWN, OTHER = "diagnostics", "quickstart"  # the recipes of tasks that are drawn, and of others
# What is shown where nothing else is asked for; "all" is every layer of the recipe `OTHER`.
LAYERS = ("softmax", "blockwise", "local", "strided", "reformer", "linformer", "performer", "transformer_xl", "s4")
TASKS, MORE_TASKS = ("recall", "selective_copy"), ("mqar", "induction", "parity")
STEPS = 200  # of each layer on each task; all that the task's recipe has with --full
LENGTHS, MORE_LENGTHS = (256, 1024, 8192), (512, 2048, 4096)
MODEL, MODE, BASELINE = "small", "forward", "softmax"
# Published tables that the page shows, as far as their cells were run.
TABLES = (("nystromformer", "3"), ("lra", "1"))
ABILITY = (
    "Accuracy of small models trained just now, on tasks that differ in what they ask of a layer: recall looks a value up by "
    "its key, anywhere before; selective copying repeats the few tokens that matter, in their order. It says what a layer of "
    "this size learns in seconds, not what a large one learns in days."
)
LONGER = "The same and harder tasks, run before: rows that came with the package, with the command of each in its recipe."


def parse(command_line: Sequence[str] | None, program: str):
    parser = commands.Parser(prog=program, description=__doc__)
    every = list(recipes.RECIPES[OTHER].layers)
    add = parser.add_argument
    named = f"of {' '.join(every)}, or all; default: {' '.join(LAYERS)}"
    add("--layers", nargs="+", action=commands.Words, default=LAYERS, metavar="LAYER", help=named)
    known = f"of {' '.join(tasks.TASKS)}, or as listops/tiny; default: {' '.join(TASKS)}"
    add("--tasks", nargs="+", action=commands.Words, default=None, metavar="TASK", help=known)
    at = ",".join(map(measurements.length_label, LENGTHS))
    add("--lengths", type=commands.parse_lengths, default=None, metavar="N,M", help=f"of the costs; default: {at}")
    add("--steps", type=int, default=None, help=f"of each layer; default: {STEPS}, with --full the task's own")
    add("--seed", type=int, default=0, help="of parameters and order; default: 0")
    add("--full", action="store_true", help="three seeds, more tasks, more lengths: hours")
    add("--out", default="runs/quickstart", help="folder of all results; default: runs/quickstart")
    add("--data-dir", default=None, help="folder of data sets; default: TFDS's own")
    arguments = parser.parse_args(command_line)
    if arguments.tasks is None:
        arguments.tasks = [*TASKS, *MORE_TASKS * arguments.full]
    if arguments.layers == ["all"]:
        arguments.layers = every
    return arguments


def main(command_line: Sequence[str] | None = None, program: str = "quickstart") -> int:
    """Does what the words of a command line say; None: of this process."""
    arguments = parse(command_line, program)
    began = time.monotonic()
    runs, reasons = plan_all(arguments)
    out = checkpoints.open_folder(arguments.out)
    csv_rows.check_file(out / "quickstart.csv", results.Result)
    csv_rows.check_file(out / "cost.csv", Measurement)
    lengths = sorted(arguments.lengths or [*LENGTHS, *MORE_LENGTHS * arguments.full])
    with Board(("layer", "cost", *arguments.tasks), arguments.layers) as board:
        for layer, task in reasons:
            board.show(layer, task, "cannot")
        costs = measure_cost(arguments.layers, lengths, out / "cost.csv", board)
        rows = [train_one(run, word, out, arguments.data_dir, board) for word, run in runs]
    known = ledger.read_ledger()
    before = [row for row in known.rows() if row.status == "ok" and row.recipe in (DRAWN, OTHER)]
    sections = [
        overview.cost(costs),
        overview.ability(rows, ABILITY, reasons=reasons),
        overview.ability(before, LONGER, "Ability, longer runs"),
        overview.arena(known, TABLES),
        *overview.damaged([out / "quickstart.csv", out / "cost.csv"]),
    ]
    took = f"{clock(time.monotonic() - began)} in all; {machine.hardware()}."
    page.write("subquad: what each layer costs and can do", sections, out / "index.html", footer=took)
    for section in sections[:2]:
        page.show(section)
    print(f"\n{took} The page: {out / 'index.html'}; rows: {out / 'cost.csv'}, {out / 'quickstart.csv'}; losses: {out}/runs.")
    failed = [row for row in (*costs, *rows) if row.status.startswith("failed")]
    return commands.FAILED if failed else 0


def plan_all(arguments) -> tuple[list[tuple[str, Run]], dict[tuple[str, str], str]]:
    """((task as it was given, run) of all, (layer, task) -> why the layer cannot do the task).

    Raises: ValueError: an unknown word, or no run is possible.
    """
    for layer in arguments.layers:
        layers.find_layer(layer)
    seeds = [arguments.seed + number for number in range(3 if arguments.full else 1)]
    steps = STEPS if arguments.steps is None and not arguments.full else arguments.steps
    given = {} if steps is None else {"steps": steps}
    runs, reasons, errors = [], {}, []
    for word in arguments.tasks:
        name, _, config = word.partition("/")
        if config or name not in tasks.TASKS:
            tasks.find_task(name, config)  # which refuses what it does not know
        recipe, chosen = DRAWN if name in diagnostics.CONFIGS else OTHER, {"config": config} if config else {}
        for layer in arguments.layers:
            try:
                runs += [(word, plan(recipe, layer, task=name, seed=seed, **chosen, **given)) for seed in seeds]
            except (ValueError, TypeError, NotImplementedError) as error:
                errors.append(error)
                reasons[layer, word] = files.one_line(error)
    if not runs:
        raise errors[0]
    return runs, reasons


def measure_cost(names: Sequence[str], lengths: Sequence[int], path: pathlib.Path, board: Board) -> list[Measurement]:
    """The rows of these layers at these lengths: those of `path` where it has them all, else measured now, in turn."""
    names = list(dict.fromkeys([BASELINE, *names]))
    wanted = {(name, length) for name in names for length in lengths}
    here = lambda row: (row.status, row.hardware) == ("ok", machine.hardware())
    kept = [row for row in measurements.read_measurements(path) if here(row) and (row.layer, row.length) in wanted]
    if wanted == {(row.layer, row.length) for row in kept}:
        say(f"cost: measured before, kept ({path}).")
        return kept
    limit, source = machine.available_memory()
    settings = speed.Settings(
        MODEL, machine.utc_now(), limit, source, timing.matmul_rate("float32"), values=dict(num_layers=1), baseline=BASELINE,
        seconds=0.3, threads=timing.limit_threads(None) if jax.default_backend() == "cpu" else None,
    )  # fmt: skip
    found: list[Measurement] = []
    for length in lengths:
        at = measurements.length_label(length)

        def tell(text: str, at=at) -> None:
            name, colon, what = text.partition(": ")
            if colon and name in board.cells:
                board.show(name, "cost", f"{at}: {what}")

        if not board.on_terminal:
            say(f"cost: {at}")
        rows = speed.race(names, length, MODE, settings, tell)
        for row in rows:
            if row.layer in board.cells:
                board.show(row.layer, "cost", cost_words(row, at))
        measurements.write_measurements(rows, path)
        found += rows
    return found


def cost_words(row: Measurement, at: str) -> str:
    return f"{at}: {1e3 * row.median_ms / row.length:.1f} µs/token" if row.median_ms else row.status.partition(":")[0]


def train_one(run: Run, column: str, out: pathlib.Path, data_dir: str | None, board: Board) -> results.Result:
    """The row of a run, trained now or before, shown in a column. One layer's fault is a row, and the others still run."""
    folder, task = out / "runs" / run.id, tasks.find_task(run.task, run.config)
    if (folder / "result.json").exists():
        say(f"{run.layer}, {run.task}: finished before, kept ({folder}).")
    try:
        shown = dict(show=board.cell(run.layer, column), quiet=board.on_terminal)
        row = train.train(run, out=folder, data_dir=data_dir, resume=True, **shown)
    except checkpoints.Interrupted as stopped:
        saved = str(stopped).partition(" Go on")[0]
        raise checkpoints.Interrupted(f"{saved} The same command goes on from there.", stopped.number) from None
    except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
        row = results.failure(run, task, commands.memory_error(error) or files.one_line(error))
        print(f"{run.layer}, {run.task}: {row.status}", file=sys.stderr)
    board.show(run.layer, column, results.score_of_seeds([row]))
    results.append(row, out / "quickstart.csv")
    return row
