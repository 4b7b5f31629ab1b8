"""Compressive Transformer: segment by segment by hand, Transformer-XL at rate 1, the cache, and a loss for the compressor.

No peer's numbers: the definition is spelt out here, dense, and in the paper's own terms of memories that are pushed along.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad.kernels import relative
from subquad.zoo import CompressiveAttention, TransformerXLAttention
from subquad.zoo.positions import sinusoidal

D, N = 8, 2


def make(segment_length=6, memory_length=4, compressed_length=3, rate=2, **options):
    sizes = dict(segment_length=segment_length, memory_length=memory_length, compressed_length=compressed_length, rate=rate)
    layer = CompressiveAttention(N, D, **sizes, **options, rngs=nnx.Rngs(0))
    for seed, bias in enumerate((layer.content_bias, layer.position_bias)):
        bias[...] = jax.random.normal(jax.random.key(seed), bias.shape, bias.dtype)
    return layer


def inputs(length, batch=2, seed=0):
    return jax.random.normal(jax.random.key(seed), (batch, length, D))


def weights(layer, segment, hidden):
    """Those of a segment's queries over all that they see, [B, N, L, S]."""
    count = hidden.shape[1]
    query, key, distances = layer.query(segment), layer.key(hidden), layer.relative(sinusoidal(jnp.arange(count), D))
    behind = np.arange(count - segment.shape[1], count)[:, None] - np.arange(count)
    content = jnp.einsum("btnh,bsnh->bnts", query + layer.content_bias[...], key)
    position = jnp.einsum("btnh,tsnh->bnts", query + layer.position_bias[...], distances[behind.clip(0)])
    return jax.nn.softmax(jnp.where(behind >= 0, (content + position) / np.sqrt(D // N), -jnp.inf))


def by_segments(layer, x):
    """Algorithm 1: each memory a list of tokens, the oldest first. Short ones stand for those with empty slots before them."""
    memory, compressed, outputs = x[:, :0], x[:, :0], []
    taps = np.arange(layer.rate) * layer.dilation - (layer.rate - 1) * (layer.dilation - 1) // 2
    for start in range(0, x.shape[1], layer.segment_length):
        segment = x[:, start : start + layer.segment_length]
        hidden = jnp.concatenate([compressed, memory, segment], 1)
        heads = relative.attention(
            layer.query(segment), layer.key(hidden), layer.value(hidden),
            layer.relative(sinusoidal(jnp.arange(hidden.shape[1]), D)), layer.content_bias[...], layer.position_bias[...],
            implementation="reference",
        )  # fmt: skip
        outputs.append(layer.out(heads))
        memory = jnp.concatenate([memory, jax.lax.stop_gradient(segment)], 1)
        leaving = max(0, memory.shape[1] - layer.memory_length) // layer.rate * layer.rate
        groups = memory[:, :leaving].reshape(len(x), -1, layer.rate, D)
        if layer.compressor is not None:
            at = np.arange(0, leaving, layer.rate)[:, None] + taps
            groups = jnp.where(((at >= 0) & (at < leaving))[..., None], memory[:, at.clip(0, max(0, leaving - 1))], 0)
            new = jnp.einsum("bgrd,rde->bge", groups, layer.compressor.kernel[...]) + layer.compressor.bias[...]
        elif layer.compression == "most_used":
            used = weights(layer, segment, hidden).sum((1, 2))[:, compressed.shape[1] :][:, :leaving]
            best = jnp.argsort(-used, axis=1)[:, : leaving // layer.rate]
            new = jnp.take_along_axis(memory, jnp.sort(best, axis=1)[..., None], axis=1)
        else:
            new = groups.mean(2) if layer.compression == "mean" else groups.max(2)
        memory = memory[:, leaving:]
        compressed = jnp.concatenate([compressed, jax.lax.stop_gradient(new)], 1)
        compressed = compressed[:, max(0, compressed.shape[1] - layer.compressed_length) :]
    return jnp.concatenate(outputs, 1)


def with_gradients(function, layer, x):
    graph, state = nnx.split(layer)
    cotangent = inputs(x.shape[1], seed=9)

    def loss(state, x):
        y = function(nnx.merge(graph, state), x)
        return jnp.sum(y * cotangent), y

    (_, y), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(state, x)
    return y, gradients


def close(actual, expected, atol=2e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=atol), actual, expected)


@pytest.mark.parametrize("sizes,compression,length", [
    ((6, 4, 3, 2), "conv", 33), ((6, 4, 9, 2), "mean", 32), ((3, 0, 2, 3), "max", 14), ((4, 8, 2, 4), "conv", 31),
    ((6, 4, 0, 2), "mean", 20), ((6, 4, 3, 2), "max", 9), ((6, 4, 5, 2), "most_used", 33), ((4, 0, 3, 2), "most_used", 12),
    ((6, 2, 4, 2), "dilated", 32), ((9, 12, 4, 3), "dilated", 40),
], ids=str)
def test_algorithm_1(sizes, compression, length):
    layer, x = make(*sizes, compression=compression), inputs(length)
    close(with_gradients(lambda layer, x: layer(x), layer, x), with_gradients(by_segments, layer, x))


@pytest.mark.parametrize("compression", ["mean", "max", "most_used"])
def test_at_rate_1_it_is_transformer_xl_with_both_memories(compression):
    layer, x = make(6, 5, 7, 1, compression=compression), inputs(33)
    plain = TransformerXLAttention(N, D, segment_length=6, memory_length=12, rngs=nnx.Rngs(0))
    nnx.update(plain, nnx.state(layer))
    close(*(with_gradients(lambda layer, x: layer(x), one, x) for one in (layer, plain)))


@pytest.mark.parametrize("compression", ["conv", "dilated", "most_used"])
def test_a_cache_across_many_segments(compression):
    """Token by token, and in pieces longer than a segment, of samples that stand at different places in theirs."""
    layer, x = make(compression=compression), inputs(40)
    wanted = jax.jit(lambda x: layer(x))(x)
    step = jax.jit(lambda x, cache, mask: layer.extend(x, cache, mask=mask))
    cache, start, outputs = layer.init_cache(2, 1), 0, []
    valid = np.ones((2, 40), bool)
    valid[1, [2, 3, 9, 20]] = False
    for width in (1, 1, 10, 1, 10, 1, 1, 10, 1, 1, 1):
        if start + width > 40:
            break
        piece = slice(start, start + width)
        y, cache = step(x[:, piece], cache, jnp.asarray(valid[:, None, None, piece]))
        outputs.append(y)
        start += width
    outputs = np.concatenate(outputs, 1)
    for b in range(2):
        kept = valid[b, :start]
        alone = wanted[b, :start] if kept.all() else jax.jit(lambda x: layer(x))(x[b : b + 1, :start][:, kept])[0]
        np.testing.assert_allclose(outputs[b][kept], alone, rtol=1e-4, atol=2e-5)


def reconstruction(layer, x):
    """Algorithm 2, segment by segment, in float64 from the layer's heads; the compressor's groups by hand."""
    size, room = layer.segment_length, layer.memory_length
    heads = lambda projection, x: np.asarray(projection(x[None])[0], np.float64)

    def attention(query, hidden):
        logits = np.einsum("tnh,snh->nts", query, heads(layer.key, hidden)) / np.sqrt(query.shape[-1])
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        return np.einsum("nts,snh->tnh", weights / weights.sum(-1, keepdims=True), heads(layer.value, hidden))

    errors = []
    for sample in x:
        for start in range(0, len(sample) - size + 1, size):
            old = sample[max(0, start - room) : max(0, start + size - room)]
            if len(old):
                query = heads(layer.query, sample[start : start + size])
                errors.append((attention(query, old) - attention(query, layer.compress(old[None])[0])) ** 2)
    return np.mean(errors)


@pytest.mark.parametrize("sizes,length", [((6, 4, 3, 2), 33), ((4, 8, 1, 4), 24)], ids=str)
@pytest.mark.parametrize("compression", ["conv", "max"])
def test_algorithm_2(sizes, length, compression):
    layer, x = make(*sizes, compression=compression), inputs(length)
    np.testing.assert_allclose(layer.reconstruction_loss(x), reconstruction(layer, x), rtol=1e-4)


def test_the_loss_counts_real_tokens_alone():
    layer, x = make(compression="conv"), inputs(24)
    valid = jnp.ones((2, 30), bool).at[:, [0, 7, 20, 21, 22, 23]].set(False)
    padded = 30 * inputs(30, seed=3)
    padded = padded.at[:, jnp.flatnonzero(valid[0])].set(x)
    loss = layer.reconstruction_loss(padded, mask=valid[:, None, None])
    np.testing.assert_allclose(loss, layer.reconstruction_loss(x), rtol=1e-5)


def test_the_loss_trains_the_compressor_and_the_task_all_else():
    """Exactly: the gradients of all others are 0."""
    layer, x = make(compression="conv"), inputs(33)
    graph, state = nnx.split(layer)
    of_loss, of_inputs = jax.jit(jax.grad(lambda state, x: nnx.merge(graph, state).reconstruction_loss(x), (0, 1)))(state, x)
    of_task = jax.jit(jax.grad(lambda state: jnp.sum(nnx.merge(graph, state)(x) ** 2)))(state)
    assert (of_inputs == 0).all()
    for (path, one), (_, other) in zip(nnx.to_flat_state(of_loss), nnx.to_flat_state(of_task), strict=True):
        is_compressor = path[0] == "compressor"
        assert bool((one[...] != 0).any()) == is_compressor, path
        assert bool((other[...] == 0).all()) == is_compressor, path


def test_the_loss_falls_where_the_compressor_learns():
    layer, x = make(compression="conv"), inputs(60)
    graph, compressor, rest = nnx.split(layer, lambda path, _: path[0] == "compressor", ...)
    loss = lambda compressor: nnx.merge(graph, compressor, rest).reconstruction_loss(x)

    @jax.jit
    def descend(compressor):
        step = lambda _, c: jax.tree.map(lambda a, g: a - 0.3 * g, c, jax.grad(loss)(c))
        return jax.lax.fori_loop(0, 100, step, compressor)

    assert loss(descend(compressor)) < 0.5 * loss(compressor)


def test_taps_beside_each_other_are_the_convolution():
    layer, x = make(compression="dilated", dilation=1), inputs(33)
    plain = make(compression="conv")
    close(*(with_gradients(lambda layer, x: layer.reconstruction_loss(x) * x, one, x) for one in (layer, plain)))


def test_every_token_that_leaves_has_one_tap_but_at_the_ends_of_its_segment():
    """Slots that would read it, before the first and after the last, are not there."""
    layer = make(segment_length=40, memory_length=0, rate=4, compression="dilated", use_bias=False)
    reads = jax.jit(layer.compress)(jnp.eye(80)[..., None] * jnp.ones(D)).any(2)  # of each token, which slots
    assert not reads[:40, 10:].any() and not reads[40:, :10].any()
    count = reads.sum(1).reshape(2, 40)
    assert (count <= 1).all() and (count[:, 6:34] == 1).all()


def test_nothing_to_compress_is_no_loss():
    layer = make()
    assert layer.reconstruction_loss(inputs(5)) == 0
    assert make(6, 12).reconstruction_loss(inputs(12)) == 0


def test_lengths_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="CompressiveAttention: segment_length must be a multiple of rate = 4, got 6"):
        make(rate=4)
    with pytest.raises(ValueError, match="CompressiveAttention: memory_length must be a multiple of rate = 2, got 5"):
        make(memory_length=5)
    with pytest.raises(ValueError, match="CompressiveAttention: compression must be a known name, got 'most'"):
        make(compression="most")
    with pytest.raises(ValueError, match="CompressiveAttention: dilation must have no divisor in common with rate = 2, got 4"):
        make(compression="dilated", dilation=4)
    with pytest.raises(ValueError, match='CompressiveAttention: dilation must be None where compression is "conv", got 3'):
        make(compression="conv", dilation=3)
    with pytest.raises(ValueError, match='CompressiveAttention: compression must be a function .* got "most_used"'):
        make(compression="most_used").reconstruction_loss(inputs(12))
    with pytest.raises(ValueError, match="CompressiveAttention: inputs_q must have shape"):
        make().reconstruction_loss(jnp.ones((2, 12, D + 1)))
