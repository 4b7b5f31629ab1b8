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
        logits = model(tokens((1, 5)), mask=jnp.zeros((1, 5), bool))
        np.testing.assert_array_equal(logits, model.head(jnp.zeros((1, SMALL["in_features"]))), pooling)


def test_dual_encoder_shares_its_encoder():
    model = zoo.DualEncoder(2, **SMALL, **SOFTMAX, rngs=nnx.Rngs(0))
    a, b = tokens((3, 20)), tokens((3, 12), seed=1)
    mask = jnp.arange(12) < jnp.array([[12], [5], [1]])
    y = model(a, b, other_mask=mask)
    assert y.shape == (3, 2)
    np.testing.assert_allclose(model(a[1:2], b[1:2, :5]), y[1:2], atol=1e-5)
    assert jnp.abs(model(b, a) - model(a, b)).max() > 1e-4


def test_the_other_sequence_is_refused_by_its_name():
    model = zoo.DualEncoder(2, **SMALL, **SOFTMAX, rngs=nnx.Rngs(0))
    a, b = tokens((3, 6)), tokens((2, 5))
    with pytest.raises(ValueError, match="DualEncoder: other must have the 3 samples of tokens, got 2 samples"):
        model(a, b)
    with pytest.raises(TypeError, match="DualEncoder: other must be an array"):
        model(a, [[1, 2]] * 3)
    with pytest.raises(ValueError, match="DualEncoder: other must have length <= max_length = 40, got 41"):
        model(a, tokens((3, 41)))
    with pytest.raises(ValueError, match="DualEncoder: other_mask must be boolean of shape"):
        model(a, a, other_mask=jnp.ones((3, 5), bool))
    with pytest.raises(ValueError, match="DualEncoder: mask must be boolean of shape"):
        model(a, a, mask=jnp.ones((3, 5), bool))


def test_dropout_draws_only_when_asked():
    model = zoo.Classifier(3, **SMALL, **SOFTMAX, dropout_rate=0.5, rngs=nnx.Rngs(0))
    x = tokens((2, 20))
    np.testing.assert_array_equal(model(x), model(x))
    draw = lambda seed: model(x, deterministic=False, rngs=nnx.Rngs(dropout=seed))
    np.testing.assert_array_equal(draw(1), draw(1))
    assert jnp.abs(draw(1) - draw(2)).max() > 1e-3


@pytest.mark.parametrize("remat", [False, True])
def test_train_and_eval_turn_dropout_on_and_off(remat):
    asked = []

    class Asked(zoo.LocalAttention):
        def __call__(self, inputs, *, deterministic, **call):
            asked.append(deterministic)
            return super().__call__(inputs, deterministic=deterministic, **call)

    mixer = functools.partial(Asked, 2, window_size=4)
    options = dict(**SMALL, mixer=mixer, dropout_rate=0.5, remat=remat)
    x, causal = tokens((2, 20)), functools.partial(Asked, 2, window_size=4, is_causal=True)
    for model, inputs in (
        (zoo.Encoder(**options, rngs=nnx.Rngs(0)), (x,)),
        (zoo.Classifier(3, **options, rngs=nnx.Rngs(0)), (x,)),
        (zoo.DualEncoder(3, **options, rngs=nnx.Rngs(0)), (x, x)),
        (zoo.CausalLM(**{**options, "mixer": causal}, rngs=nnx.Rngs(0)), (x,)),
    ):
        call = lambda seed=1, model=model, inputs=inputs, **words: model(*inputs, rngs=nnx.Rngs(seed), **words)
        without, drawn = call(deterministic=True), call(deterministic=False)
        np.testing.assert_array_equal(call(), without)
        model.train()
        asked.clear()
        np.testing.assert_array_equal(call(), drawn)
        assert set(asked) == {False}
        np.testing.assert_array_equal(call(deterministic=True), without)
        model.eval()
        asked.clear()
        np.testing.assert_array_equal(call(), without)
        assert set(asked) == {True}


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", None])
def test_extend_equals_one_call(positions):
    model = language_model(positions=positions)
    x = tokens((2, 12))
    cache, pieces = model.init_cache(2, 12), []
    for start, stop in ((0, 5), (5, 6), (6, 12)):
        logits, cache = model.extend(x[:, start:stop], cache)
        pieces.append(logits)
    np.testing.assert_allclose(jnp.concatenate(pieces, 1), model(x), atol=1e-4)


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", None])
def test_generation_ignores_padding_on_the_left(positions):
    model = nnx.clone(language_model(positions=positions))
    model.encoder.embed.embedding[...] *= 5  # or else it says the same token whatever the positions
    prompts = tokens((2, 5))
    padded = jnp.concatenate([tokens((2, 3), seed=4), prompts], axis=1).at[1, 4:6].set(7)
    mask = jnp.arange(8) >= jnp.array([[3], [6]])
    generated, logits = model.generate(padded, 6, mask=mask), model(padded, mask=mask)
    extended, cache = [], model.init_cache(2, 9)
    for start, stop in ((0, 2), (2, 7), (7, 8)):
        pieces, cache = model.extend(padded[:, start:stop], cache, mask=mask[:, start:stop])
        extended.append(pieces)
    extended.append(model.extend(generated[:, :1], cache)[0])
    for i, prompt in enumerate((prompts[:1], prompts[1:, 3:])):
        whole = model(jnp.concatenate([prompt, generated[i : i + 1, :1]], axis=1))[0]
        np.testing.assert_array_equal(generated[i : i + 1], model.generate(prompt, 6))
        np.testing.assert_allclose(logits[i, mask[i]], whole[:-1], atol=1e-4)
        np.testing.assert_allclose(jnp.concatenate(extended, axis=1)[i, -len(whole) :], whole, atol=1e-4)


@pytest.mark.parametrize("mixer", ["local", "strided", "reformer", "performer", "transformer_xl", "s4"])
def test_padding_on_the_left_changes_no_logit(mixer):
    options = {
        "local": dict(num_heads=2, window_size=4), "strided": dict(num_heads=2, stride=4),
        "reformer": dict(num_heads=2, chunk_size=4), "performer": dict(num_heads=2, num_features=8),
        "transformer_xl": dict(num_heads=2, segment_length=4, memory_length=4), "s4": dict(state_size=8),
    }[mixer]  # fmt: skip
    model = zoo.CausalLM(**{**SMALL, "num_layers": 1}, mixer=mixer, mixer_options=options, rngs=nnx.Rngs(0))
    prompt = tokens((1, 5))
    padded, mask = jnp.concatenate([tokens((1, 3), seed=4), prompt], axis=1), jnp.arange(8)[None] >= 3
    wanted, _ = model.extend(prompt, model.init_cache(1, 9))
    found, _ = model.extend(padded, model.init_cache(1, 9), mask=mask)
    np.testing.assert_allclose(found[:, -1], wanted[:, -1], atol=1e-4)


def test_what_is_no_array_is_refused_by_name():
    model = language_model()
    for call in (model, model.encoder, lambda tokens: model.generate(tokens, 2), lambda tokens: model.extend(tokens, None)):
        with pytest.raises(TypeError, match="(tokens|prompt) must be an array"):
            call([[1, 2]])
    with pytest.raises(TypeError, match="mask must be an array"):
        model.generate(tokens((1, 2)), 2, mask=[[True, True]])
    with pytest.raises(ValueError, match="mask must be boolean of shape"):
        model.extend(tokens((1, 2)), model.init_cache(1, 2), mask=jnp.ones((1, 1, 1, 2), bool))


@pytest.mark.parametrize("given, got", [(None, "a NoneType"), ((), "a tuple"), (1, "1 layers")], ids=str)
def test_a_cache_of_another_kind_is_refused(given, got):
    model = language_model()
    cache = model.init_cache(1, 4)
    cache = cache._replace(layers=cache.layers[:given]) if given == 1 else given
    with pytest.raises(ValueError, match=f"CausalLM: cache must be an LMCache of 2 layers, got {got}. Pass what init_cache"):
        model.extend(tokens((1, 2)), cache)


@pytest.mark.parametrize(
    "options,word",
    [
        (dict(num_layers=-5), "num_layers"),
        (dict(num_layers=0), "num_layers"),
        (dict(num_layers=1.0), "num_layers"),
        (dict(mlp_features=-5), "mlp_features"),
        (dict(mlp_features=2.0), "mlp_features"),
        (dict(dropout_rate=1.5), "dropout_rate"),
        (dict(dropout_rate=-0.1), "dropout_rate"),
        (dict(dropout_rate=float("nan")), "dropout_rate"),
        (dict(mixer_options=dict(num_heads=2, out_features=1)), "out_features"),
        (dict(mixer_options=dict(num_heads=2, out_features=8)), "out_features"),
    ],
)
def test_options_out_of_range_are_refused(options, word):
    with pytest.raises(ValueError, match=word):
        zoo.Classifier(3, **{**SMALL, **SOFTMAX, **options}, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    "options,error,word",
    [
        (dict(rngs=0), TypeError, "Encoder: rngs must be an nnx.Rngs, got int"),
        (dict(dtype=jnp.int32), ValueError, "Encoder: dtype must be a floating-point dtype"),
        (dict(in_features=0), ValueError, "Encoder: in_features must be a positive integer, got 0"),
        (dict(vocab_size=0), ValueError, "Encoder: vocab_size must be a positive integer, got 0"),
        (dict(max_length=None), ValueError, "Encoder: max_length must be a positive integer, got None"),
        (dict(max_length=None, positions=None), None, None),
        (dict(num_layers=True), ValueError, "Encoder: num_layers must be a positive integer, got True"),
        (dict(norm=["layer"]), ValueError, "Block: norm must be a known name, got ..layer... Did you mean 'layer'"),
        (dict(experts=dict(num_experts=2, topk=1)), TypeError, "Experts: topk must be one of its options.*'top_k'"),
        (dict(experts={}), TypeError, "Experts: num_experts must be given, got nothing"),
        (dict(mixer=["softmax", ["local"]]), TypeError, "Encoder: mixer must be a name or a function"),
        (dict(in_features=15, positions="sinusoidal"), ValueError, "Encoder: in_features must be even with positions="),
        (dict(mlp_features=None), ValueError, "Encoder: mlp_features must be an integer of at least 0, got None"),
        (dict(num_classes=0), ValueError, "Head: num_classes must be a positive integer, got 0"),
        (dict(head_features=8), ValueError, "Head: head_features must be a sequence of sizes, got 8"),
        (dict(head_features=(8, 0)), ValueError, "Head: head_features must be a positive integer, got 0"),
        (dict(head_features=np.array([8])), None, None),
    ],
    ids=str,
)
def test_sizes_and_kinds_are_checked_by_name(options, error, word):
    make = lambda: zoo.Classifier(**{**dict(num_classes=3), **SMALL, **SOFTMAX, **dict(rngs=nnx.Rngs(0)), **options})
    if error is None:
        assert make()(tokens((1, 4)) % 7).shape == (1, 3)
        return
    with pytest.raises(error, match=word):
        make()


@pytest.mark.parametrize("rate", ["dropout_rate", "drop_path_rate"])
def test_a_call_that_draws_names_the_rngs_that_it_lacks(rate):
    model = zoo.Classifier(3, **SMALL, **SOFTMAX, **{rate: 0.5}, rngs=nnx.Rngs(0))
    owner = "Encoder" if rate == "dropout_rate" else "Block"
    with pytest.raises(ValueError, match=f"{owner}: rngs must be given where it draws, got None. Pass rngs=nnx.Rngs"):
        model(tokens((1, 4)), deterministic=False)
    with pytest.raises(ValueError, match="deterministic=True"):
        zoo.FeedForward(4, 8, dropout_rate=0.5, rngs=nnx.Rngs(0))(jnp.ones((1, 4)), deterministic=False)
    assert model(tokens((1, 4)), deterministic=False, rngs=nnx.Rngs(1)).shape == (1, 3)


def test_generation_needs_a_mixer_with_a_cache():
    class Plain(nnx.Module):
        is_causal = True

        def __call__(self, inputs, mask=None, deterministic=None, rngs=None):
            return inputs

    model = zoo.CausalLM(**SMALL, mixer=lambda in_features, rngs: Plain(), rngs=nnx.Rngs(0))
    assert model(tokens((1, 4))).shape == (1, 4, 11)
    with pytest.raises(TypeError, match="CausalLM: mixer must have init_cache and extend here, got a Plain"):
        model.generate(tokens((1, 4)), 2)


def test_a_given_embed_has_the_features_of_the_encoder():
    rngs = nnx.Rngs(0)
    make = lambda features: zoo.Classifier(
        3, **{**SMALL, **SOFTMAX, "vocab_size": None}, embed=nnx.Embed(7, features, rngs=rngs), rngs=rngs
    )
    assert make(SMALL["in_features"])(tokens((1, 4)) % 7).shape == (1, 3)
    with pytest.raises(ValueError, match="Encoder: embed must have in_features = 16, got 8 features"):
        make(8)


def test_a_language_model_refuses_what_it_cannot_honour():
    rngs = nnx.Rngs(0)
    with pytest.raises(ValueError, match="mixer_options must leave is_causal out or True, got is_causal=False"):
        zoo.CausalLM(**SMALL, mixer="softmax", mixer_options=dict(num_heads=2, is_causal=False), rngs=rngs)
    with pytest.raises(ValueError, match="embed must have attend"):
        zoo.CausalLM(**SMALL, **SOFTMAX, embed=nnx.Linear(1, 16, rngs=rngs), rngs=rngs)
    with pytest.raises(ValueError, match="mixer must build layers whose is_causal is True, got a Linear with no is_causal"):
        zoo.CausalLM(**SMALL, mixer=lambda in_features, rngs: nnx.Linear(in_features, in_features, rngs=rngs), rngs=rngs)
    model = zoo.CausalLM(**{**SMALL, "vocab_size": None}, **SOFTMAX, embed=nnx.Embed(7, 16, rngs=rngs), rngs=rngs)
    assert model(jnp.ones((1, 6), jnp.int32)).shape == (1, 6, 7)
    assert model.generate(jnp.ones((1, 3), jnp.int32), 2).shape == (1, 2)


def test_only_learned_positions_bound_the_length():
    for positions in ("sinusoidal", None):
        model = zoo.Classifier(3, **SMALL, **SOFTMAX, positions=positions, rngs=nnx.Rngs(0))
        assert model(tokens((1, 41))).shape == (1, 3)


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


def test_an_untied_output_projection_is_a_map_of_its_own():
    model = zoo.CausalLM(**SMALL, **SOFTMAX, tie_embeddings=False, rngs=nnx.Rngs(0))
    x = tokens((2, 6))
    hidden = model.encoder(x)
    wanted = np.asarray(hidden) @ np.asarray(model.head.kernel[...])
    np.testing.assert_allclose(model(x), wanted, atol=1e-5)
    assert model.head.kernel.shape == (16, 11) and model.head.bias is None
    assert jnp.abs(model(x) - model.encoder.embed.attend(hidden)).max() > 1e-2
    found, _ = model.extend(x, model.init_cache(2, 6))
    np.testing.assert_allclose(found, model(x), atol=1e-4)
    assert not hasattr(zoo.CausalLM(**SMALL, **SOFTMAX, rngs=nnx.Rngs(0)), "head")


def test_an_embed_without_attend_needs_an_output_projection():
    class Halves(nnx.Module):
        def __call__(self, inputs):
            return inputs[..., None] * jnp.ones(16) / 10

    model = zoo.CausalLM(**SMALL, **SOFTMAX, embed=Halves(), tie_embeddings=False, rngs=nnx.Rngs(0))
    assert model.generate(tokens((2, 3)), 2).shape == (2, 2)
    with pytest.raises(ValueError, match="generate: prompt must be in 0..10, got 11"):
        model.generate(jnp.array([[11]]), 2)
    with pytest.raises(ValueError, match="embed must have num_embeddings >= vocab_size = 11, got 7"):
        zoo.CausalLM(**SMALL, **SOFTMAX, embed=nnx.Embed(7, 16, rngs=nnx.Rngs(0)), tie_embeddings=False, rngs=nnx.Rngs(0))


def test_models_tabulate_one_after_the_other():
    words, x = dict(SMALL, num_layers=1), tokens((2, 6))
    for model, inputs in (
        (zoo.Classifier(3, **words, **SOFTMAX, rngs=nnx.Rngs(0)), (x,)),
        (zoo.DualEncoder(3, **words, **SOFTMAX, rngs=nnx.Rngs(0)), (x, x)),
        (zoo.CausalLM(**words, **SOFTMAX, rngs=nnx.Rngs(0)), (x,)),
    ):
        assert "Total Parameters" in nnx.tabulate(model, *inputs)
