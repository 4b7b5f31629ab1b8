"""The shapes in the signatures are true: every layer is traced with its annotations checked."""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
TRACE = """
from jaxtyping import install_import_hook

with install_import_hook(["subquad.kernels", "subquad.zoo"], "beartype.beartype"):
    import jax
    from tests.zoo.cases import CASES, DIRECTIONS, inputs

    for name, is_causal in DIRECTIONS:
        jax.eval_shape(lambda x: CASES[name].make(is_causal)(x), inputs(63))
        print(name)
"""


def test_every_layer_runs_with_its_annotations_checked():
    done = subprocess.run([sys.executable, "-c", TRACE], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "softmax" in done.stdout, done.stderr[-4000:]
