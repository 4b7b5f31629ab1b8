"""The suite runs on the CPU wherever it runs, and its processes share what they compile."""

import ctypes
import gc
import importlib.metadata
import itertools
import os
import pathlib
import re
import signal
import zlib

import pytest

# Before jax is imported, unless the caller says otherwise.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
cache = pathlib.Path(__file__).parents[1] / ".pytest_cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Compiling takes most of the suite's time, and most of that LLVM's optimisation and, where XLA still lets us choose, its newer
# way to write fused loops; what is computed stays the same. XLA for GPUs compiles nothing without optimising it.
flags = ["--xla_backend_optimization_level=0"] if os.environ["JAX_PLATFORMS"] == "cpu" else []
if flags:  # the processes of the suite take all cores: a program in parts only costs more
    flags.append("--xla_cpu_parallel_codegen_split_count=1")
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):
    flags.append("--xla_cpu_use_fusion_emitters=false")  # an unknown flag ends the process
# The caller's own flags come last, so that they win: XLA_FLAGS=--xla_cpu_max_isa=AVX2 scripts/test.
given = os.environ.get("XLA_FLAGS", "").split()
os.environ["XLA_FLAGS"] = " ".join([flag for flag in flags if flag not in given] + given)

import jax  # noqa: E402

from tests import oracle  # noqa: E402

# A shell starts what runs in its background with Ctrl-C ignored, and so would be the commands that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Tracing makes many small objects that stay, and the collector looks through them again and again: a sixth of the tracing.
gc.set_threshold(100_000, 10, 10)

MAPS, STATUS, tests_run = pathlib.Path("/proc/self/maps"), pathlib.Path("/proc/self/statm"), itertools.count(1)
# Bytes by which a process may grow before it drops what it compiled: two processes should fit in 8 GB.
GROWTH = 5 << 29
kept = {"bytes": 0}


def resident_bytes() -> int:
    return int(STATUS.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if STATUS.exists() else 0


@pytest.fixture(autouse=True)
def few_compiled_programs():
    """Drops compiled programs before they take all memory, or all memory maps that Linux gives a process, where XLA aborts."""
    yield
    if next(tests_run) % 20:
        return
    many = MAPS.exists() and MAPS.read_bytes().count(b"\n") > 45_000  # of 65,530
    if many or resident_bytes() > kept["bytes"] + GROWTH:
        jax.clear_caches()
        gc.collect()
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # the C library keeps what is freed
            trim(0)
        kept["bytes"] = resident_bytes()


def pytest_addoption(parser):
    parser.addoption("--oracles", metavar="CSV", help="write how well the layers agree with oracles: zoo/results/oracles.csv")


def pytest_configure(config):
    if config.getoption("oracles") and not hasattr(config, "workerinput"):  # of xdist: its reports come to the main process
        config.pluginmanager.register(oracle.Table(config.getoption("oracles")))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """A test's report takes along what it compared with oracles."""
    oracle.comparisons.clear()
    result = yield
    item.user_properties += [("oracle", row) for row in oracle.comparisons]
    return result


def leg_of(config) -> str:
    """The leg that scripts/test runs: "interpret" or "aot"; of the CPU or of several: "" (its expression begins otherwise)."""
    found = re.match(r"\(*(interpret|aot)\b", config.getoption("markexpr"))
    return found[1] if found else ""


def pytest_ignore_collect(collection_path, config):
    """Of a leg that has few tests only the files that name it are imported; it would take longer than many of the tests."""
    leg = leg_of(config)
    if leg and re.fullmatch(r"test_.*\.py", collection_path.name) and f"mark.{leg}" not in collection_path.read_text():
        return True


def in_sample(item) -> bool:
    """Whether a test runs by default. Of the cases that are marked `sample(every)` one in `every` does, the same ones always.

    `sample(every, of=names)`: of the cases whose parameter `name` is one of these; the others all run.
    """
    sample = item.get_closest_marker("sample")
    if sample is None or ("of" in sample.kwargs and item.callspec.params["name"] not in sample.kwargs["of"]):
        return True
    return zlib.crc32(item.name.encode()) % sample.args[0] == 0


def pytest_collection_modifyitems(config, items):
    for item in items:
        if re.search("0x[0-9a-f]{8}", item.name):  # the processes of xdist would not find the same tests
            raise pytest.UsageError(f"{item.nodeid} has an address in its name, another one in each process; give it an id")
        if not in_sample(item):
            item.add_marker(pytest.mark.full)
    if "full" not in config.getoption("markexpr"):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("full")])
        items[:] = [item for item in items if not item.get_closest_marker("full")]
    # Triton is an interpreter or a compiler for the whole life of a process, so scripts/test runs these legs one by one.
    interpreting = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
    gpu = None
    for item in items:
        if item.get_closest_marker("interpret") and not interpreting:
            item.add_marker(pytest.mark.skip(reason="needs TRITON_INTERPRET=1; scripts/test sets it"))
        if item.get_closest_marker("aot") and interpreting:
            item.add_marker(pytest.mark.skip(reason="needs TRITON_INTERPRET unset"))
        if item.get_closest_marker("gpu"):
            gpu = jax.default_backend() == "gpu" if gpu is None else gpu
            if not gpu:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))
    # The suites of all layers and all operations go one by one: tests of one share what they compile, in a process that runs
    # them in a row.
    one_by_one = lambda item: item.path.name in ("test_contract.py", "test_suite.py") and hasattr(item, "callspec")
    items.sort(key=lambda item: (str(item.path), item.callspec.params.get("name", "") if one_by_one(item) else ""))
