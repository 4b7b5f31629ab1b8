"""cosFormer: every weight by hand, its two limits, prefixes, lengths, and the authors' code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad.zoo.kernelized.cosformer import CosformerAttention
from tests import oracle

FEATURES, HEADS, LONGEST = 16, 2, 30


def build(is_causal=False, **options):
    words = {**dict(max_length=LONGEST, is_causal=is_causal), **options}
    return CosformerAttention(HEADS, FEATURES, rngs=nnx.Rngs(0), **words)


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def spelt_out(query, key, value, longest, is_causal):
    """[B, T, N, H], query by query and key by key."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    outputs = np.zeros((*query.shape[:3], value.shape[3]))
    for b, t, n in np.ndindex(query.shape[:3]):
        seen = t + 1 if is_causal else key.shape[1]
        products = np.maximum(key[b, :seen, n], 0) @ np.maximum(query[b, t, n], 0)
        weights = products * np.cos(np.pi / 2 * (t - np.arange(seen)) / longest)
        if weights.any():  # the first query may have no feature in common with the first key: 0
            outputs[b, t, n] = weights @ value[b, :seen, n] / weights.sum()
    return jnp.asarray(outputs, jnp.float32)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("length", [13, LONGEST])
def test_the_formula(is_causal, length):
    layer, x = build(is_causal), normal(2, length, FEATURES)
    heads = spelt_out(*layer.project(x), LONGEST, is_causal)
    np.testing.assert_allclose(layer(x), layer.out(heads), rtol=1e-4, atol=1e-5)


def test_cross_attention_counts_both_sides_from_0():
    layer, x, context = build(), normal(2, 9, FEATURES), normal(2, 14, FEATURES, seed=1)
    heads = spelt_out(*layer.project(x, context), LONGEST, False)
    np.testing.assert_allclose(layer(x, context), layer.out(heads), rtol=1e-4, atol=1e-5)


def test_a_long_period_is_linear_attention_of_relus():
    layer, x = build(max_length=10**6), normal(2, 12, FEATURES)
    query, key, value = layer.project(x)
    weights = jnp.einsum("btnh,bsnh->bnts", nnx.relu(query), nnx.relu(key))
    heads = jnp.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), value)
    np.testing.assert_allclose(layer(x), layer.out(heads), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("is_causal", [False, True])
def test_no_weight_is_negative_at_the_longest_distance(is_causal):
    """Of one-hot values: the weights of a row, which sum to 1."""
    layer = build(is_causal)
    query, key = normal(1, LONGEST, HEADS, 8, seed=1), normal(1, LONGEST, HEADS, 8, seed=2)
    value = jnp.broadcast_to(jnp.eye(LONGEST)[None, :, None], (1, LONGEST, HEADS, LONGEST))
    weights = layer.attend(query, key, value, None)
    assert weights.min() >= 0 and weights[0, -1, :, 0].min() > 0
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)


def test_a_prefix_has_the_outputs_that_it_has_alone():
    """The authors' code, whose period is the length of the call, moves by a tenth."""
    layer, x = build(True), normal(2, 24, FEATURES)
    np.testing.assert_allclose(layer(x[:, :18]), layer(x)[:, :18], rtol=1e-5, atol=1e-6)


def test_rows_without_a_common_feature_are_0():
    layer = build()
    query, value = -jnp.ones((1, 5, HEADS, 8)), jnp.ones((1, 5, HEADS, 8))
    outputs, pull = jax.vjp(lambda query: layer.attend(query, jnp.ones_like(query), value, None), query)
    assert (outputs == 0).all() and (pull(outputs + 1)[0] == 0).all()


def test_grouped_heads_are_repeated_ones():
    grouped = CosformerAttention(4, FEATURES, num_kv_heads=2, max_length=20, is_causal=True, rngs=nnx.Rngs(0))
    query, key, value = grouped.project(normal(2, 9, FEATURES))
    every = CosformerAttention(4, FEATURES, max_length=20, is_causal=True, rngs=nnx.Rngs(0))
    wanted = every.attend(query, jnp.repeat(key, 2, 2), jnp.repeat(value, 2, 2), None)
    np.testing.assert_allclose(grouped.attend(query, key, value, None), wanted, rtol=1e-5, atol=1e-6)


def test_lengths_beyond_the_period_are_refused_or_nan():
    layer, causal = build(), build(True)
    with pytest.raises(ValueError, match="CosformerAttention: inputs_q must be at most .* max_length = 30 tokens, got 31"):
        layer(normal(1, LONGEST + 1, FEATURES))
    with pytest.raises(ValueError, match="CosformerAttention: inputs_kv must be at most .* max_length = 30 tokens, got 31"):
        layer(normal(1, 3, FEATURES), normal(1, LONGEST + 1, FEATURES))
    with pytest.raises(ValueError, match="CosformerAttention: max_length must be at most .* max_length = 30 tokens, got 31"):
        causal.init_cache(1, LONGEST + 1)
    cache = causal.init_cache(2, LONGEST)
    mask = jnp.ones((2, 1, 1, LONGEST), bool).at[1, ..., 4].set(False)
    outputs, cache = causal.extend(normal(2, LONGEST, FEATURES), cache, mask=mask)
    assert jnp.isfinite(outputs).all()
    outputs, cache = causal.extend(normal(2, 1, FEATURES), cache)
    assert jnp.isnan(outputs[0]).all() and jnp.isfinite(outputs[1]).all()
    with pytest.raises(ValueError, match="CosformerAttention: max_length must be a positive integer"):
        build(max_length=0)


@pytest.mark.parametrize("name", ["cosformer_bidir", "cosformer_causal", "cosformer_cross"])
def test_oracle(name):
    """The authors' code, time first: its period is the longer side of this call; its clamp at 1e-6 does not bind here."""
    peer = oracle.load(name)
    heads, longest = peer.meta["cfg"]["H"], max(array.shape[0] for array in peer.inputs.values())
    layer = CosformerAttention(
        heads, peer.inputs["x"].shape[2], max_length=longest, is_causal=peer.meta["cfg"]["causal"], rngs=nnx.Rngs(0)
    )
    names = dict(q_proj="query", k_proj="key", v_proj="value", out_proj="out")

    def run(inputs, weights):
        return oracle.holding(layer, weights, names)(*(x.swapaxes(0, 1) for x in inputs.values())).swapaxes(0, 1)

    oracle.compare("cosformer", peer, run)
