"""RWKV-4 against its equation, term by term, at keys of any size, and a peer: the mean, and the whole layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad.zoo.gated.rwkv4 import RWKV4
from tests import oracle

FEATURES, HIDDEN = 5, 6


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def build(features=FEATURES, hidden=HIDDEN, **options):
    layer = RWKV4(features, hidden_features=hidden, **options, rngs=nnx.Rngs(0))
    leaves, tree = jax.tree.flatten(nnx.state(layer))
    nnx.update(layer, tree.unflatten([x + 0.5 * normal(*x.shape, seed=i) for i, x in enumerate(leaves)]))
    return layer


def weighted_mean(layer, key, value):
    """Eq. 16: in float64, each output from all tokens up to its own."""
    rate, bonus = np.exp(np.float64(layer.decay_bias[...])), np.float64(layer.bonus[...])
    outputs = np.zeros(value.shape)
    for t in range(key.shape[1]):
        distance = np.arange(t)[::-1, None]  # t - 1 - s
        logs = np.concatenate([np.float64(key[:, :t]) - distance * rate, np.float64(key[:, t : t + 1]) + bonus], 1)
        weights = np.exp(logs - logs.max(1, keepdims=True))
        outputs[:, t] = (weights * value[:, : t + 1]).sum(1) / weights.sum(1)
    return outputs


def test_the_equations():
    layer, x = build(), np.float64(normal(2, 11, FEATURES))
    read = lambda variable: np.float64(variable[...])
    before = np.pad(x, [(0, 0), (1, 0), (0, 0)])[:, :-1]
    k, v, r = (
        (mix * x + (1 - mix) * before) @ read(of.kernel)
        for mix, of in zip(read(layer.mix), (layer.key, layer.value, layer.receptance), strict=True)
    )
    outputs = weighted_mean(layer, k, v) / (1 + np.exp(-r))
    np.testing.assert_allclose(layer(x.astype(np.float32)), outputs @ read(layer.out.kernel), atol=1e-5)


@pytest.mark.parametrize("size", [1.0, 300.0])
def test_keys_of_any_size(size):
    """exp(300) is beyond float32; the mean of a constant is that constant."""
    layer, key, value = build(), size * normal(2, 40, HIDDEN), normal(2, 40, HIDDEN, seed=1)
    run = jax.jit(jax.value_and_grad(lambda key, value: jnp.sum(layer.mean(key, value)[0] ** 2), argnums=(0, 1)))
    np.testing.assert_allclose(layer.mean(key, value)[0], weighted_mean(layer, key, value), atol=1e-5 * size)
    np.testing.assert_allclose(layer.mean(key, jnp.full_like(value, 3.0))[0], 3.0, rtol=1e-6)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(run(key, value)))


def test_packed_sequences_are_as_alone():
    layer, x = build(), normal(2, 17, FEATURES)
    run = jax.jit(lambda x, ids=None: layer(x, segment_ids=ids))
    packed = run(x, jnp.asarray([3] * 6 + [1] * 4 + [3] * 7))
    alone = jnp.concatenate([run(x[:, :6]), run(x[:, 6:10]), run(x[:, 10:])], axis=1)
    np.testing.assert_allclose(packed, alone, atol=1e-5)


def test_where_it_starts():
    layer = RWKV4(64, rngs=nnx.Rngs(0))
    rate = np.exp(np.float64(layer.decay_bias[...]))
    assert (np.diff(rate) > 0).all() and rate[0] == pytest.approx(np.exp(-5)) and rate[-1] == pytest.approx(np.exp(3))
    np.testing.assert_allclose(np.exp(layer.bonus[...][1:4]), 0.3 * np.exp([0.5, -0.5, 0.0]), rtol=1e-5)


@pytest.mark.parametrize(("options", "words"), [
    (dict(hidden=0), "hidden_features must be a positive"), (dict(is_causal=False), "does not support is_causal"),
])  # fmt: skip
def test_refusals(options, words):
    with pytest.raises(ValueError, match=f"RWKV4:? {words}"):
        build(**options)


def test_oracle_mean():
    """Transformers' recurrence, whose sums after the last token are not stabilised."""
    peer, layer = oracle.load("rwkv4_wkv"), build()

    def run(inputs, w):
        ours = nnx.clone(layer)
        ours.decay_bias[...], ours.bonus[...] = w["time_decay"], w["time_first"]
        outputs, state = ours.mean(inputs["k"], inputs["v"])
        sums = state[:, :2] * jnp.exp(state[:, 2:])
        return {"o": outputs, "num": sums[:, 0], "den": sums[:, 1]}

    oracle.compare("rwkv4", peer, run, of="mechanism")


def test_oracle_layer():
    peer = oracle.load("rwkv4_layer")
    layer = build(peer.meta["cfg"]["hidden_size"], peer.meta["cfg"]["attention_hidden_size"])

    def run(inputs, w):
        ours = nnx.clone(layer)
        ours.decay_bias[...], ours.bonus[...] = w["time_decay"], w["time_first"]
        ours.mix[...] = jnp.concatenate([w[f"time_mix_{name}"][0] for name in ("key", "value", "receptance")])
        for name in ("key", "value", "receptance"):
            getattr(ours, name).kernel[...] = w[f"{name}.weight"].T
        ours.out.kernel[...] = w["output.weight"].T
        return ours(inputs["x"])

    oracle.compare("rwkv4", peer, run)
