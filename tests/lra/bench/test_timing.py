import os
import subprocess
import sys

import numpy as np
import pytest

from subquad.lra.bench import timing

GROW = """
import numpy as np
from subquad.lra.bench import timing
print(timing.memory_growth(lambda: np.ones(50 * 2**20, np.uint8).sum()))
"""


def test_calls_are_made_in_turn_and_each_is_timed():
    order, now = [], [0.0]

    def call(name, cost):
        def run():
            order.append(name)
            now[0] += cost

        return run

    slow, fast = timing.time_alternately([call("a", 3.0), call("b", 1.0)], repeats=4, clock=lambda: now[0])
    assert slow == timing.Spread(3.0, 3.0, 3.0, 3.0, 5)  # so slow that the first call counts
    assert (fast.best, fast.calls) == (1.0, 4)
    assert order == ["a", "b"] * 5
    order.clear()
    timing.time_alternately([call("a", 0.1), call("b", 1.0)], repeats=2, clock=lambda: now[0])
    assert order == ["a", "b"] + ["a", "a", "b"] * 2  # a quick call is made once untimed before each timed one


def test_the_first_results_are_shown_before_any_timing():
    seen = []
    calls = [lambda: seen.append("a") or 1, lambda: 2]
    timing.time_alternately(calls, repeats=2, inspect=lambda found: seen.append(list(found)))
    assert seen[:2] == ["a", [1, 2]]


def test_a_spread_holds_minimum_and_quartiles():
    assert timing.Spread.from_times([5.0, 1.0, 3.0, 2.0, 4.0]) == (1.0, 2.0, 3.0, 4.0, 5)


def test_without_repeats_time_is_the_limit_but_two_rounds_are_made():
    assert timing.time_alternately([lambda: None], seconds=0.0)[0].calls == 2
    assert timing.time_alternately([lambda: None], seconds=60.0)[0].calls == 50


def test_threads_must_be_there():
    with pytest.raises(ValueError, match=r"count must be 1 to \d+, got 0"):
        timing.limit_threads(0)
    assert timing.limit_threads(None) == len(os.sched_getaffinity(0))


def test_growth_is_what_a_call_takes_at_its_largest():
    environment = {**os.environ, **timing.PLAIN_MALLOC}
    done = subprocess.run([sys.executable, "-c", GROW], env=environment, capture_output=True, text=True, check=True)
    assert 49 * 2**20 <= int(done.stdout) < 54 * 2**20  # the system counts in strides


def test_rates_are_finite_and_plausible():
    assert 1e8 < timing.copy_bandwidth(megabytes=4) < 1e14
    assert 1e8 < timing.matmul_rate("float32", size=64) < 1e16


def test_one_thread_has_a_clock_of_its_own():
    assert np.isfinite(timing.clock_of(1)()) and timing.clock_of(1) is not timing.clock_of(2)
