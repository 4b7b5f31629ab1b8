"""`subquad convert`, from a clone."""

if __name__ == "__main__":
    from subquad.lra.cli.__main__ import run

    run("convert", None, "convert_lm")
