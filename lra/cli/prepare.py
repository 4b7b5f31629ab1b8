"""Prepares the data sets of the Long Range Arena, and stand-ins that need no network.

subquad prepare list
subquad prepare prepare text image          without a name: all that take two minutes at most
subquad prepare check text/modern           sizes, checksums, labels, lengths, floors, a small network
"""

import argparse
import hashlib
import os
import pathlib
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from subquad.kernels.dispatch import nearest
from subquad.lra import tasks
from subquad.lra.cli import commands
from subquad.lra.data import catalogue, sources, store
from subquad.lra.progress import Work, over
from subquad.lra.report import text_tables
from subquad.lra.tasks import Task

ACTIONS = ("list", "prepare", "check")
# Data sets that take longer are prepared only when they are named.
PATIENCE_SECONDS = 120
# Of fewer pictures nothing follows from a score at chance.
FEW = 100
# A share of pictures of one colour that is more than chance: a black sky is one, a faulty archive has many.
BLANK = 0.05


def parse(command_line: Sequence[str] | None, program: str):
    parser = commands.Parser(prog=program, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", nargs="?", metavar="|".join(ACTIONS))
    parser.add_argument("tasks", nargs="*", metavar="TASK", help="as in the list: text, or text/modern")
    parser.add_argument("--data-dir", default=None, help="folder of data sets; default: TFDS's own")
    parser.add_argument("--manual-dir", default=None, help="folder of files fetched by hand; default: downloads/manual in it")
    steps = "batches that check's network of pictures learns from; 0: pictures are not tried; default: 400"
    parser.add_argument("--cnn-steps", type=commands.number(int, 0), default=400, help=steps)
    arguments = parser.parse_args(command_line)
    if arguments.action is None:
        parser.error(f"action must be one of {', '.join(ACTIONS)}, got none. `list` shows every task.")
    if arguments.action not in ACTIONS:
        parser.error(f"action must be a known one, got {arguments.action!r}. {nearest(arguments.action, ACTIONS)}")
    if arguments.action == "check" and not arguments.tasks:
        parser.error("check must be given a task, got none. The action `list` names them.")
    if arguments.action == "list" and arguments.tasks:
        parser.error(f"list must be given no task, got {arguments.tasks[0]!r}. It shows all of them.")
    return arguments


def main(command_line: Sequence[str] | None = None, program: str = "prepare_lra") -> int:
    """Does what the words of a command line say; None: of this process."""
    arguments = parse(command_line, program)
    tasks.tasks_named(arguments.tasks)  # a wrong word is reported before anything is prepared
    if arguments.action == "list":
        words = ("task", "kind", "source", "prepared")
        text_tables.print_table(listing(arguments.data_dir), left=words, unbroken=lambda name: True)
        manual = store.manual_folder(arguments.data_dir, arguments.manual_dir)
        print("Hours are those of two cores, without the download; while it prepares, the hours of this machine are shown.")
        print(f"Data sets in {arguments.data_dir or store.default_folder()}; files fetched by hand are looked for in {manual}.")
        return 0
    if arguments.action == "prepare":
        return prepare(arguments.tasks, arguments.data_dir, arguments.manual_dir)
    faults = 0
    for word in arguments.tasks:
        report = check(word, arguments.data_dir, cnn_steps=arguments.cnn_steps)
        print("\n".join(report.lines), flush=True)
        faults += len(report.faults)
    return commands.FAILED if faults else 0


def listing(data_dir: str | os.PathLike | None = None) -> list[tuple[str, ...]]:
    """The table of all tasks, headings first."""
    rows = [("task", "kind", "classes", "length", "train/validation/test", "source", "disk", "hours", "prepared")]
    for configs in tasks.TASKS.values():
        for task in configs.values():
            found = catalogue.find_dataset(task.dataset)
            sizes = "/".join(f"{size:,}" for size in task.splits.values())
            hours = found.seconds / 3600
            rows.append((
                f"{task.name}/{task.config}", task.kind.replace("_", " "), str(task.num_classes), f"{task.length:,}", sizes,
                str(found.source or "generated"), sources.size(found.disk), f"{hours:.2f}" if hours >= 0.005 else "<0.01",
                "drawn" if found.drawn else "yes" if store.is_prepared(task.dataset, data_dir) else "no",
            ))  # fmt: skip
    return rows


def prepare(words: Sequence[str], data_dir=None, manual_dir=None) -> int:
    """Prepares the tasks that are named, or, where none is, all that take two minutes at most and whose source is here.

    A line on stdout for each; for one that cannot be prepared a line on stderr.

    Returns: 0, or 1 where a task that was named, or a data set at hand, could not be prepared.
    """
    every = (task for configs in tasks.TASKS.values() for task in configs.values())
    is_quick = lambda found: found.seconds <= PATIENCE_SECONDS and not found.drawn
    quick = [task for task in every if is_quick(catalogue.find_dataset(task.dataset))]
    wanted = tasks.tasks_named(words) or quick
    failed, done = 0, set()
    for task in wanted:
        if catalogue.find_dataset(task.dataset).drawn:
            print(f"{task.name}/{task.config}: drawn while it is read, nothing to prepare", flush=True)
            continue
        folder = store.dataset_folder(task.dataset, data_dir)
        if folder in done:
            continue
        done.add(folder)
        try:
            store.prepare(task.dataset, data_dir, manual_dir)
            print(f"{task.name}/{task.config}: in {folder}, {sources.size(_bytes(folder))}", flush=True)
        except sources.MissingSource as error:
            failed += bool(words)
            print(error if words else f"skipped: {error}", file=sys.stderr, flush=True)
        except sources.DatasetError as error:
            failed += 1
            print(error, file=sys.stderr, flush=True)
    return int(failed > 0)


def _bytes(folder: pathlib.Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


@dataclass
class Report:
    """What `check` found: lines to print, what is wrong, and what could not be shown to be right."""

    lines: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)


def check(word: str, data_dir=None, *, cnn_steps: int = 400) -> Report:
    """Looks at a prepared data set: checksums, sizes, labels, lengths, repeated examples, floors, and a small network.

    What pictures show is judged on test: if nothing tells their labels better than guessing, that is a fault.

    Args:
        word: as `tasks.tasks_named` takes.
        data_dir: the folder that holds data sets.
        cnn_steps: batches that the network is trained for, on tasks that are pictures; 0 leaves it out.
    Raises: ValueError: unknown task.  DatasetError: it is not prepared, or cannot be read.
    """
    (task,) = tasks.tasks_named([word])
    drawn = catalogue.find_dataset(task.dataset).drawn
    folder = store.dataset_folder(task.dataset, data_dir)
    if not drawn and not folder.exists():
        cure = f"Run {store.preparing(word, data_dir)}"
        raise sources.DatasetError(f"{word}: data set must be prepared first, got no folder {folder}. {cure}")
    where = "drawn while it is read" if drawn else f"{sources.size(_bytes(folder))} in {folder}"
    report = Report([f"{task.name}/{task.config} ({task.dataset}), {where}"])
    if task.note:
        report.lines.append(f"  note      {task.note}")
    if not drawn:
        _check_files(report, folder)
    splits, source = store.load(task.dataset, data_dir)
    report.lines.append(f"  data      {source}")
    if not drawn:  # what was drawn for each split belongs to no other, and has no end
        _check_examples(report, task, splits)
    with Work(f"{task.name}/{task.config}: floors"):
        floors = task.floors(splits)
    unit = "" if task.kind == "language_model" else " %"
    scores = [f"{name} {score if task.kind == 'language_model' else 100 * score:.1f}{unit}" for name, score in floors.items()]
    report.lines.append(f"  floors    {', '.join(scores)} ({task.metric}, test)")
    if task.image_shape and cnn_steps:
        _check_pictures(report, task, splits, floors["majority"], cnn_steps)
    found = [f"  WRONG     {fault}" for fault in report.faults] + [f"  NOT SHOWN {doubt}" for doubt in report.doubts]
    report.lines += found or ["  ok"]
    return report


def _check_files(report: Report, folder: pathlib.Path) -> None:
    sums = folder / store.CHECKSUMS
    if not sums.exists():
        report.lines.append("  checksums none were written; prepare it anew to have them")
        return
    lines = sums.read_text(errors="replace").splitlines()
    for line in over(lines, f"{folder.parent.name}: checksums"):
        checksum, _, name = line.partition("  ")
        if not name:
            report.faults.append(f"{store.CHECKSUMS} has a line without a file, {line!r:.60}")
        elif not (folder / name).exists():
            report.faults.append(f"file {name} is missing")
        elif store.sha256(folder / name) != checksum:
            report.faults.append(f"file {name} is not what was written: its sha256 differs from {store.CHECKSUMS}")
    every = hashlib.sha256(sums.read_bytes()).hexdigest()[:16]
    report.lines.append(f"  checksums of {len(lines)} files in {store.CHECKSUMS}, itself sha256 {every}...")


def _check_examples(report: Report, task: Task, splits: Mapping[str, Sequence]) -> None:
    found = catalogue.find_dataset(task.dataset)
    seen: dict[str, set[bytes]] = {}
    for split, part in splits.items():
        published = task.splits[split]
        line = f"  {split:9} {len(part):,} examples"
        if len(part) != published:
            line += f", where {published:,} are usual"
            # What is generated from the Python at hand may differ.
            if found.source is not None or found.exact:
                report.faults.append(f"{split} has {len(part):,} examples where {published:,} were published")
        labels, lengths, hashes, blank = Counter(), [], set(), 0
        for example in over(part, f"{task.name}/{task.config}: {split}"):
            parts = [example[name] for name in ("inputs", "inputs1", "inputs2") if name in example]
            lengths.append(max(map(len, parts)))
            labels[example.get("label")] += 1
            blank += int(np.ptp(parts[0]) == 0)
            hashes.add(hashlib.blake2b(b"|".join(part.tobytes() for part in parts), digest_size=8).digest())
        report.lines += [line + f", {len(part) - len(hashes):,} of them repeated", f"  {'':9} lengths {_spread(lengths, task)}"]
        if task.kind != "language_model":
            shares = [100 * labels[label] / len(part) for label in range(task.num_classes)]
            report.lines.append(f"  {'':9} labels {' '.join(f'{share:.1f}' for share in shares)} %")
            absent = [str(label) for label in range(task.num_classes) if not labels[label]]
            if absent:
                report.faults.append(f"{split} has no example of label {', '.join(absent)}")
        if task.image_shape and blank > BLANK * len(part):
            report.faults.append(f"{split} has {blank:,} pictures of one colour")
        seen[split] = hashes
    if found.slices.get("validation") != found.slices["test"]:
        for one, two in (("train", "test"), ("train", "validation")):
            report.lines.append(f"  in both {one} and {two}: {len(seen[one] & seen[two]):,} examples")


def _spread(lengths: list[int], task: Task) -> str:
    """Quantiles, a histogram of ten bars from the shortest to the longest, and how many are cut."""
    values = np.array(lengths)
    marks = np.quantile(values, (0, 0.1, 0.5, 0.9, 0.99, 1)).astype(int)
    counts, _ = np.histogram(values, bins=10, range=(marks[0], max(marks[-1], marks[0] + 1)))
    bars = "".join(" ▁▂▃▄▅▆▇█"[-(-8 * count // max(1, counts.max()))] for count in counts)
    text = "min {} p10 {} p50 {} p90 {} p99 {} max {}".format(*(f"{mark:,}" for mark in marks))
    return f"{text} |{bars}| {100 * (values > task.length).mean():.1f} % are cut at {task.length:,}"


def _check_pictures(report: Report, task: Task, splits: Mapping[str, Sequence], chance: float, steps: int) -> None:
    """Something has to tell the labels of pictures that it has not seen: a small network, or a rule made for the task."""
    from subquad.lra.data import small_network
    from subquad.lra.data.pathfinder import line_following

    with Work(f"{task.name}/{task.config}: a small network"):
        reached, count = small_network.accuracy(
            splits, task.image_shape, task.num_classes, task.vocabulary_size - 1, steps=steps
        )
    # Three standard deviations of guessing.
    needed = chance + 3 * (chance * (1 - chance) / count) ** 0.5
    above = f"above chance from {100 * needed:.1f} %"
    report.lines.append(f"  network   {100 * reached:.1f} % on {count:,} pictures of test after {steps} steps; {above}")
    who = "a small network learns nothing"
    if reached < needed and task.name == "pathfinder":
        # Whose labels take a network more pictures and steps than that.
        with Work(f"{task.name}/{task.config}: following the lines"):
            reached, count = line_following.accuracy(splits, task.image_shape[0])
        report.lines.append(f"  lines     {100 * reached:.1f} % by following them from disc to disc; {above}")
        who = "neither a small network nor following the lines tells their labels"
    if reached >= needed:
        return
    if count < FEW:
        report.doubts.append(f"that pictures and labels belong together: {count} pictures of test are too few")
    else:
        report.faults.append(f"{who}: pictures and labels may not belong together")
