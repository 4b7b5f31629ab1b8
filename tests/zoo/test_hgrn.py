"""HGRN against its formula, step by step, its limits, and flash-linear-attention's recurrence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad.zoo.statespace.hgrn import HGRN
from tests import oracle

FEATURES = 5


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def build(**options):
    return HGRN(FEATURES, **dict(lower_bound=0.3, is_causal=True) | options, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("is_causal", [True, False])
def test_the_formula_step_by_step(is_causal):
    """In two directions the states of both are added, each with the present token in it."""
    layer, x = build(is_causal=is_causal), np.float64(normal(2, 9, FEATURES))
    layer.phase[...] = normal(*layer.phase.shape, seed=1)
    layer.norm.scale[...], layer.norm.bias[...] = normal(2 * FEATURES, seed=2), normal(2 * FEATURES, seed=3)
    silu = lambda x: x / (1 + np.exp(-x))
    linear = lambda module, x: x @ np.float64(module.kernel[...]) + np.float64(module.bias[...])
    real, imaginary = np.split(silu(linear(layer.input, x)), 2, axis=-1)
    forget = 0.3 + 0.7 / (1 + np.exp(-linear(layer.forget, x)))
    total = np.zeros((2, 9, FEATURES), complex)
    for which, order in enumerate((range(9), range(8, -1, -1))[: 1 if is_causal else 2]):
        h = np.zeros((2, FEATURES), complex)
        for t in order:
            turned = forget[:, t] * np.exp(1j * np.float64(layer.phase[which])) * h
            h = turned + (1 - forget[:, t]) * (real + 1j * imaginary)[:, t]
            total[:, t] += h
    states = np.concatenate([total.real, total.imag], axis=-1)
    states = (states - states.mean(-1, keepdims=True)) / np.sqrt(states.var(-1, keepdims=True) + 1e-5)
    states = states * layer.norm.scale[...] + layer.norm.bias[...]
    np.testing.assert_allclose(layer(jnp.float32(x)), linear(layer.out, states * silu(linear(layer.gate, x))), atol=3e-5)


def test_a_bound_is_what_a_closed_gate_keeps():
    """And an open one keeps all, whatever the bound. Gates and what they write are one."""
    x, start = jnp.asarray(normal(1, 6, FEATURES)), jax.lax.complex(normal(1, FEATURES), normal(1, FEATURES, seed=1))
    layer = build(lower_bound=0.9)
    layer.forget.kernel[...], layer.phase[...] = jnp.zeros((FEATURES, FEATURES)), jnp.zeros((1, FEATURES))
    for bias, kept in ((-40.0, 0.9), (40.0, 1.0)):
        layer.forget.bias[...] = jnp.full(FEATURES, bias)
        forget, drive = layer.gates(x)
        np.testing.assert_allclose(forget, jnp.full((1, 6, FEATURES), kept), atol=1e-6)
        assert (jnp.abs(drive).max() > 0.01) == (kept < 1)
        np.testing.assert_allclose(layer.recur(forget, 0 * drive, start)[1], kept**6 * start, rtol=1e-5)


def test_packed_sequences_are_as_alone():
    layer, x = build(is_causal=False), normal(2, 17, FEATURES)
    run = jax.jit(lambda x, ids=None: layer(x, segment_ids=ids))
    packed = run(x, jnp.asarray([3] * 6 + [1] * 4 + [3] * 7))
    alone = jnp.concatenate([run(x[:, :6]), run(x[:, 6:10]), run(x[:, 10:])], axis=1)
    np.testing.assert_allclose(packed, alone, atol=1e-5)


@pytest.mark.parametrize("bound", [-0.1, 1.0])
def test_refusals(bound):
    with pytest.raises(ValueError, match=r"HGRN: lower_bound must be a number in \[0, 1\)"):
        build(lower_bound=bound)


def test_oracle():
    """Theirs is real, the paper's with a phase of 0, and is given (1 - f) c."""
    peer = oracle.load("hgrn")
    layer = HGRN(peer.inputs["x"].shape[-1], is_causal=True, rngs=nnx.Rngs(0))

    def run(inputs, _):
        ours = nnx.clone(layer)
        ours.phase[...] = jnp.zeros_like(ours.phase[...])
        states, last = ours.recur(jnp.exp(inputs["g"]), inputs["x"] + 0j, inputs["h0"] + 0j)
        return {"o": states.real, "h": last.real}

    oracle.compare("hgrn", peer, run, of="mechanism")
