"""Races: functions timed in turn in one process, and the memory of each in a process of its own.

Times on a shared machine are noise above a minimum, so what is compared are minima of calls made in turn.
"""

import ctypes
import gc
import os
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from subquad.lra import machine

QUICK = 0.2  # seconds below which a call is made once untimed before it is timed: its data may have left the caches
SLOW = 2.0  # seconds from which even the first call counts
REST = 0.005  # seconds for the threads of the side before to fall asleep


class Spread(NamedTuple):
    """Seconds of several calls."""

    best: float
    lower: float  # quartile
    median: float
    upper: float  # quartile
    calls: int

    @classmethod
    def from_times(cls, times: Sequence[float]) -> "Spread":
        return cls(min(times), *map(float, np.percentile(times, (25, 50, 75))), len(times))


def limit_threads(count: int | None) -> int:
    """Keeps this process, its children and every library in them to `count` processors; None: all it may use.

    Call it before the first computation of JAX, which counts the processors once.

    Raises: ValueError: more than there are.
    """
    if not hasattr(os, "sched_setaffinity"):
        if count is not None:
            raise ValueError(f"threads: count must be left out on this system, got {count}. It cannot bind processes.")
        return os.cpu_count() or 1
    available = sorted(os.sched_getaffinity(0))
    if count is not None and not 1 <= count <= len(available):
        raise ValueError(f"threads: count must be 1 to {len(available)}, got {count}. So many processors are here.")
    if count is not None:
        os.sched_setaffinity(0, available[:count])
    return len(available) if count is None else count


def clock_of(threads: int) -> Callable[[], float]:
    """The processor's time for one thread, which other programs on the machine do not stretch; else the time of day."""
    return time.process_time if threads == 1 else time.perf_counter


def time_alternately(
    calls: Sequence[Callable[[], Any]],
    *,
    seconds: float = 2.0,
    repeats: int | None = None,
    clock: Callable[[], float] = time.perf_counter,
    inspect: Callable[[list[Any]], None] | None = None,
) -> list[Spread]:
    """Times the calls in turn: one of each, then again.

    Args:
        calls: functions that return when their work is done.
        seconds: for all timed calls together; at least two rounds are made, at most fifty.
        repeats: rounds, whatever they take. None: by `seconds`.
        clock: what the calls are timed with.
        inspect: is given the results of the first calls, before any timing.
    Returns: a `Spread` for each.
    """
    times: list[list[float]] = [[] for _ in calls]
    first, quick = [], []
    for call, taken in zip(calls, times, strict=True):
        start = clock()
        first.append(call())
        seen = clock() - start
        quick.append(seen < QUICK)
        if seen >= SLOW:
            taken.append(seen)  # what the first call does more than others is lost in it
    if inspect is not None:
        inspect(first)
    first.clear()
    least, most = (repeats, repeats) if repeats else (2, 50)
    gc.collect()
    gc.disable()
    try:
        began = time.perf_counter()
        while min(map(len, times)) < least or (len(times[0]) < most and time.perf_counter() - began < seconds):
            for call, taken, again in zip(calls, times, quick, strict=True):
                time.sleep(REST)
                if again:
                    call()
                start = clock()
                call()
                taken.append(clock() - start)
    finally:
        gc.enable()
    return [Spread.from_times(taken) for taken in times]


def memory_growth(call: Callable[[], Any]) -> int:
    """Bytes by which this process grows at its largest while `call` runs: its temporaries, and results until they go.

    The call runs once before, so that code and lasting caches do not count. Linux only, and meant for a process that has
    done little else and was started with `PLAIN_MALLOC` in its environment: what the allocator keeps would hide growth.
    """
    call()
    gc.collect()
    time.sleep(0.2)  # a compiled program's buffers may be freed by another thread, after its results are there
    ctypes.CDLL(None).malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
    before = machine.proc_bytes("self/status", "VmRSS")
    call()
    return max(0, machine.proc_bytes("self/status", "VmHWM") - before)


# So that every large buffer goes back to the system when it is freed, and none of it is counted twice or not at all.
PLAIN_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "2"}


def copy_bandwidth(megabytes: int = 256) -> float:
    """Bytes per second that this device reads and writes, together, when it rewrites an array in place."""
    touch = jax.jit(lambda array: array + 1, donate_argnums=0)
    held = [jnp.zeros(megabytes * 2**18, jnp.float32)]

    def call():
        held[0] = touch(held[0]).block_until_ready()

    return 2 * held[0].nbytes / time_alternately([call], repeats=8)[0].best


def matmul_rate(dtype: Any, size: int | None = None, clock: Callable[[], float] = time.perf_counter) -> float:
    """Floating-point operations per second of a square matrix product in `dtype`, summed in float32.

    Args:
        size: rows and columns. None: 1024 on a CPU; 8192 elsewhere, where a smaller one would not fill the device.
        clock: the one that what is compared with the rate is timed with.
    """
    size = size or (1024 if jax.default_backend() == "cpu" else 8192)
    multiply = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
    a = jnp.ones((size, size), dtype)
    call = lambda: multiply(a, a).block_until_ready()
    return 2 * size**3 / time_alternately([call], repeats=10, clock=clock)[0].best
