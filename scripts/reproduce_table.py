"""`subquad table`, from a clone."""

if __name__ == "__main__":  # before the libraries, which take seconds to load
    from subquad.lra import interrupts

    interrupts.exit_during_startup("reproduce_table")

from subquad.lra.cli import commands
from subquad.lra.cli.table import main

if __name__ == "__main__":
    commands.run("reproduce_table", main)
