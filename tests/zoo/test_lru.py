"""The LRU against its formula, step by step, its ring, and another implementation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad.zoo.statespace.lru import LRU
from subquad.zoo.statespace.output import skipped
from tests import oracle

FEATURES, STATE = 5, 7


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def build(**options):
    return LRU(FEATURES, **dict(state_size=STATE) | options, rngs=nnx.Rngs(0))


def linear_part(layer, x):
    """y = Re(C x) + D u."""
    return skipped(layer.skip, x, layer.respond(x, None, None))


@pytest.mark.parametrize("is_causal", [False, True])
def test_the_formula_step_by_step(is_causal):
    layer, x = build(is_causal=is_causal), normal(2, 9, FEATURES)
    numbers = lambda param: np.float64(param[...])
    decay = np.exp(-np.exp(numbers(layer.log_decay)) + 1j * np.exp(numbers(layer.log_phase)))
    B, C = (numbers(m) @ [1, 1j] for m in (layer.input_matrix, layer.output_matrix))

    def states(tokens):
        state, found = np.zeros((2, STATE)), []
        for token in tokens:
            state = decay * state + np.exp(numbers(layer.log_scale)) * (token @ B.T)
            found.append(state)
        return np.stack(found, 1)

    tokens = x.swapaxes(0, 1)
    y = (states(tokens) @ C[0].T).real + x * layer.skip[...]
    if not is_causal:
        y += (states(tokens[::-1])[:, ::-1] @ C[1].T).real
    np.testing.assert_allclose(linear_part(layer, jnp.asarray(x)), y, atol=1e-5)
    want = jax.nn.glu(jax.nn.gelu(y, approximate=False) @ layer.out.kernel[...] + layer.out.bias[...])
    np.testing.assert_allclose(layer(x), want, atol=1e-5)


@pytest.mark.parametrize(("low", "high", "phase"), [(0.0, 0.99, 2 * np.pi), (0.9, 0.999, np.pi / 10), (0.5, 1.0, 1.0)])
def test_the_ring(low, high, phase):
    """Uniform by area; states start as large as their inputs."""
    layer = LRU(64, state_size=2000, r_min=low, r_max=high, max_phase=phase, rngs=nnx.Rngs(0))
    decay, B, C = layer.system()
    radius, angle = np.abs(decay), np.angle(decay) % (2 * np.pi)
    assert low - 1e-6 <= radius.min() and radius.max() < 1 and radius.max() <= high + 1e-6
    uniform = (radius**2 - low**2) / (high**2 - low**2)
    for values in (uniform, angle / phase):
        np.testing.assert_allclose(np.quantile(values, [0.05, 0.25, 0.5, 0.75, 0.95]), [0.05, 0.25, 0.5, 0.75, 0.95], atol=0.04)
    np.testing.assert_allclose(np.exp(layer.log_scale[...]), np.sqrt(1 - radius**2), rtol=2e-2)
    # |x|^2 of white inputs: gamma^2 |B|^2 / (1 - |lambda|^2), one for each mode and 1 for all features together.
    assert np.mean(np.sum(np.abs(B) ** 2, 1) / (1 - radius**2)) == pytest.approx(1, rel=0.05)
    assert np.mean(np.abs(C) ** 2) == pytest.approx(2 / 2000, rel=0.05)


def test_packed_sequences_are_as_alone():
    layer, x = build(), normal(2, 17, FEATURES)
    run = jax.jit(lambda x, ids=None: layer(x, segment_ids=ids))
    packed = run(x, jnp.asarray([3] * 6 + [1] * 4 + [3] * 7))
    alone = jnp.concatenate([run(x[:, :6]), run(x[:, 6:10]), run(x[:, 10:])], axis=1)
    np.testing.assert_allclose(packed, alone, atol=1e-6)


@pytest.mark.parametrize(("options", "words"), [
    (dict(state_size=0), "state_size must be a positive integer"),
    (dict(r_min=0.99), r"r_min must be a number in \[0, 0.99\)"), (dict(r_max=1.5), "r_max must be a number"),
    (dict(max_phase=7.0), r"max_phase must be a number in \(0, 6"), (dict(gate="glu"), "gate must be a known name"),
    (dict(gate="half", out_features=3), "out_features must be in_features = 5"),
])  # fmt: skip
def test_refusals(options, words):
    with pytest.raises(ValueError, match=f"LRU: {words}"):
        build(**options)


def test_oracle():
    """minimal-LRU's recurrence."""
    peer, layer = oracle.load("lru"), build(is_causal=True)

    def run(inputs, w):
        ours = nnx.merge(*nnx.split(layer))
        ours.log_decay, ours.log_phase, ours.log_scale = map(nnx.Param, (w["nu_log"], w["theta_log"], w["gamma_log"]))
        ours.input_matrix = nnx.Param(jnp.stack([w["B_re"], w["B_im"]], -1))
        ours.output_matrix = nnx.Param(jnp.stack([w["C_re"], w["C_im"]], -1)[None])
        ours.skip = nnx.Param(w["D"])
        return {"y": linear_part(ours, inputs["x"][None])[0]}

    oracle.compare("lru", peer, run, of="mechanism")
