import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from subquad.kernels import gate, specs

WRONG = 1.0


def make(length, dtype, rng):
    return {"x": jnp.asarray(rng.normal(size=(1, length, 2)), dtype), "count": np.arange(length)}


def call(arrays, implementation):
    """A cumulative mean; "triton" is wrong by the factor WRONG, the reference stores a square matrix."""
    x, count = arrays["x"], arrays["count"] + 1
    if implementation == "reference":
        weight = jnp.tril(jnp.ones((len(count), len(count)), x.dtype)) / count[:, None]
        return jnp.einsum("ts,bsd->btd", weight, x)
    sums = jnp.cumsum(x.astype(jnp.float32), 1) / count[:, None].astype(jnp.float32)
    return (sums * (WRONG if implementation == "triton" else 1)).astype(x.dtype)


SPEC = specs.Spec("toy.mean", "plain", make, call)


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setattr(specs, "find", lambda name: SPEC)
    gate._expected.cache_clear()
    gate._bytes.cache_clear()
    monkeypatch.setattr(gate, "REFERENCE_BYTES", 2**30)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_right_passes_and_wrong_does_not(monkeypatch, dtype):
    for implementation in ("xla", "triton"):
        verdict = gate.check(SPEC, implementation, 64, dtype)
        assert verdict.passed and verdict.against == "reference, T = 64", verdict
    monkeypatch.setitem(globals(), "WRONG", 1.5)
    verdict = gate.check(SPEC, "triton", 64, dtype)
    assert not verdict.passed and 0.4 < verdict.error < 0.6
    monkeypatch.setitem(globals(), "WRONG", float("nan"))
    assert not gate.check(SPEC, "triton", 64, dtype).passed


def test_beyond_the_reference_xla_takes_its_place(monkeypatch):
    monkeypatch.setattr(gate, "REFERENCE_BYTES", 20_000)  # a matrix of 32 x 32 float64 and little else
    assert gate.check(SPEC, "xla", 128, "float32").against == "reference, T = 32"
    verdict = gate.check(SPEC, "triton", 128, "bfloat16")
    assert verdict.passed and verdict.against == "xla in float32, T = 128"
    monkeypatch.setitem(globals(), "WRONG", 1.1)
    assert not gate.check(SPEC, "triton", 128, "bfloat16").passed


def test_slack_widens_what_is_allowed():
    wide = dataclasses.replace(SPEC, slack=10.0)
    assert gate.check(wide, "xla", 16, "float32").allowed == pytest.approx(10 * gate.TOLERANCES["float32"])
