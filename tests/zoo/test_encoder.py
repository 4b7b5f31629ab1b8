"""The encoder: what padding holds and where it stands, ids out of range, segments, a mixer for each layer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad import zoo
from subquad.zoo.model import POOLINGS, pool
from tests.zoo.test_model import PERFORMER, SMALL, SOFTMAX, tokens

LOCAL = dict(mixer="local", mixer_options=dict(num_heads=2, window_size=3))
REAL = tokens((2, 5))
# The same five tokens of each sample among other ids: on the left, with holes, and both.
MASKS = np.array([[0, 0, 1, 1, 1, 1, 1, 0, 0], [1, 0, 1, 1, 0, 0, 1, 0, 1]], bool), np.array(
    [[0, 0, 0, 0, 1, 1, 1, 1, 1], [0, 1, 1, 0, 1, 1, 0, 1, 0]], bool
)


def scattered(mask, fill):
    found = np.full(mask.shape, fill)
    found[mask] = np.asarray(REAL).ravel()
    return jnp.asarray(found)


def relative(found, wanted):
    return np.abs(np.asarray(found) - np.asarray(wanted)).max() / np.abs(np.asarray(wanted)).max()


@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
def test_padding_anywhere_changes_nothing_whatever_id_it_holds(positions):
    model = zoo.Encoder(**SMALL, **SOFTMAX, positions=positions, rngs=nnx.Rngs(0))
    wanted = np.asarray(model(REAL)).reshape(-1, SMALL["in_features"])
    call = jax.jit(lambda x, mask: model(x, mask=mask))
    for mask in MASKS:
        for fill in (3, -1, 99):
            assert relative(model(scattered(mask, fill), mask=jnp.asarray(mask))[mask], wanted) < 1e-5
            found = call(scattered(mask, fill), jnp.asarray(mask))
            assert relative(found[mask], wanted) < 1e-5 and jnp.isfinite(found).all()


class Poisoned(nnx.Embed):
    """Id 10 has no embedding."""

    def __call__(self, inputs):
        return jnp.where((inputs == 10)[..., None], jnp.nan, super().__call__(inputs))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_nan_embeddings_of_padding_reach_no_output_and_no_gradient(pooling):
    assert (REAL != 10).all()
    mask, x = jnp.asarray(MASKS[1]), scattered(MASKS[1], 10)
    results = []
    for embed in (Poisoned, nnx.Embed):
        words = dict(SMALL, embed=embed(SMALL["vocab_size"], SMALL["in_features"], rngs=nnx.Rngs(1)), num_layers=1)
        model = zoo.Classifier(3, pooling=pooling, **words, **SOFTMAX, rngs=nnx.Rngs(0))
        graph, state = nnx.split(model)
        loss = lambda state, graph=graph: jnp.square(nnx.merge(graph, state)(x, mask=mask)).sum()
        results.append(jax.jit(jax.value_and_grad(loss))(state))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), *results)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooling_sees_real_tokens_only_wherever_padding_stands(pooling):
    hidden = jax.random.normal(jax.random.key(0), (2, 9, 4))
    reduce = {"mean": lambda x: x.mean(0), "max": lambda x: x.max(0), "first": lambda x: x[0], "last": lambda x: x[-1]}[pooling]
    for mask in (*MASKS, np.ones((2, 9), bool)):
        poisoned = jnp.where(mask[..., None], hidden, jnp.nan)
        wanted = [reduce(np.asarray(row)[real]) for row, real in zip(hidden, mask, strict=True)]
        found, gradient = jax.value_and_grad(lambda x, m=mask: pool(x, jnp.asarray(m), pooling).sum())(poisoned)
        np.testing.assert_allclose(pool(poisoned, jnp.asarray(mask), pooling), wanted, rtol=1e-5)
        assert jnp.isfinite(found) and jnp.isfinite(gradient).all() and (gradient[~mask] == 0).all()


@pytest.mark.parametrize("kind", ["encoder", "classifier", "dual", "language"])
def test_an_id_out_of_range_is_refused_where_known_and_nan_where_not(kind):
    words = dict(SMALL, num_layers=1)
    model, pair = {
        "encoder": (zoo.Encoder(**words, **SOFTMAX, rngs=nnx.Rngs(0)), False),
        "classifier": (zoo.Classifier(3, **words, **SOFTMAX, rngs=nnx.Rngs(0)), False),
        "dual": (zoo.DualEncoder(3, **words, **SOFTMAX, rngs=nnx.Rngs(0)), True),
        "language": (zoo.CausalLM(**words, **SOFTMAX, rngs=nnx.Rngs(0)), False),
    }[kind]
    call = lambda x: model(jnp.maximum(x, 0) % 11, x) if pair else model(x)
    jitted = jax.jit(call)
    for wrong in (-1, -11, -12, 11, 2**31 - 1, -(2**31)):
        bad = REAL.at[0, 2].set(wrong)
        with pytest.raises(ValueError, match=f"Encoder: {'other' if pair else 'tokens'} must be in 0..10, got {wrong}. "):
            call(bad)
        is_nan = np.isnan(jitted(bad))
        assert not is_nan[1].any()
        assert is_nan[0, 2].all() if kind in ("encoder", "language") else is_nan[0].all()
    for dtype in ("int8", "uint8", "int16", "uint32"):
        np.testing.assert_array_equal(call(REAL.astype(dtype)), call(REAL))


def test_an_embed_without_a_vocabulary_decides_itself_what_it_takes():
    class Numbers(nnx.Module):
        def __call__(self, inputs):
            return inputs[..., None] * jnp.ones(16)

    build = lambda vocab_size: zoo.Encoder(**{**SMALL, "vocab_size": vocab_size}, **SOFTMAX, embed=Numbers(), rngs=nnx.Rngs(0))
    assert jnp.isfinite(build(None)(jnp.array([[-5, 300]]))).all()
    with pytest.raises(ValueError, match="Encoder: tokens must be in 0..10, got 300"):
        build(11)(jnp.array([[5, 300]]))


def test_a_step_past_the_learned_positions_is_refused_where_known_and_nan_where_not():
    model = zoo.CausalLM(**{**SMALL, "num_layers": 1, "max_length": 6}, **PERFORMER, rngs=nnx.Rngs(0))
    step = jax.jit(lambda x, cache, mask: model.extend(x, cache, mask=mask))
    real = jnp.array([[False, True, True, True], [True] * 4])
    _, cache = model.extend(tokens((2, 4)), model.init_cache(2, 6), mask=real)
    np.testing.assert_array_equal(cache.length, [3, 4])
    x, every = tokens((2, 3), seed=1), jnp.ones((2, 3), bool)
    with pytest.raises(ValueError, match="CausalLM: tokens must end before max_length = 6, got one at position 6. Construct"):
        model.extend(x, cache, mask=every)
    logits, _ = step(x, cache, every)
    assert not jnp.isnan(logits[0]).any() and jnp.isnan(logits[1, 2]).all()
    shorter = every.at[1, 2].set(False)  # padding stands nowhere
    np.testing.assert_allclose(model.extend(x, cache, mask=shorter)[0][0], logits[0], rtol=1e-4, atol=1e-5)
    sinusoidal = zoo.CausalLM(**{**SMALL, "num_layers": 1, "max_length": 6}, **PERFORMER, positions=None, rngs=nnx.Rngs(0))
    assert jnp.isfinite(sinusoidal.extend(tokens((1, 9)), sinusoidal.init_cache(1, 2))[0]).all()


@pytest.mark.parametrize("mixer", [SOFTMAX, LOCAL, PERFORMER], ids=["softmax", "local", "performer"])
def test_packed_segments_are_sequences_of_their_own(mixer):
    for model in (
        zoo.Encoder(**SMALL, **mixer, rngs=nnx.Rngs(0)), zoo.CausalLM(**SMALL, **mixer, rngs=nnx.Rngs(0)),
    ):  # fmt: skip
        call = jax.jit(lambda x, m, s, model=model: model(x, mask=m, segment_ids=s))
        segments = jnp.array([[4, 4, 4, 0, 0], [7, 7, 7, 7, 7]])
        for mask in (np.ones((2, 5), bool), *MASKS):
            ids = np.zeros(mask.shape, int)
            ids[mask] = np.asarray(segments).ravel()
            found = np.asarray(call(scattered(mask, 1), jnp.asarray(mask), jnp.asarray(ids)))
            wanted = jnp.concatenate([model(REAL[:1, :3])[0], model(REAL[:1, 3:])[0], model(REAL[1:])[0]])
            assert relative(found[mask], wanted) < 1e-5
        masked = model(REAL, segment_ids=segments, mask=jnp.ones((2, 5), bool))
        assert relative(model(REAL, segment_ids=segments), masked) < 1e-5


def test_segments_are_refused_by_name():
    model = zoo.Encoder(**SMALL, **PERFORMER, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="segment_ids must be integers of shape"):
        model(REAL, segment_ids=jnp.zeros((2, 4), jnp.int32))
    with pytest.raises(TypeError, match="segment_ids must be an array"):
        model(REAL, segment_ids=[[1] * 5] * 2)
    linformer = dict(mixer="linformer", mixer_options=dict(num_heads=2, max_length=8, num_landmarks=4))
    model = zoo.Encoder(**SMALL, **linformer, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="LinformerAttention does not support segment_ids: .* mixture"):
        model(REAL, segment_ids=jnp.zeros((2, 5), jnp.int32))


def test_a_mixer_for_each_layer():
    kinds = lambda model: [type(block.mixer).__name__ for block in model.encoder.blocks]
    words = dict(SMALL, num_layers=3)
    causal = functools.partial(zoo.make, "softmax", num_heads=2, is_causal=True)
    model = zoo.CausalLM(
        **words, mixer=["local", causal, "s4"], mixer_options=[dict(num_heads=2, window_size=3), None, {}], rngs=nnx.Rngs(0)
    )
    assert kinds(model) == ["LocalAttention", "SoftmaxAttention", "S4"]
    assert [block.mixer.is_causal for block in model.encoder.blocks] == [True] * 3
    found, _ = model.extend(REAL, model.init_cache(2, 5))
    np.testing.assert_allclose(found, model(REAL), atol=1e-4)
    for_all = zoo.Classifier(3, **words, mixer=("softmax", "performer", "softmax"), mixer_options=dict(num_heads=4),
                             rngs=nnx.Rngs(0))
    assert [block.mixer.num_heads for block in for_all.encoder.blocks] == [4] * 3
    windows = [dict(num_heads=2, window_size=size) for size in (1, 2, 3)]
    model = zoo.Classifier(3, **words, mixer="local", mixer_options=windows, rngs=nnx.Rngs(0))
    assert [int(block.mixer.pattern(20)[0, 0].sum()) for block in model.encoder.blocks] == [2, 3, 4]


@pytest.mark.parametrize(
    "options,error,word",
    [
        (dict(mixer=["local", "softmax"]), ValueError, "mixer must have one entry for each layer, got 2 for 3 layers"),
        (dict(mixer=["local", 3, "softmax"]), TypeError, "mixer must be a name or a function, or a sequence of them"),
        (dict(mixer=3), TypeError, "mixer must be a name or a function"),
        (dict(mixer="softmax", mixer_options=[{}]), ValueError, "mixer_options must have one entry for each layer"),
        (dict(mixer="softmax", mixer_options="ab"), TypeError, "mixer_options must be a mapping or None"),
        (dict(mixer=["softmax", nnx.Linear, "s4"], mixer_options=[{}, {"a": 1}, {}]), ValueError, "empty when mixer is"),
        (dict(mixer=["local", "softmax", "s4"], mixer_options=dict(num_heads=2, window_size=2)), TypeError, "window_size"),
        (dict(mixer=nnx.Linear(16, 16, rngs=nnx.Rngs(0))), ValueError, "mixer must be a name or .* got a Linear"),
        (dict(mixer_options=dict(num_heads=2, in_features=8)), ValueError, "mixer_options must leave .* got in_features"),
        (dict(mixer_options=dict(num_heads=2, rngs=nnx.Rngs(0))), ValueError, "mixer_options must leave .* got rngs"),
        (dict(mixer=["softmax", "softmx", "s4"], mixer_options=[dict(num_heads=2)] * 3), ValueError, "softmax"),
    ],
)
def test_mixers_that_do_not_fit_the_layers_are_refused(options, error, word):
    with pytest.raises(error, match=word):
        zoo.Encoder(**{**SMALL, "num_layers": 3}, **options, rngs=nnx.Rngs(0))


def test_the_words_that_a_mixer_is_called_with():
    seen = []

    class Seen(nnx.Module):
        def __init__(self, in_features, rngs):
            pass

        def __call__(self, inputs, **call):
            seen.append(set(call))
            return inputs

    model = zoo.Encoder(**{**SMALL, "num_layers": 1}, mixer=Seen, rngs=nnx.Rngs(0))
    model(REAL)
    model(REAL, segment_ids=jnp.zeros_like(REAL))
    assert seen == [{"mask", "deterministic", "rngs"}, {"mask", "deterministic", "rngs", "segment_ids"}]


def test_a_batch_of_any_size_is_exported_once():
    model = zoo.Classifier(3, **{**SMALL, "num_layers": 1}, **PERFORMER, rngs=nnx.Rngs(0))
    (batch,) = jax.export.symbolic_shape("batch")
    spec = lambda dtype: jax.ShapeDtypeStruct((batch, 5), dtype)
    exported = jax.export.export(jax.jit(lambda x, mask: model(x, mask=mask)))(spec(jnp.int32), spec(bool))
    mask = jnp.arange(5) >= jnp.array([[2], [0]])
    np.testing.assert_allclose(exported.call(REAL, mask), model(REAL, mask=mask), rtol=1e-4, atol=1e-5)
    assert exported.call(tokens((3, 5)), jnp.ones((3, 5), bool)).shape == (3, 3)


@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
def test_models_trace_under_strict_promotion(positions):
    words = dict(SMALL, num_layers=1, positions=positions, dropout_rate=0.1)
    mask = jnp.asarray(MASKS[0])
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        for pooling in POOLINGS:
            model = zoo.Classifier(3, pooling=pooling, **words, **SOFTMAX, rngs=nnx.Rngs(0))
            jax.eval_shape(lambda x, m, model=model: model(x, mask=m), scattered(MASKS[0], 1), mask)
        model = zoo.CausalLM(**words, **SOFTMAX, tie_embeddings=False, rngs=nnx.Rngs(0))
        draw = lambda x, m: model(x, mask=m, segment_ids=x, deterministic=False, rngs=nnx.Rngs(0))
        jax.eval_shape(draw, scattered(MASKS[0], 1), mask)
        jax.eval_shape(lambda x: model.generate(x, 3, temperature=1.0, top_k=5, top_p=0.5, rngs=nnx.Rngs(0)), REAL)
