"""The README says what the code and the committed measurements say."""

import pathlib

from .scripts.calling import call

ROOT = pathlib.Path(__file__).parents[1]


def test_only_known_words_are_taken_and_help_writes_nothing():
    before = (ROOT / "README.md").stat().st_mtime_ns
    for word, code in (("--help", 0), ("--chek", 2)):
        done = call("readme", word)
        assert done.returncode == code, done.stderr
    assert "Did you mean '--check'?" in done.stderr and (ROOT / "README.md").stat().st_mtime_ns == before


def test_generated_parts_are_up_to_date():
    done = call("readme", "--check")
    assert done.returncode == 0, done.stderr
