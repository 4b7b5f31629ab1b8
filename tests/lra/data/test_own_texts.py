"""Text of the user's: what is read, cut and held out."""

import numpy as np
import pytest

from subquad.lra import tasks
from subquad.lra.data import own_texts


def test_documents_follow_one_another_and_no_byte_is_lost():
    found = list(own_texts.sequences([b"abc", b"", "dé".encode()], 4))
    assert [bytes(one) for one in found] == [b"abc\0\0", b"\0d\xc3\xa9\0"]


def test_the_last_twentieth_is_tested_and_the_configuration_names_the_contents(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_bytes(bytes(range(1, 201)))
    second.write_bytes(bytes(range(1, 256)))
    task, splits = tasks.own_text([first, second], 8)
    assert {name: len(rows) for name, rows in splits.items()} == task.splits == {"train": 53, "validation": 2, "test": 2}
    rows = [row for part in splits.values() for row in part]
    joined = np.concatenate([row["inputs"] for row in rows])
    assert (joined[:200] == np.arange(2, 202)).all() and joined[200] == task.end_of_document
    assert all((row["inputs"][1:] == row["targets"][:-1]).all() for row in rows)
    assert tasks.own_text([second, first], 8)[0].config != task.config != tasks.own_text([first, second], 9)[0].config
    assert tasks.own_text_task(task.config, task.splits) == task
    tasks.check_splits(task, splits)


def test_what_cannot_be_read_or_is_short_is_told(tmp_path):
    file = tmp_path / "short.txt"
    file.write_text("too short")
    with pytest.raises(ValueError, match="text must be files that can be read, got .*missing.txt: No such file"):
        tasks.own_text([tmp_path / "missing.txt"])
    with pytest.raises(ValueError, match="text must hold at least 20 sequences of 4 bytes, got 2 from "):
        tasks.own_text([file], 4)
    with pytest.raises(ValueError, match="text-length must be at least 2 bytes, got 1"):
        tasks.own_text([file], 1)
    (tmp_path / "wide.txt").write_text("To be, or not to be", "utf-16")
    with pytest.raises(ValueError, match="text must hold no zero byte, .* got one at byte 3 of .*wide.txt. Save it as UTF-8"):
        tasks.own_text([tmp_path / "wide.txt"])
    with pytest.raises(ValueError, match="Is a directory. Check the name; the files of a folder are folder/"):
        tasks.own_text([tmp_path])
