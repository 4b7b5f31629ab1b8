"""The Triton kernels of linear attention, interpreted, with the small blocks that a GPU gets."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from subquad.kernels import launch, linear, specs, tuning

pytestmark = pytest.mark.interpret


@pytest.fixture
def small_blocks(monkeypatch):
    try:
        launch.require("interpret")
    except launch.Declined as reason:
        pytest.skip(str(reason))
    from subquad.kernels.linear import passes, triton

    def small(kernel, plan, x, width, columns):
        is_whole = x.erase is not None and kernel is passes.linear_states
        return tuning.Config(dict(BLOCK_M=width if is_whole else 16, BLOCK_V=16))

    whole = triton.plan_of
    monkeypatch.setattr(passes, "heuristic", small)
    monkeypatch.setattr(triton, "plan_of", lambda *args, **options: dataclasses.replace(whole(*args, **options), chunk=16))


# By default those that hold the most: segments, feature maps, a normaliser, decays of channels and the delta rule.
SEVERAL = ["linear.attention/segments", "linear.random_feature_attention/softmax-causal"]
SEVERAL += ["linear.gated/normalized", "linear.gated/channels-delta", "linear.gated/channels-bonus"]
OTHERS = ["linear.attention/causal", "linear.attention/bidirectional", "linear.gated/heads", "linear.gated/channels"]
OTHERS += ["linear.gated/floored", "linear.gated/channels-erasing"]


@pytest.mark.parametrize("name", SEVERAL + [pytest.param(name, marks=pytest.mark.full) for name in OTHERS])
def test_states_and_values_in_several_blocks(name, small_blocks):
    spec = specs.find(name)
    arrays = spec.draw(37)
    cotangents = specs.cotangents(spec, "xla", arrays)
    inexact, rest = specs.split(arrays)
    got = jax.jit(specs.forward_backward(spec, "interpret", rest))(inexact, cotangents)
    want = specs.expected(spec, arrays, cotangents)
    assert_close(got, want)


@pytest.mark.parametrize(
    "name",
    ["softmax", "packed-softmax-causal"]
    + [pytest.param(name, marks=pytest.mark.full) for name in ("softmax-causal", "packed-softmax")],
)
def test_random_features_in_pieces(name, small_blocks, monkeypatch):
    """Long sequences are cut, so that not all features are in memory: the state goes from piece to piece."""
    from subquad.kernels.linear import triton

    if name != "packed-softmax":  # which is not cut
        monkeypatch.setattr(triton, "PIECE", 20)
    spec = specs.find(f"linear.random_feature_attention/{name.removeprefix('packed-')}")
    arrays = spec.draw(50)
    segments = jnp.asarray([[0] * 13 + [1] * 27 + [2] * 3 + [3] * 7]) if "packed" in name else None
    query, key, value = (arrays[x][:1] for x in ("query", "key", "value"))

    def run(implementation):
        call = functools.partial(
            linear.random_feature_attention, mask=arrays["mask"], segment_ids=segments, is_causal="causal" in spec.name,
            return_state=True, implementation=implementation,
        )  # fmt: skip
        (out, state), pull = jax.vjp(jax.jit(call), query, key, value, arrays["projection"])
        return out, state, pull((jnp.cos(out), jax.tree.map(jnp.cos, state)))

    assert_close(run("interpret"), run("reference"))


def assert_close(got, want):
    for leaf, x, y in zip(specs.names_of(got), jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert specs.error(x, y) < 1e-5, leaf
