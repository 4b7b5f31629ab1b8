"""This machine: its name in rows of results, and its memory."""

import pathlib

import jax

from subquad.lra import parallel
from subquad.lra.report import results

# Of the control group of a container: all of it, what of it is used.
_GROUPS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))


def name() -> str:
    """This machine as the rows of runs on one device name it."""
    return parallel.hardware(results.environment()["hardware"], None)


def memory() -> tuple[int, str]:
    """(bytes that a program can have here at the most, what has them): of a GPU what JAX may allocate, else of the host."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"], device.device_kind
    found = {"this machine": _meminfo("MemTotal")}
    for most, _ in _GROUPS:
        size = _group(most)
        if size is not None:
            found["this control group"] = size
    source = min(found, key=found.get)
    return found[source], source


def available_memory() -> tuple[int, str]:
    """(bytes that a program may take here now, and what says so)."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"], f"what JAX may allocate on {device.device_kind}"
    free = {"memory available at the start": _meminfo("MemAvailable")}
    for most, used in _GROUPS:
        sizes = _group(most), _group(used)
        if None not in sizes:
            free["memory that this control group had left"] = sizes[0] - sizes[1]
    source = min(free, key=free.get)
    return free[source] * 9 // 10, f"nine tenths of the {source}"


def _meminfo(name: str) -> int:
    lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
    return 1024 * next(int(text.split()[1]) for text in lines if text.startswith(f"{name}:"))


def _group(name: str) -> int | None:
    try:
        return int((pathlib.Path("/sys/fs/cgroup") / name).read_text())
    except (OSError, ValueError):  # no such group, or "max"
        return None
