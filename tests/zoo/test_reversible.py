"""Reversible blocks: the same function and gradients as two plain streams, in memory that depth does not change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad import zoo
from tests.assertions import assert_close

SIZES = dict(vocab_size=11, in_features=16, num_layers=3, mlp_features=24, max_length=64)


def build(kind=zoo.Encoder, **options):
    return kind(**{**SIZES, "mixer_options": dict(num_heads=2), "reversible": True, **options}, rngs=nnx.Rngs(0))


def tokens(length=13, batch=2):
    return jax.random.randint(jax.random.key(1), (batch, length), 0, SIZES["vocab_size"])


def plain(encoder, x, mask=None, keys=None):
    """The two streams, layer by layer; `keys` of each layer's two draws."""
    hidden = encoder.embed(x) + encoder.positions(jnp.arange(x.shape[1])[None])
    hidden = hidden if mask is None else jnp.where(mask[..., None], hidden, 0)
    call = dict(mask=None if mask is None else mask[:, None, None])
    first = second = hidden
    for at, block in enumerate(encoder.blocks):
        draws = [
            dict(deterministic=keys is None, rngs=None if keys is None else nnx.Rngs(dropout=keys[2 * at + half]))
            for half in (0, 1)
        ]
        first = first + block.mix(block.mixer_norm(second), draws[0], call)
        second = second + block.feed(block.mlp_norm(first), draws[1])[0]
    return encoder.norm((first + second) / 2)


def outputs_and_gradients(model, function):
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def run(params):
        def loss(params):
            outputs = function(nnx.merge(graph, params, rest))
            return jnp.sum(outputs * jnp.cos(jnp.arange(outputs.size).reshape(outputs.shape))), outputs

        (_, outputs), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        return outputs, gradients

    outputs, gradients = run(params)
    return outputs, nnx.to_pure_dict(gradients)


@pytest.mark.parametrize("mixer,options", [
    ("softmax", dict(num_heads=2)), ("performer", dict(num_heads=2, num_features=8)), ("s4", dict(state_size=4)),
], ids=str)
def test_two_plain_streams_say_the_same(mixer, options):
    model, x = build(mixer=mixer, mixer_options=options), tokens()
    mask = jnp.ones_like(x, bool).at[0, 9:].set(False)
    actual = outputs_and_gradients(model, lambda model: jnp.where(mask[..., None], model(x, mask=mask), 0))
    expected = outputs_and_gradients(model, lambda model: jnp.where(mask[..., None], plain(model, x, mask), 0))
    assert_close(actual, expected, 1e-4)


def test_dropout_is_drawn_again_as_it_was():
    model, x = build(dropout_rate=0.4), tokens()
    model.dropout.rate = 0.0  # of the embeddings, whose key is another
    draw = lambda model, seed: model(x, deterministic=False, rngs=nnx.Rngs(dropout=seed))
    rngs = nnx.Rngs(dropout=5)
    keys = [rngs.dropout() for _ in range(2 * SIZES["num_layers"])]
    assert_close(
        outputs_and_gradients(model, lambda model: draw(model, 5)),
        outputs_and_gradients(model, lambda model: plain(model, x, keys=keys)), 1e-4,
    )  # fmt: skip
    assert jnp.abs(draw(model, 5) - draw(model, 6)).max() > 0.01
    np.testing.assert_array_equal(draw(model, 5), draw(model, 5))


def temporaries(depth, reversible=True):
    """The compiler's figure for a gradient: temporaries, parameters and gradients left out."""
    model = build(num_layers=depth, reversible=reversible, max_length=1024)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    loss = lambda params: jnp.sum(nnx.merge(graph, params, rest)(tokens(1024)) ** 2)
    return jax.jit(jax.grad(loss)).lower(params).compile().memory_analysis().temp_size_in_bytes


def test_memory_does_not_grow_with_depth():
    shallow, deep = temporaries(2), temporaries(8)
    assert deep <= 1.1 * shallow
    plain = temporaries(8, reversible=False)
    assert plain > 2 * temporaries(2, reversible=False) and deep < plain / 2


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="XLA of jaxlib 0.12 orders such a stack well behind barriers alone")
def test_xla_still_needs_the_layers_apart(monkeypatch):
    """Behind barriers alone memory grows with depth; see `xla_cpu.as_own_computation`."""
    barrier = jax.lax.optimization_barrier
    monkeypatch.setattr(zoo.reversible, "as_own_computation", lambda function, arrays: barrier(function(barrier(arrays))))
    assert temporaries(8) > 1.3 * temporaries(2)


def test_extending_says_what_a_call_says():
    model, x = build(zoo.CausalLM), tokens(12)
    cache, pieces = model.init_cache(2, 12), []
    for start, stop in ((0, 5), (5, 6), (6, 12)):
        logits, cache = model.extend(x[:, start:stop], cache)
        pieces.append(logits)
    np.testing.assert_allclose(jnp.concatenate(pieces, 1), model(x), rtol=1e-4, atol=1e-5)


def test_half_precision_keeps_its_streams_in_float32():
    model = build(dtype=jnp.bfloat16)
    exact = build()
    nnx.update(exact, nnx.state(model))
    run = lambda model: outputs_and_gradients(model, lambda model: model(tokens()).astype(jnp.float32))
    (outputs, gradients), (wanted, of_exact) = run(model), run(exact)
    assert model(tokens()).dtype == jnp.bfloat16
    assert_close(outputs, wanted, 0.05)
    assert_close(gradients, of_exact, 0.15)


@pytest.mark.parametrize("options,message", [
    (dict(norm_order="post"), "Encoder: norm_order must be 'pre' with reversible, got post"),
    (dict(norm="batch"), "Encoder: norm must be no batch norm with reversible, got batch"),
    (dict(mlp_features=0), "Encoder: mlp_features must be positive with reversible, got 0"),
    (dict(remat=True), "Encoder: remat must be False with reversible, got True"),
], ids=str)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


@pytest.mark.parametrize("groups", [None, 1])
def test_what_a_mixer_moves_is_written(groups):
    options = dict(mixer="routing", mixer_options=dict(num_heads=2, num_clusters=3), num_layers=2, layer_groups=groups)
    model, x = build(**options), tokens()
    model.set_attributes(moves_centroids=True)
    hidden = model.embed(x) + model.positions(jnp.arange(x.shape[1])[None])
    mixers, first, second = [nnx.clone(block.mixer) for block in model.blocks], hidden, hidden
    for at, block in zip(model.order, model.layers, strict=True):
        first = first + mixers[at](block.mixer_norm(second), deterministic=False)
        second = second + block.feed(block.mlp_norm(first), dict(deterministic=True, rngs=None))[0]
    outputs, statistics = (first + second) / 2, [mixer.centroids[...] for mixer in mixers]
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def run(params):
        def loss(params):
            model = nnx.merge(graph, params, rest, copy=True)
            y = model(x, deterministic=False)
            return jnp.sum(y**2), (y, [block.mixer.centroids[...] for block in model.blocks])

        return jax.value_and_grad(loss, has_aux=True)(params)

    (_, (y, moved)), gradients = run(params)
    assert_close(y, model.norm(outputs), 1e-5)
    assert_close(moved, statistics, 1e-5)
    assert jnp.abs(moved[0] - model.blocks[0].mixer.centroids[...]).max() > 1e-5
    # The way back finds what the way there found: so do gradients of the same blocks without what moves.
    model.set_attributes(moves_centroids=False)
    if groups is None:
        graph = nnx.split(model, nnx.Param, ...)[0]
        still = jax.jit(jax.grad(lambda params: jnp.sum(nnx.merge(graph, params, rest)(x, deterministic=False) ** 2)))(params)
        assert_close(nnx.to_pure_dict(gradients), nnx.to_pure_dict(still), 1e-5)
    # Nothing is written where nothing has moved: a caller's gradient may close over the model.
    jax.grad(lambda hidden: jnp.sum(model.run_blocks(hidden, {}, False, None)[0]))(hidden)
