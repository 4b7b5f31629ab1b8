import csv
import os
import subprocess
import sys

import numpy as np
import pytest

from subquad.lra import racing
from subquad.lra.checkpoints import RunError

GROW = """
import numpy as np
from subquad.lra import racing
print(racing.memory_growth(lambda: np.ones(50 * 2**20, np.uint8).sum()))
"""


def test_calls_are_made_in_turn_and_each_is_timed():
    order, now = [], [0.0]

    def call(name, cost):
        def run():
            order.append(name)
            now[0] += cost

        return run

    slow, fast = racing.alternate([call("a", 3.0), call("b", 1.0)], repeats=4, clock=lambda: now[0])
    assert slow == racing.Spread(3.0, 3.0, 3.0, 3.0, 5)  # so slow that the first call counts
    assert (fast.best, fast.calls) == (1.0, 4)
    assert order == ["a", "b"] * 5
    order.clear()
    racing.alternate([call("a", 0.1), call("b", 1.0)], repeats=2, clock=lambda: now[0])
    assert order == ["a", "b"] + ["a", "a", "b"] * 2  # a quick call is made once untimed before each timed one


def test_the_first_results_are_shown_before_any_timing():
    seen = []
    racing.alternate([lambda: seen.append("a") or 1, lambda: 2], repeats=2, inspect=lambda found: seen.append(list(found)))
    assert seen[:2] == ["a", [1, 2]]


def test_a_spread_holds_minimum_and_quartiles():
    assert racing.Spread.of([5.0, 1.0, 3.0, 2.0, 4.0]) == (1.0, 2.0, 3.0, 4.0, 5)


def test_without_repeats_time_is_the_limit_but_two_rounds_are_made():
    assert racing.alternate([lambda: None], seconds=0.0)[0].calls == 2
    assert racing.alternate([lambda: None], seconds=60.0)[0].calls == 50


def test_threads_must_be_there():
    with pytest.raises(ValueError, match=r"count must be 1 to \d+, got 0"):
        racing.limit_threads(0)
    assert racing.limit_threads(None) == len(os.sched_getaffinity(0))


def test_growth_is_what_a_call_takes_at_its_largest():
    environment = {**os.environ, **racing.PLAIN_MALLOC}
    done = subprocess.run([sys.executable, "-c", GROW], env=environment, capture_output=True, text=True, check=True)
    assert 49 * 2**20 <= int(done.stdout) < 54 * 2**20  # the system counts in strides


def test_rates_are_finite_and_plausible():
    assert 1e8 < racing.copy_bandwidth(megabytes=4) < 1e14
    assert 1e8 < racing.matmul_rate("float32", size=64) < 1e16


def test_a_row_takes_the_place_of_the_one_with_its_key_and_leaves_the_others(tmp_path):
    path = tmp_path / "new" / "rows.csv"
    racing.write_rows(path, [dict(name="a", length=1, ms=1.0), dict(name="b", length=1, ms=None)], ("name", "length"))
    racing.write_rows(path, [dict(name="a", length=1, ms=0.5), dict(name="a", length=2, ms=2.0)], ("name", "length"))
    rows = list(csv.DictReader(path.open()))
    assert [(row["name"], row["length"], row["ms"]) for row in rows] == [("a", "1", "0.5"), ("b", "1", ""), ("a", "2", "2.0")]
    assert [file.name for file in path.parent.iterdir()] == ["rows.csv"]


@pytest.mark.parametrize("content", [b"other\n1\n", b"a line\n", b"no line", b"\n", b"\x89PNG\xff\x00\n"])
def test_a_file_with_other_columns_is_left_alone(tmp_path, content):
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    with pytest.raises(RunError, match="must have the columns of this version"):
        racing.write_rows(path, [dict(name="a")], ("name",))
    assert path.read_bytes() == content


def test_a_folder_that_cannot_be_made_is_told_before_any_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="must be writable"):
        racing.check_table(tmp_path / "file" / "rows.csv", ["name"])


def test_the_table_is_printed(capsys):
    racing.show(["race", "ms"], [["one", "1.5"]])
    assert "race" in (shown := capsys.readouterr().out) and "1.5" in shown
    assert np.isfinite(racing.clock_of(1)()) and racing.clock_of(1) is not racing.clock_of(2)
