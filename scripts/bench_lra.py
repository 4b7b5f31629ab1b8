"""`subquad bench`, from a clone."""

if __name__ == "__main__":  # before the libraries, which take seconds to load
    from subquad.lra import interrupts

    interrupts.exit_during_startup("bench_lra")

from subquad.lra.cli import commands
from subquad.lra.cli.bench import main

if __name__ == "__main__":
    commands.run("bench_lra", main)
