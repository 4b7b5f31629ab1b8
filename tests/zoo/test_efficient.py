"""Efficient attention: both softmaxes by hand, the causal form as prefixes of it, loud keys, segments, and peers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad.kernels import linear
from subquad.zoo.kernelized.efficient import EfficientAttention
from tests import oracle

FEATURES, HEADS = 16, 2


def build(is_causal=False, **options):
    return EfficientAttention(HEADS, FEATURES, is_causal=is_causal, rngs=nnx.Rngs(0), **options)


def normal(*shape, seed=0, scale=1.0):
    return scale * jax.random.normal(jax.random.key(seed), shape)


def dense(query, key, value):
    """The paper's product, [B, T, N, H]: no causality."""
    means = jnp.einsum("bsnh,bsnv->bnhv", jax.nn.softmax(key, 1), value)
    return jnp.einsum("btnh,bnhv->btnv", jax.nn.softmax(query, -1), means)


def test_the_formula():
    layer, x, context = build(), normal(2, 13, FEATURES), normal(2, 9, FEATURES, seed=1)
    np.testing.assert_allclose(layer(x), layer.out(dense(*layer.project(x))), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(layer(x, context), layer.out(dense(*layer.project(x, context))), rtol=1e-4, atol=1e-6)


def test_a_causal_token_has_the_formula_of_its_prefix():
    """Outputs and every gradient, of weights that are all stored, [T, S] for each feature."""
    layer = build(True)
    arrays = [normal(2, 13, HEADS, 8, seed=seed, scale=2.0) for seed in range(3)]

    def prefixes(query, key, value):
        seen = jnp.tri(13, dtype=bool)[:, :, None, None]
        weights = jax.nn.softmax(jnp.where(seen, key[:, None], -jnp.inf), 2)  # [B, T, S, N, H]
        return jnp.einsum("btnh,btsnh,bsnv->btnv", jax.nn.softmax(query, -1), weights, value)

    y = layer.attend(*arrays, None)
    np.testing.assert_allclose(y[:, 6:7], dense(*(x[:, :7] for x in arrays))[:, 6:], rtol=1e-4, atol=1e-5)
    both = [jax.jit(lambda *qkv, f=f: jax.vjp(f, *qkv))(*arrays) for f in (lambda *qkv: layer.attend(*qkv, None), prefixes)]
    (y, pull), (wanted, wanted_pull) = both
    assert oracle.relative_error(y, wanted) < 1e-5
    assert oracle.relative_error(pull(jnp.cos(y)), wanted_pull(jnp.cos(y))) < 1e-5


@pytest.mark.parametrize("factor", [30.0, 1e4])
def test_a_loud_future_changes_no_past_and_a_loud_key_is_the_mean(factor):
    """Without the running sum, exp(k) would be infinite from 89 on."""
    layer = build(True)
    query, key, value = (normal(1, 150, HEADS, 8, seed=seed) for seed in range(3))
    run = jax.jit(lambda key: layer.attend(query, key, value, None))
    y, loud = run(key), run(key.at[:, 70].set(factor))
    np.testing.assert_array_equal(loud[:, :70], y[:, :70])
    assert jnp.isfinite(loud).all()
    np.testing.assert_allclose(loud[:, 70:], jnp.broadcast_to(value[:, 70:71], loud[:, 70:].shape), rtol=1e-4, atol=1e-5)
    gradient = jax.grad(lambda key: run(key).sum())(key.at[:, 70].set(factor))
    assert jnp.isfinite(gradient).all()


@pytest.mark.parametrize("is_causal", [False, True])
def test_weights_sum_to_one(is_causal):
    query, key = normal(1, 700, HEADS, 8, seed=1, scale=4.0), normal(1, 700, HEADS, 8, seed=2, scale=4.0)
    layer = build(is_causal)
    y = jax.jit(lambda *qkv: layer.attend(*qkv, None))(query, key, jnp.full_like(key, 3.0))
    np.testing.assert_allclose(y, 3.0, rtol=2e-5)


def test_the_cache_is_the_means_and_their_sums():
    layer, x = build(True), normal(2, 12, FEATURES)
    cache = layer.init_cache(2, 12)
    for piece in (x[:, :5], x[:, 5:6], x[:, 6:]):
        _, cache = layer.extend(piece, cache)
    _, key, value = layer.project(x)
    average = jnp.einsum("bsnh,bsnv->bnhv", jax.nn.softmax(key, 1), value)
    np.testing.assert_allclose(cache.average, average, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(cache.log_sum, jax.nn.logsumexp(key, 1), rtol=1e-5, atol=1e-5)


def test_gradients_through_a_cache_are_those_of_one_call():
    layer, x = build(True), normal(1, 9, FEATURES)

    def pieces(x):
        cache, outputs = layer.init_cache(1, 9), []
        for start, stop in ((0, 4), (4, 5), (5, 9)):
            y, cache = layer.extend(x[:, start:stop], cache)
            outputs.append(y)
        return jnp.concatenate(outputs, 1)

    gradients = [jax.jit(jax.grad(lambda x, f=f: jnp.sum(jnp.sin(f(x)))))(x) for f in (layer, pieces)]
    np.testing.assert_allclose(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("is_causal", [False, True])
def test_packed_sequences_are_separate_ones(is_causal):
    layer, x = build(is_causal), normal(1, 20, FEATURES)
    ids = jnp.asarray([4] * 7 + [0] * 12 + [4])
    packed, pull = jax.vjp(lambda x: layer(x, segment_ids=ids), x)
    gradient = pull(jnp.cos(packed))[0]
    for start, end in ((0, 7), (7, 19), (19, 20)):
        alone, pull = jax.vjp(layer, x[:, start:end])
        np.testing.assert_allclose(packed[:, start:end], alone, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(gradient[:, start:end], pull(jnp.cos(alone))[0], rtol=1e-3, atol=1e-5)


def test_grouped_heads_are_repeated_ones():
    for is_causal in (False, True):
        grouped = EfficientAttention(4, FEATURES, num_kv_heads=2, is_causal=is_causal, rngs=nnx.Rngs(0))
        every = EfficientAttention(4, FEATURES, is_causal=is_causal, rngs=nnx.Rngs(0))
        query, key, value = grouped.project(normal(2, 9, FEATURES))
        wanted = every.attend(query, jnp.repeat(key, 2, 2), jnp.repeat(value, 2, 2), None)
        np.testing.assert_allclose(grouped.attend(query, key, value, None), wanted, rtol=1e-5, atol=1e-6)


# Peers.


def test_oracle_authors():
    """cmsflash/efficient-attention: channels first, values of another width than keys, and its input added to the output."""
    peer, layer = oracle.load("efficient_authors"), build()
    heads = peer.meta["cfg"]["heads"]

    def run(inputs, weights):
        tokens = inputs["x"][:, :, 0].mT
        mapped = lambda name, x: x @ weights[f"{name}.weight"][:, :, 0, 0].T + weights[f"{name}.bias"]
        split = lambda x: x.reshape(*x.shape[:2], heads, -1)
        mixed = layer.attend(*(split(mapped(name, tokens)) for name in ("queries", "keys", "values")), None)
        return (mapped("reprojection", mixed.reshape(*mixed.shape[:2], -1)) + tokens).mT[:, :, None]

    oracle.compare("efficient", peer, run, of="mechanism")


def heads_first(function):
    """Of q, k and v [B, N, T, H] by name. The peer multiplies the query's softmax by 1 / sqrt(H), here 8."""
    return lambda inputs, _: function(*(inputs[name].swapaxes(1, 2) for name in "qkv")).swapaxes(1, 2)


def test_oracle_linear_attention_transformer():
    run = heads_first(lambda *qkv: 8**-0.5 * build().attend(*qkv, None))
    oracle.compare("efficient", oracle.load("linattn_bidir"), run, of="mechanism")


def test_oracle_linear_attention_transformer_causal_is_another_function():
    """Its causal form divides by the sum over all features: linear attention with features softmax(q) and exp(k). In it a loud
    feature drowns the others, and the last token is not the paper's; here each feature is a mean of its own."""
    normalised_by_row = lambda q, k, v: linear.attention(jax.nn.softmax(q, -1), jnp.exp(k), v, is_causal=True)
    oracle.compare(None, oracle.load("linattn_causal_blind1"), heads_first(normalised_by_row))
    query, key, value = (normal(1, 9, HEADS, 8, seed=seed) for seed in range(3))
    assert jnp.abs(normalised_by_row(query, key, value) - build(True).attend(query, key, value, None)).max() > 0.05
