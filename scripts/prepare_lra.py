"""`subquad prepare`, from a clone."""

if __name__ == "__main__":  # before the libraries, which take seconds to load
    from subquad.lra import interrupts

    interrupts.exit_during_startup("prepare_lra")

from subquad.lra.cli import commands
from subquad.lra.cli.prepare import main

if __name__ == "__main__":
    commands.run("prepare_lra", main)
