"""The suite runs on the CPU wherever it runs, and its processes share what they compile."""

import os
import pathlib

import pytest

# Before jax is imported, unless the caller says otherwise.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
cache = pathlib.Path(__file__).parents[1] / ".pytest_cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items):
    # Tests of one file, and of one layer in the contract suite, share what they compile: one process each.
    for item in items:
        layer = getattr(item, "callspec", None) and item.callspec.params.get("name")
        shared = f"{item.path.name}:{layer}" if layer and item.path.name == "test_contract.py" else item.path.name
        item.add_marker(pytest.mark.xdist_group(shared))
