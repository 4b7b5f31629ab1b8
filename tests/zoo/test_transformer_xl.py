"""Transformer-XL: the peers' numbers, the paper's identities, the memory and its stopped gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from flax import nnx

from subquad.kernels import relative
from subquad.zoo.positions import sinusoidal
from subquad.zoo.recurrent.transformer_xl import TransformerXLAttention
from tests import oracle

D, N = 8, 2


def make(segment_length=5, memory_length=7, in_features=D, **options):
    options = {"segment_length": segment_length, "memory_length": memory_length, **options}
    layer = TransformerXLAttention(N, in_features, **options, rngs=nnx.Rngs(0))
    # Biases as large as the rest, so that no term hides.
    for seed, bias in enumerate((layer.content_bias, layer.position_bias)):
        bias[...] = jax.random.normal(jax.random.key(seed), bias.shape, bias.dtype)
    return layer


def inputs(length, batch=2, seed=0):
    return jax.random.normal(jax.random.key(seed), (batch, length, D))


def run(layer, x, mask=None):
    """The compiled call: operation by operation it would take longer."""
    return jax.jit(lambda x, mask: layer(x, mask=mask))(x, mask)


def one_segment(layer, memory, segment, seen):
    """The paper's equations for one segment and its memory, by the dense reference."""
    hidden = jnp.concatenate([jax.lax.stop_gradient(memory), segment], axis=1)
    heads = relative.attention(
        layer.query(segment), layer.key(hidden), layer.value(hidden),
        layer.relative(sinusoidal(jnp.arange(hidden.shape[1]), D)), layer.content_bias[...], layer.position_bias[...],
        mask=seen, implementation="reference",
    )  # fmt: skip
    return layer.out(heads)


def by_segments(layer, x, valid, ids=None):
    outputs = []
    seen = jnp.broadcast_to(valid[:, None, None], (*valid.shape[:1], 1, x.shape[1], x.shape[1]))
    if ids is not None:
        seen &= (ids[:, :, None] == ids[:, None])[:, None]
    for start in range(0, x.shape[1], layer.segment_length):
        stop, first = start + layer.segment_length, max(0, start - layer.memory_length)
        outputs.append(one_segment(layer, x[:, first:start], x[:, start:stop], seen[:, :, start:stop, first:stop]))
    return jnp.concatenate(outputs, axis=1)


def with_gradients(fn, layer, x):
    """Output, and gradients with respect to parameters and inputs."""
    graphdef, state = nnx.split(layer)
    cotangent = inputs(x.shape[1], seed=9)

    def loss(state, x):
        y = fn(nnx.merge(graphdef, state), x)
        return jnp.sum(y * cotangent), y

    (_, y), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(state, x)
    return y, gradients


def close(actual, expected, atol=2e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=atol), actual, expected)


@pytest.mark.parametrize("segment,memory,length", [(5, 7, 18), (5, 3, 15), (5, 0, 13), (1, 3, 5)])
def test_a_long_call_is_segment_after_segment(segment, memory, length):
    layer, x = make(segment, memory), inputs(length)
    valid = jnp.ones((2, length), bool).at[1, length - 2 :].set(False)
    actual = with_gradients(lambda layer, x: layer(x, mask=valid[:, None, None]) * valid[..., None], layer, x)
    close(actual, with_gradients(lambda layer, x: by_segments(layer, x, valid) * valid[..., None], layer, x))


@pytest.mark.parametrize("padded", [False, True])
def test_packed_sequences_see_their_own_tokens_only(padded):
    """In their segment and in their memory; values and gradients are those of a mask."""
    layer, x = make(5, 7), inputs(18)
    ids = jnp.array([[4] * 3 + [1] * 9 + [2] * 6, [0] * 10 + [3] * 8])
    valid = jnp.ones((2, 18), bool).at[1, 16:].set(not padded)
    mask = valid[:, None, None] if padded else None
    actual = with_gradients(lambda layer, x: layer(x, mask=mask, segment_ids=ids) * valid[..., None], layer, x)
    close(actual, with_gradients(lambda layer, x: by_segments(layer, x, valid, ids) * valid[..., None], layer, x))
    # A sequence that begins with a segment is what it is alone.
    if not padded:
        close(actual[0][1:, 10:], run(layer, x[1:, 10:]))


def test_nothing_leaks_between_packed_sequences():
    layer, x = make(4, 6), inputs(17, batch=1)
    ids = jnp.array([0] * 6 + [5] * 7 + [2] * 4)
    packed = jax.jit(lambda x: layer(x, segment_ids=ids))
    changed = jax.vmap(lambda s: x.at[0, s].multiply(3.0))(jnp.arange(17))
    moved = jnp.abs(jax.vmap(packed)(changed)[:, 0] - packed(x)[0]).max(-1) > 1e-6
    np.testing.assert_array_equal(moved.T, layer.pattern(17)[0] & (ids[:, None] == ids))


@pytest.mark.parametrize("length", [1, 5, 6, 10])
def test_any_length_is_a_prefix(length):
    layer, x = make(), inputs(13)
    close(run(layer, x[:, :length]), run(layer, x)[:, :length])


def test_training_on_a_stream_by_whole_segments():
    """Extend by segments gives the long call's values and gradients, the memory's share in W_k, W_v, W_R included."""

    def stream(layer, x):
        cache, outputs = layer.init_cache(2, 13), []
        for start in range(0, 13, 5):
            y, cache = layer.extend(x[:, start : start + 5], cache)
            outputs.append(y)
        return jnp.concatenate(outputs, axis=1)

    layer, x = make(), inputs(13)
    close(with_gradients(stream, layer, x), with_gradients(lambda layer, x: layer(x), layer, x))


def test_no_gradient_reaches_the_memory():
    layer, x = make(), inputs(13, batch=1)
    jacobian = jax.jit(jax.jacrev(lambda x: layer(x).sum((0, -1))))(x)[:, 0]
    reached = np.abs(jacobian).sum(-1) > 1e-7
    segment = np.arange(13) // 5
    np.testing.assert_array_equal(reached, np.tril(segment[:, None] == segment))


@pytest.mark.parametrize("segment,memory", [(5, 7), (4, 2), (3, 0), (32, 8)])
def test_pattern_is_what_changes_what(segment, memory):
    layer, x = make(segment, memory), inputs(17, batch=1)
    changed = jax.vmap(lambda s: x[0].at[s].multiply(3.0))(jnp.arange(17))
    moved = jnp.abs(run(layer, changed) - run(layer, x)).max(-1) > 1e-6
    np.testing.assert_array_equal(moved.T, layer.pattern(17)[0])


def test_without_memory_and_relative_terms_it_is_causal_softmax():
    layer, x = make(segment_length=23, memory_length=0), inputs(23)
    for term in (layer.content_bias, layer.position_bias, layer.relative.kernel):
        term[...] = jnp.zeros_like(term[...])
    flax = nnx.MultiHeadAttention(N, D, decode=False, rngs=nnx.Rngs(1))
    nnx.update(layer, nnx.state(flax, nnx.Param))
    close(run(layer, x), flax(x, mask=nnx.make_causal_mask(x[..., 0])))


def test_only_distances_count():
    """The same tokens after padding, a whole segment of it or not, give the same numbers."""
    layer, x = make(), inputs(13)
    for padding in (5, 3):
        shifted = jnp.concatenate([inputs(padding, seed=3), x], axis=1)
        mask = jnp.arange(13 + padding) >= padding
        close(run(layer, shifted, mask[None, None, None])[:, padding:], run(layer, x))


def test_extend_in_any_cutting_with_padding():
    layer, x = make(), inputs(37)
    valid = jax.random.uniform(jax.random.key(5), (2, 1, 1, 37)) > 0.3
    expected = run(layer, x, valid)
    extend = jax.jit(lambda x, cache, mask: layer.extend(x, cache, mask=mask))
    for cuts in ([37], [1, 6, 11, 19], [11, 1, 1, 6, 11, 6, 1]):
        cache, outputs, start = layer.init_cache(2, 37), [], 0
        for width in cuts:
            part = slice(start, start + width)
            y, cache = extend(x[:, part], cache, valid[..., part])
            outputs.append(y)
            start += width
        is_real = valid[:, 0, 0, :, None]
        close(jnp.concatenate(outputs, axis=1) * is_real, expected * is_real)
        np.testing.assert_array_equal(cache.seen, is_real.sum((1, 2)))


def test_the_cache_keeps_a_window_whatever_max_length():
    layer = make(segment_length=5, memory_length=7)
    small, large = (layer.init_cache(3, n) for n in (1, 10**6))
    assert jax.tree.map(jnp.shape, small) == jax.tree.map(jnp.shape, large)
    assert small.hidden.shape == (3, 11, D) and not small.seen.any()
    half = layer.init_cache(3, 9, dtype=jnp.bfloat16)
    after = jax.eval_shape(layer.extend, inputs(2, batch=3), half)[1]
    assert after.hidden.dtype == half.hidden.dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="TransformerXLAttention: max_length must be a positive integer"):
        layer.init_cache(3, 0)


def test_odd_features():
    layer = TransformerXLAttention(1, 7, segment_length=3, memory_length=2, rngs=nnx.Rngs(0))
    assert jax.eval_shape(layer, jnp.ones((2, 8, 7))).shape == (2, 8, 7)


def test_refusals():
    with pytest.raises(ValueError, match="TransformerXLAttention does not support is_causal=False.*SoftmaxAttention"):
        make(is_causal=False)
    for option, value in (("segment_length", 0), ("segment_length", 2.5), ("memory_length", -1)):
        with pytest.raises(ValueError, match=f"TransformerXLAttention: {option} must be an? "):
            make(**{option: value})


def by_extend(layer, memory, x):
    """The peer's call: its memory in the cache, and one segment."""
    cache = layer.init_cache(x.shape[0], 1)
    known = memory.shape[1]
    before = -(-known // layer.segment_length) * layer.segment_length  # whole segments
    cache = cache._replace(hidden=cache.hidden.at[:, -known:].set(memory), seen=cache.seen + before)
    return layer.extend(x, cache)[0]


def by_call(layer, memory, x):
    """The same as the second segment of a long call, whose first ends with the memory."""
    before = jnp.full((x.shape[0], x.shape[1] - memory.shape[1], x.shape[2]), 7.0)
    return layer(jnp.concatenate([before, memory, x], axis=1))[:, x.shape[1] :]


@pytest.mark.parametrize("call", [by_extend, by_call])
@pytest.mark.parametrize("name", ["transfoxl_mem", "transfoxl_original_mem"])
def test_against_peers(name, call):
    """The peers are time-major and put residual and LayerNorm inside; ours stand around the layer here.

    The stored gradient of the memory is left out: the paper stops it, and so does the layer (tests/kernels has it).
    """
    peer = oracle.load(name)
    size, features = peer.meta["cfg"], peer.inputs["w"].shape[-1]
    layer = TransformerXLAttention(
        size["H"], features, segment_length=size["T"], memory_length=size["M"], use_bias=False, rngs=nnx.Rngs(0)
    )
    distances = np.arange(peer.inputs["r"].shape[0])[::-1]
    np.testing.assert_allclose(sinusoidal(distances, features), peer.inputs["r"][:, 0], atol=1e-6)
    names = {"r_net": "relative", "o_net": "out", "r_w_bias": "content_bias", "r_r_bias": "position_bias"}

    def run(inputs, weights):
        given = inputs | weights
        gain, shift = given["layer_norm.weight"], given["layer_norm.bias"]
        own = {name: given[name] for name in ("r_net.weight", "o_net.weight", "r_w_bias", "r_r_bias")}
        maps = jnp.split(given["qkv_net.weight"], 3)
        own |= {f"{name}.weight": w for name, w in zip(("query", "key", "value"), maps, strict=True)}
        memory, x = (rearrange(given[k], "t b d -> b t d") for k in ("mems", "w"))
        y = x + call(oracle.holding(layer, own, names), memory, x)
        y = (y - y.mean(-1, keepdims=True)) / jnp.sqrt(y.var(-1, keepdims=True) + 1e-5)
        return rearrange(y * gain + shift, "b t d -> t b d")

    del peer.grad_inputs["mems"]
    oracle.compare("transformer_xl", peer, run)
