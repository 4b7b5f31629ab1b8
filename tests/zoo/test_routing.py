"""Routing attention against a peer, and against its definition, spelt out cluster by cluster."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from flax import nnx

from subquad import zoo
from subquad.zoo.buckets.routing import RoutingAttention, attend_within, largest
from tests import oracle

LENGTH = 23


def small(**options):
    return RoutingAttention(2, 16, **{"num_clusters": 4, "rngs": nnx.Rngs(0), **options})


def last(**options):
    return small(**{"selection": "last", "window_size": 3, "is_causal": True, **options})


def inputs(length=LENGTH, seed=0):
    return jax.random.normal(jax.random.key(seed), (2, length, 16))


def unit(x):
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


# The peer. Its queries and keys have a list each also where causal, and a cluster then shows a learned key, too. It divides by
# n + 1e-5 where n clusters took a query, and gives 0 where none did. Its loss of commitment is no part of the layer.


@pytest.mark.parametrize("name", ["routing_bidir", "routing_causal"])
def test_lucidrains(name):
    peer = oracle.load(name)
    cfg, means = peer.meta["cfg"], jnp.asarray(peer.constants["means"], jnp.float32)
    heads, clusters = means.shape[:2]
    is_causal, window = cfg.get("causal", False), cfg["window"]

    def commitment(x):
        nearest = jnp.einsum("bntd,ncd->bntc", jax.lax.stop_gradient(unit(x)), means).argmax(-1)
        return unit(x) - means[jnp.arange(heads)[None, :, None], nearest]

    def run(given, weights):
        fold = lambda x: rearrange(x, "b n t h -> (b n) t 1 h")
        query, key, value = (fold(given[word]) for word in "qkv")
        batch, length = len(given["q"]), query.shape[1]
        scores = (jnp.einsum("bntd,ncd->bnct", jax.lax.stop_gradient(unit(given[word])), means) for word in "qk")
        real = jnp.ones((len(query), length), bool)
        lists = [largest(rearrange(x, "b n c t -> (b n) c t"), real, window, window) for x in scores]
        taken = (lists[0].reshape(len(query), -1, 1) == jnp.arange(length)).sum(1)[..., None, None]
        if is_causal:  # the learned keys stand before all tokens
            learned = (jnp.tile(weights[word], (batch, 1, 1, 1)) for word in ("mem_key", "mem_value"))
            before = [jnp.zeros_like(query[:, :clusters]), *learned]
            query, key, value = (jnp.concatenate(pair, axis=1) for pair in zip(before, (query, key, value), strict=True))
            of_cluster = jnp.broadcast_to(jnp.arange(clusters)[:, None], (len(query), clusters, 1))
            lists = lists[0] + clusters, jnp.concatenate([of_cluster, lists[1] + clusters], axis=2)
        y = attend_within(query, key, value, *lists, is_causal, None)[:, -length:] * taken / (taken + 1e-5)
        both = [commitment(given[word]) for word in "qk"]
        return {"y": rearrange(y, "(b n) t 1 h -> b n t h", n=heads),
                "aux_loss": 1e-4 * jnp.square(jnp.concatenate(both, axis=2)).mean()}

    oracle.compare("routing", peer, run, of="mechanism")


def test_lucidrains_moves_its_means():
    peer = oracle.load("routing_kmeans_update")
    x, means = (jnp.asarray(x, jnp.float32) for x in (peer.inputs["x"], peer.constants["means"]))
    layer = small(is_causal=True, normalize=False, use_bias=False)
    layer.centroids[...] = means
    layer.query.kernel[...] = jnp.eye(16).reshape(16, 2, 8)
    scores = layer.scores(rearrange(x, "b n t h -> (b n) t 1 h"), layer.centroids_of_rows(len(x))).reshape(2, 2, 4, -1)
    found = layer.updated_centroids(rearrange(x, "b n t h -> b t (n h)"), decay=peer.meta["cfg"]["ema_decay"])
    outputs = {"dists": jnp.swapaxes(scores, 2, 3), "means_new": found}
    oracle.check("routing", peer, (outputs, {name: peer.outputs[name] for name in outputs}), of="mechanism")


# The definition.


def heads_of(layer, x):
    """Query, key and value [T, N, H] of one sample, in NumPy."""
    maps = [layer.query, layer.query if layer.is_causal else layer.key, layer.value]
    query, key, value = (np.einsum("td,dnh->tnh", x, m.kernel[...]) + np.asarray(m.bias[...]) for m in maps)
    if layer.normalize:
        query, key = ((h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-6) for h in (query, key))
    return query, key, value


def nearest_first(layer, heads, head):
    """The places of tokens by their score, the largest first, for each cluster of a head; and the scores [C, T]."""
    scores = np.asarray(layer.centroids[...])[head] @ (heads if layer.normalize else np.asarray(unit(heads)))[:, head].T
    return np.argsort(-scores, axis=1, kind="stable"), scores


def spelt_out(layer, x):
    """The layer for one sample without padding, in NumPy, token by token."""
    x = np.asarray(x, np.float64)
    query, key, value = heads_of(layer, x)
    length, out = len(x), np.zeros_like(value)

    def attention(t, places, head):
        weights = np.exp([query[t, head] @ key[s, head] / layer.head_features**0.5 for s in places])
        return weights @ value[places, head] / weights.sum()

    for head in range(layer.num_heads):
        (queries, scores), (keys, _) = (nearest_first(layer, x, head) for x in (query, key))
        for t in range(length):
            if layer.selection == "last":
                same = [s for s in range(t + 1) if scores[:, s].argmax() == scores[:, t].argmax()]
                out[t, head] = attention(t, same[-layer.window_size :], head)
                continue
            window = layer.window_size or -(-length // layer.num_clusters)
            parts = [attention(t, [s for s in keys[c, :window] if s <= t or not layer.is_causal], head)
                     for c in range(layer.num_clusters) if t in queries[c, :window]]  # fmt: skip
            out[t, head] = np.mean(parts, axis=0) if parts else value[t, head]
    return np.einsum("tnh,nhf->tf", out, layer.out.kernel[...]) + np.asarray(layer.out.bias[...])


@pytest.mark.parametrize("options", [
    dict(), dict(is_causal=True), dict(window_size=9, normalize=False), dict(window_size=2, is_causal=True),
    dict(selection="last", window_size=3, is_causal=True), dict(selection="last", window_size=40, is_causal=True),
], ids=str)  # fmt: skip
def test_layer(options):
    """Also with padding in a hole, which takes no place of a list."""
    layer, x = small(**options), inputs()
    run = jax.jit(lambda x, mask: layer(x, mask=mask))
    is_real = np.ones((2, LENGTH), bool)
    is_real[1, [0, 7, 8, 22]] = False
    y = run(x, jnp.asarray(is_real)[:, None, None])
    for sample in range(2):
        want = spelt_out(layer, x[sample, is_real[sample]])
        np.testing.assert_allclose(y[sample, is_real[sample]], want, atol=5e-5)


def test_a_token_that_no_cluster_took_has_its_own_value():
    layer, x = small(window_size=1, num_clusters=1), inputs()
    taken = [set(nearest_first(layer, heads_of(layer, np.asarray(x[0]))[0], head)[0][0, :1]) for head in range(2)]
    y, alone = layer(x)[0], layer.out(layer.value(x))[0]
    for t in range(LENGTH):
        if not any(t in places for places in taken):
            np.testing.assert_allclose(y[t], alone[t], atol=1e-5)
    assert jnp.abs(y - alone).max() > 1e-3


@pytest.mark.parametrize("options", [dict(), dict(is_causal=True), dict(selection="last", window_size=23, is_causal=True)],
                         ids=str)
def test_one_cluster_is_softmax(options):
    layer, x = small(num_clusters=1, normalize=False, **options), inputs()
    plain = zoo.SoftmaxAttention(2, 16, is_causal=layer.is_causal, rngs=nnx.Rngs(0))
    for name in ("query", "key", "value", "out"):
        source = getattr(layer, "query" if name == "key" and layer.is_causal else name)
        nnx.update(getattr(plain, name), nnx.state(source))
    np.testing.assert_allclose(layer(x), plain(x), atol=1e-5)


# What "last" promises: strictly causal, the same at every length, and token by token.


@pytest.mark.parametrize("at", [1, 11, LENGTH - 1])
def test_a_loud_future_changes_no_past_of_last(at):
    run, x = jax.jit(last()), inputs()
    y, loud = run(x), run(x.at[:, at].multiply(30.0))
    np.testing.assert_allclose(loud[:, :at], y[:, :at], atol=1e-5)
    assert jnp.abs(loud[:, at:] - y[:, at:]).max() > 1e-3


def test_top_leaks():
    run, x = jax.jit(small(is_causal=True)), inputs()
    others = [run(x.at[:, 11].set(inputs(1, seed)[:, 0]))[:, :11] for seed in range(1, 5)]
    assert max(jnp.abs(y - run(x)[:, :11]).max() for y in others) > 1e-3


@pytest.mark.parametrize("length", [1, 14])
def test_the_first_tokens_of_last_do_not_know_how_many_follow(length):
    layer, x = last(), inputs()
    np.testing.assert_allclose(layer(x[:, :length]), layer(x)[:, :length], atol=1e-5)


@pytest.mark.parametrize("cuts,rotary_base", [([LENGTH], None), ([9, 1, 4, 9], 100.0)], ids=str)
def test_extend_equals_one_call_of_last(cuts, rotary_base):
    layer, x = last(rotary_base=rotary_base), inputs()
    mask = jnp.ones((2, 1, 1, LENGTH), bool).at[1, ..., 5:12].set(False).at[0, ..., 0].set(False)
    cache, outputs, start = layer.init_cache(2, LENGTH), [], 0
    step = jax.jit(lambda x, cache, mask: layer.extend(x, cache, mask=mask))
    for width in cuts:
        y, cache = step(x[:, start : start + width], cache, mask[..., start : start + width])
        outputs.append(y)
        start += width
    real = mask[:, 0, 0, :, None]
    want = jnp.where(real, layer(x, mask=mask), 0)
    np.testing.assert_allclose(jnp.where(real, jnp.concatenate(outputs, 1), 0), want, atol=2e-5)


def test_extend_after_top_is_last():
    """With the window of the room in the cache."""
    layer, x = small(is_causal=True), inputs()
    y, _ = layer.extend(x, layer.init_cache(2, 40))
    other = last(window_size=10)
    nnx.update(other, nnx.state(layer))
    np.testing.assert_allclose(y, other(x), atol=2e-5)


# Centroids.


def test_centroids_are_no_parameters_and_start_as_directions():
    layer = small()
    kinds = {type(leaf) for path, leaf in nnx.to_flat_state(nnx.state(layer)) if path == ("centroids",)}
    assert kinds == {zoo.Centroids} and not issubclass(zoo.Centroids, nnx.Param)
    np.testing.assert_allclose(jnp.linalg.norm(layer.centroids[...], axis=-1), 1, atol=1e-6)


@pytest.mark.parametrize("remat", [False, True])
def test_a_model_moves_its_centroids_where_it_is_told(remat):
    model = zoo.Encoder(
        vocab_size=11, in_features=16, num_layers=2, mlp_features=8, max_length=12, mixer="routing", remat=remat,
        mixer_options=dict(num_heads=2, num_clusters=3), rngs=nnx.Rngs(0),
    )
    tokens = np.arange(24).reshape(2, 12) % 11
    before = [block.mixer.centroids[...] for block in model.blocks]
    y = model(tokens)
    first = model.blocks[0].mixer_norm(model.embed(tokens) + model.positions.embedding[...])
    want = model.blocks[0].mixer.updated_centroids(first)
    train = nnx.jit(lambda model: model(tokens, deterministic=False))
    np.testing.assert_allclose(train(model), y, atol=1e-5)
    model.set_attributes(moves_centroids=True)
    np.testing.assert_allclose(model(tokens), y, atol=1e-5)
    np.testing.assert_array_equal(model.blocks[0].mixer.centroids[...], before[0])
    np.testing.assert_allclose(train(model), y, atol=1e-5)
    np.testing.assert_allclose(model.blocks[0].mixer.centroids[...], want, atol=1e-5)
    assert all(jnp.abs(block.mixer.centroids[...] - old).max() > 1e-5 for block, old in zip(model.blocks, before, strict=True))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_updated_centroids(is_causal, normalize):
    layer, x = small(is_causal=is_causal), inputs()
    is_real = np.ones((2, LENGTH), bool)
    is_real[0, [0, 3, 22]] = False
    old = np.asarray(layer.centroids[...], np.float64)
    total = np.zeros_like(old)
    for sample in range(2):
        for heads in heads_of(layer, np.asarray(x[sample, is_real[sample]], np.float64))[:2]:
            for t, head in np.ndindex(heads.shape[:2]):
                total[head, (old[head] @ heads[t, head]).argmax()] += heads[t, head] / 2
    if normalize:
        total = np.asarray(unit(total))
    loud = jnp.where(is_real[..., None], x, jnp.nan)
    update = jax.jit(lambda x: layer.updated_centroids(
        x, mask=jnp.asarray(is_real)[:, None, None], decay=0.7, normalize=normalize))
    np.testing.assert_allclose(update(loud), 0.7 * old + 0.3 * total, atol=1e-5)
    np.testing.assert_array_equal(layer.centroids[...], old.astype(np.float32))


def test_a_centroid_without_members_stays():
    layer = small()
    layer.centroids[...] = layer.centroids[...].at[:, 1].set(-layer.centroids[:, 0] * 1e-3).at[:, 2:].multiply(1e-3)
    x = inputs(1)
    moved, nothing = layer.updated_centroids(x, decay=0.0), ~jnp.any(layer.updated_centroids(x, decay=0.0, normalize=False), -1)
    assert 0 < nothing.sum() < nothing.size
    np.testing.assert_array_equal(moved[nothing], layer.centroids[...][nothing])
    np.testing.assert_allclose(jnp.linalg.norm(moved[~nothing], axis=-1), 1, atol=1e-5)


@pytest.mark.parametrize("options,match", [
    (dict(num_clusters=0), "num_clusters"), (dict(window_size=0), "window_size"),
    (dict(selection="lats"), "selection.*last"), (dict(selection="last", window_size=3), "selection must be 'top'"),
    (dict(selection="last", is_causal=True), "window_size must be a positive integer, got None"),
], ids=str)  # fmt: skip
def test_refusals(options, match):
    with pytest.raises(ValueError, match=match):
        small(**options)


def test_update_refusals():
    with pytest.raises(ValueError, match=r"decay must be a number in \[0, 1\], got 1.5"):
        small().updated_centroids(inputs(), decay=1.5)
    with pytest.raises(ValueError, match="mask"):
        small().updated_centroids(inputs(), mask=jnp.ones((2, LENGTH), bool))
