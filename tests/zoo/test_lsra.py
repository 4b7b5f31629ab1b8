"""LSRA: two layers side by side, and the authors' code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad.zoo.convolution.dynamicconv import DynamicConv
from subquad.zoo.convolution.lightconv import LightConv
from subquad.zoo.convolution.lsra import LSRA
from tests import oracle
from tests.zoo import shortconv

FEATURES = 16


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def build(**options):
    return LSRA(FEATURES, **dict(num_heads=2, conv_width=5) | options, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(("is_causal", "kind"), [(False, LightConv), (True, DynamicConv)])
def test_halves_are_the_two_layers(is_causal, kind):
    """Attention spelt out, and what is tested elsewhere; neither half of the features reaches the other."""
    layer, x = build(is_causal=is_causal, is_dynamic=kind is DynamicConv), normal(2, 9, FEATURES)
    y, local = layer(x), layer.local
    assert type(local) is kind and local.convolution.num_heads == 2
    query, key, value = (part(x[..., :8]) for part in (layer.attention.query, layer.attention.key, layer.attention.value))
    logits = np.einsum("btnh,bsnh->bnts", query, key) / 2
    weights = shortconv.softmax(np.where(np.tri(9) > 0, logits, -1e9) if is_causal else logits, -1)
    want = layer.attention.out(jnp.asarray(np.einsum("bnts,bsnh->btnh", weights, value), jnp.float32))
    np.testing.assert_allclose(y[..., :8], want, atol=1e-5)
    np.testing.assert_allclose(y[..., 8:], local(x[..., 8:]), atol=1e-6)


def test_both_halves_drop_by_draws_of_their_own():
    layer, x = build(dropout_rate=0.5), normal(2, 9, FEATURES)
    plain = layer(x)
    layer.train()
    one, other = (layer(x, rngs=nnx.Rngs(dropout=seed)) for seed in range(2))
    for y in (one - plain, one - other):
        assert (np.abs(y).reshape(2, 9, 2, 8).max((0, 1, 3)) > 1e-2).all()
    np.testing.assert_array_equal(one, layer(x, rngs=nnx.Rngs(dropout=0)))
    np.testing.assert_array_equal(layer(x, deterministic=True), plain)


def test_packed_sequences_are_as_alone():
    layer, x = build(), normal(2, 17, FEATURES)
    run = jax.jit(lambda x, ids=None: layer(x, segment_ids=ids))
    packed = run(x, jnp.asarray([3] * 6 + [1] * 4 + [2] * 7))
    alone = jnp.concatenate([run(x[:, :6]), run(x[:, 6:10]), run(x[:, 10:])], axis=1)
    np.testing.assert_allclose(packed, alone, atol=1e-5)


@pytest.mark.parametrize(("options", "words"), [
    (dict(out_features=5), "out_features must be even"), (dict(num_heads=3), "num_heads must divide in_features / 2 = 8"),
    (dict(conv_heads=16), "conv_heads must divide in_features / 2 = 8"), (dict(conv_width=0), "conv_width must be a positive"),
    (dict(dropout_rate=-1.0), r"dropout_rate must be a number in \[0, 1\]"),
])  # fmt: skip
def test_refusals(options, words):
    with pytest.raises(ValueError, match=f"LSRA: {words}"):
        build(**options)


def test_oracle():
    """The authors' two branches, of which the convolution stands without its linear maps."""
    peer = oracle.load("lsra_multibranch")
    heads, _, width = peer.weights["branches.1.weight"].shape
    layer = build(num_heads=heads, conv_width=width, use_glu=False)
    layer.local = shortconv.bare(layer.local)
    names = {f"branches.0.{theirs}": f"attention.{ours}" for theirs, ours in
             (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"), ("out_proj", "out"))}  # fmt: skip

    def run(inputs, w):
        taps = w.pop("branches.1.weight")
        ours = oracle.holding(layer, w, names)
        ours.local.convolution.taps[...] = jnp.flip(taps[:, 0], 1).T  # their last tap weighs the latest token
        return ours(inputs["x"].swapaxes(0, 1)).swapaxes(0, 1)

    oracle.compare("lsra", peer, run)
