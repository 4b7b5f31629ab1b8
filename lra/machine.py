"""This machine, this code and the time, as rows of results name them; the memory that there is."""

import datetime
import functools
import importlib.metadata
import os
import pathlib
import platform
import subprocess
from collections.abc import Iterator

import jax

# Of the control group of a container: all of it, what of it is used.
_GROUPS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))


def utc_now() -> str:
    """The time, as rows have it."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@functools.cache
def environment(devices: int = 1) -> dict[str, str]:
    """What a number depends on beside its configuration: commit, versions, hardware."""
    names = ("jax", "jaxlib", "flax", "optax", "numpy")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    return {"commit": _commit(), "versions": f"python {platform.python_version()}, {versions}", "hardware": hardware(devices)}


def _commit() -> str:
    """The commit of this code, with "+changes" where files differ from it; "unknown" outside its repository."""
    here = pathlib.Path(__file__).parent
    git = lambda *words: subprocess.run(["git", "-C", here, *words], capture_output=True, text=True, check=True).stdout
    try:
        git("ls-files", "--error-unmatch", pathlib.Path(__file__).name)  # not some repository around an installation
        return git("rev-parse", "HEAD").strip() + ("+changes" if git("status", "--porcelain", "-uno").strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def cores() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def hardware(devices: int = 1) -> str:
    """The devices that a run uses, in words."""
    if jax.default_backend() != "cpu":
        return f"{devices} x {jax.devices()[0].device_kind}"
    described = f"{cores()} core{'' if cores() == 1 else 's'} of {_processor_name()}"
    processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return described if devices == 1 else f"{described}, as {devices} devices{processes}"


@functools.cache
def processor() -> str:
    """The processor by its name, and by the numbers that say which it is where a virtual machine hides the name."""
    facts = _processor_facts()
    numbers = [f"{word} {facts[key]}" for word, key in (("family", "cpu family"), ("model", "model")) if facts.get(key)]
    return ", ".join([_processor_name(), *numbers, *(["avx512"] if "avx512f" in facts.get("flags", "").split() else [])])


def _processor_name() -> str:
    return _processor_facts().get("model name") or platform.processor() or platform.machine()


def _processor_facts() -> dict[str, str]:
    """What Linux says of the first processor; empty elsewhere."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (text.partition(":") for text in lines)}


def memory() -> tuple[int, str]:
    """(bytes that a program can have here at the most, what has them): of a GPU what JAX may allocate, else of the host."""
    of_groups = ((most, "this control group") for most, _ in _groups())
    return _device_memory() or min((proc_bytes("meminfo", "MemTotal"), "this machine"), *of_groups)


def available_memory() -> tuple[int, str]:
    """(bytes that a program may take here now, and what says so)."""
    if found := _device_memory():
        return found[0], f"what JAX may allocate on {found[1]}"
    of_groups = ((most - used, "memory that this control group had left") for most, used in _groups())
    free, source = min((proc_bytes("meminfo", "MemAvailable"), "memory available at the start"), *of_groups)
    return free * 9 // 10, f"nine tenths of the {source}"


def _device_memory() -> tuple[int, str] | None:
    device = jax.local_devices()[0]
    most = (device.memory_stats() or {}).get("bytes_limit")
    return None if most is None else (most, device.device_kind)


def _groups() -> Iterator[tuple[int, int]]:
    for names in _GROUPS:
        try:
            most, used = (int((pathlib.Path("/sys/fs/cgroup") / name).read_text()) for name in names)
        except (OSError, ValueError):  # no such group, or "max"
            continue
        yield most, used


def proc_bytes(file: str, name: str) -> int:
    """A number of kilobytes that a file below /proc gives, as bytes."""
    lines = (pathlib.Path("/proc") / file).read_text().splitlines()
    return 1024 * next(int(text.split()[1]) for text in lines if text.startswith(f"{name}:"))
