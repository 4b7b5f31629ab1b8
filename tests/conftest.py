"""The suite runs on the CPU wherever it runs, and its processes share what they compile."""

import os
import pathlib

# Before jax is imported, unless the caller says otherwise.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
cache = pathlib.Path(__file__).parents[1] / ".pytest_cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


def pytest_collection_modifyitems(items):
    # The contract suite layer by layer: tests of one layer share what they compile, in a process that runs them in a row.
    layer = lambda item: item.callspec.params.get("name", "") if hasattr(item, "callspec") else ""
    items.sort(key=lambda item: (str(item.path), layer(item) if item.path.name == "test_contract.py" else ""))
