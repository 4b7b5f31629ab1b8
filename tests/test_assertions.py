"""The suite's own ground: how it compares numbers, and that a caller's XLA flags join its own."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from tests.assertions import assert_close, errors

LARGE, ZERO = np.linspace(-40, 40, 9), np.zeros(3)


def test_what_is_zero_by_mathematics_may_hold_rounding():
    noise = {"bias": ZERO + 1e-5, "kernel": LARGE}
    assert_close(noise, {"bias": ZERO, "kernel": LARGE}, 1e-5)  # a tenth of 40 is the measure
    with pytest.raises(AssertionError, match=r"gradients: errors of 1e-05 or more: \{\"\['bias'\]\""):
        assert_close({"bias": ZERO + 1e-4, "kernel": LARGE}, {"bias": ZERO, "kernel": LARGE}, 1e-5, "gradients")
    assert_close(ZERO, ZERO, 1e-30)
    with pytest.raises(AssertionError):
        assert_close(ZERO + 1e-5, ZERO, 1e-6)


def test_what_is_wrong_fails():
    for wrong in (LARGE * 1.001, LARGE[:8], LARGE[None], LARGE * np.nan, [LARGE], -LARGE):
        with pytest.raises(AssertionError):
            assert_close(wrong, LARGE, 1e-4)


def test_small_leaves_are_measured_by_themselves():
    """One that is a tenth of the largest may not be wrong by its own size, or by a hundredth of it."""
    small = LARGE / 10
    assert errors([LARGE, small * 1.01], [LARGE, small]) == {"[0]": 0.0, "[1]": pytest.approx(0.01)}


def test_flags_of_the_caller_join_those_of_the_suite():
    env = {**os.environ, "XLA_FLAGS": "--xla_cpu_max_isa=AVX2", "JAX_PLATFORMS": "cpu"}
    code = "import os, tests.conftest; print(os.environ['XLA_FLAGS'])"
    root = pathlib.Path(__file__).parents[1]
    flags = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, env=env, check=True).stdout
    assert flags.split()[0] == "--xla_backend_optimization_level=0" and flags.split()[-1] == "--xla_cpu_max_isa=AVX2"
    again = dict(env, XLA_FLAGS=flags.strip())  # a worker of the suite
    assert flags == subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, env=again).stdout
