import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subquad.kernels import gate, softmax, specs
from subquad.kernels.softmax.specs import draw

WRONG = 1.0
XLA_ERROR = 0.0


def make(length, dtype, rng):
    return {"x": jnp.asarray(rng.normal(size=(1, length, 2)), dtype), "count": np.arange(length)}


def call(arrays, implementation):
    """A cumulative mean; "triton" is wrong by the factor WRONG, the reference stores a square matrix."""
    x, count = arrays["x"], arrays["count"] + 1
    if implementation == "reference":
        weight = jnp.tril(jnp.ones((len(count), len(count)), x.dtype)) / count[:, None]
        return jnp.einsum("ts,bsd->btd", weight, x)
    sums = jnp.cumsum(x.astype(jnp.float32), 1) / count[:, None].astype(jnp.float32)
    return (sums * (WRONG if implementation == "triton" else 1 + XLA_ERROR)).astype(x.dtype)


SPEC = specs.Spec("toy.mean", "plain", make, call)


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setattr(specs, "find", lambda name: SPEC)
    gate._target.cache_clear()
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
    assert gate.check(SPEC, "xla", 128, "float32").against == "reference, T = 32 in place of 128"
    verdict = gate.check(SPEC, "triton", 128, "bfloat16")
    assert verdict.passed and verdict.against == "xla in float32, T = 128"
    monkeypatch.setitem(globals(), "WRONG", 1.1)
    assert not gate.check(SPEC, "triton", 128, "bfloat16").passed


def test_float32_may_be_wrong_by_twice_what_xla_is_also_beyond_the_reference(monkeypatch):
    """The XLA path has no error against itself: what it has against the reference, where that fits, counts."""
    monkeypatch.setattr(gate, "REFERENCE_BYTES", 20_000)
    monkeypatch.setitem(globals(), "XLA_ERROR", 1e-4)
    monkeypatch.setitem(globals(), "WRONG", 1 + 1e-4)
    verdict = gate.check(SPEC, "triton", 128, "float32")
    assert verdict.passed and verdict.against == "xla in float32, T = 128"
    monkeypatch.setitem(globals(), "WRONG", 1 + 1e-3)
    assert not gate.check(SPEC, "triton", 128, "float32").passed


def attend(arrays, implementation):
    """Causal attention; "xla" and "triton" are wrong at the last keys or in the gradients, by what BAD says."""
    bad = BAD if implementation != "reference" else ""
    if bad:
        arrays = arrays | dict(key=arrays["key"].at[:, -64:].mul(3) if bad == "late keys" else arrays["key"])
    out, lse = softmax.attention(**arrays, is_causal=True, return_lse=True, implementation="reference")
    return (scale_gradient(out) if bad == "gradient" else out), lse


BAD = ""
ATTENTION = specs.Spec("softmax.attention", "toy", functools.partial(draw, heads=1, features=4), attend)
scale_gradient = jax.custom_vjp(lambda x: x)
scale_gradient.defvjp(lambda x: (x, None), lambda _, gradient: (1.01 * gradient,))


@pytest.mark.parametrize("implementation", ["xla", "triton"])
def test_a_sample_of_queries_is_checked_at_the_length_that_is_timed(monkeypatch, implementation):
    monkeypatch.setattr(specs, "find", lambda name: ATTENTION)
    monkeypatch.setattr(gate, "REFERENCE_BYTES", 300_000)
    assert gate._longest(ATTENTION, 512, "float32") < 512
    verdict = gate.check(ATTENTION, implementation, 512, "float32")
    assert verdict.passed and verdict.against == "reference, 32 queries of T = 512"
    for bad in ("late keys", "gradient"):
        gate._target.cache_clear()
        if implementation == "triton":  # with an XLA path that is right
            gate._target(ATTENTION.name, 512, "float32")
        monkeypatch.setitem(globals(), "BAD", bad)
        assert not gate.check(ATTENTION, implementation, 512, "float32").passed, bad
        monkeypatch.setitem(globals(), "BAD", "")


def test_the_queries_alone_are_the_rows_of_the_whole():
    """Of every spec that is sampled, the rows and the gradients that the reference gives for a sample of queries."""
    sampled = [spec for spec in specs.load().values() if gate._can_sample(spec, 64, "float32") and spec.bench_lengths]
    assert {spec.variant for spec in sampled} >= {"full", "causal", "window"}
    for spec in sampled:
        inexact, cotangents, rest = gate.problem(spec, 64, "float32")
        run, want = gate._sampled(spec, 64, inexact, cotangents)
        for got, wanted in zip(jax.tree.leaves(run("reference")), jax.tree.leaves(want), strict=True):
            assert specs.error(got, wanted) < 1e-5, spec.name


def test_what_is_benchmarked_has_the_size_of_a_benchmark():
    assert [spec.name for spec in specs.load().values() if spec.bench_lengths and spec.make_bench is None] == []


def test_published_shapes_have_those_arrays_and_a_length_of_their_own():
    found = specs.targets()
    assert not set(found) & set(specs.load()) and {"softmax.attention/causal-2x16384x16x128"} <= set(found)
    for name, spec in found.items():
        shape = tuple(map(int, name.rpartition("-")[2].split("x")))
        assert spec.bench_lengths == shape[1:2] and specs.find(name) is not None
        arrays = jax.eval_shape(lambda spec=spec: spec.draw(8, "bfloat16", bench=True))
        assert {x.shape for x in arrays.values()} == {(shape[0], 8, *shape[2:])}
        if shape[0] == 1:
            jax.eval_shape(specs.forward(spec, "xla", {}), arrays)


def test_slack_widens_what_is_allowed():
    wide = dataclasses.replace(SPEC, slack=10.0)
    assert gate.check(wide, "xla", 16, "float32").allowed == pytest.approx(10 * gate.TOLERANCES["float32"])
