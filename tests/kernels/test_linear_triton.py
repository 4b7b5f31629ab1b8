"""The Triton kernels of linear attention, interpreted, with the small blocks that a GPU gets."""

import dataclasses

import jax
import pytest

from subquad.kernels import launch, specs, tuning

pytestmark = pytest.mark.interpret


@pytest.fixture
def small_blocks(monkeypatch):
    try:
        launch.require("interpret")
    except launch.Declined as reason:
        pytest.skip(str(reason))
    from subquad.kernels.linear import triton

    whole = triton.plan_of
    monkeypatch.setattr(triton, "heuristic", lambda *_: tuning.Config(dict(BLOCK_W=16, BLOCK_C=16)))
    monkeypatch.setattr(triton, "plan_of", lambda *args, **options: dataclasses.replace(whole(*args, **options), chunk=16))


@pytest.mark.parametrize(
    "name",
    ["linear.attention/causal", "linear.attention/bidirectional", "linear.random_feature_attention/softmax-causal"]
    + ["linear.gated/heads", "linear.gated/normalized"],
)
def test_states_and_values_in_several_blocks(name, small_blocks):
    spec = specs.find(name)
    arrays = spec.draw(37)
    cotangents = specs.cotangents(spec, "xla", arrays)
    inexact, rest = specs.split(arrays)
    got = jax.jit(specs.forward_backward(spec, "interpret", rest))(inexact, cotangents)
    want = specs.expected(spec, arrays, cotangents)
    for leaf, x, y in zip(specs.names_of(got), jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert specs.error(x, y) < 1e-5, leaf
