"""RetNet's layer against its formula, its limits, and two peers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad.kernels import linear
from subquad.zoo.gated.retention import Retention
from tests import oracle

FEATURES, HEADS = 16, 2


def build(**options):
    return Retention(HEADS, FEATURES, rngs=nnx.Rngs(0), **options)


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def test_the_formula_step_by_step():
    """Eqs. 5, 6 and 8; the rotation turns features i and i + H/2 as one complex number."""
    layer, x = build(), normal(2, 11, FEATURES)
    layer.norm.scale[...] = normal(16, seed=1)
    query, key, value, gate = (np.asarray(heads, np.float64) for heads in (*layer.project(x)[:3], layer.gate(x)))
    angle = np.arange(11)[:, None, None] * 10000.0 ** (-np.arange(0, 8, 2) / 8)
    turn = lambda heads: (heads[..., :4] + 1j * heads[..., 4:]) * np.exp(1j * angle)
    query, key = turn(query), turn(key)
    heads, state = np.zeros((2, 11, HEADS, 16)), np.zeros((2, HEADS, 4, 16), complex)
    gamma = 1 - 2.0 ** -np.array([5, 6])
    for t in range(11):
        state = gamma[:, None, None] * state + np.einsum("bnh,bnv->bnhv", key[:, t].conj(), value[:, t])
        heads[:, t] = np.einsum("bnh,bnhv->bnv", query[:, t], state).real / 8**0.5
    heads /= np.sqrt(np.mean(heads**2, -1, keepdims=True) + 1e-5)
    heads *= np.asarray(layer.norm.scale[...]) * gate / (1 + np.exp(-gate))
    np.testing.assert_allclose(layer(x), layer.out(jnp.asarray(heads, jnp.float32)), atol=1e-5)


def test_without_decay_it_is_a_sum_and_with_all_of_it_a_token_alone():
    x = normal(1, 9, FEATURES)
    layer = build(decay=(1.0, 0.0))
    query, key, value, _ = layer.project(x)
    heads, _ = layer.retain(query, key, value, None)
    sums = linear.gated(query, key, value)[:, :, 0] * 8**-0.5
    own = jnp.sum(query * key, -1, keepdims=True)[:, :, 1] * value[:, :, 1] * 8**-0.5
    np.testing.assert_allclose(heads, jnp.stack([sums, own], 2), atol=1e-5)


def test_outputs_depend_on_distances_alone():
    """A sequence behind others that the gate of a segment hides is as at the start, wherever its positions begin."""
    layer, x = build(rotary_base=10.0), normal(1, 17, FEATURES)
    ids = jnp.asarray([0] * 5 + [1] * 12)
    np.testing.assert_allclose(layer(x, segment_ids=ids)[:, 5:], layer(x[:, 5:]), atol=1e-5)


@pytest.mark.parametrize(("options", "words"), [
    (dict(value_features=9), "value_features must be a multiple of num_heads = 2"),
    (dict(value_features=0), "value_features must be a positive integer"),
    (dict(decay=0.5), "decay must hold 2 numbers"), (dict(decay=(0.5,)), "decay must hold 2 numbers"),
    (dict(decay=(0.5, 1.5)), r"decay must be a number in \[0, 1\], got 1.5"),
    (dict(is_causal=False), "does not support is_causal=False"),
])  # fmt: skip
def test_refusals(options, words):
    with pytest.raises(ValueError, match=f"Retention:? {words}"):
        build(**options)


def test_oracle_of_the_sums():
    peer = oracle.load("retention")
    layer = Retention(2, 16, value_features=12, rotary_base=None, rngs=nnx.Rngs(0))
    swap = lambda heads: heads.swapaxes(1, 2)
    retain = lambda inputs, _: {"o": swap(layer.retain(*(swap(inputs[x]) for x in "qkv"), None)[0])}
    oracle.compare("retention", peer, retain, of="mechanism")


def test_oracle_of_the_layer():
    """torchscale's parallel form. It divides rows by numbers without a gradient, which its norm takes away but for epsilon:
    they are here what our sums are divided by before the same norm. Its rotation has angles and pairs of its own."""
    peer = oracle.load("retnet_layer")
    cfg, angle = peer.meta["cfg"], jnp.asarray(peer.constants["angle"], jnp.float32)
    layer = Retention(
        cfg["heads"], cfg["embed_dim"], value_features=cfg["value_dim"], rotary_base=None, use_bias=False, rngs=nnx.Rngs(0)
    )
    layer.norm.epsilon = cfg["eps"]
    names = dict(q_proj="query", k_proj="key", v_proj="value", g_proj="gate", out_proj="out")

    def turn(heads):
        first, second = heads[..., ::2], heads[..., 1::2]
        at = (jnp.arange(heads.shape[1])[:, None] * angle)[:, None, ::2]
        return jnp.concatenate([first * jnp.cos(at) - second * jnp.sin(at), second * jnp.cos(at) + first * jnp.sin(at)], -1)

    def run(inputs, weights):
        ours = oracle.holding(layer, weights, names)
        query, key, value, _ = ours.project(inputs["x"])
        query, key = turn(query), turn(key)
        heads, _ = ours.retain(query, key, value, None)
        distance = np.subtract.outer(np.arange(24), np.arange(24))
        decay = np.where(distance >= 0, np.asarray(ours.decay)[:, None, None] ** np.maximum(distance, 0), 0)
        root = np.sqrt(decay.sum(-1)).T
        scores = jnp.einsum("btnh,bsnh->btns", query, key) * 4**-0.5 * decay.swapaxes(0, 1).astype(np.float32) / root[..., None]
        rows = jnp.clip(jnp.abs(scores).sum(-1), 1, 5e4)
        return ours.out(ours.norm(heads / (root * jax.lax.stop_gradient(rows))[..., None], ours.gate(inputs["x"])))

    oracle.compare("retention", peer, run)
