"""The shapes in the signatures are true: every layer runs with its annotations checked."""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


def test_every_layer_runs_with_its_annotations_checked():
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "tests/zoo/test_contract.py",
        "-k", "test_any_length and [63-", "--jaxtyping-packages=subquad.kernels,subquad.zoo,beartype.beartype",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:]
