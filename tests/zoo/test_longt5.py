"""LongT5Attention: a window and transient global tokens, with T5's biases; the published code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad import zoo
from tests import oracle

from .patterned import FEATURES, check_definition, inputs


def make(radius=5, block_size=4, heads=4, **options):
    layer = zoo.LongT5Attention(
        heads, FEATURES, radius=radius, block_size=block_size, num_buckets=8, max_distance=10, rngs=nnx.Rngs(0), **options
    )
    if block_size:
        layer.global_scale[...] += 0.1 * jax.random.normal(jax.random.key(2), (FEATURES,))
    return layer


def bucket(distance, num_buckets, max_distance):
    """T5, appendix: number by number."""
    half = num_buckets // 2
    exact, size = half // 2, abs(distance)
    if size >= exact:
        wide = np.log(np.float32(size / exact)) / np.float32(np.log(max_distance / exact)) * np.float32(half - exact)
        size = min(exact + int(wide), half - 1)
    return size + half * (distance > 0)


def dense(layer, x):
    """The definition for real tokens alone, [1, T, D]: every logit at once."""
    length, (size, options) = x.shape[1], (layer.block_size, (layer.num_buckets, layer.max_distance))
    at = np.arange(length)
    table = lambda bias, distances: bias[...][np.vectorize(lambda d: bucket(d, *options))(distances)].transpose(2, 0, 1)
    query, key, value = layer.query(x), layer.key(x), layer.value(x)
    logits = layer.scale * jnp.einsum("btnh,bsnh->bnts", query, key) + table(layer.bias, at - at[:, None])
    logits = jnp.where(abs(at - at[:, None]) <= layer.radius, logits, -1e30)
    if size is not None:
        count = max(1, length // size)
        block = np.minimum(at // size, count - 1)
        sums = jnp.stack([x[:, block == j].sum(1) for j in range(count)], 1)
        tokens = sums / jnp.sqrt((sums**2).mean(-1, keepdims=True) + 1e-6) * layer.global_scale[...]
        far = layer.scale * jnp.einsum("btnh,bsnh->bnts", query, layer.key(tokens))
        far += table(layer.global_bias, np.arange(count) - block[:, None])
        logits, value = jnp.concatenate([logits, far], -1), jnp.concatenate([value, layer.value(tokens)], 1)
    return layer.out(jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(logits), value))


@pytest.mark.parametrize(("radius", "block_size"), [(5, 4), (2, 7), (40, 3), (3, 40), (6, None)])
def test_the_definition(radius, block_size):
    """Outputs and every gradient, among the real tokens of each sample; some are left over by whole blocks."""
    check_definition(make(radius, block_size), dense)


def test_the_definition_piece_by_piece(monkeypatch):
    """As a CPU computes long sequences: some heads at a time, of these some queries, who end within a block."""
    monkeypatch.setattr("subquad.zoo.patterns.longt5.QUERIES", 7)
    monkeypatch.setattr("subquad.zoo.projection.LARGE_BYTES", 1)
    monkeypatch.setattr("subquad.zoo.projection.PIECE_BYTES", 2 * 4 * 29 * 4)  # two heads
    check_definition(make(2, 5), dense)


def test_a_window_over_everything_without_biases_is_softmax_attention():
    layer = make(40, None, scale=2**-1)
    layer.bias[...] = jnp.zeros_like(layer.bias[...])
    full = zoo.SoftmaxAttention(4, FEATURES, rngs=nnx.Rngs(1))
    nnx.update(full, {name: nnx.state(getattr(layer, name)) for name in ("query", "key", "value", "out")})
    np.testing.assert_allclose(layer(inputs(33)), full(inputs(33)), atol=2e-6)


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(8, 20), (32, 128), (4, 3)])
def test_the_buckets_of_t5(num_buckets, max_distance):
    layer = zoo.LongT5Attention(4, FEATURES, num_buckets=num_buckets, max_distance=max_distance, rngs=nnx.Rngs(0))
    distances = np.arange(-300, 300)
    found = layer.bucket(distances)
    np.testing.assert_array_equal(found, [bucket(distance, num_buckets, max_distance) for distance in distances])
    assert set(np.asarray(found).tolist()) == set(range(num_buckets)) - {num_buckets // 2}


def test_the_window_alone_makes_no_square():
    layer = make(31, None)
    assert "512,512" not in str(jax.make_jaxpr(jax.grad(lambda x: layer(x).sum()))(inputs(512)))


def test_logits_start_as_t5s():
    """Of standard deviation 1, as queries are drawn with (D H)^-1/2; biases with D^-1/2."""
    layer = zoo.LongT5Attention(8, 512, use_bias=False, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (1, 64, 512))
    logits = layer.scale * jnp.einsum("btnh,bsnh->bnts", layer.query(x), layer.key(x))
    assert 0.9 < logits.std() < 1.1
    for bias in (layer.bias, layer.global_bias):  # of 256 numbers each
        assert 0.8 < bias[...].std() * 512**0.5 < 1.2


NAMES = {
    "q": "query", "k": "key", "v": "value", "o": "out", "relative_attention_bias.weight": "bias",
    "global_relative_attention_bias.weight": "global_bias", "global_input_layer_norm.weight": "global_scale",
}  # fmt: skip


@pytest.mark.parametrize("name", ["longt5_local", "longt5_tglobal_pad"])
def test_hugging_face(name):
    """Outputs at padding are 0 there. A radius of 7 is a block of 8 less the query's own place."""
    peer = oracle.load(name)
    size = peer.meta["cfg"]["global_block_size"] if "global" in name else None
    layer = zoo.LongT5Attention(
        2, 16, radius=7, block_size=size, num_buckets=8, max_distance=20, use_bias=False, rngs=nnx.Rngs(0)
    )
    real = jnp.asarray(peer.inputs["mask"] > 0)

    def forward(inputs, weights):
        maps = {name: x.T if name.endswith("bias.weight") or name.endswith("norm.weight") else x for name, x in weights.items()}
        held = oracle.holding(layer, maps, NAMES)
        return jnp.where(real[..., None], held(inputs["x"], mask=real[:, None, None]), 0)

    oracle.compare("longt5", peer, forward)


def test_refusals():
    for word, options in (
        ("radius", dict(radius=0)), ("block_size", dict(block_size=0)), ("num_buckets", dict(num_buckets=6)),
        ("num_buckets", dict(num_buckets=32, max_distance=8)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"LongT5Attention: {word} must"):
            zoo.LongT5Attention(4, FEATURES, **options, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="global tokens are made of all tokens"):
        make()(inputs(5), segment_ids=jnp.zeros((2, 5), int))
