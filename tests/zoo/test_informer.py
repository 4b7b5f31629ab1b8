"""ProbSparse attention against Hugging Face's, and against its definition, spelt out query by query."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad import zoo
from subquad.zoo.buckets.informer import InformerAttention, answer, spread
from tests import oracle

LENGTH = 23


def small(**options):
    return InformerAttention(2, 16, **{"factor": 2, "rngs": nnx.Rngs(0), **options})


def inputs(length=LENGTH, seed=0):
    return jax.random.normal(jax.random.key(seed), (2, length, 16))


def test_hugging_face():
    """It samples as many keys as there are, so that its sum over them divided by T is the mean of the sample, as here."""
    peer = oracle.load("informer")
    heads, length = peer.meta["cfg"]["heads"], peer.inputs["x"].shape[1]
    used = peer.meta["cfg"]["factor"] * math.ceil(math.log1p(length))
    sample = jnp.asarray(peer.constants["index_sample"], jnp.int32)[None]

    def run(inputs, weights):
        x = inputs["x"]
        linear = lambda name, x: x @ weights[f"{name}_proj.weight"].T + weights[f"{name}_proj.bias"]
        fold = lambda x: jnp.swapaxes(x.reshape(2, length, heads, -1), 1, 2).reshape(2 * heads, length, 1, -1)
        query, key, value = (fold(linear(name, x)) for name in "qkv")
        measure = spread(query, key, jnp.tile(sample, (len(query), 1)), jnp.ones(sample.shape, bool))
        y = answer(query, key, value, jnp.ones(measure.shape, bool), measure, used, used, None)
        return linear("out", jnp.swapaxes(y.reshape(2, heads, length, -1), 1, 2).reshape(x.shape))

    oracle.compare("informer", peer, run, of="mechanism")


def spelt_out(layer, x):
    """The layer for one sample, in NumPy, query by query; and which queries of each head are answered."""
    x = np.asarray(x, np.float64)
    query, key, value = (
        np.einsum("td,dnh->tnh", x, m.kernel[...]) + np.asarray(m.bias[...]) for m in (layer.query, layer.key, layer.value))
    length, answered = len(x), []
    count = layer.factor * math.ceil(math.log(1 + length))
    sample = [int(length * where) for where in np.asarray(layer.sample[...])[:count]]
    out = np.broadcast_to(value.mean(0), value.shape).copy()
    for head in range(layer.num_heads):
        logits = query[:, head] @ key[:, head].T / layer.head_features**0.5
        measure = [max(row[sample]) - sum(row[sample]) / count for row in logits]
        answered.append(set(np.argsort(measure)[::-1][:count].tolist()))
        for t in answered[-1]:
            weights = np.exp(logits[t])
            out[t, head] = weights @ value[:, head] / weights.sum()
    return np.einsum("tnh,nhf->tf", out, layer.out.kernel[...]) + np.asarray(layer.out.bias[...]), answered


@pytest.mark.parametrize("factor", [1, 2])
def test_layer(factor):
    """Also with padding in a hole, which is neither sampled nor answered, nor part of the mean."""
    layer, x = small(factor=factor), inputs()
    is_real = np.ones((2, LENGTH), bool)
    is_real[1, [0, 7, 8, 22]] = False
    y = jax.jit(lambda x: layer(x, mask=jnp.asarray(is_real)[:, None, None]))(x)
    for sample in range(2):
        want, answered = spelt_out(layer, x[sample, is_real[sample]])
        np.testing.assert_allclose(y[sample, is_real[sample]], want, atol=2e-5)
        assert all(0 < len(places) < is_real[sample].sum() for places in answered)


def test_all_answered_is_softmax():
    layer, x = small(factor=10), inputs()
    plain = zoo.SoftmaxAttention(2, 16, rngs=nnx.Rngs(0))
    nnx.update(plain, nnx.state(layer, nnx.Param))
    np.testing.assert_allclose(layer(x), plain(x), atol=1e-5)


def test_alike_scores_lose_nothing():
    """Queries of 0 see the mean of all values in either way."""
    layer, x = small(factor=1), inputs()
    layer.query.kernel[...] *= 0
    plain = zoo.SoftmaxAttention(2, 16, rngs=nnx.Rngs(0))
    nnx.update(plain, nnx.state(layer, nnx.Param))
    np.testing.assert_allclose(layer(x), plain(x), atol=1e-5)


def test_samples_are_drawn_anew_where_the_caller_says():
    layer, x = small(factor=1), inputs()
    y, drawn = layer(x), layer.redraw(nnx.Rngs(1))
    np.testing.assert_array_equal(layer(x), y)
    layer.sample[...] = drawn
    assert isinstance(layer.sample, zoo.RandomFeature) and jnp.abs(layer(x) - y).max() > 1e-3
    assert drawn.min() >= 0 and drawn.max() < 1 and drawn.shape == (24,)


def test_refusals():
    with pytest.raises(ValueError, match="factor must be a positive integer, got 0"):
        small(factor=0)
    with pytest.raises(ValueError, match="does not support is_causal=True"):
        small(is_causal=True)
