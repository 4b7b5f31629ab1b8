"""Prepares the data sets of the Long Range Arena, and stand-ins that need no network.

python scripts/prepare_lra.py list
python scripts/prepare_lra.py prepare text image          without a name: all that take two minutes at most
python scripts/prepare_lra.py check text/modern           sizes, checksums, labels, lengths, floors, a small network
"""

if __name__ == "__main__":  # before the libraries, which take seconds to load
    from subquad.lra import interrupts

    interrupts.exit_during_startup("prepare_lra")

import argparse

from subquad.kernels.dispatch import nearest
from subquad.lra import commands, prepare
from subquad.lra.data import store

ACTIONS = ("list", "prepare", "check")


def parse():
    parser = commands.Parser(prog="prepare_lra", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", nargs="?", metavar="|".join(ACTIONS))
    parser.add_argument("tasks", nargs="*", metavar="TASK", help="as in the list: text, or text/modern")
    parser.add_argument("--data-dir", default=None, help="folder of data sets; default: TFDS's own")
    parser.add_argument("--manual-dir", default=None, help="folder of files fetched by hand; default: downloads/manual in it")
    steps = "batches that check's network of pictures learns from; 0: pictures are not tried; default: 400"
    parser.add_argument("--cnn-steps", type=int, default=400, help=steps)
    arguments = parser.parse_args()
    if arguments.action is None:
        parser.error(f"action must be one of {', '.join(ACTIONS)}, got none. `list` shows every task.")
    if arguments.action not in ACTIONS:
        parser.error(f"action must be a known one, got {arguments.action!r}. {nearest(arguments.action, ACTIONS)}")
    if arguments.action == "check" and not arguments.tasks:
        parser.error("check must be given a task, got none. The action `list` names them.")
    if arguments.action == "list" and arguments.tasks:
        parser.error(f"list must be given no task, got {arguments.tasks[0]!r}. It shows all of them.")
    if arguments.cnn_steps < 0:
        parser.error(f"--cnn-steps must be >= 0, got {arguments.cnn_steps}.")
    return arguments


def main() -> int:
    arguments = parse()
    prepare.chosen(arguments.tasks)  # a wrong word is told before anything is prepared
    if arguments.action == "list":
        prepare.show(prepare.listing(arguments.data_dir))
        manual = store.manual_folder(arguments.data_dir, arguments.manual_dir)
        print("Hours are those of two cores, without the download; while it prepares, the hours of this machine are shown.")
        print(f"Data sets in {arguments.data_dir or store.default_folder()}; files fetched by hand are looked for in {manual}.")
        return 0
    if arguments.action == "prepare":
        return prepare.prepare(arguments.tasks, arguments.data_dir, arguments.manual_dir)
    faults = 0
    for word in arguments.tasks:
        report = prepare.check(word, arguments.data_dir, cnn_steps=arguments.cnn_steps)
        print("\n".join(report.lines), flush=True)
        faults += len(report.faults)
    return commands.FAILED if faults else 0


if __name__ == "__main__":
    commands.run("prepare_lra", main)
