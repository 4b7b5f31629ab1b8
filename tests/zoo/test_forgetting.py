"""Forgetting attention: the formula by products of gates, the "Pro" block, limits, packed sequences, flash-linear-attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad import zoo
from subquad.zoo.dense.forgetting import ForgettingAttention
from tests import oracle

FEATURES, HEADS, LENGTH = 16, 4, 11
PRO = dict(use_output_gate=True, use_output_norm=True, use_qk_norm=True, use_kv_shift=True)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def build(**options):
    return ForgettingAttention(HEADS, FEATURES, **options, rngs=nnx.Rngs(0))


def varied(layer):
    """The layer with all parameters off their initial values."""
    rng = np.random.default_rng(1)
    nnx.update(layer, jax.tree.map(lambda x: x + 0.3 * rng.normal(size=x.shape).astype(np.float32), nnx.state(layer)))
    return layer


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def mapped(linear, x):
    """A projection, by its own numbers."""
    return np.tensordot(x, linear.kernel[...], 1) + np.asarray(linear.bias[...])


def mixed(gate, heads, x):
    share = sigmoid(mapped(gate, x))[..., None]
    return share * np.concatenate([np.zeros_like(heads[:1]), heads[:-1]]) + (1 - share) * heads


def norm(x, scale, epsilon):
    return scale[...] * x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon)


def definition(layer, x):
    """Outputs [T, D] of inputs [T, D], token by token and head by head."""
    query, key, value = (mapped(m, x) for m in (layer.query, layer.key, layer.value))
    if layer.key_shift is not None:
        key, value = mixed(layer.key_shift, key, x), mixed(layer.value_shift, value, x)
    if layer.query_norm is not None:
        query, key = norm(query, layer.query_norm.scale, 1e-5), norm(key, layer.key_norm.scale, 1e-5)
    gates, group, heads = sigmoid(mapped(layer.forget_gate, x)), query.shape[1] // key.shape[1], np.zeros_like(query)
    for t, n in np.ndindex(heads.shape[:2]):
        weights = [
            np.exp(query[t, n] @ key[s, n // group] / np.sqrt(query.shape[2])) * np.prod(gates[s + 1 : t + 1, n])
            for s in range(t + 1)
        ]
        heads[t, n] = np.array(weights) @ value[: t + 1, n // group] / sum(weights)
    if layer.output_norm is not None:
        heads = norm(heads, layer.output_norm.scale, 1e-6)
    if layer.output_gate is not None:
        heads = heads * sigmoid(mapped(layer.output_gate, x))
    return np.tensordot(heads, layer.out.kernel[...], 2) + layer.out.bias[...]


@pytest.mark.parametrize(
    "options", [{}, dict(use_output_gate=True), dict(use_output_norm=True), PRO], ids=["none", "gate", "norm", "pro"]
)
def test_the_formula(options):
    """Each weight is exp(q . k / sqrt(H)) times the gates after the key up to the query; two heads of keys."""
    layer, x = varied(build(num_kv_heads=2, **options)), 2 * normal(LENGTH, FEATURES)
    np.testing.assert_allclose(jax.jit(lambda x: layer(x))(x), definition(layer, x), atol=2e-5)


def test_without_options_there_are_no_parameters_but_the_forget_gates():
    assert set(nnx.state(build())) == {"query", "key", "value", "out", "forget_gate"}
    assert set(nnx.state(build(**PRO))) - set(nnx.state(build())) == {
        "key_shift", "value_shift", "query_norm", "key_norm", "output_norm", "output_gate",
    }  # fmt: skip


def test_keys_are_rotated_where_they_end_up():
    """The shift and the norms come first: a rotated layer's logits depend on the distance of positions alone."""
    layer, x = varied(build(**PRO, rotary_base=100.0)), normal(LENGTH, FEATURES)
    same = jnp.asarray(np.broadcast_to(x[:1], x.shape))[None]  # all tokens alike, but for the first's missing neighbour
    query, key, *rest, inputs = layer.project(same)
    query, key, *_ = layer.prepare(query, key, rest[0], inputs)
    logits = np.einsum("btnh,bsnh->bnts", query, key)[..., 1:]
    np.testing.assert_allclose(logits[:, :, 3, 1], logits[:, :, 9, 7], atol=1e-5)
    assert np.abs(logits[:, :, 3, 1] - logits[:, :, 3, 0]).max() > 1e-2


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
    layer, x = varied(build(**PRO)), normal(2, 17, FEATURES)
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
    attend = lambda inputs, _: {"o": layer.attend(*(inputs[x] for x in "qkvg"), None, None)}
    oracle.compare("forgetting", peer, attend, of="mechanism")
