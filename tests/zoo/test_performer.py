"""Performer: what the paper proves of its features, strict causality, and peers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad import zoo
from subquad.kernels import linear
from subquad.zoo.features import random_projection
from subquad.zoo.kernelized.performer import PerformerAttention
from tests import oracle
from tests.assertions import assert_close

HEAD = 8


def normal(*shape, seed=0, scale=1.0):
    return scale * jax.random.normal(jax.random.key(seed), shape)


def draws(count, num_features, **options):
    """[count, M, H] independent projections."""
    keys = jax.random.split(jax.random.key(7), count)
    return jax.vmap(lambda key: random_projection(key, num_features, HEAD, **options))(keys)


# Projections.


@pytest.mark.parametrize("num_features", [1, 5, 8, 19])
def test_rows_are_orthogonal_in_blocks(num_features):
    projection = random_projection(jax.random.key(0), num_features, HEAD)
    assert projection.shape == (num_features, HEAD)
    for start in range(0, num_features, HEAD):
        block = projection[start : start + HEAD]
        product = block @ block.T
        np.testing.assert_allclose(product - jnp.diag(jnp.diag(product)), 0, atol=1e-5)
    loose = random_projection(jax.random.key(0), HEAD, HEAD, orthogonal=False)
    assert jnp.abs(loose @ loose.T - jnp.diag(jnp.sum(loose**2, -1))).max() > 1


@pytest.mark.parametrize("orthogonal", [True, False])
def test_every_row_is_a_standard_gaussian(orthogonal):
    rows = draws(4000, HEAD, orthogonal=orthogonal)
    assert jnp.abs(rows.mean(0)).max() < 0.1  # without the sign of QR the diagonal would be off by 1
    covariance = jnp.einsum("cmh,cmk->mhk", rows, rows) / 4000
    np.testing.assert_allclose(covariance, np.tile(np.eye(HEAD), (HEAD, 1, 1)), atol=0.15)
    norms = jnp.sum(rows**2, -1)  # chi squared: mean H, variance 2 H
    np.testing.assert_allclose(norms.mean(), HEAD, rtol=0.02)
    np.testing.assert_allclose(norms.var(), 2 * HEAD, rtol=0.1)
    fixed = draws(3, HEAD, orthogonal=orthogonal, row_norm="sqrt")
    np.testing.assert_allclose(jnp.sum(fixed**2, -1), HEAD, rtol=1e-5)


# Features.


@pytest.mark.parametrize("orthogonal", [True, False])
def test_softmax_features_are_unbiased(orthogonal):
    query, key = normal(6, HEAD, seed=1), normal(6, HEAD, seed=2)

    def estimate(projection):
        (q, q_scale), (k, k_scale) = linear.softmax_features(query, projection), linear.softmax_features(key, projection)
        return jnp.exp(q_scale + k_scale) * jnp.sum(q * k, -1)

    estimates = jax.lax.map(estimate, draws(4000, 2 * HEAD, orthogonal=orthogonal), batch_size=500)
    error = jnp.abs(estimates.mean(0) - jnp.exp(jnp.sum(query * key, -1) / HEAD**0.5))
    assert (error < 4 * estimates.std(0) / 4000**0.5).all()


def test_orthogonal_rows_have_the_smaller_variance():
    # Small inputs: the tail of the estimate is log-normal, and a sample's variance says little where it is heavy.
    query, key = normal(6, HEAD, seed=1, scale=0.25), normal(6, HEAD, seed=2, scale=0.25)

    def variance(orthogonal):
        def estimate(projection):
            (q, q_scale), (k, k_scale) = linear.softmax_features(query, projection), linear.softmax_features(key, projection)
            return jnp.exp(q_scale + k_scale) * jnp.sum(q * k, -1)

        return jax.vmap(estimate)(draws(4000, HEAD, orthogonal=orthogonal)).var(0)

    assert (variance(True) < variance(False)).all()


def test_softmax_features_are_scaled_by_token():
    projection = random_projection(jax.random.key(0), 32, HEAD)
    x = normal(5, HEAD).at[3].multiply(1e3)
    features, scale = linear.softmax_features(x, projection)
    np.testing.assert_allclose(features.max(-1), 1, rtol=1e-6)
    assert features.min() >= np.exp(-30.001) and np.isfinite(scale).all()
    alone, alone_scale = linear.softmax_features(x[:1], projection)
    np.testing.assert_allclose(features[:1], alone, rtol=1e-5)
    np.testing.assert_allclose(scale[:1], alone_scale, rtol=1e-5)
    gradient = jax.grad(lambda x: sum(jnp.sum(part) for part in linear.softmax_features(x, projection)))(x)
    assert np.isfinite(gradient).all()


def test_relu_features_are_positive_and_rectified():
    projection = random_projection(jax.random.key(0), 32, HEAD)
    x = normal(5, HEAD)
    features = linear.relu_features(x, projection) * 32**0.5
    np.testing.assert_allclose(features, np.maximum(x @ projection.T, 0) + 1e-3, rtol=1e-4, atol=1e-6)


def test_projection_refuses_an_unknown_norm():
    with pytest.raises(ValueError, match="row_norm"):
        random_projection(jax.random.key(0), 4, 4, row_norm="one")


# The paper's claim: more features, nearer to softmax.


def dense_softmax(query, key, value, is_causal):
    logits = jnp.einsum("btnh,bsnh->bnts", query, key) / query.shape[-1] ** 0.5
    if is_causal:
        logits = jnp.where(jnp.tri(query.shape[1], dtype=bool), logits, -jnp.inf)
    return jnp.einsum("bnts,bsnv->btnv", jax.nn.softmax(logits), value)


@pytest.mark.parametrize("is_causal", [False, True])
def test_error_falls_as_one_over_the_root_of_the_features(is_causal):
    # Small inputs: the features are log-normal, and with large ones the law shows only at very many.
    query, key = normal(1, 24, 2, HEAD, seed=0, scale=0.25), normal(1, 24, 2, HEAD, seed=1, scale=0.25)
    value = normal(1, 24, 2, HEAD, seed=2)
    exact = dense_softmax(query, key, value, is_causal)
    counts = [32, 256, 2048]
    errors = []
    for count in counts:
        layer = PerformerAttention(2, 2 * HEAD, num_features=count, is_causal=is_causal, rngs=nnx.Rngs(0))
        graphdef = nnx.graphdef(layer)

        @jax.jit
        def squared_error(state, graphdef=graphdef):
            return jnp.mean((nnx.merge(graphdef, state).attend(query, key, value, None) - exact) ** 2)

        squares = []
        for projection in draws(24, count):
            layer.projection[...] = projection
            squares.append(squared_error(nnx.state(layer)))
        errors.append(np.mean(squares) ** 0.5)
    slope = np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert -0.6 < slope < -0.4


# The layer.


@pytest.mark.parametrize("kernel", ["softmax", "relu"])
@pytest.mark.parametrize("factor", [30.0, 1e4])
def test_strictly_causal(kernel, factor):
    """Peers subtract the largest exponent over all keys and add an epsilon, so that a large last key moves the past."""
    layer = PerformerAttention(2, 16, num_features=32, kernel=kernel, is_causal=True, rngs=nnx.Rngs(0))
    run = jax.jit(lambda x: layer(x))
    x = normal(2, 150, 16)
    y = run(x)
    for at in (1, 128, 149):
        loud = run(x.at[:, at].multiply(factor))
        np.testing.assert_array_equal(loud[:, :at], y[:, :at])
        assert jnp.isfinite(loud).all()
        assert jnp.abs(loud[:, at] - y[:, at]).max() > 1e-3


@pytest.mark.parametrize("kernel", ["softmax", "relu"])
def test_extend_in_any_cutting(kernel):
    layer = PerformerAttention(2, 16, num_features=32, kernel=kernel, is_causal=True, rngs=nnx.Rngs(0))
    # Loud tokens move the running maximum inside and between the pieces.
    x = normal(2, 40, 16) * jnp.where(jnp.arange(40) % 7 == 3, 8.0, 1.0)[:, None]
    whole = layer(x)
    extend = jax.jit(lambda x, cache: layer.extend(x, cache))
    cache, pieces, start = layer.init_cache(2, 40), [], 0
    sizes = [a.shape for a in cache]
    for width in (1, 1, 17, 20, 1):
        piece, cache = extend(x[:, start : start + width], cache)
        pieces.append(piece)
        start += width
    np.testing.assert_allclose(jnp.concatenate(pieces, 1), whole, rtol=1e-4, atol=1e-5)
    assert [a.shape for a in cache] == sizes == [(2, 2, 32, 8), (2, 2, 32), (2, 2), (2,)]


def test_redraw_is_pure_and_kept():
    layer = PerformerAttention(2, 16, num_features=12, rngs=nnx.Rngs(0))
    x = normal(1, 9, 16)
    y, before = layer(x), layer.projection[...]
    drawn = layer.redraw(nnx.Rngs(1))
    np.testing.assert_array_equal(layer.projection[...], before)
    np.testing.assert_array_equal(layer.redraw(nnx.Rngs(1)), drawn)
    assert drawn.shape == before.shape and jnp.abs(drawn - before).max() > 0.1
    layer.projection[...] = drawn
    assert jnp.abs(layer(x) - y).max() > 1e-4

    @jax.jit
    def redrawn(state, key):
        model = nnx.merge(graphdef, state)
        model.projection[...] = model.redraw(nnx.Rngs(key))
        return nnx.state(model)

    graphdef, state = nnx.split(layer)
    nnx.update(layer, redrawn(state, jax.random.key(5)))
    np.testing.assert_allclose(layer.projection[...], layer.redraw(nnx.Rngs(jax.random.key(5))), rtol=1e-5, atol=1e-5)


def test_features_are_in_the_checkpoint_and_not_among_the_parameters():
    layer = PerformerAttention(2, 16, num_features=12, rngs=nnx.Rngs(0))
    assert isinstance(layer.projection, zoo.RandomFeature) and not isinstance(layer.projection, nnx.Param)
    assert "projection" in nnx.state(layer) and "projection" not in nnx.state(layer, nnx.Param)


@pytest.mark.parametrize(
    "change,argument",
    [(dict(num_features=0), "num_features"), (dict(kernel="cosine"), "kernel"), (dict(row_norm="one"), "row_norm")],
)
def test_refusals(change, argument):
    with pytest.raises(ValueError, match=f"PerformerAttention: {argument}"):
        PerformerAttention(2, 16, **change, rngs=nnx.Rngs(0))


# A peer's whole layer.


def test_oracle_self_attention():
    """performer-pytorch's SelfAttention: its projections in ours, its features into our sums.

    Departure: it adds 1e-4 to every feature after subtracting the maximum over all positions. The layer adds nothing,
    so it is held to the same formula without the 1e-4, and the file to the formula with it.
    """
    peer = oracle.load("performer_selfattn")
    layer = PerformerAttention(peer.meta["cfg"]["H"], 16, num_features=peer.meta["cfg"]["m"], rngs=nnx.Rngs(0))
    layer.projection[...] = jnp.asarray(peer.constants["projection"])
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out": "out"}

    def formula(inputs, weights, offset=1e-4):
        held = oracle.holding(layer, weights, names)
        query, key, value = held.project(inputs["x"], inputs["x"])

        def phi(x, axes):
            exponent = x * HEAD**-0.25 @ peer.constants["projection"].T
            largest = jax.lax.stop_gradient(exponent.max(axes, keepdims=True))
            return jnp.exp(exponent - jnp.sum(x**2, -1, keepdims=True) / 2 * HEAD**-0.5 - largest) + offset

        return held.out(linear.attention(phi(query, -1), phi(key, (1, 3)), value))

    oracle.compare("performer", peer, formula, of="mechanism")

    ours = oracle.outputs_and_gradients(peer, lambda inputs, weights: oracle.holding(layer, weights, names)(inputs["x"]))
    assert_close(ours, oracle.outputs_and_gradients(peer, functools.partial(formula, offset=0.0)), 1e-5)
    assert 1e-5 < oracle.relative_error(ours[0]["y"], peer.outputs["y"]) < 0.05


@pytest.mark.parametrize("kernel", ["softmax", "relu"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_packed_sequences_are_separate_ones(is_causal, kernel):
    options = dict(num_features=16, kernel=kernel, is_causal=is_causal, rngs=nnx.Rngs(0))
    layer = PerformerAttention(2, 2 * HEAD, **options)
    x, ids = normal(1, 40, 2 * HEAD), jnp.repeat(jnp.asarray([4, 0, 4]), jnp.asarray([9, 20, 11]), total_repeat_length=40)
    packed, pull = jax.vjp(lambda x: layer(x, segment_ids=ids), x)
    gradient = pull(jnp.cos(packed))[0]
    for start, end in ((0, 9), (9, 29), (29, 40)):
        alone, pull = jax.vjp(layer, x[:, start:end])
        np.testing.assert_allclose(packed[:, start:end], alone, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(gradient[:, start:end], pull(jnp.cos(alone))[0], rtol=1e-3, atol=1e-5)
