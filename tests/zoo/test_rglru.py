"""Griffin's recurrent block against its formula, step by step, its limits, and the authors' code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad.zoo.statespace.rglru import RGLRU, gated
from tests import oracle

FEATURES, HIDDEN = 5, 6


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def build(**options):
    return RGLRU(FEATURES, **dict(hidden_features=HIDDEN, num_blocks=2) | options, rngs=nnx.Rngs(0))


def sigmoid(x):
    return 1 / (1 + np.exp(-np.float64(x)))


def by_blocks(module, x) -> np.ndarray:
    """The map as one matrix, whose blocks off the diagonal are 0."""
    size, blocks, _ = module.kernel.shape
    matrix = np.zeros((blocks * size, blocks * size))
    for j in range(blocks):
        matrix[j * size : (j + 1) * size, j * size : (j + 1) * size] = module.kernel[...][:, j]
    return x @ matrix + np.ravel(module.bias[...])


@pytest.mark.parametrize("width", [1, 4])
def test_the_formula_step_by_step(width):
    layer, x = build(conv_width=width), normal(2, 9, FEATURES)
    layer.taps_bias[...], layer.decay_gate.bias[...] = normal(HIDDEN, seed=1), normal(2, 3, seed=2)
    layer.taps[...] = normal(width, HIDDEN, seed=3)
    linear = lambda module, x: np.float64(x) @ np.float64(module.kernel[...]) + np.float64(module.bias[...])
    hidden = linear(layer.input, x)
    states, state = [], np.zeros((2, HIDDEN))
    for t in range(9):
        u = layer.taps_bias[...] + sum(layer.taps[...][j] * hidden[:, t - j] for j in range(width) if t >= j)
        a = sigmoid(layer.decay[...]) ** (8 * sigmoid(by_blocks(layer.decay_gate, u)))
        state = a * state + np.sqrt(1 - a**2) * sigmoid(by_blocks(layer.input_gate, u)) * u
        states.append(state)
    gate = jax.nn.gelu(linear(layer.gate, x).astype(np.float32), approximate=False)
    np.testing.assert_allclose(layer(x), linear(layer.out, gate * np.stack(states, 1)), atol=2e-5)


def test_a_closed_gate_keeps_the_state_and_an_open_one_forgets():
    """Also where the gate is so near 0 that a is 1 and the root 0: the gradients stay finite."""
    layer, x = build(), normal(1, 9, HIDDEN)
    start = normal(1, HIDDEN, seed=1)
    for bias in (-30.0, -200.0):
        layer.decay_gate.bias[...] = jnp.full((2, 3), bias)
        states, last = layer.recur(x, start)
        np.testing.assert_allclose(states, np.broadcast_to(start[:, None], states.shape), atol=2e-5)
        np.testing.assert_array_equal(last, states[:, -1])
        assert np.isfinite(jax.grad(lambda x: layer.recur(x, start)[0].sum())(x)).all()  # noqa: B023
    layer.decay_gate.bias[...], layer.decay[...] = jnp.full((2, 3), 30.0), jnp.full(HIDDEN, -30.0)
    np.testing.assert_allclose(layer.recur(x, start)[0], sigmoid(by_blocks(layer.input_gate, x)) * x, rtol=1e-4)


def test_where_it_starts():
    """sigmoid(Lambda)^c is uniform between 0.9 and 0.999; taps are small."""
    layer = RGLRU(64, hidden_features=4096, num_blocks=64, rngs=nnx.Rngs(0))
    power = sigmoid(layer.decay[...]) ** 8
    shares = np.linspace(0.05, 0.95, 7)
    np.testing.assert_allclose(np.quantile(power, shares), 0.9 + 0.099 * shares, atol=0.005)
    assert np.std(layer.taps[...]) == pytest.approx(0.05, rel=0.05)


def test_packed_sequences_are_as_alone():
    layer, x = build(), normal(2, 17, FEATURES)
    run = jax.jit(lambda x, ids=None: layer(x, segment_ids=ids))
    packed = run(x, jnp.asarray([3] * 6 + [1] * 4 + [3] * 7))
    alone = jnp.concatenate([run(x[:, :6]), run(x[:, 6:10]), run(x[:, 10:])], axis=1)
    np.testing.assert_allclose(packed, alone, atol=1e-6)


@pytest.mark.parametrize(("options", "words"), [
    (dict(num_blocks=4), "num_blocks must divide hidden_features = 6"), (dict(conv_width=0), "conv_width must be a positive"),
    (dict(hidden_features=0), "hidden_features must be a positive"), (dict(is_causal=False), "does not support is_causal"),
])  # fmt: skip
def test_refusals(options, words):
    with pytest.raises(ValueError, match=f"RGLRU:? {words}"):
        build(**options)


def test_oracle():
    """RecurrentGemma's recurrence, from a state and from none: then its first token has weight 1, which the paper's has not."""
    peer = oracle.load("rglru")
    width, blocks = peer.meta["cfg"]["width"], peer.meta["cfg"]["num_heads"]
    layer = build(hidden_features=width, num_blocks=blocks)

    def run(inputs, w):
        ours, x = nnx.clone(layer), inputs["x"]
        ours.decay[...] = -w["a_param"]  # theirs is 1 - sigmoid's
        for gate, name in ((ours.decay_gate, "a_gate"), (ours.input_gate, "input_gate")):
            gate.kernel[...], gate.bias[...] = w[f"{name}.w"].swapaxes(0, 1), w[f"{name}.b"]

        def text(x):
            first = gated(ours.input_gate, x[:, 0]) * x[:, 0]
            states, last = ours.recur(x[:, 1:], first)
            return jnp.concatenate([first[:, None], states], 1), last

        (whole, last), (start, _), (rest, other_last) = text(x[:1]), text(x[1:, :9]), text(x[1:, 9:])
        states, last_from = ours.recur(x, inputs["h0"])
        y = jnp.concatenate([whole, jnp.concatenate([start, rest], 1)])
        return {"y": y, "h": jnp.concatenate([last, other_last]), "y_from_h0": states, "h_from_h0": last_from}

    assert [list(np.flatnonzero(at == 0)) for at in peer.inputs["segment_pos"]] == [[0], [0, 9]]
    oracle.compare("rglru", peer, run, of="mechanism")
