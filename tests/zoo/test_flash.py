"""FLASH: its equations pair by pair, one chunk, the state of its extension, and FLASH-pytorch's layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad.zoo import unit
from subquad.zoo.dense.gau import GAU
from subquad.zoo.kernelized.flash import FLASH
from tests import oracle

from . import gated_unit

FEATURES, LENGTH = 12, 11
SIZES = dict(shared_features=6, value_features=10, chunk_size=4)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def moved(layer):
    """A layer off its small values."""
    state = nnx.state(layer, nnx.Param)
    nnx.update(layer, jax.tree.map(lambda x: x + 0.5 * normal(*x.shape, seed=x.size), state))
    return layer


def build(**options):
    return moved(FLASH(FEATURES, **SIZES | options, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("options", [dict(), dict(bias="simple", rotary_base=50.0)], ids=str)
def test_the_formula(options, is_causal):
    layer, x = build(is_causal=is_causal, **options), normal(2, LENGTH, FEATURES)
    u, v, (query, key, far_query, far_key) = gated_unit.tokens(layer, x)
    attended = np.zeros_like(v)
    for b, t, s in np.ndindex(2, LENGTH, LENGTH):
        weight = 0
        if t // 4 == s // 4 and (s <= t or not is_causal):
            weight += max(query[b, t] @ key[b, s] / 4 + gated_unit.bias(layer, t % 4, s % 4), 0) ** 2
        if s // 4 < t // 4 or not is_causal:
            weight += far_query[b, t] @ far_key[b, s] / (4 if is_causal else LENGTH)
        attended[b, t] += weight * v[b, s]
    want = gated_unit.out(layer, u * attended)
    np.testing.assert_allclose(layer(x), want, atol=1e-5 * np.abs(want).max())


def test_one_chunk_is_gau():
    """Of as many tokens as GAU's constant, where there is no chunk before."""
    layer, x = build(is_causal=True, chunk_size=LENGTH), normal(2, LENGTH, FEATURES)
    whole = GAU(FEATURES, shared_features=6, value_features=10, is_causal=True, max_length=LENGTH, rngs=nnx.Rngs(1))
    nnx.update(whole, {name: part for name, part in nnx.state(layer).items() if not name.startswith("query_key")})
    whole.query_key_scale[...], whole.query_key_shift[...] = layer.query_key_scale[:2], layer.query_key_shift[:2]
    np.testing.assert_allclose(whole(x), layer(x), atol=1e-5)


@pytest.mark.parametrize("cuts", [[1] * 11, [3, 1, 6, 1], [4, 4, 3]], ids=str)
def test_the_state_is_an_open_chunk_and_two_sums(cuts):
    """However tokens come, with padding that no chunk counts: the sums over whole chunks and over the open one."""
    layer, x = build(is_causal=True), normal(2, LENGTH, FEATURES)
    mask = jnp.asarray(np.arange(LENGTH) != np.array([[0], [6]]))[:, None, None]
    step = jax.jit(lambda x, cache, mask: layer.extend(x, cache, mask=mask))
    cache, start = layer.init_cache(2, LENGTH), 0
    for width in cuts:
        _, cache = step(x[:, start : start + width], cache, mask[..., start : start + width])
        start += width
    np.testing.assert_array_equal(cache.seen, [10, 10])
    real = np.stack([sample[np.asarray(keep[0, 0])] for sample, keep in zip(x, mask, strict=True)])
    _, v, (*_, far_key) = gated_unit.tokens(layer, real)
    for sums, part in ((cache.whole, slice(0, 8)), (cache.open, slice(8, 10))):
        want = np.einsum("bsz,bsv->bzv", far_key[:, part], v[:, part])
        np.testing.assert_allclose(sums, want, atol=1e-5 * np.abs(want).max())
    np.testing.assert_allclose(cache.value[:, :2], v[:, 8:], atol=1e-5)


@pytest.mark.parametrize("name", ["flash_bidir", "flash_causal"])
def test_oracle(name):
    """FLASH-pytorch's, which has norm and residual within, no rotation, and other places for the four heads.

    Its padding has outputs, as if it were no key but a query, and n counts it: so it is handed to what `respond` runs.
    """
    peer = oracle.load(name)
    config, width = peer.meta["cfg"], peer.inputs["x"].shape[-1]
    size, shared, is_causal = config["group_size"], config["query_key_dim"], config["causal"]
    layer = FLASH(
        width, chunk_size=size, shared_features=shared, bias="simple", rotary_base=None, is_causal=is_causal, rngs=nnx.Rngs(0)
    )
    places = np.array([0, 2, 1, 3])  # its heads are query, linear query, key, linear key

    def run(inputs, weights):
        ours = nnx.clone(layer)
        gated_unit.load(ours, weights)
        ours.query_key_scale[...] = weights["qk_offset_scale.gamma"][places]
        ours.query_key_shift[...] = weights["qk_offset_scale.beta"][places]
        table = weights["rel_pos_bias.relative_attention_bias.weight"]
        ours.distances[...] = gated_unit.distances(table, size, shared**0.5, is_causal)
        x = gated_unit.norm(inputs["x"], weights)
        if "keep" not in inputs:
            return {"y": ours(x) + inputs["x"]}
        z, value = unit.tokens_of(ours, x, inputs["keep"])
        attended, _ = ours._in_chunks(z, value, jnp.zeros(2, int), jnp.full(2, x.shape[1]))
        return {"y": unit.finish(ours, x, attended) + inputs["x"]}

    oracle.compare("flash", peer, run)
