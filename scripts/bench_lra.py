"""`subquad bench`, from a clone."""

if __name__ == "__main__":
    from subquad.lra.cli.__main__ import run

    run("bench", None, "bench_lra")
