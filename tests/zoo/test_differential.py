"""Differential attention: the formula head by head, its limit, its refusals, and DiffLlama's layer."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad.zoo.dense.differential import DifferentialAttention
from tests import oracle

FEATURES, HEADS, LENGTH = 16, 2, 11


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def build(features=FEATURES, **options):
    layer = DifferentialAttention(HEADS, features, **options, rngs=nnx.Rngs(0))
    layer.norm.scale[...] = 1 + 0.1 * normal(features // HEADS)
    return layer


def softmax(logits):
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def spelt_out(layer, x, mask, weight):
    """Eqs. 1 to 3, with one head of keys; mask [B, N, T, S]."""
    query, key, value = (np.einsum("btd,dnh->nbth", x, m.kernel[...]) for m in (layer.query, layer.key, layer.value))
    heads, half = [], FEATURES // HEADS // 2
    for n in range(HEADS):
        maps = []
        for part in (slice(0, half), slice(half, None)):
            logits = query[n, ..., part] @ key[0, ..., part].swapaxes(1, 2) / np.sqrt(half)
            maps.append(softmax(np.where(mask[:, n], logits, -1e9)))
        o = (maps[0] - weight * maps[1]) @ value[0]
        o /= np.sqrt((o**2).mean(-1, keepdims=True) + 1e-5)
        heads.append((1 - layer.lambda_init) * layer.norm.scale[...] * o)
    return np.einsum("nbth,nhd->btd", heads, layer.out.kernel[...])


@pytest.mark.parametrize("is_causal", [False, True])
def test_the_formula(is_causal):
    layer, x = build(num_kv_heads=1, lambda_init=0.3, is_causal=is_causal), 2 * normal(2, LENGTH, FEATURES)
    mask = np.random.default_rng(1).random((2, HEADS, LENGTH, LENGTH)) < 0.6
    mask |= np.eye(LENGTH, dtype=bool)
    lambdas = [np.exp(layer.lambda_query[i] @ layer.lambda_key[i]) for i in range(2)]
    want = spelt_out(layer, x, mask & (np.tri(LENGTH, dtype=bool) | (not is_causal)), lambdas[0] - lambdas[1] + 0.3)
    np.testing.assert_allclose(layer(x, mask=jnp.asarray(mask)), want, atol=2e-5)


def test_lambda_0_is_softmax_attention_of_half_the_features_normed():
    layer, x = build(num_kv_heads=1, lambda_init=0.0), normal(2, LENGTH, FEATURES)
    layer.lambda_query[...] = jnp.zeros((2, 4))
    np.testing.assert_allclose(layer(x), spelt_out(layer, x, np.ones((2, HEADS, LENGTH, LENGTH), bool), 0), atol=2e-5)


def test_rotation_keeps_distances():
    """Both halves of a head are rotated as heads of their own: only the distance of positions counts."""
    layer, x = build(is_causal=True, rotary_base=50.0), jnp.asarray(normal(1, LENGTH, FEATURES))
    query, key, _ = layer.project(x)
    assert query.shape == (1, LENGTH, 2 * HEADS, 4)
    at = jnp.arange(LENGTH)[None]
    logits = [jnp.einsum("btnh,bsnh->bnts", *layer.rotate(query, key, at + by, at + by)) for by in (0, 7)]
    np.testing.assert_allclose(*logits, atol=1e-5)


@pytest.mark.parametrize(("features", "options", "words"), [
    (6, {}, "num_heads must leave an even number of 6 features to each, got 2"),
    (12, dict(rotary_base=10.0), "rotary_base must be None with an odd number of head features, 3"),
    (16, dict(lambda_init=1.0), r"lambda_init must be a number in \[0, 1\), got 1.0"),
    (16, dict(lambda_init=-0.1), r"lambda_init must be a number in \[0, 1\), got -0.1"),
])
def test_refusals(features, options, words):
    with pytest.raises(ValueError, match=f"DifferentialAttention: {words}"):
        DifferentialAttention(HEADS, features, **options, rngs=nnx.Rngs(0))


def test_oracle():
    """Hugging Face's layer: maps of heads n and n + N/2 are one of ours, and the norm has no gain; its layer 2 is the third."""
    peer = oracle.load("differential")
    heads, width = peer.meta["cfg"]["heads"] // 2, 4
    layer = DifferentialAttention(
        heads, 16, lambda_init=0.8 - 0.6 * np.exp(-0.3 * peer.meta["cfg"]["layer_idx"]), use_bias=False, is_causal=True,
        rngs=nnx.Rngs(0),
    )

    def run(inputs, weights):
        # Rows of their projections are (i, n, h): the map, the head, the feature; of ours n, (i, h). The halves of the features
        # of a value are their heads n and n + N/2.
        ours = nnx.clone(layer)
        paired = lambda w: jnp.moveaxis(w.reshape(2, heads, width, 16), 0, 1).reshape(heads, 2 * width, 16)
        for name in "qkv":
            kernel = jnp.moveaxis(paired(weights[f"{name}_proj.weight"]), -1, 0)
            getattr(ours, {"q": "query", "k": "key", "v": "value"}[name]).kernel[...] = kernel
        ours.lambda_query[...] = jnp.stack([weights["lambda_q1"], weights["lambda_q2"]])
        ours.lambda_key[...] = jnp.stack([weights["lambda_k1"], weights["lambda_k2"]])
        ours.out.kernel[...] = weights["o_proj.weight"].T.reshape(heads, 2 * width, 16)
        return {"y": ours(inputs["x"])}

    oracle.compare("differential", peer, run)
