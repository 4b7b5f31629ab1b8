"""RWKV-6 against its equations, token by token, its limits, and the recurrence of a peer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad.zoo.gated.rwkv6 import RWKV6
from tests import oracle

FEATURES, HEADS, WIDTH = 5, 2, 3


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def build(**options):
    options = dict(hidden_features=HEADS * WIDTH, head_features=WIDTH, mix_rank=2, decay_rank=4) | options
    layer = RWKV6(FEATURES, **options, rngs=nnx.Rngs(0))
    leaves, tree = jax.tree.flatten(nnx.state(layer))
    nnx.update(layer, tree.unflatten([x + 0.5 * normal(*x.shape, seed=i) for i, x in enumerate(leaves)]))
    return layer


def test_the_equations():
    layer, x = build(), np.float64(normal(2, 11, FEATURES))
    read = lambda variable: np.float64(variable[...])
    state, before, outputs = np.zeros((2, HEADS, WIDTH, WIDTH)), np.zeros((2, FEATURES)), []
    for t in range(11):
        now = x[:, t]
        mean, mixed = now + (before - now) * read(layer.mix_of_mix), {}
        for i, name in enumerate(("w", "k", "v", "r", "g")):
            mix = read(layer.mix)[i] + np.tanh(mean @ read(layer.mix_down)[i]) @ read(layer.mix_up)[i]
            mixed[name] = now + (before - now) * mix
        low = np.tanh(mixed["w"] @ read(layer.decay_down)) @ read(layer.decay_up)
        decay = np.exp(-np.exp(read(layer.decay_bias) + low)).reshape(2, HEADS, WIDTH)
        maps = dict(k=layer.key, v=layer.value, r=layer.receptance, g=layer.gate)
        k, v, r, g = ((mixed[name] @ read(of.kernel)).reshape(2, HEADS, WIDTH) for name, of in maps.items())
        write = k[..., None] * v[..., None, :]
        o = np.einsum("bnm,bnmv->bnv", r, state + read(layer.bonus)[..., None] * write)
        state, before = decay[..., None] * state + write, now
        o = (o - o.mean(-1, keepdims=True)) / np.sqrt(o.var(-1, keepdims=True) + 64e-5)
        o = (o * read(layer.norm.scale) + read(layer.norm.bias)) * g / (1 + np.exp(-g))
        outputs.append(o.reshape(2, -1) @ read(layer.out.kernel))
    np.testing.assert_allclose(layer(x.astype(np.float32)), np.stack(outputs, 1), atol=3e-5)


def test_without_decay_and_with_a_bonus_of_1_it_is_linear_attention():
    layer = build()
    layer.bonus[...] = jnp.ones((HEADS, WIDTH))
    r, k, v = (normal(2, 9, HEADS, WIDTH, seed=seed) for seed in range(3))
    heads, _ = layer.mix_time(r, k, v, jnp.zeros_like(k))
    weights = np.tril(np.einsum("btnm,bsnm->bnts", r, k))
    np.testing.assert_allclose(heads, np.einsum("bnts,bsnv->btnv", weights, v), atol=1e-5)
    layer.bonus[...] = jnp.zeros((HEADS, WIDTH))  # without a bonus no token sees itself
    heads, _ = layer.mix_time(r, k, v, jnp.zeros_like(k))
    np.testing.assert_allclose(heads, np.einsum("bnts,bsnv->btnv", np.tril(weights, -1), v), atol=1e-5)


def test_packed_sequences_are_as_alone():
    layer, x = build(), normal(2, 17, FEATURES)
    run = jax.jit(lambda x, ids=None: layer(x, segment_ids=ids))
    packed = run(x, jnp.asarray([3] * 6 + [1] * 4 + [3] * 7))
    alone = jnp.concatenate([run(x[:, :6]), run(x[:, 6:10]), run(x[:, 10:])], axis=1)
    np.testing.assert_allclose(packed, alone, atol=1e-5)


def test_where_it_starts():
    """Decays from those that remember hundreds of tokens to those that forget in one or two; mixes of at most one."""
    layer = RWKV6(64, head_features=16, rngs=nnx.Rngs(0))
    decay = np.exp(-np.exp(np.float64(layer.decay_bias[...])))
    assert (np.diff(decay) < 0).all() and decay[0] == pytest.approx(np.exp(-np.exp(-6))) and 0.6 < decay[-1] < 0.7
    assert layer.mix[...].min() >= -0.15 and layer.mix[...].max() == 1


@pytest.mark.parametrize(("options", "words"), [
    (dict(head_features=4), "head_features must divide hidden_features = 6"), (dict(mix_rank=0), "mix_rank must be a positive"),
    (dict(is_causal=False), "does not support is_causal"),
])  # fmt: skip
def test_refusals(options, words):
    with pytest.raises(ValueError, match=f"RWKV6:? {words}"):
        build(**options)


def test_oracle():
    """flash-linear-attention's recurrence, with a state in and out; heads come first there, and values are narrower."""
    peer, layer = oracle.load("rwkv6"), build(hidden_features=16, head_features=8)

    def run(inputs, _):
        ours, swap = nnx.clone(layer), lambda x: x.swapaxes(1, 2)
        ours.bonus[...] = inputs["u"]
        heads, state = ours.mix_time(*(swap(inputs[name]) for name in "qkvw"), state=inputs["h0"])
        return {"o": swap(heads), "h": state}

    oracle.compare("rwkv6", peer, run, of="mechanism")
