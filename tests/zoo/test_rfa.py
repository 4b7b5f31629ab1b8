"""Random feature attention: features and gate by hand, softmax in the limit, closed gates, packed sequences, and two peers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad.kernels import linear
from subquad.zoo.kernelized.rfa import RFAAttention, fourier_features
from tests import oracle

FEATURES, HEADS = 16, 2


def build(is_causal=False, **options):
    return RFAAttention(HEADS, FEATURES, **{**dict(is_causal=is_causal, rngs=nnx.Rngs(0)), **options})


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def features(layer, heads) -> np.ndarray:
    """[B, T, N, 2 M] in float64, head by head."""
    heads = np.asarray(heads, np.float64)
    heads = heads / np.linalg.norm(heads, axis=-1, keepdims=True)
    rows = np.asarray(layer.projection[...], np.float64) * np.asarray(layer.sigma[...], np.float64)[:, None]
    angles = np.stack([heads[:, :, n] @ rows[n].T for n in range(heads.shape[2])], 2)
    return np.concatenate([np.sin(angles), np.cos(angles)], -1) / np.sqrt(layer.num_features)


def step_by_step(layer, x) -> np.ndarray:
    """Section 3.2, a token at a time: the heads [B, T, N, H] of a causal layer."""
    query, key, value, logits = layer.project(x)
    query, key, value = features(layer, query), features(layer, key), np.asarray(value, np.float64)
    gates = np.ones(query.shape[:3]) if logits is None else 1 / (1 + np.exp(-np.asarray(logits, np.float64)))
    outputs = np.zeros(value.shape)
    for b, n in np.ndindex(value.shape[0], value.shape[2]):
        sums, norms = 0.0, 0.0
        for t in range(value.shape[1]):
            gate = gates[b, t, n]
            new = 1.0 if logits is None else 1 - gate
            sums = gate * sums + new * np.outer(key[b, t, n], value[b, t, n])
            norms = gate * norms + new * key[b, t, n]
            outputs[b, t, n] = query[b, t, n] @ sums / (query[b, t, n] @ norms)
    return outputs


@pytest.mark.parametrize("given", [None, False])
def test_the_recurrence(given):
    layer, x = build(True, gate=given), normal(2, 13, FEATURES)
    layer.sigma[...] *= 0.5 + jax.random.uniform(jax.random.key(2), layer.sigma.shape)
    expected = layer.out(jnp.asarray(step_by_step(layer, x), jnp.float32))
    np.testing.assert_allclose(layer(x), expected, rtol=1e-4, atol=1e-5)


def test_the_formula_without_causality():
    layer, x, context = build(), normal(2, 9, FEATURES), normal(2, 14, FEATURES, seed=1)
    for given in ((x,), (x, context)):
        query, key, value, gate = layer.project(*given)
        assert gate is None
        weights = np.einsum("btnm,bsnm->bnts", features(layer, query), features(layer, key))
        heads = np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), value)
        np.testing.assert_allclose(layer(*given), layer.out(jnp.asarray(heads, jnp.float32)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("is_causal", [False, True])
def test_many_features_are_softmax_over_unit_vectors(is_causal):
    """Of rows with deviation sigma: exp(sigma^2 q . k) of unit vectors. The error falls as the root of the features."""
    arrays, errors = [normal(1, 12, HEADS, 8, seed=seed) for seed in range(3)], {}
    query, key, value = arrays
    query, key = (heads / jnp.linalg.norm(heads, axis=-1, keepdims=True) for heads in (query, key))
    logits = 1.5**2 * jnp.einsum("btnh,bsnh->bnts", query, key)
    logits = jnp.where(jnp.tri(12, dtype=bool) | (not is_causal), logits, -jnp.inf)
    expected = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(logits), value)
    for count in (100, 10_000):
        layer = build(is_causal, num_features=count, gate=False)
        layer.sigma[...] *= 1.5
        errors[count] = jnp.abs(layer.attend(*arrays, None, None) - expected).mean()
    assert errors[10_000] < 0.02 and errors[10_000] < 0.3 * errors[100]


def test_a_gate_that_is_shut_keeps_the_token_alone_and_an_open_one_the_first():
    layer, x = build(True), normal(2, 9, FEATURES)
    value = layer.value(x)
    layer.gate.bias[...] -= 60.0
    np.testing.assert_allclose(layer(x), layer.out(value), rtol=1e-4, atol=1e-5)
    layer.gate.bias[...] += 120.0  # 1 - g is 1e-26: the sums are divided by one another all the same
    ungated = build(True, gate=False, rngs=nnx.Rngs(0))
    nnx.update(ungated, {k: v for k, v in nnx.state(layer).items() if k != "gate"})
    layer.gate.kernel[...] *= 0.0
    np.testing.assert_allclose(layer(x), ungated(x), rtol=1e-3, atol=1e-4)


def test_packed_sequences_are_separate_ones():
    layer, x = build(True), normal(1, 20, FEATURES)
    ids = jnp.asarray([4] * 7 + [0] * 12 + [4])
    packed, pull = jax.vjp(lambda x: layer(x, segment_ids=ids), x)
    gradient = pull(jnp.cos(packed))[0]
    for start, end in ((0, 7), (7, 19), (19, 20)):
        alone, pull = jax.vjp(layer, x[:, start:end])
        np.testing.assert_allclose(packed[:, start:end], alone, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(gradient[:, start:end], pull(jnp.cos(alone))[0], rtol=1e-3, atol=1e-5)


def test_a_gate_keeps_its_bias():
    """The papers' layout: no biases but the gate's."""
    layer = build(True, use_bias=False)
    assert layer.query.bias is None and layer.gate.bias[...].shape == (HEADS,)


def test_a_zero_vector_has_a_gradient():
    layer = build(True)
    query, value = jnp.zeros((1, 5, HEADS, 8)), normal(1, 5, HEADS, 8)
    run = lambda query: layer.attend(query, query, value, jnp.zeros((1, 5, HEADS)), None)
    assert jnp.isfinite(run(query)).all() and (jax.grad(lambda query: run(query).sum())(query) == 0).all()


def test_sizes_of_queries_and_keys_do_not_count():
    layer, x = build(gate=False), normal(2, 9, FEATURES)
    query, key, value, _ = layer.project(x)
    factors = jnp.exp(normal(2, 9, HEADS, 1, seed=1))
    scaled = layer.attend(query * factors, key / factors, value, None, None)
    np.testing.assert_allclose(scaled, layer.attend(query, key, value, None, None), rtol=1e-3, atol=1e-5)


def test_features_are_redrawn_where_the_caller_says():
    layer = build(num_features=2000)
    before, drawn = layer.projection[...], layer.redraw(nnx.Rngs(1))
    np.testing.assert_array_equal(before, layer.projection[...])
    assert drawn.shape == (HEADS, 2000, 8) and (drawn != before).all()
    for rows in (before, drawn):
        assert abs(rows.var() - 1) < 0.05 and abs(rows.mean()) < 0.02


def test_what_cannot_be_is_refused():
    for words, message in (
        (dict(gate=True), "RFAAttention: gate must be None or False without is_causal=True"),
        (dict(constants="code"), "RFAAttention: constants must be 'paper' where is_causal=False"),
        (dict(constants="code", gate=True, is_causal=True), "RFAAttention: gate must be None or False"),
        (dict(constants="paperr"), "RFAAttention: constants must be a known name"),
        (dict(num_features=0), "RFAAttention: num_features must be a positive integer"),
    ):
        with pytest.raises(ValueError, match=message):
            build(**words)


# Peers.


def test_oracle_authors():
    """Noahs-ARK/RFA, time first, with its constants; its denominators never reach the bound of 1 here."""
    peer = oracle.load("rfa_causal")
    layer = RFAAttention(2, 8, is_causal=True, num_features=peer.meta["cfg"]["proj_dim"], constants="code", rngs=nnx.Rngs(0))
    layer.projection[...] = jnp.asarray(peer.constants["random"])

    def run(inputs, weights):
        copy = nnx.clone(layer)
        copy.sigma[...] = weights["sigma"][:, 0]
        query, key, value = (inputs[name].swapaxes(0, 1) for name in "qkv")
        heads, cache = copy.attend_cached(query, key, value, None, None, copy.init_cache(2, 1))
        flat = heads.reshape(*heads.shape[:2], -1).swapaxes(0, 1)
        return {"y": flat, "s": cache.numerator, "z": cache.denominator}

    oracle.compare("rfa", peer, run, of="mechanism")


def test_oracle_fourier_features():
    """HKUNLP's keeps the sizes of queries and keys, exp(|x|^2 / 2) beside each feature, of which a query's cancels."""
    peer = oracle.load("rfa_fourier")
    directions = jnp.asarray(peer.constants["eval_proj"])

    def run(inputs, weights):
        mapped = inputs["x"] @ weights["qkv.weight"].T + weights["qkv.bias"]
        query, key, value = (x.reshape(*x.shape[:2], 2, 4) for x in jnp.split(mapped, 3, -1))
        query, key = (x * 4**-0.25 for x in (query, key))
        heads = linear.attention(
            fourier_features(query, directions), fourier_features(key, directions), value,
            key_log_scale=0.5 * jnp.sum(key**2, -1),
        )
        return heads.reshape(*heads.shape[:2], -1) @ weights["proj.weight"].T + weights["proj.bias"]

    oracle.compare("rfa", peer, run, of="mechanism")
