"""Clustered attention against pytorch-fast-transformers, and against its definition, spelt out query by query."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad import zoo
from subquad.zoo.buckets.clustered import ClusteredAttention, attend_by_cluster
from tests import oracle
from tests.assertions import assert_close

LENGTH = 23


def small(**options):
    return ClusteredAttention(2, 16, **{"num_clusters": 4, "num_top": 3, "num_iterations": 3, "rngs": nnx.Rngs(0), **options})


def inputs(length=LENGTH, seed=0):
    return jax.random.normal(jax.random.key(seed), (2, length, 16))


def dense(query, key, value, clusters, count, top, is_peers):
    """The definition for given clusters [B, N, T]. The peer passes no gradient to the share of the top keys, m_c."""
    query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
    scale, member = query.shape[-1] ** -0.5, jax.nn.one_hot(clusters, count)
    means = jnp.einsum("bntc,bnth->bnch", member, query) / member.sum(2)[..., None]
    weights = jax.nn.softmax(jnp.einsum("bnch,bnsh->bncs", means, key) * scale)
    of_query = lambda x: jnp.einsum("bntc,bncs->bnts", member, x)
    is_top = weights >= jax.lax.top_k(weights, top)[0][..., -1:] if top else jnp.zeros(weights.shape, bool)
    rest = jnp.where(is_top, 0, weights)
    share = of_query(1 - rest.sum(-1, keepdims=True))
    logits = jnp.where(of_query(is_top * 1.0) > 0.5, jnp.einsum("bnth,bnsh->bnts", query, key) * scale, -1e30)
    own = (jax.lax.stop_gradient(share) if is_peers else share) * jax.nn.softmax(logits) if top else 0
    return jnp.swapaxes((own + of_query(rest)) @ value, 1, 2)


@pytest.mark.parametrize("name,is_improved", [("ft_clustered", False), ("ft_improved_clustered", True)])
def test_fast_transformers(name, is_improved):
    """Its k-means starts from random queries, so its clusters are taken from the file. Its gradient leaves a term out: the peer
    is explained by a dense formula that does so, too, and the layer by the same formula with its whole gradient."""
    peer = oracle.load(name)
    clusters, count = jnp.asarray(peer.constants["clusters"], jnp.int32), peer.meta["cfg"]["clusters"]
    top = peer.meta["cfg"]["topk"] if is_improved else 0

    def attend(inputs, _):
        fold = lambda x: jnp.swapaxes(x, 1, 2).reshape(4, -1, 1, x.shape[-1])
        real = jnp.ones((4, clusters.shape[2]), bool)
        heads = (fold(inputs[word]) for word in "qkv")
        y = attend_by_cluster(*heads, real, clusters.reshape(4, -1), count, top, None)
        return jnp.swapaxes(y.reshape(2, 2, *y.shape[1::2]), 1, 2)

    def formula(is_peers):
        return lambda inputs, _: dense(*(inputs[word] for word in "qkv"), clusters, count, top, is_peers)

    oracle.compare("clustered", peer, formula(True), of="mechanism")
    ours, whole = (oracle.outputs_and_gradients(peer, function) for function in (attend, formula(False)))
    assert_close(ours, whole, 1e-5)
def means_of_bits(layer, query, head):
    """K-means of the signs of one head's queries [T, H], and the cluster of each, in NumPy."""
    bits = np.where(query @ np.asarray(layer.planes[...], np.float64)[head].T >= 0, 1, -1)
    count = layer.num_clusters
    centres = bits[[int((c + 0.5) * len(query) / count) for c in range(count)]]
    assign = lambda: np.array([[(row != centre).sum() for centre in centres] for row in bits]).argmin(1)
    for _ in range(layer.num_iterations):
        clusters = assign()
        for c, p in np.ndindex(centres.shape):
            votes = bits[clusters == c, p].sum()
            centres[c, p] = np.sign(votes) if votes else centres[c, p]
    return assign()


def spelt_out(layer, x):
    """The layer for one sample, in NumPy, query by query."""
    x = np.asarray(x, np.float64)
    query, key, value = (
        np.einsum("td,dnh->tnh", x, m.kernel[...]) + np.asarray(m.bias[...]) for m in (layer.query, layer.key, layer.value))
    out = np.zeros_like(value)
    for head in range(layer.num_heads):
        clusters = means_of_bits(layer, query[:, head], head)
        for t in range(len(x)):
            mean = query[clusters == clusters[t], head].mean(0)
            weights = np.exp(key[:, head] @ mean / layer.head_features**0.5)
            weights /= weights.sum()
            top = np.argsort(-weights)[: layer.num_top]
            own = np.exp(key[top, head] @ query[t, head] / layer.head_features**0.5)
            weights[top] = weights[top].sum() * own / own.sum() if layer.num_top else weights[top]
            out[t, head] = weights @ value[:, head]
    return np.einsum("tnh,nhf->tf", out, layer.out.kernel[...]) + np.asarray(layer.out.bias[...])


@pytest.mark.parametrize("num_top", [0, 3])
def test_layer(num_top):
    """Also with padding in a hole, which is in no mean and no list."""
    layer, x = small(num_top=num_top), inputs()
    is_real = np.ones((2, LENGTH), bool)
    is_real[1, [0, 7, 8, 22]] = False
    y = jax.jit(lambda x: layer(x, mask=jnp.asarray(is_real)[:, None, None]))(x)
    for sample in range(2):
        np.testing.assert_allclose(y[sample, is_real[sample]], spelt_out(layer, x[sample, is_real[sample]]), atol=2e-5)


def plain(layer):
    softmax = zoo.SoftmaxAttention(2, 16, rngs=nnx.Rngs(0))
    nnx.update(softmax, nnx.state(layer, nnx.Param))
    return softmax


def test_all_keys_on_top_is_softmax():
    layer, x = small(num_top=40), inputs()
    np.testing.assert_allclose(layer(x), plain(layer)(x), atol=1e-5)


@pytest.mark.parametrize("top", [0, 5])
def test_a_cluster_for_each_query_is_softmax(top):
    layer, x = small(), inputs()
    query, key, value = (jnp.swapaxes(h, 1, 2).reshape(4, LENGTH, 1, 8) for h in layer.project(x))
    clusters = jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32), (4, LENGTH))
    y = attend_by_cluster(query, key, value, jnp.ones(clusters.shape, bool), clusters, LENGTH, top, None)
    y = layer.out(jnp.swapaxes(y.reshape(2, 2, LENGTH, 8), 1, 2))
    np.testing.assert_allclose(y, plain(layer)(x), atol=1e-5)


def test_improved_is_closer():
    """In L1 its weights are no further from those of softmax (section 3.3)."""
    x = inputs()
    far = []
    for num_top in (0, 3, 12):
        layer = small(num_top=num_top)
        layer.value.kernel[...], layer.value.bias[...] = jnp.zeros((16, 2, 8)), jnp.zeros((2, 8))
        heads = layer.project(x)
        rows = []
        for s in range(0, LENGTH, 8):  # eight columns of the weights at a time
            value = jnp.zeros((2, LENGTH, 2, 8)).at[:, s : s + 8].set(jnp.eye(8)[: LENGTH - s, None])
            rows.append(layer.attend(*heads[:2], value, None))
        weights = jnp.concatenate(rows, -1)[..., :LENGTH]
        exact = jax.nn.softmax(jnp.einsum("btnh,bsnh->btns", *heads[:2]) / 8**0.5)
        np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
        far.append(np.abs(weights - exact).sum(-1))
    assert (far[1] <= far[0] + 1e-5).all() and (far[2] <= far[0] + 1e-5).all() and far[2].mean() < far[1].mean() < far[0].mean()


def test_planes_are_drawn_anew_where_the_caller_says():
    layer, x = small(), inputs()
    y, drawn = layer(x), layer.redraw(nnx.Rngs(1))
    np.testing.assert_array_equal(layer(x), y)
    layer.planes[...] = drawn
    assert isinstance(layer.planes, zoo.RandomFeature) and jnp.abs(layer(x) - y).max() > 1e-3


@pytest.mark.parametrize("options,match", [
    (dict(num_clusters=0), "num_clusters"), (dict(num_top=-1), "num_top must be an integer of at least 0"),
    (dict(num_bits=0), "num_bits"), (dict(num_iterations=0), "num_iterations"), (dict(is_causal=True), "is_causal=True"),
], ids=str)  # fmt: skip
def test_refusals(options, match):
    with pytest.raises(ValueError, match=match):
        small(**options)
