"""RWKV-7 against its equations, token by token, its limits, and the recurrence of a peer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad.kernels import linear
from subquad.zoo.delta.rwkv7 import RWKV7
from tests import oracle

from .delta import sigmoid

FEATURES, HEADS, WIDTH = 5, 2, 3


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def build(**options):
    options = dict(hidden_features=HEADS * WIDTH, head_features=WIDTH, decay_rank=2, rate_rank=4, gate_rank=3) | options
    layer = RWKV7(FEATURES, **options, rngs=nnx.Rngs(0))
    leaves, tree = jax.tree.flatten(nnx.state(layer))
    nnx.update(layer, tree.unflatten([x + 0.5 * normal(*x.shape, seed=i) for i, x in enumerate(leaves)]))
    return layer


def test_the_equations():
    layer, x = build(), np.float64(normal(2, 11, FEATURES))
    read = lambda variable: np.float64(variable[...])
    state, before, outputs = np.zeros((2, HEADS, WIDTH, WIDTH)), np.zeros((2, FEATURES)), []
    by_head = lambda x: x.reshape(2, HEADS, WIDTH)
    for t in range(11):
        now = x[:, t]
        m = dict(zip("rwkvag", (now + (before - now) * mix for mix in read(layer.mix)), strict=True))
        r, k, v = (by_head(m[i] @ read(of.kernel)) for i, of in dict(r=layer.receptance, k=layer.key, v=layer.value).items())
        low = by_head(np.tanh(m["w"] @ read(layer.decay_down)) @ read(layer.decay_up))
        w = np.exp(-np.exp(-0.5) * sigmoid(low + read(layer.decay_bias)))
        a = sigmoid(by_head(m["a"] @ read(layer.rate_down) @ read(layer.rate_up)) + read(layer.rate_bias))
        g = by_head(sigmoid(m["g"] @ read(layer.gate_down)) @ read(layer.gate_up))
        z, y = k * read(layer.erased), k * (1 + (a - 1) * read(layer.written))
        z = z / np.sqrt((z**2).sum(-1, keepdims=True) + 1e-6)
        erased = (a * z)[..., None] * np.einsum("bnm,bnmv->bnv", z, state)[..., None, :]
        state, before = w[..., None] * state - erased + y[..., None] * v[..., None, :], now
        o = np.einsum("bnm,bnmv->bnv", r, state)
        o = (o - o.mean(-1, keepdims=True)) / np.sqrt(o.var(-1, keepdims=True) + 64e-5)
        o = o * read(layer.norm.scale) + read(layer.norm.bias) + (r * read(layer.bonus) * y).sum(-1, keepdims=True) * v
        outputs.append((o * g).reshape(2, -1) @ read(layer.out.kernel))
    np.testing.assert_allclose(layer(x.astype(np.float32)), np.stack(outputs, 1), atol=3e-5)


def test_where_it_becomes_others():
    layer = build()
    r, y, v, z = (normal(2, 9, HEADS, WIDTH, seed=seed) for seed in range(4))
    z /= np.linalg.norm(z, axis=-1, keepdims=True)
    none, all_ = jnp.zeros_like(y), jnp.ones_like(y)
    heads, _ = layer.mix_time(r, z, y, v, none, none)  # no decay, and nothing erased: linear attention
    weights = np.tril(np.einsum("btnm,bsnm->bnts", r, y))
    np.testing.assert_allclose(heads, np.einsum("bnts,bsnv->btnv", weights, v), atol=1e-5)
    heads, state = layer.mix_time(r, z, z, v, all_, none)  # one key for both, at the rate 1: the delta rule
    delta, last = linear.gated(r, z, v, beta=jnp.ones((2, 9, HEADS)), return_state=True)
    np.testing.assert_allclose(heads, delta, atol=1e-5)
    np.testing.assert_allclose(state, last, atol=1e-5)
    assert jnp.allclose(jnp.einsum("bnm,bnmv->bnv", z[:, -1], state), v[:, -1], atol=1e-5)  # the last value is under its key


def test_packed_sequences_are_as_alone():
    layer, x = build(), normal(2, 17, FEATURES)
    run = jax.jit(lambda x, ids=None: layer(x, segment_ids=ids))
    packed = run(x, jnp.asarray([3] * 6 + [1] * 4 + [3] * 7))
    alone = jnp.concatenate([run(x[:, :6]), run(x[:, 6:10]), run(x[:, 10:])], axis=1)
    np.testing.assert_allclose(packed, alone, atol=1e-5)


def test_where_it_starts():
    """Decays from hundreds of tokens to the fastest there is, one in each head; rates around a half; mixes of at most one."""
    layer, x = RWKV7(64, head_features=16, rngs=nnx.Rngs(0)), normal(1, 64)
    decay = np.exp(np.float64(layer.log_decay(x, x)))[0]
    assert decay[0, 0] > 0.9995 and np.exp(-np.exp(-0.5)) < decay[-1, -1] < 0.57 and (decay[:, 0] > decay[:, -1]).all()
    rate = layer.rate(x, x)
    assert 0.3 < rate.min() < rate.max() < 0.6
    assert layer.mix[...].min() >= 0 and layer.mix[...].max() == 1
    rows = np.float64(layer.decay_up[...])
    np.testing.assert_allclose(rows @ rows.T, 0.01 * np.eye(64), atol=1e-7)


@pytest.mark.parametrize(("options", "words"), [
    (dict(head_features=4), "head_features must divide hidden_features = 6"), (dict(gate_rank=0), "gate_rank must be"),
    (dict(is_causal=False), "does not support is_causal"),
])  # fmt: skip
def test_refusals(options, words):
    with pytest.raises(ValueError, match=f"RWKV7:? {words}"):
        build(**options)


def test_oracle():
    """flash-linear-attention's recurrence, with a state in and out; it multiplies queries by M^-1/2, and heads come first."""
    peer, layer = oracle.load("rwkv7"), build()

    def run(inputs, _):
        swap = lambda x: x.swapaxes(1, 2)
        q, key, value, erased, rate, decay = (swap(inputs[name]) for name in ("q", "k", "v", "kappa", "a", "w"))
        heads, state = layer.mix_time(q * q.shape[-1] ** -0.5, erased, key, value, rate, decay, state=inputs["s0"])
        return {"o": swap(heads), "h": state}

    oracle.compare("rwkv7", peer, run, of="mechanism")
