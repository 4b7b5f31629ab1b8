"""`subquad generate`, from a clone."""

if __name__ == "__main__":
    from subquad.lra.cli.__main__ import run

    run("generate", None, "generate")
