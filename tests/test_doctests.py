"""Every example in a docstring runs."""

import doctest
import importlib
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad import zoo

ROOT = pathlib.Path(__file__).parents[1]
NAMES = {"jax": jax, "jnp": jnp, "np": np, "nnx": nnx, "zoo": zoo}


def modules():
    for part in ("kernels", "zoo", "lra"):
        for path in sorted((ROOT / part).rglob("*.py")):
            if ">>>" in path.read_text():
                parts = path.relative_to(ROOT).with_suffix("").parts
                yield ".".join(("subquad", *parts)).removesuffix(".__init__")


@pytest.mark.parametrize("module", list(modules()))
def test_examples_run(module):
    found = importlib.import_module(module)
    failed, tried = doctest.testmod(found, extraglobs=NAMES, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert tried and not failed


@pytest.mark.parametrize("name", ["README.md", "kernels/README.md", "zoo/README.md", "lra/README.md"])
def test_readme_examples_run(name):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, name, "exec"), {"__name__": "readme"})
