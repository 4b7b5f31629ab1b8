"""Forgetting attention: the formula by products of gates, its limits, packed sequences, and flash-linear-attention."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from subquad import zoo
from subquad.zoo.dense.forgetting import ForgettingAttention
from tests import oracle

FEATURES, HEADS, LENGTH = 16, 4, 11


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def build(**options):
    return ForgettingAttention(HEADS, FEATURES, **options, rngs=nnx.Rngs(0))


def test_the_formula():
    """Each weight is exp(q . k / sqrt(H)) times the gates after the key up to the query; two heads of keys."""
    layer, x = build(num_kv_heads=2), 2 * normal(2, LENGTH, FEATURES)
    query, key, value = (np.einsum("btd,dnh->btnh", x, m.kernel[...]) for m in (layer.query, layer.key, layer.value))
    gates = 1 / (1 + np.exp(-x @ layer.forget_gate.kernel[...]))
    heads = np.zeros_like(query)
    for b, t, n in np.ndindex(2, LENGTH, HEADS):
        weights = [
            np.exp(query[b, t, n] @ key[b, s, n // 2] / 2) * np.prod(gates[b, s + 1 : t + 1, n]) for s in range(t + 1)
        ]
        heads[b, t, n] = np.array(weights) @ value[b, : t + 1, n // 2] / sum(weights)
    np.testing.assert_allclose(layer(x), np.einsum("btnh,nhd->btd", heads, layer.out.kernel[...]), atol=1e-5)


def test_open_gates_are_softmax_and_closed_ones_see_nothing_else():
    layer, x = build(), normal(2, LENGTH, FEATURES)
    softmax = zoo.SoftmaxAttention(HEADS, FEATURES, is_causal=True, rngs=nnx.Rngs(1))
    nnx.update(softmax, {name: part for name, part in nnx.state(layer).items() if name != "forget_gate"})
    layer.forget_gate.bias[...] = jnp.full(HEADS, 30.0)
    np.testing.assert_allclose(layer(x), softmax(x), atol=1e-5)
    layer.forget_gate.bias[...] = jnp.full(HEADS, -60.0)
    np.testing.assert_allclose(layer(x), layer.out(layer.value(jnp.asarray(x))), atol=1e-5)


def test_packed_sequences_are_as_alone():
    """Also where an id comes again: its first sequence is another."""
    layer, x = build(), normal(2, 17, FEATURES)
    run = jax.jit(lambda x, ids=None: layer(x, segment_ids=ids))
    alone = jnp.concatenate([run(x[:, :6]), run(x[:, 6:10]), run(x[:, 10:])], axis=1)
    np.testing.assert_allclose(run(x, jnp.asarray([3] * 6 + [1] * 4 + [3] * 7)), alone, atol=1e-5)


def test_what_is_long_forgotten_overflows_nothing():
    """Sums of 20 a token, thousands in all: the newest tokens count as they do alone."""
    layer, x = build(), normal(1, 300, FEATURES)
    layer.forget_gate.bias[...] = jnp.full(HEADS, -20.0)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(layer(x)[:, -1] ** 2)))(jnp.asarray(x))
    assert jnp.isfinite(gradient).all() and jnp.abs(gradient[:, -1]).max() > 1e-3
    np.testing.assert_allclose(layer(x)[:, -5:], layer(x[:, -6:])[:, -5:], atol=2e-3)


def test_gates_take_no_array_of_all_pairs():
    shape = jax.ShapeDtypeStruct((1, 2048, FEATURES), jnp.float32)
    layer = build()
    assert "2048,2048" not in str(jax.make_jaxpr(jax.grad(lambda x: layer(x).sum()))(shape))


def test_oracle():
    peer, layer = oracle.load("forgetting"), build()
    attend = lambda inputs, _: {"o": layer.attend(*(inputs[x] for x in "qkvg"), None)}
    oracle.compare("forgetting", peer, attend, of="mechanism")
