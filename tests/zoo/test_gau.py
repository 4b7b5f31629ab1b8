"""GAU: its equations pair by pair, blocks of queries, extension, and FLASH-pytorch's layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad.zoo.dense import gau
from subquad.zoo.dense.gau import GAU
from tests import oracle

from . import gated_unit

FEATURES, LENGTH = 12, 11
SIZES = dict(shared_features=6, value_features=10)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def build(**options):
    layer = GAU(FEATURES, **SIZES | options, rngs=nnx.Rngs(0))
    state = nnx.state(layer, nnx.Param)  # off their small values
    nnx.update(layer, jax.tree.map(lambda x: x + 0.5 * normal(*x.shape, seed=x.size), state))
    return layer


OPTIONS = [
    dict(), dict(bias="simple", max_length=15), dict(is_causal=True, max_length=15),
    dict(is_causal=True, bias="simple", max_length=15, rotary_base=50.0),
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_formula(options, monkeypatch):
    """In blocks of 4 queries; n is max_length where it is causal, and the tokens' number elsewhere."""
    monkeypatch.setattr(gau, "BLOCK", 4)
    layer, x = build(**options), normal(2, LENGTH, FEATURES)
    u, v, (query, key) = gated_unit.tokens(layer, x)
    attended = np.zeros_like(v)
    for b, t, s in np.ndindex(2, LENGTH, LENGTH):
        if s <= t or not layer.is_causal:
            logit = query[b, t] @ key[b, s] / (15 if layer.is_causal else LENGTH) + gated_unit.bias(layer, t, s)
            attended[b, t] += max(logit, 0) ** 2 * v[b, s]
    want = gated_unit.out(layer, u * attended)
    np.testing.assert_allclose(layer(x), want, atol=1e-5 * np.abs(want).max())


def test_gradients_by_blocks_are_those_of_all_at_once(monkeypatch):
    monkeypatch.setattr(gau, "BLOCK", 4)
    x, found = jnp.asarray(normal(2, LENGTH, FEATURES)), []
    for implementation in ("xla", "reference"):
        layer = build(is_causal=True, max_length=15, implementation=implementation)
        found.append(jax.jit(nnx.grad(lambda layer, x: jnp.sum(layer(x) ** 2), argnums=(0, 1)))(layer, x))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max()), *found)


def test_long_inputs_take_no_array_of_all_pairs():
    layer, shape = build(), jax.ShapeDtypeStruct((1, 2048, FEATURES), jnp.float32)
    assert "2048,2048" not in str(jax.make_jaxpr(jax.grad(lambda x: layer(x).sum()))(shape))


@pytest.mark.parametrize(("options", "words"), [
    (dict(is_causal=True), "max_length must be given where is_causal or with bias='simple', and only then, got None"),
    (dict(bias="simple"), "max_length must be given"), (dict(max_length=5), "max_length must be given"),
    (dict(shared_features=5), "shared_features must be even with bias='rotary', got 5"),
    (dict(shared_features=5, bias="simple", max_length=5), "rotary_base must be None with an odd number"),
    (dict(rotary_base=-1.0), "rotary_base must be a number"),
    (dict(bias="learned"), "bias must be a known name, got 'learned'"),
], ids=str)
def test_refusals(options, words):
    with pytest.raises(ValueError, match=f"GAU: {words}"):
        GAU(FEATURES, **SIZES | options, rngs=nnx.Rngs(0))


def test_more_than_max_length():
    layer = build(is_causal=True, max_length=5)
    with pytest.raises(ValueError, match="GAU: inputs_q must be at most the layer's max_length = 5 tokens, got 6 tokens"):
        layer(normal(1, 6, FEATURES))
    with pytest.raises(ValueError, match="GAU: max_length must be at most the layer's max_length = 5 tokens, got 6"):
        layer.init_cache(1, 6)


@pytest.mark.parametrize("name", ["gau_bidir", "gau_causal"])
def test_oracle(name):
    """FLASH-pytorch's, which has norm and residual within, no rotation, and divides the bias by the tokens of the call, too."""
    peer = oracle.load(name)
    is_causal, (_, length, width) = peer.meta["cfg"]["causal"], peer.inputs["x"].shape
    layer = GAU(
        width, shared_features=peer.meta["cfg"]["query_key_dim"], bias="simple", rotary_base=None, max_length=length,
        is_causal=is_causal, rngs=nnx.Rngs(0),
    )

    def run(inputs, weights):
        ours = nnx.clone(layer)
        gated_unit.load(ours, weights)
        ours.query_key_scale[...] = weights["offsetscale.gamma"]
        ours.query_key_shift[...] = weights["offsetscale.beta"]
        table = weights["rel_pos_bias.relative_attention_bias.weight"]
        ours.distances[...] = gated_unit.distances(table, length, width**0.5, is_causal) / length
        return {"y": ours(gated_unit.norm(inputs["x"], weights)) + inputs["x"]}

    oracle.compare("gau", peer, run)
