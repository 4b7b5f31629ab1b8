"""Mamba against its formula, step by step, its limits, and Hugging Face's layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad.zoo.statespace.mamba import Mamba
from tests import oracle

FEATURES, HIDDEN = 5, 6


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def build(**options):
    return Mamba(FEATURES, **dict(hidden_features=HIDDEN, state_size=4, step_rank=3) | options, rngs=nnx.Rngs(0))


def test_the_formula_step_by_step():
    layer, x = build(), np.float64(normal(2, 9, FEATURES))
    layer.convolution.bias[...], layer.skip[...] = normal(HIDDEN, seed=1), normal(HIDDEN, seed=2)
    layer.step.bias[...], layer.log_rates[...] = normal(HIDDEN, seed=3), normal(HIDDEN, 4, seed=4)
    silu = lambda x: x / (1 + np.exp(-x))
    linear = lambda module, x: x @ np.float64(module.kernel[...])
    before, taps = linear(layer.input, x), np.float64(layer.convolution.taps[...])
    rates, state, outputs = np.exp(np.float64(layer.log_rates[...])), np.zeros((2, HIDDEN, 4)), []
    for t in range(9):
        u = silu(layer.convolution.bias[...] + sum(taps[j] * before[:, t - j] for j in range(4) if t >= j))
        low, into, out = np.split(linear(layer.select, u), [3, 7], axis=-1)
        step = np.log1p(np.exp(linear(layer.step, low) + layer.step.bias[...]))
        state = np.exp(-step[..., None] * rates) * state + (step * u)[..., None] * into[:, None]
        outputs.append((state * out[:, None]).sum(-1) + layer.skip[...] * u)
    expected = linear(layer.out, np.stack(outputs, 1) * silu(linear(layer.gate, x)))
    np.testing.assert_allclose(layer(jnp.float32(x)), expected, atol=2e-5)


def test_a_short_step_keeps_the_state_and_a_long_one_begins_anew():
    layer, x, start = build(), jnp.asarray(normal(1, 9, HIDDEN)), jnp.asarray(normal(1, HIDDEN, 4, seed=1))
    into = layer.select(x)[..., 3:7]
    layer.step.bias[...] = jnp.full(HIDDEN, -40.0)
    np.testing.assert_allclose(layer.scan(x, start)[1], start, atol=1e-6)
    layer.step.bias[...] = jnp.full(HIDDEN, 1e4)
    last = layer.scan(x, start)[1]
    np.testing.assert_allclose(last / 1e4, (x[:, -1, :, None] * into[:, -1, None]), rtol=2e-3)


def test_where_it_starts():
    """Steps are log-uniform between their bounds; the rates of the N states of each feature are 1, 2, .., N."""
    layer = Mamba(16, hidden_features=4096, rngs=nnx.Rngs(0))
    shares = np.linspace(0.05, 0.95, 7)
    step = np.log(np.log1p(np.exp(np.float64(layer.step.bias[...]))))
    np.testing.assert_allclose(np.quantile(step, shares), np.log(1e-3) + np.log(100) * shares, atol=0.1)
    np.testing.assert_allclose(jnp.exp(layer.log_rates[...])[7], np.arange(1, 17), rtol=1e-6)


def test_packed_sequences_are_as_alone():
    layer, x = build(), normal(2, 17, FEATURES)
    run = jax.jit(lambda x, ids=None: layer(x, segment_ids=ids))
    packed = run(x, jnp.asarray([3] * 6 + [1] * 4 + [3] * 7))
    alone = jnp.concatenate([run(x[:, :6]), run(x[:, 6:10]), run(x[:, 10:])], axis=1)
    np.testing.assert_allclose(packed, alone, atol=1e-6)


@pytest.mark.parametrize(("options", "words"), [
    (dict(dt_min=0.2), r"dt_min must be a number in \(0, 0.1\]"), (dict(step_rank=0), "step_rank must be a positive"),
    (dict(state_size=0), "state_size must be a positive"), (dict(is_causal=False), "does not support is_causal"),
])  # fmt: skip
def test_refusals(options, words):
    with pytest.raises(ValueError, match=f"Mamba:? {words}"):
        build(**options)


def test_oracle():
    """Hugging Face's whole mixer, whose one map makes x and z, and another steps, B and C."""
    peer = oracle.load("mamba_layer")
    cfg = peer.meta["cfg"]
    layer = Mamba(
        cfg["hidden_size"], state_size=cfg["state_size"], step_rank=cfg["time_step_rank"], conv_width=cfg["conv_kernel"],
        rngs=nnx.Rngs(0),
    )  # fmt: skip

    def run(inputs, w):
        ours = nnx.clone(layer)
        ours.input.kernel[...], ours.gate.kernel[...] = jnp.split(w["in_proj.weight"].T, 2, axis=1)
        ours.convolution.taps[...] = jnp.flip(w["conv1d.weight"][:, 0].T, 0)  # its last tap weighs the present token
        ours.convolution.bias[...], ours.skip[...] = w["conv1d.bias"], w["D"]
        ours.select.kernel[...], ours.out.kernel[...] = w["x_proj.weight"].T, w["out_proj.weight"].T
        ours.step.kernel[...], ours.step.bias[...] = w["dt_proj.weight"].T, w["dt_proj.bias"]
        ours.log_rates[...] = w["A_log"]
        return ours(inputs["x"])

    oracle.compare("mamba", peer, run)
