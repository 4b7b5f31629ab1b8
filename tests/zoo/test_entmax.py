"""Entmax attention: the formula by bisection, its special cases, learned alphas, segments, and the entmax package."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad import zoo
from subquad.zoo.dense.entmax import EntmaxAttention
from tests import oracle

FEATURES, HEADS, LENGTH = 16, 4, 11


def normal(*shape, seed=0, scale=1.0):
    return scale * np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def build(alpha=1.5, **options):
    return EntmaxAttention(HEADS, FEATURES, alpha=alpha, **options, rngs=nnx.Rngs(0))


def weights_of(logits, alpha):
    """[(alpha - 1) z - tau]_+^(1 / (alpha - 1)) of the last axis, tau by bisection in float64; softmax at alpha = 1."""
    if alpha == 1:
        powers = np.exp(logits - logits.max(-1, keepdims=True))
        return powers / powers.sum(-1, keepdims=True)
    scaled = (alpha - 1) * logits
    low, high = scaled.max(-1, keepdims=True) - 1, scaled.max(-1, keepdims=True)
    power = lambda tau: np.maximum(scaled - tau, 0) ** (1 / (alpha - 1))
    for _ in range(100):
        tau = (low + high) / 2
        is_low = power(tau).sum(-1, keepdims=True) >= 1
        low, high = np.where(is_low, tau, low), np.where(is_low, high, tau)
    return power(low)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("alpha", [1, 1.3, 1.5, 2, 3.0, "learned"])
def test_the_formula(alpha, is_causal):
    """Head by head, with two heads of keys."""
    layer, x = build(alpha, num_kv_heads=2, is_causal=is_causal), normal(2, LENGTH, FEATURES, scale=2.0)
    alphas = 1 + 1 / (1 + np.exp(-np.float64(layer.alpha_logits[...]))) if alpha == "learned" else [alpha] * HEADS
    query, key, value = (np.einsum("btd,dnh->nbth", x, m.kernel[...]) for m in (layer.query, layer.key, layer.value))
    heads, zeros = [], 0
    for n in range(HEADS):
        logits = np.float64(query[n] @ key[n // 2].swapaxes(1, 2)) / np.sqrt(FEATURES / HEADS)
        if is_causal:
            logits = np.where(np.tri(LENGTH, dtype=bool), logits, -1e9)
        weights = weights_of(logits, alphas[n])
        heads.append(weights @ value[n // 2])
        zeros += (weights[:, -1] == 0).sum()
    want = np.einsum("nbth,nhd->btd", heads, layer.out.kernel[...])
    np.testing.assert_allclose(layer(x), want, atol=2e-4 if alpha == 3.0 else 1e-5)
    assert (zeros > 0) == (alpha != 1), "keys of small logits have no weight at all"


def test_alpha_1_is_softmax():
    layer, x = build(1), normal(2, LENGTH, FEATURES)
    softmax = zoo.SoftmaxAttention(HEADS, FEATURES, rngs=nnx.Rngs(1))
    nnx.update(softmax, nnx.state(layer))
    mask = jnp.asarray(np.random.default_rng(1).random((2, HEADS, LENGTH, LENGTH)) < 0.6)
    np.testing.assert_allclose(layer(x, mask=mask), softmax(x, mask=mask), atol=1e-6)


def test_alphas_learn():
    """Each head's alpha by central differences."""
    layer, x = build("learned"), normal(2, LENGTH, FEATURES, scale=2.0)
    assert ((layer.alphas() > 1) & (layer.alphas() < 2)).all() and len(set(layer.alphas().tolist())) == HEADS
    cotangent, logits = normal(2, LENGTH, FEATURES, seed=1), layer.alpha_logits[...]

    @jax.jit
    def loss(logits):
        other = nnx.clone(layer)
        other.alpha_logits[...] = logits
        return jnp.sum(other(x) * cotangent)

    steps = 0.02 * np.eye(HEADS, dtype=np.float32)
    slopes = [(loss(logits + step) - loss(logits - step)) / 0.04 for step in steps]
    np.testing.assert_allclose(jax.grad(loss)(logits), slopes, rtol=0.02, atol=2e-3)


@pytest.mark.parametrize("is_causal", [False, True])
def test_packed_sequences_are_as_alone(is_causal):
    layer, x = build(is_causal=is_causal), normal(2, 17, FEATURES)
    run = jax.jit(lambda x, ids=None, mask=None: layer(x, segment_ids=ids, mask=mask))
    ids = jnp.asarray([3] * 6 + [1] * 4 + [2] * 7)
    alone = jnp.concatenate([run(x[:, :6]), run(x[:, 6:10]), run(x[:, 10:])], axis=1)
    np.testing.assert_allclose(run(x, ids), alone, atol=1e-5)
    mask = jnp.arange(17)[None, None, None] < jnp.array([17, 13])[:, None, None, None]
    np.testing.assert_allclose(run(x, ids, mask)[1, 10:13], run(x[1:, 10:13])[0], atol=1e-5)


@pytest.mark.parametrize("alpha", [0.9, "sparsemax", float("inf"), None])
def test_refusals(alpha):
    with pytest.raises(ValueError, match="EntmaxAttention: alpha must be a number of at least 1, or 'learned'"):
        build(alpha)


def test_positions_that_nothing_compares():
    with pytest.raises(ValueError, match="EntmaxAttention: positions must be None where neither causality nor rotation"):
        build()(normal(2, 7, FEATURES), positions=jnp.arange(7))


@pytest.mark.parametrize(("name", "alpha"), [("entmax_entmax15", 1.5), ("entmax_sparsemax", 2.0)])
def test_oracle(name, alpha):
    """The entmax package, of logits: each key is a unit vector and its value the same, so a row's output is its weights."""
    peer = oracle.load(name)
    size = peer.inputs["x"].shape[1]
    layer = EntmaxAttention(1, size, alpha=alpha, rngs=nnx.Rngs(0))
    units = jnp.eye(size)[None, :, None]
    attend = lambda inputs, _: layer.attend(inputs["x"][None, :, None] * size**0.5, units, units, None)[0, :, 0]
    oracle.compare("entmax", peer, attend, of="mechanism")
