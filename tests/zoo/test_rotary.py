"""Rotary positions: pattern layers are softmax attention with the same rotation, under their pattern as a mask.

Performer rotates before its features: what it estimates is softmax attention with the same rotation.
"""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from subquad import zoo
from subquad.zoo.base import Attention
from tests.assertions import assert_close
from tests.zoo.cases import CASES, FEATURES, inputs

LENGTH = 13
OPTIONS = {
    "local": dict(num_heads=2, window_size=3),
    "blockwise": dict(num_heads=2, max_length=20, block_size=4),
    "strided": dict(num_heads=2, stride=4),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_pattern_layers_rotate_as_softmax_does(name):
    options = dict(in_features=FEATURES, is_causal=True, rotary_base=20.0, rngs=nnx.Rngs(0))
    layer, dense = zoo.make(name, **OPTIONS[name], **options), zoo.make("softmax", num_heads=2, **options)
    nnx.update(dense, nnx.state(layer))
    mask = jnp.asarray(layer.pattern(LENGTH))[None]
    found = jax.jit(nnx.value_and_grad(lambda layer, x: jnp.sum(layer(x) ** 2)))(layer, inputs(LENGTH))
    expected = jax.jit(nnx.value_and_grad(lambda layer, x: jnp.sum(layer(x, mask=mask) ** 2)))(dense, inputs(LENGTH))
    assert_close(found, expected, 1e-4)


@pytest.mark.parametrize("is_causal", [True, False])
def test_performer_estimates_rotated_softmax_attention(is_causal):
    options = dict(num_heads=2, in_features=FEATURES, is_causal=is_causal, rotary_base=20.0, rngs=nnx.Rngs(0))
    layer, dense = zoo.make("performer", num_features=4096, **options), zoo.make("softmax", **options)
    nnx.update(dense, {name: x for name, x in nnx.state(layer).items() if name != "projection"})
    x = 0.5 * inputs(LENGTH)  # of large ones few features count
    rotated, expected = layer(x), dense(x)
    dense.rotary_base = None
    error = lambda y: jnp.sqrt(jnp.mean((rotated - y) ** 2))
    assert error(expected) < 0.2 * error(dense(x))


EXTENDED = OPTIONS | {
    "performer": dict(num_heads=2, num_features=16),
    "reformer": dict(num_heads=2, num_hashes=2, num_buckets=4, chunk_size=LENGTH),  # a chunk that cuts nothing off
}


@pytest.mark.parametrize("name", EXTENDED)
def test_extended_tokens_rotate_by_their_position(name):
    options = EXTENDED[name]
    layer = zoo.make(name, in_features=FEATURES, is_causal=True, rotary_base=20.0, rngs=nnx.Rngs(0), **options)
    x, cache, parts = inputs(LENGTH), layer.init_cache(2, LENGTH), []
    for start, stop in ((0, 5), (5, 6), (6, LENGTH)):
        part, cache = layer.extend(x[:, start:stop], cache)
        parts.append(part)
    assert_close(jnp.concatenate(parts, axis=1), layer(x), 1e-4)


def test_reformer_rotates_what_it_hashes_and_compares():
    """In one chunk every key is in reach: softmax attention of rotated queries to keys of the same bucket."""
    layer = zoo.make("reformer", in_features=FEATURES, rotary_base=20.0, rngs=nnx.Rngs(0), **EXTENDED["reformer"])
    x = inputs(LENGTH)
    query, value = layer.rotate(*2 * [layer.query(x)])[0], layer.value(x)
    buckets = layer.hash(query, LENGTH)
    same = (buckets[..., :, None, :] == buckets[..., None, :, :]).any(1) & ~jnp.eye(LENGTH, dtype=bool)[None, ..., None]
    key = query / jnp.linalg.norm(query, axis=-1, keepdims=True)
    scores = jnp.where(same, jnp.einsum("btnh,bsnh->btsn", query, key) * layer.head_features**-0.5, -1e9)
    weights = jnp.where(same.any(2, keepdims=True), jax.nn.softmax(scores, 2), 0)
    assert_close(layer(x), layer.out(jnp.einsum("btsn,bsnv->btnv", weights, value)), 1e-4)


@pytest.mark.parametrize("name", [name for name in CASES if issubclass(zoo.LAYERS[name], Attention)])
def test_a_rotation_that_a_layer_cannot_take_is_refused(name):
    make = lambda **more: zoo.make(name, in_features=FEATURES, rngs=nnx.Rngs(0), **{**CASES[name].options, **more})
    if not CASES[name].supports.rotary:
        with pytest.raises(ValueError, match="does not support rotary_base: "):
            make(rotary_base=100.0)
        return
    heads = CASES[name].options["num_heads"]
    for more, words in (
        (dict(rotary_base=100.0, qkv_features=3 * heads), "rotary_base must be None with an odd number"),
        (dict(rotary_base=0.0), r"rotary_base must be a number in \(0, inf\)"),
    ):
        with pytest.raises(ValueError, match=words):
            make(**more)
