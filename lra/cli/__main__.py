"""`subquad COMMAND ...`, which is `python -m subquad.lra.cli COMMAND ...`: what scripts/ do, without a clone."""

import importlib
import sys
from typing import NoReturn

from subquad.lra import interrupts

COMMANDS = {
    "quickstart": "what each layer costs and can do, in minutes: a board and a page",
    "train": "train one layer on one task",
    "generate": "go on from a text with a language model that was trained",
    "convert": "change a trained language model's attention for another layer, and train it on",
    "prepare": "list, prepare and check data sets",
    "table": "put what was run here beside a published table, and run what is missing",
    "bench": "measure time, memory, FLOPs and energy against length",
    "report": "a page, tables and plots of rows that are there",
}
USAGE = "usage: subquad COMMAND [--help] ...\n\n" + "\n".join(f"  {name:11} {what}" for name, what in COMMANDS.items())


def main() -> None:
    """Hands the command line to the command that its first word names, and ends the process."""
    name, *words = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        sys.exit(print(USAGE))
    run(name, words, f"subquad {name}" if name in COMMANDS else "subquad")


def run(name: str, words: list[str] | None, program: str) -> NoReturn:
    """Ends the process by a command with these words; None: with those of this process. `program` begins its messages."""
    interrupts.exit_during_startup(program)  # before the libraries, which take seconds to load
    from subquad.kernels.dispatch import nearest
    from subquad.lra.cli import commands

    def command() -> int:
        if name not in COMMANDS:
            raise ValueError(f"command must be a known one, got {name!r}. {nearest(name, COMMANDS)}")
        return importlib.import_module(f"subquad.lra.cli.{name}").main(words, program)

    commands.run(program, command)


if __name__ == "__main__":
    main()
