"""The expressions in the arena's own ListOps files, basic_{train,val,test}.tsv, with this library's token ids."""

import csv
import pathlib
from collections.abc import Iterator

from subquad.lra.data import sources
from subquad.lra.data.listops import expressions

FILES = {"train": "basic_train.tsv", "validation": "basic_val.tsv", "test": "basic_test.tsv"}
# Bytes of a file: 96,000 rows of 2,000 symbols, each in brackets of its own.
SOURCE = sources.Release(tuple(FILES.values()), largest=2_000_000_000, total=12_000_000_000)


def read_examples(path: pathlib.Path) -> Iterator[expressions.Example]:
    """Every line's expression and value, in the file's order. Each value is computed anew and compared.

    Raises: DatasetError: no header "Source<TAB>Target", a symbol out of the vocabulary, or a wrong value.
    """
    # A byte that is no UTF-8 becomes a symbol that is none.
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        rows = csv.reader(file, delimiter="\t")
        try:
            header = next(rows, [])
            if header != ["Source", "Target"]:
                raise sources.DatasetError(f"lra_listops: {path} must begin with 'Source<TAB>Target', got {header!r:.80}.")
            for row in rows:
                text, target = row
                tokens, label = expressions.tokenise(text), int(target)
                if expressions.evaluate(tokens) != label:
                    raise ValueError(f"value {label} where {expressions.evaluate(tokens)} is right")
                yield expressions.Example(tokens, label)
        except (ValueError, csv.Error) as error:
            raise sources.DatasetError(
                f"lra_listops: {path}:{rows.line_num} must hold an expression and its value, got {error!s:.150}"
            ) from None
