"""SMYRF against its authors' code, and against its definition, spelt out round by round."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad import zoo
from subquad.zoo.buckets.smyrf import SmyrfAttention, attend_by_rank, hashes
from tests import oracle

LENGTH = 23


def small(**options):
    return SmyrfAttention(2, 16, **{"num_hashes": 2, "cluster_size": 6, "rngs": nnx.Rngs(0), **options})


def inputs(length=LENGTH, seed=0):
    return jax.random.normal(jax.random.key(seed), (2, length, 16))


def test_the_authors_code():
    """It ranks by a . x + b, whose b moves no rank; M is of each head and sample, as here."""
    peer = oracle.load("smyrf")
    directions = jnp.asarray(peer.constants["alpha"].T, jnp.float32)[:, None]  # [R, 1, H+2]
    real = jnp.ones(peer.inputs["q"].shape[:2], bool)

    def run(inputs, _):
        query, key, value = (inputs[name][:, :, None] for name in "qkv")
        places = hashes(query, key, real, directions)
        return {"o": attend_by_rank(query, key, value, real, *places, peer.meta["cfg"]["cluster"], None)[:, :, 0]}

    oracle.compare("smyrf", peer, run, of="mechanism")


def spelt_out(layer, x):
    """The layer for one sample, in NumPy, query by query."""
    x = np.asarray(x, np.float64)
    query, key, value = (
        np.einsum("td,dnh->tnh", x, m.kernel[...]) + np.asarray(m.bias[...]) for m in (layer.query, layer.key, layer.value))
    out = np.zeros_like(value)
    for head in range(layer.num_heads):
        q, k, v = query[:, head], key[:, head], value[:, head]
        most = (q**2).sum(1).max() + (k**2).sum(1).max()
        lifted_q = [[*a, 0, np.sqrt(most - a @ a)] for a in q]
        lifted_k = [[*a, np.sqrt(most - a @ a), 0] for a in k]
        apart = np.square(np.array(lifted_q)[:, None] - np.array(lifted_k)).sum(-1)
        np.testing.assert_allclose(apart, 2 * most - 2 * q @ k.T, atol=1e-9)
        weights = np.zeros((len(x), len(x)))
        for direction in np.asarray(layer.directions[:, head], np.float64):
            rank_q, rank_k = (np.argsort(np.argsort(np.array(lifted) @ direction)) for lifted in (lifted_q, lifted_k))
            same = rank_q[:, None] // layer.cluster_size == rank_k // layer.cluster_size
            weights += np.where(same, np.exp(q @ k.T / layer.head_features**0.5), 0)
        out[:, head] = weights @ v / weights.sum(1, keepdims=True)
    return np.einsum("tnh,nhf->tf", out, layer.out.kernel[...]) + np.asarray(layer.out.bias[...])


def test_layer():
    """Also with padding in a hole, which takes no place of a cluster."""
    layer, x = small(), inputs()
    is_real = np.ones((2, LENGTH), bool)
    is_real[1, [0, 7, 8, 22]] = False
    y = jax.jit(lambda x: layer(x, mask=jnp.asarray(is_real)[:, None, None]))(x)
    for sample in range(2):
        np.testing.assert_allclose(
            y[sample, is_real[sample]], spelt_out(layer, x[sample, is_real[sample]]), atol=2e-5)


@pytest.mark.parametrize("num_hashes", [1, 3])
def test_one_cluster_is_softmax(num_hashes):
    layer, x = small(cluster_size=40, num_hashes=num_hashes), inputs()
    plain = zoo.SoftmaxAttention(2, 16, rngs=nnx.Rngs(0))
    nnx.update(plain, nnx.state(layer, nnx.Param))
    np.testing.assert_allclose(layer(x), plain(x), atol=1e-5)


def test_directions_are_drawn_anew_where_the_caller_says():
    layer, x = small(), inputs()
    y, drawn = layer(x), layer.redraw(nnx.Rngs(1))
    np.testing.assert_array_equal(layer(x), y)
    layer.directions[...] = drawn
    assert isinstance(layer.directions, zoo.RandomFeature) and jnp.abs(layer(x) - y).max() > 1e-3


@pytest.mark.parametrize("option", ["num_hashes", "cluster_size"])
def test_refusals(option):
    with pytest.raises(ValueError, match=f"{option} must be a positive integer, got 0"):
        small(**{option: 0})
