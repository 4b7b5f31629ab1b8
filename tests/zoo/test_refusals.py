"""What no layer takes, asked of every layer that could: refused by name, with what there is instead."""

import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad import zoo

from .cases import CASES, EXTENDING, FEATURES, inputs, sampled

CROSS = [name for name in CASES if CASES[name].supports.cross]


def refused(name, words, kind=ValueError):
    return pytest.raises(kind, match=f"^{zoo.LAYERS[name].__name__}(:| does not support) ({words})")


@pytest.mark.parametrize("name", CROSS)
def test_keys_of_another_batch(name):
    layer = CASES[name].make()
    for shape, batch in (((1, 5), (2,)), ((3, 5), (2,)), ((2, 1, 5), (2,)), ((5,), (2,))):
        with refused(name, re.escape(f"inputs_kv must have the batch axes {batch} of inputs_q, got {(*shape, FEATURES)}")):
            layer(inputs(7), jnp.ones((*shape, FEATURES)))
    with refused(name, r"inputs_kv must have the batch axes \(1, 2\)"):
        layer(inputs(7)[None], inputs(5))
    assert layer(inputs(7)[0], inputs(5)[0]).shape == (7, FEATURES)


@pytest.mark.parametrize("name", CROSS)
def test_keys_of_other_features_or_kind(name):
    layer = CASES[name].make()
    with refused(name, rf"inputs_kv must have shape .*{FEATURES}"):
        layer(inputs(7), jnp.ones((2, 5, FEATURES + 1)))
    with refused(name, "inputs_kv must be an array of floating-point", TypeError):
        layer(inputs(7), jnp.ones((2, 5, FEATURES), int))
    with refused(name, "inputs_kv must have a token"):
        layer(inputs(7), inputs(5)[:, :0])
    with refused(name, "mask must be|mask must have"):
        layer(inputs(7), inputs(5), mask=jnp.ones((2, 1, 1, 7), bool))  # of the queries
    for word in ("positions", "segment_ids"):
        with refused(name, f"{word}: |{word} must be None in cross-attention"):
            layer(inputs(7), inputs(5), **{word: jnp.zeros(7, int)})


@pytest.mark.parametrize("name", [name for name in CROSS if CASES[name].supports.causal])
def test_a_causal_layer_has_no_other_keys(name):
    with refused(name, "inputs_kv must be None when is_causal"):
        CASES[name].make(True)(inputs(7), inputs(7, seed=1))


@pytest.mark.parametrize("name", EXTENDING)
def test_extend_takes_one_batch_axis(name):
    layer = CASES[name].make(True)
    cache = layer.init_cache(2, 7)
    for wrong in (inputs(3)[None], inputs(3)[:, None], inputs(3)[0]):
        with refused(name, re.escape(f"inputs must have shape [B, T, D] in extend, got {wrong.shape}")):
            layer.extend(wrong, cache)
    with refused(name, "inputs must have shape"):
        layer.extend(inputs(3)[..., :5], cache)
    with refused(name, "inputs must have a token"):
        layer.extend(inputs(3)[:, :0], cache)
    with refused(name, "inputs must be an array of floating-point", TypeError):
        layer.extend(np.ones((2, 3, FEATURES), int), cache)
    for shape in ((2, 3), (2, 1, 3, 3), (2, 1, 1, 4), (3, 1, 1, 3)):
        with refused(name, "mask must be|mask must have"):
            layer.extend(inputs(3), cache, mask=jnp.ones(shape, bool))
    with refused(name, "mask must be a boolean array", TypeError):
        layer.extend(inputs(3), cache, mask=jnp.ones((2, 1, 1, 3)))


@sampled
@pytest.mark.parametrize("name", EXTENDING)
def test_the_cache_of_a_wider_layer_of_the_same_name(name):
    layer, options = CASES[name].make(True), CASES[name].options
    words = {word: 2 * options[word] for word in ("hidden_features", "value_features") if word in options}
    wider = zoo.make(name, in_features=2 * FEATURES, is_causal=True, rngs=nnx.Rngs(0), **{**options, **words})
    own, other = (jax.tree.map(jnp.shape, one.init_cache(2, 7)) for one in (layer, wider))
    if own == other:
        pytest.skip("its state is as large whatever the width")
    with refused(name, "cache must be of this layer, with an array of shape"):
        layer.extend(inputs(3), wider.init_cache(2, 7))


@pytest.mark.parametrize("name", CASES)
def test_a_layer_of_the_other_direction_says_so(name):
    """Each direction that a layer lacks is refused by its constructor, and each that it has is built as asked."""
    supports = CASES[name].supports
    for is_causal, has in ((True, supports.causal), (False, supports.bidirectional)):
        if has:
            layer = CASES[name].make(is_causal)
            assert layer.is_causal is is_causal
            assert np.triu(layer.pattern(6).any(0), 1).any() != is_causal
        else:
            with refused(name, f"is_causal={is_causal}: .* Use "):
                CASES[name].make(is_causal)
    default = inspect.signature(zoo.LAYERS[name].__init__).parameters["is_causal"].default
    assert default is not supports.bidirectional, "bidirectional where that exists"


@pytest.mark.parametrize("name", EXTENDING)
def test_what_is_not_causal_does_not_extend(name):
    if not CASES[name].supports.bidirectional:
        pytest.skip("causal only")
    layer = CASES[name].make(False)
    for call in (lambda: layer.init_cache(2, 7), lambda: layer.extend(inputs(3), None)):
        with refused(name, "is_causal must be True for init_cache and extend, got False"):
            call()


@pytest.mark.parametrize("name", CASES)
def test_options_of_another_kind(name):
    """What a command line or a file of settings may hand over in the place of a number, a flag or a dtype."""
    case, layer = CASES[name], zoo.LAYERS[name]
    for word, parameter in inspect.signature(layer.__init__).parameters.items():
        if isinstance(parameter.default, bool):
            with refused(name, f"{word} must be True or False, got 'false'"):
                case.make(**{"is_causal": not case.supports.bidirectional, word: "false"})
        elif isinstance(parameter.default, float) and word != "alpha":
            with refused(name, f"{word} must be a number in .*, got 'high'"):
                case.make(not case.supports.bidirectional, **{word: "high"})
    for word, value in (("dtype", "bf16"), ("dtype", jnp.int32), ("param_dtype", int)):
        with refused(name, f"{word} must be a floating-point dtype, got"):
            case.make(not case.supports.bidirectional, **{word: value})
    for rngs in (0, jax.random.key(0)):
        for made in (functools.partial(zoo.make, name), layer):
            with refused(name, "rngs must be an nnx.Rngs, got", TypeError):
                made(in_features=FEATURES, rngs=rngs, **case.options)


def test_a_mixer_without_heads_sows_no_weights():
    with refused("s4", "sow_weights: its weights are never stored. Use "):
        CASES["s4"].make()(inputs(3), sow_weights=True)


@sampled
@pytest.mark.parametrize("name", CASES)
def test_words_of_flaxs_calls_are_taken_where_they_say_what_the_layer_is(name):
    is_causal = not CASES[name].supports.bidirectional
    layer = CASES[name].make(is_causal)
    for same in (is_causal, np.bool_(is_causal), None):
        assert jax.eval_shape(lambda x, same=same: layer(x, decode=False, is_causal=same), inputs(7)).shape == (2, 7, FEATURES)
    with refused(name, "decode must be False or None, got True. Use init_cache and extend"):
        layer(inputs(7), decode=True)
    with refused(name, f"is_causal must be {is_causal}, as the layer was built, or None, got {not is_causal}. Pass"):
        layer(inputs(7), is_causal=not is_causal)
    with refused(name, "inputs_k must be called inputs_kv", TypeError):
        layer(inputs(7), inputs_k=inputs(7))
    with refused(name, "maks must be a word of a call, got maks=None. Did you mean 'mask'", TypeError):
        layer(inputs(7), maks=None)


@sampled
@pytest.mark.parametrize("name", CASES)
def test_a_word_is_no_flag_and_a_flag_no_mask(name):
    case, layer = CASES[name], zoo.LAYERS[name]
    words = {word for one in layer.__mro__ if "__init__" in vars(one)
             for word, parameter in inspect.signature(one.__init__).parameters.items() if parameter.default in (True, False)
             and isinstance(parameter.default, bool)}  # fmt: skip
    assert words
    for word in words:
        with refused(name, f"{word} must be True or False, got 'false'"):
            layer(in_features=FEATURES, rngs=nnx.Rngs(0), **{**case.options, word: "false"})
    layer = case.make(not case.supports.bidirectional)
    for mask in (True, np.True_):
        with refused(name, "mask must be a boolean array, True = attend, got .*True.*. Leave it out", TypeError):
            layer(inputs(7), mask=mask)


def test_numbers_that_no_array_has():
    for name in ("softmax", "s4"):
        for length in (-1, 2.0):
            with refused(name, f"length must be an integer of at least 0, got {length}"):
                CASES[name].make().pattern(length)
        for dtype in ("int8", "bf16"):
            with refused(name, f"dtype must be a floating-point dtype, got '{dtype}'"):
                CASES[name].make(True).init_cache(2, 4, dtype)


def test_words_are_no_flags_of_functions_and_models():
    sizes = dict(vocab_size=5, in_features=16, num_layers=1, mlp_features=8, max_length=9, mixer_options=dict(num_heads=2))
    for make, word in (
        (lambda **flag: zoo.attention_fn("softmax", **flag), "is_causal"),
        (lambda **flag: zoo.Encoder(**sizes, **flag, rngs=nnx.Rngs(0)), "reversible"),
        (lambda **flag: zoo.CausalLM(**sizes, **flag, rngs=nnx.Rngs(0)), "tie_embeddings"),
        (lambda **flag: zoo.FeedForward(4, 8, **flag, rngs=nnx.Rngs(0)), "use_bias"),
        (lambda **flag: zoo.FeedForward(4, 8, **flag, rngs=nnx.Rngs(0)), "is_gated"),
        (lambda **flag: zoo.Experts(4, 8, num_experts=2, top_k=2, **flag, rngs=nnx.Rngs(0)), "drop_second"),
    ):
        with pytest.raises(ValueError, match=f"{word} must be True or False, got 'false'"):
            make(**{word: "false"})
        make(**{word: np.False_})


def test_what_completion_shows():
    assert {"masks", "positions", "interop", "SoftmaxAttention", "convert"} < set(dir(zoo)) == set(zoo.__all__)
