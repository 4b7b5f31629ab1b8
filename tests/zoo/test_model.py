"""Models: padding, pooling, dropout, generation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad import zoo

SMALL = dict(vocab_size=11, in_features=16, num_layers=2, mlp_features=24, max_length=40)
PERFORMER = dict(mixer="performer", mixer_options=dict(num_heads=2, num_features=8))
SOFTMAX = dict(mixer="softmax", mixer_options=dict(num_heads=2))


def tokens(shape, seed=0):
    return jax.random.randint(jax.random.key(seed), shape, 0, SMALL["vocab_size"])


@functools.cache
def language_model(mixer="softmax", positions="learned"):
    options = SOFTMAX if mixer == "softmax" else PERFORMER
    return zoo.CausalLM(**SMALL, **options, positions=positions, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("pooling", ["mean", "max", "first", "last"])
def test_classifier_sees_real_tokens_only(pooling):
    model = zoo.Classifier(3, pooling=pooling, **SMALL, **SOFTMAX, rngs=nnx.Rngs(0))
    x = tokens((2, 20))
    mask = jnp.arange(20) < jnp.array([[20], [13]])
    y = model(x, mask=mask)
    assert y.shape == (2, 3)
    np.testing.assert_allclose(model(jnp.where(mask, x, 7), mask=mask), y, atol=1e-5)
    np.testing.assert_allclose(model(x[1:, :13])[0], y[1], atol=1e-5)


def test_poolings_differ():
    x, mask = tokens((1, 9)), jnp.ones((1, 9), bool)
    logits = [
        zoo.Classifier(3, pooling=p, **SMALL, **SOFTMAX, rngs=nnx.Rngs(0))(x, mask=mask)
        for p in ("mean", "max", "first", "last")
    ]
    for i, a in enumerate(logits):
        for b in logits[:i]:
            assert jnp.abs(a - b).max() > 1e-4


def test_all_padding_pools_to_zero():
    for pooling in ("mean", "max", "first", "last"):
        model = zoo.Classifier(3, pooling=pooling, **SMALL, **SOFTMAX, rngs=nnx.Rngs(0))
        assert jnp.isfinite(model(tokens((1, 5)), mask=jnp.zeros((1, 5), bool))).all()


def test_dual_encoder_shares_its_encoder():
    model = zoo.DualEncoder(2, **SMALL, **SOFTMAX, rngs=nnx.Rngs(0))
    a, b = tokens((3, 20)), tokens((3, 12), seed=1)
    mask = jnp.arange(12) < jnp.array([[12], [5], [1]])
    y = model(a, b, other_mask=mask)
    assert y.shape == (3, 2)
    np.testing.assert_allclose(model(a[1:2], b[1:2, :5]), y[1:2], atol=1e-5)
    assert jnp.abs(model(b, a) - model(a, b)).max() > 1e-4


def test_dropout_draws_only_when_asked():
    model = zoo.Classifier(3, **SMALL, **SOFTMAX, dropout_rate=0.5, rngs=nnx.Rngs(0))
    x = tokens((2, 20))
    np.testing.assert_array_equal(model(x), model(x))
    draw = lambda seed: model(x, deterministic=False, rngs=nnx.Rngs(dropout=seed))
    np.testing.assert_array_equal(draw(1), draw(1))
    assert jnp.abs(draw(1) - draw(2)).max() > 1e-3


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", None])
def test_extend_equals_one_call(positions):
    model = language_model(positions=positions)
    x = tokens((2, 12))
    cache, pieces = model.init_cache(2, 12), []
    for start, stop in ((0, 5), (5, 6), (6, 12)):
        logits, cache = model.extend(x[:, start:stop], cache)
        pieces.append(logits)
    np.testing.assert_allclose(jnp.concatenate(pieces, 1), model(x), atol=1e-4)


@pytest.mark.parametrize("mixer", ["softmax", "performer"])
def test_greedy_generation_is_the_argmax_of_the_full_pass(mixer):
    model = language_model(mixer)
    prompt = tokens((2, 4))
    generated = model.generate(prompt, 6)
    whole = jnp.concatenate([prompt, generated], axis=1)
    expected = jnp.argmax(model(whole), -1)[:, 3:-1]
    np.testing.assert_array_equal(generated, expected)


def test_generation_ignores_padding_on_the_left():
    model = language_model(positions=None)
    prompt = tokens((1, 5))
    padded = jnp.concatenate([tokens((1, 3), seed=4), prompt], axis=1)
    mask = jnp.arange(8)[None] >= 3
    np.testing.assert_array_equal(model.generate(padded, 6, mask=mask), model.generate(prompt, 6))


def test_sampling():
    model = language_model()
    prompt = tokens((4, 4))
    sample = lambda seed, **options: model.generate(prompt, 20, temperature=1.5, rngs=nnx.Rngs(seed), **options)
    np.testing.assert_array_equal(sample(0), sample(0))
    assert (sample(0) != sample(1)).any()
    np.testing.assert_array_equal(sample(0, top_k=1), model.generate(prompt, 20))
    assert sample(0, top_k=3).shape == (4, 20)


def test_generation_compiles_once():
    from subquad.zoo import model as module

    model = language_model()
    model.generate(tokens((1, 3)), 4)
    before = module._generate.jitted_fn._cache_size()
    model.generate(tokens((1, 3), seed=1), 4)
    assert module._generate.jitted_fn._cache_size() == before


@pytest.mark.parametrize(
    "arguments,word",
    [
        (dict(num_tokens=0), "num_tokens"),
        (dict(num_tokens=2, temperature=-1.0), "temperature"),
        (dict(num_tokens=2, top_k=0, temperature=1.0), "top_k"),
        (dict(num_tokens=2, top_k=2), "top_k"),
        (dict(num_tokens=2, temperature=1.0), "rngs"),
        (dict(num_tokens=100), "max_length"),
        (dict(num_tokens=2, mask=jnp.array([[True, True, False]])), "mask"),
        (dict(num_tokens=2, mask=jnp.ones((1, 4), bool)), "mask"),
    ],
)
def test_generate_refuses(arguments, word):
    with pytest.raises(ValueError, match=word):
        language_model().generate(tokens((1, 3)), **arguments)


def test_bad_models_are_refused():
    with pytest.raises(ValueError, match="performer"):
        zoo.Classifier(3, **SMALL, mixer="preformer", rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="num_features"):
        zoo.Classifier(3, **SMALL, mixer="performer", mixer_options=dict(num_heads=2, num_feature=8), rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="num_heads"):
        zoo.Classifier(3, **SMALL, mixer="softmax", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="positions"):
        zoo.Classifier(3, **SMALL, **SOFTMAX, positions="rotary", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="pooling"):
        zoo.Classifier(3, pooling="meen", **SMALL, **SOFTMAX, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="max_length"):
        zoo.Classifier(3, **SMALL, **SOFTMAX, rngs=nnx.Rngs(0))(tokens((1, 41)))
    with pytest.raises(ValueError, match="tokens"):
        zoo.Classifier(3, **SMALL, **SOFTMAX, rngs=nnx.Rngs(0))(jnp.ones((1, 4)))
    with pytest.raises(ValueError, match="mask"):
        zoo.Classifier(3, **SMALL, **SOFTMAX, rngs=nnx.Rngs(0))(tokens((1, 4)), mask=jnp.ones((1, 1, 1, 4), bool))
    with pytest.raises(ValueError, match="is_causal"):
        bidirectional = functools.partial(zoo.make, "softmax", num_heads=2)
        zoo.CausalLM(**SMALL, mixer=bidirectional, rngs=nnx.Rngs(0))


def test_a_mixer_may_have_a_dtype_of_its_own():
    options = dict(num_heads=2, param_dtype=jnp.bfloat16)
    model = zoo.Classifier(3, **SMALL, mixer="softmax", mixer_options=options, rngs=nnx.Rngs(0))
    assert model.encoder.blocks[0].mixer.query.kernel[...].dtype == jnp.bfloat16
    assert model.head.outer.kernel[...].dtype == jnp.float32


def test_a_function_as_mixer():
    causal = functools.partial(zoo.make, "softmax", num_heads=2, is_causal=True)
    model = zoo.CausalLM(**SMALL, mixer=causal, rngs=nnx.Rngs(0))
    assert model(tokens((1, 6))).shape == (1, 6, SMALL["vocab_size"])
    with pytest.raises(ValueError, match="mixer_options"):
        zoo.CausalLM(**SMALL, mixer=causal, mixer_options=dict(num_heads=2), rngs=nnx.Rngs(0))


def test_remat_keeps_less_for_the_backward_pass_and_changes_no_number():
    kept, found = {}, {}
    for remat in (False, True):
        model = zoo.Classifier(3, **{**SMALL, "num_layers": 1}, **PERFORMER, dropout_rate=0.2, remat=remat, rngs=nnx.Rngs(0))
        graph, state, fixed = nnx.split(model, nnx.Param, ...)

        def loss(state, graph=graph, fixed=fixed):
            logits = nnx.merge(graph, state, fixed)(tokens((2, 30)), deterministic=False, rngs=nnx.Rngs(dropout=1))
            return jnp.square(logits).sum()

        # Counted before XLA, which on a CPU takes remat back where it thinks that memory is cheap.
        kept[remat] = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(lambda s, f=loss: jax.vjp(f, s)[1], state)))
        found[remat] = jax.jit(jax.value_and_grad(loss))(state)
    assert kept[True] < 0.6 * kept[False]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found[True], found[False])
