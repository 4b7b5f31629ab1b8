"""Generation: greedy, sampled, stopped, streamed, and with models that are not of the zoo."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad import zoo
from subquad.zoo import generation
from tests.zoo.test_model import SMALL, SOFTMAX, language_model, tokens


@pytest.mark.parametrize("mixer", ["softmax", "performer"])
def test_greedy_generation_is_the_argmax_of_the_full_pass(mixer):
    model = language_model(mixer)
    prompt = tokens((2, 4))
    generated = model.generate(prompt, 6)
    whole = jnp.concatenate([prompt, generated], axis=1)
    expected = jnp.argmax(model(whole), -1)[:, 3:-1]
    np.testing.assert_array_equal(generated, expected)


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_generated_tokens_do_not_wrap_into_the_dtype_of_the_prompt(dtype):
    model = zoo.CausalLM(**{**SMALL, "vocab_size": 300}, **SOFTMAX, rngs=nnx.Rngs(0))
    sample = lambda prompt: model.generate(prompt, 12, temperature=5.0, rngs=nnx.Rngs(0))
    wanted, found = sample(tokens((2, 4))), sample(tokens((2, 4)).astype(dtype))
    assert wanted.max() > 255 and found.dtype == jnp.int32
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("transform", ["jit", "vmap", "eval_shape"])
def test_generation_under_a_transform_leaves_the_model_whole(transform):
    model = zoo.CausalLM(**SMALL, **SOFTMAX, rngs=nnx.Rngs(0))
    prompt, mask = tokens((2, 4)), jnp.arange(4) >= jnp.array([[0], [2]])
    wanted, logits = model.generate(prompt, 3, mask=mask), model(prompt)
    run = lambda prompt: model.generate(prompt, 3, mask=mask)
    if transform == "jit":
        np.testing.assert_array_equal(jax.jit(run)(prompt), wanted)
    elif transform == "vmap":
        found = jax.vmap(lambda prompt, mask: model.generate(prompt[None], 3, mask=mask[None])[0])(prompt, mask)
        np.testing.assert_array_equal(found, wanted)
    else:
        assert jax.eval_shape(run, prompt).shape == wanted.shape
    np.testing.assert_array_equal(model(prompt), logits)
    np.testing.assert_array_equal(model.generate(prompt, 3, mask=mask), wanted)


def test_generation_fills_the_learned_positions():
    model = language_model()
    prompt = tokens((1, 4))
    generated = model.generate(prompt, 37)  # the last token is never fed
    whole = jnp.concatenate([prompt, generated[:, :-1]], axis=1)
    np.testing.assert_array_equal(generated, jnp.argmax(model(whole), -1)[:, 3:])
    assert model.generate(tokens((1, 40)), 1).shape == (1, 1)
    with pytest.raises(ValueError, match="max_length"):
        model.generate(prompt, 38)


def test_generation_stops_at_the_stop_token():
    model, prompt = language_model(), tokens((4, 4))
    sample = lambda **options: np.asarray(model.generate(prompt, 30, temperature=9.0, rngs=nnx.Rngs(0), **options))
    free, stopped = sample(), sample(stop_token=3)
    assert (free == 3).any(axis=1).all()
    for row, wanted in zip(stopped, free, strict=True):
        end = int(np.argmax(wanted == 3))
        np.testing.assert_array_equal(row[: end + 1], wanted[: end + 1])
        assert (row[end:] == 3).all()


def test_sampling():
    model = language_model()
    prompt = tokens((4, 4))
    sample = lambda seed, **options: model.generate(prompt, 20, temperature=1.5, rngs=nnx.Rngs(seed), **options)
    np.testing.assert_array_equal(sample(0), sample(0))
    assert (sample(0) != sample(1)).any()
    np.testing.assert_array_equal(sample(0, top_k=1), model.generate(prompt, 20))
    drawn = sample(0, top_k=3)
    logits = model(jnp.concatenate([prompt, drawn[:, :-1]], axis=1))[:, 3:]
    ranks = (logits > jnp.take_along_axis(logits, drawn[..., None], axis=-1)).sum(-1)
    assert set(np.unique(ranks)) == {0, 1, 2}


def test_the_smallest_temperature_takes_the_most_likely_token():
    model, prompt = language_model(), tokens((4, 4))
    for temperature in (1e-39, 1e-45, 1e-30):
        drawn = model.generate(prompt, 6, temperature=temperature, rngs=nnx.Rngs(0))
        np.testing.assert_array_equal(drawn, model.generate(prompt, 6))


def test_top_k_takes_the_first_of_equal_tokens():
    model = zoo.CausalLM(**SMALL, **SOFTMAX, rngs=nnx.Rngs(0))
    model.encoder.embed.embedding[...] *= 0
    assert set(np.unique(model.generate(tokens((4, 4)), 20, temperature=1.0, top_k=2, rngs=nnx.Rngs(0)))) == {0, 1}


def test_many_lengths_are_one_program():
    model = language_model("performer")
    wanted = model.generate(tokens((1, 12)), 10)
    before = generation._generate._cache_size()
    for length, num_tokens in ((12, 3), (2, 16), (7, 1), (16, 9)):
        prompt = tokens((1, 12))[:, -length:] if length < 12 else jnp.pad(tokens((1, 12)), [(0, 0), (length - 12, 0)])
        mask = jnp.arange(length)[None] >= length - 12
        found = model.generate(prompt, num_tokens, mask=mask)
        assert found.shape == (1, num_tokens)
        if length >= 12:
            np.testing.assert_array_equal(found, wanted[:, :num_tokens])
    assert generation._generate._cache_size() == before


def test_a_loop_ends_when_every_sample_has_stopped():
    """Else ten million tokens would take minutes."""
    ones = jnp.full((4, 4), -jnp.inf).at[jnp.arange(4), jnp.array([1, 2, 3, 0])].set(0.0)
    found = zoo.generate(Bigrams(ones), jnp.array([[0], [1]]), 10_000_000, stop_token=3)
    np.testing.assert_array_equal(found[:, :4], [[1, 2, 3, 3], [2, 3, 3, 3]])
    assert (found[:, -1] == 3).all()


def test_lengths_are_rounded_up_to_the_longest_sequence_only():
    assert language_model().longest == 40
    free = {**SMALL, "positions": None, "rngs": nnx.Rngs(0)}
    model = zoo.CausalLM(**free, mixer="cosformer", mixer_options=dict(num_heads=4, max_length=19))
    assert model.longest == 19 and zoo.CausalLM(**free, **SOFTMAX).longest is None
    prompt = tokens((1, 17))
    np.testing.assert_array_equal(model.generate(prompt, 3)[:, 0], jnp.argmax(model(prompt)[:, -1], -1))
    with pytest.raises(ValueError, match="max_length"):
        model.generate(prompt, 4)


@pytest.mark.parametrize(
    "arguments,word",
    [
        (dict(num_tokens=0), "num_tokens"),
        (dict(num_tokens=2, temperature=-1.0), "temperature"),
        (dict(num_tokens=2, temperature=float("nan"), rngs=nnx.Rngs(0)), "temperature"),
        (dict(num_tokens=2, temperature=float("inf"), rngs=nnx.Rngs(0)), "temperature"),
        (dict(num_tokens=2, top_k=0, temperature=1.0), "top_k"),
        (dict(num_tokens=2, stop_token=11), "stop_token"),
        (dict(num_tokens=2, stop_token=-1), "stop_token"),
        (dict(num_tokens=2, stop_token=[1, 11]), "stop_token"),
        (dict(num_tokens=2, top_k=12, temperature=1.0, rngs=nnx.Rngs(0)), "top_k"),
        (dict(num_tokens=2, top_p=0.5), "top_p"),
        (dict(num_tokens=2, top_p=0.0, temperature=1.0, rngs=nnx.Rngs(0)), "top_p"),
        (dict(num_tokens=2, top_p=1.5, temperature=1.0, rngs=nnx.Rngs(0)), "top_p"),
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Bigrams:
    """A model of the user's: the logits of the next token are a row of a table; its cache counts tokens."""

    table: jax.Array

    def init_cache(self, batch_size, max_length):
        return jnp.zeros(batch_size, jnp.int32)

    def extend(self, tokens, cache):
        return self.table[tokens], cache + tokens.shape[1]


PROBABILITIES = jnp.array([0.05, 0.5, 0.15, 0.3])


def drawn(num_tokens=4, samples=128, table=None, **options):
    table = jnp.tile(jnp.log(PROBABILITIES), (4, 1)) if table is None else table
    prompt = jnp.zeros((samples, 1), jnp.int32)
    return np.asarray(zoo.generate(Bigrams(table), prompt, num_tokens, rngs=nnx.Rngs(0), **options))


@pytest.mark.parametrize(
    "options,kept",
    [
        (dict(), {0, 1, 2, 3}),
        (dict(top_p=1.0), {0, 1, 2, 3}),
        (dict(top_p=0.9), {1, 2, 3}),
        (dict(top_p=0.83), {1, 2, 3}),
        (dict(top_p=0.83, top_k=3), {1, 3}),  # of 0.5, 0.3, 0.15 over 0.95
        (dict(top_p=0.79), {1, 3}),
        (dict(top_p=0.9, temperature=0.5), {1, 3}),  # of squares
        (dict(top_p=0.4), {1}),
        (dict(top_p=1e-30), {1}),
    ],
)
def test_top_p_keeps_the_fewest_tokens_that_add_up_to_it(options, kept):
    assert set(np.unique(drawn(**{"temperature": 1.0, **options}))) == kept


def test_every_token_has_a_key_of_its_own():
    for options in (dict(), dict(top_p=0.99), dict(top_k=4)):
        sampled = drawn(table=jnp.zeros((4, 4)), temperature=1.0, **options)
        for i in range(4):
            for j in range(i):
                assert 0.1 < (sampled[:, i] == sampled[:, j]).mean() < 0.45, (i, j, options)


def test_any_of_several_stop_tokens_stops():
    free, stopped = drawn(16, temperature=1.0), drawn(16, temperature=1.0, stop_token=[0, 2])
    ends = np.isin(free, [0, 2])
    assert set(stopped[:, -1]) == {0, 1, 2, 3}
    for row, wanted, end in zip(stopped, free, ends, strict=True):
        stop = int(np.argmax(end)) if end.any() else len(end)
        np.testing.assert_array_equal(row[: stop + 1], wanted[: stop + 1])
        assert (row[stop:] == row[min(stop, 15)]).all()


def test_a_stream_is_the_generation_and_ends_where_every_sample_has_stopped():
    model, prompt, mask = language_model(), tokens((2, 4)), jnp.arange(4) >= jnp.array([[0], [2]])
    call = dict(temperature=9.0, top_p=0.99, mask=mask)
    wanted = model.generate(prompt, 8, rngs=nnx.Rngs(0), **call)
    found = list(model.stream(prompt, 8, rngs=nnx.Rngs(0), **call))
    np.testing.assert_array_equal(jnp.stack(found, 1), wanted)
    before = generation._round._cache_size()
    list(model.stream(prompt, 8, rngs=nnx.Rngs(1), **call))
    assert generation._round._cache_size() == before
    ones = jnp.full((4, 4), -jnp.inf).at[jnp.arange(4), jnp.array([1, 2, 3, 0])].set(0.0)  # counts on
    found = list(zoo.stream(Bigrams(ones), jnp.array([[0], [1]]), 10, stop_token=3))
    np.testing.assert_array_equal(jnp.stack(found, 1), [[1, 2, 3], [2, 3, 3]])
    with pytest.raises(ValueError, match="num_tokens"):
        model.stream(prompt, 0)  # at once, not at the first token


def test_an_id_out_of_range_is_refused_or_gives_no_token():
    model, good = language_model(), tokens((1, 3))
    for wrong in (-1, -11, 11, 2**31 - 1, -(2**31)):
        bad = good.at[0, 1].set(wrong)
        with pytest.raises(ValueError, match=f"generate: prompt must be in 0..10, got {wrong}"):
            model.generate(bad, 2)
        padded, mask = jnp.concatenate([bad[:, 1:2], good], 1), jnp.arange(4)[None] > 0
        np.testing.assert_array_equal(model.generate(padded, 2, mask=mask), model.generate(good, 2))
    both = jnp.concatenate([good, good.at[0, 1].set(-1)])
    for options in (dict(), dict(temperature=1.0), dict(temperature=1.0, top_p=0.5)):
        found = jax.jit(lambda x, options=options: model.generate(x, 3, rngs=nnx.Rngs(0), **options))(both)
        assert (found[0] >= 0).all() and (found[1] == -1).all()


def test_models_that_cannot_generate_are_refused():
    with pytest.raises(TypeError, match="model must have init_cache and extend, got a Encoder"):
        zoo.generate(language_model().encoder, tokens((1, 3)), 2)
    plain = type("Plain", (), {"init_cache": Bigrams.init_cache, "extend": Bigrams.extend})
    with pytest.raises(TypeError, match="model must be an nnx.Module or a pytree, got a Plain"):
        zoo.generate(plain(), tokens((1, 3)), 2)


def test_numbers_of_numpy_and_jax_are_numbers():
    model, prompt = language_model(), tokens((1, 3))
    draw = lambda count, **sampling: model.generate(prompt, count, rngs=nnx.Rngs(0), **sampling)
    expected = draw(4, temperature=1.0, top_k=3, top_p=0.5, stop_token=2)
    for kinds in ((np.int64, np.float64), (jnp.int32, jnp.float32)):
        whole, real = kinds
        found = draw(whole(4), temperature=real(1), top_k=whole(3), top_p=real(0.5), stop_token=whole(2))
        np.testing.assert_array_equal(found, expected)
    assert len(list(model.stream(prompt, np.int64(4)))) == 4


@pytest.mark.parametrize(
    "arguments",
    [dict(num_tokens=2.0), dict(num_tokens=True), dict(top_k=2.0), dict(stop_token=2.7), dict(stop_token=[1, 2.5]),
     dict(temperature="1"), dict(temperature=True), dict(temperature=None), dict(top_p="high"), dict(draft_tokens=1.5)],
    ids=str,
)  # fmt: skip
def test_what_is_no_number_is_refused(arguments):
    (word,) = arguments
    arguments = {"num_tokens": 2, "temperature": 1.0, "rngs": nnx.Rngs(0), **arguments}
    with pytest.raises(TypeError, match=f"generate: {word} must be an? (number|integer) that is known outside of jax.jit, got"):
        language_model().generate(tokens((1, 3)), **arguments)


def test_what_generate_draws_from():
    model, prompt = language_model(), tokens((1, 3))
    greedy = model.generate(prompt, 3, rngs=nnx.Rngs(params=0))  # which are not drawn from
    np.testing.assert_array_equal(greedy, model.generate(prompt, 3))
    draw = lambda rngs: model.generate(prompt, 5, temperature=2.0, rngs=rngs)
    np.testing.assert_array_equal(draw(nnx.Rngs(dropout=0).dropout), draw(nnx.Rngs(dropout=0)))
    with pytest.raises(ValueError, match="generate: rngs must have a stream 'dropout' or a default one, got those of params"):
        draw(nnx.Rngs(params=0))
    for wrong in (jax.random.key(0), 0):
        with pytest.raises(TypeError, match="generate: rngs must be an nnx.Rngs, got"):
            draw(wrong)
    with pytest.raises(TypeError, match="temperature must be a number that is known"):
        jax.jit(lambda temperature: model.generate(prompt, 2, temperature=temperature))(1.0)
    with pytest.raises(ValueError, match="draft_tokens must be left out without a draft, got 4"):
        model.generate(prompt, 2, draft_tokens=4)
