"""`subquad quickstart`, from a clone."""

if __name__ == "__main__":  # before the libraries, which take seconds to load
    from subquad.lra import interrupts

    interrupts.exit_during_startup("quickstart")

from subquad.lra.cli import commands
from subquad.lra.cli.quickstart import main

if __name__ == "__main__":
    commands.run("quickstart", main)
