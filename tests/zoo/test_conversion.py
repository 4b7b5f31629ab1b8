"""A model's attention changed for another mechanism."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from subquad import zoo

from .cases import CASES, DIRECTIONS, FEATURES, inputs, label, sampled


def flax_model(**words) -> nnx.Module:
    return nnx.Sequential(nnx.MultiHeadAttention(4, FEATURES, decode=False, **dict(rngs=nnx.Rngs(0)) | words))


def agree(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "words", [{}, dict(num_kv_heads=2), dict(use_bias=False), dict(qkv_features=8, out_features=24)], ids=str
)
def test_flaxs_attention_as_softmax_says_the_same(words):
    model = flax_model(**words)
    converted = zoo.convert(model, "softmax", rngs=nnx.Rngs(1))
    (change,) = converted.changes
    assert not change.new and not change.lost
    agree(converted.model(inputs(9)), model(inputs(9)))


def test_cross_attention_keeps_its_features():
    class Reader(nnx.Module):
        def __init__(self):
            self.read = nnx.MultiHeadAttention(2, FEATURES, in_kv_features=12, decode=False, rngs=nnx.Rngs(0))

        def __call__(self, x, memory):
            return self.read(x, memory)

    memory = jax.random.normal(jax.random.key(2), (2, 7, 12))
    model = Reader()
    agree(zoo.convert(model, "softmax", rngs=nnx.Rngs(1)).model(inputs(5), memory), model(inputs(5), memory))


def test_shared_keys_are_copied_where_the_new_layer_does_not_share():
    model = flax_model(num_kv_heads=2)
    whole = zoo.convert(model, "blockwise", max_length=9, block_size=9, shifts=[0] * 4, rngs=nnx.Rngs(1))
    assert whole.changes[0].after.key.kernel.shape == (FEATURES, 4, FEATURES // 4)
    agree(whole.model(inputs(9)), model(inputs(9)))


def test_what_a_layer_cannot_keep_is_said():
    model = flax_model(normalize_qk=True, dropout_rate=0.1, attention_fn=zoo.attention_fn("local", window_size=2))
    (change,) = zoo.convert(model, "reformer", rngs=nnx.Rngs(1)).changes
    assert set(change.lost) == {
        "key/kernel", "key/bias", "query_ln/scale", "key_ln/scale", "dropout of attention weights", "its attention_fn",
    }  # fmt: skip
    assert change.new == ("rotations",) and "loses key/bias" in str(change)
    assert zoo.convert(model, "softmax", rngs=nnx.Rngs(1)).changes[0].after.dropout_rate == 0.1


@sampled
@pytest.mark.parametrize("name,is_causal", DIRECTIONS, ids=label)
def test_any_layer_takes_the_place(name, is_causal):
    options = {word: value for word, value in CASES[name].options.items() if word not in ("num_heads", "num_kv_heads")}
    converted = zoo.convert(flax_model(), name, is_causal=is_causal, rngs=nnx.Rngs(1), **options)
    (change,) = converted.changes
    variables = {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.variables(change.after, nnx.Not(nnx.RngState)))}
    assert {*change.kept, *change.new} == variables
    assert jax.eval_shape(converted.model, inputs(9)).shape == (2, 9, FEATURES)


def test_a_layer_in_two_places_stays_one_and_the_model_stays_as_it_was():
    class Twice(nnx.Module):
        def __init__(self):
            self.first = nnx.MultiHeadAttention(2, FEATURES, decode=False, rngs=nnx.Rngs(0))
            self.layers = nnx.List([self.first, nnx.Linear(FEATURES, FEATURES, rngs=nnx.Rngs(0))])

    model = Twice()
    before = jax.tree.map(np.array, nnx.state(model))
    converted = zoo.convert(model, "local", window_size=3, rngs=nnx.Rngs(1))
    assert len(converted.changes) == 1 and converted.model.first is converted.model.layers[0]
    converted.model.first.query.kernel[...] = 0.0
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), before)
    assert isinstance(model.first, nnx.MultiHeadAttention)


def test_only_some_layers():
    model = zoo.CausalLM(
        vocab_size=7, in_features=FEATURES, num_layers=2, mlp_features=8, max_length=32, mixer="softmax",
        mixer_options=dict(num_heads=2, rotary_base=100.0), rngs=nnx.Rngs(0),
    )  # fmt: skip
    tokens = jnp.arange(10)[None] % 7
    converted = zoo.convert(model, "local", window_size=31, rngs=nnx.Rngs(1), only=lambda path: "blocks/1/" in path)
    mixers = [block.mixer for block in converted.model.encoder.blocks]
    assert [type(mixer) for mixer in mixers] == [zoo.SoftmaxAttention, zoo.LocalAttention]
    assert mixers[1].is_causal and mixers[1].rotary_base == 100.0
    # A window that holds the whole sequence.
    agree(converted.model(tokens), model(tokens))


def test_a_converted_model_learns_on():
    """A model that was trained with softmax reads another layer's outputs worse, and again well after few steps."""

    class Reader(nnx.Module):
        def __init__(self):
            self.mix = nnx.MultiHeadAttention(4, FEATURES, decode=False, rngs=nnx.Rngs(0))
            self.read = nnx.Linear(FEATURES, FEATURES, rngs=nnx.Rngs(1))

        def __call__(self, x):
            return self.read(self.mix(x))

    x = inputs(16, batch=8)
    target = jnp.flip(x, 1).mean(1, keepdims=True) + 0 * x

    def loss_of(model):
        return ((model(x) - target) ** 2).mean()

    def train(model, steps):
        optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer):
            loss, gradients = nnx.value_and_grad(loss_of)(model)
            optimizer.update(model, gradients)
            return loss

        return [float(step(model, optimizer)) for _ in range(steps)]

    model = Reader()
    untrained = train(model, 60)[0]
    trained = float(loss_of(model))
    converted = zoo.convert(model, "performer", num_features=64, rngs=nnx.Rngs(1)).model
    losses = train(converted, 30)
    assert trained < losses[0] < untrained and losses[-1] < (losses[0] + trained) / 2


class Stacked(nnx.Module):
    """Layers that are built by nnx.vmap and run by nnx.scan."""

    def __init__(self, make):
        self.layers = nnx.vmap(make)(nnx.Rngs(0).split(3))

    def __call__(self, x):
        return nnx.scan(lambda x, layer: x + layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)


@sampled
@pytest.mark.parametrize("name,is_causal", DIRECTIONS, ids=label)
def test_layers_that_are_stacked_stay_so(name, is_causal):
    model = Stacked(lambda rngs: nnx.MultiHeadAttention(4, FEATURES, decode=False, rngs=rngs))
    options = {word: value for word, value in CASES[name].options.items() if word not in ("num_heads", "num_kv_heads")}
    converted = zoo.convert(model, name, is_causal=is_causal, rngs=nnx.Rngs(1), **options)
    one = zoo.convert(flax_model(), name, is_causal=is_causal, rngs=nnx.Rngs(1), **options)
    assert converted.changes[0].kept == one.changes[0].kept
    graph, state = nnx.split(converted.model)
    assert jax.eval_shape(lambda state, x: nnx.merge(graph, state)(x), state, inputs(9)).shape == (2, 9, FEATURES)


def test_stacked_layers_keep_what_they_learned():
    model = Stacked(lambda rngs: nnx.MultiHeadAttention(4, FEATURES, num_kv_heads=2, decode=False, rngs=rngs))
    for name, options in (("softmax", {}), ("blockwise", dict(max_length=9, block_size=9, shifts=[0] * 4))):
        converted = zoo.convert(model, name, rngs=nnx.Rngs(1), **options)
        assert not converted.changes[0].new and not converted.changes[0].lost
        agree(converted.model(inputs(9)), model(inputs(9)))
    make = nnx.vmap(nnx.vmap(lambda rngs: nnx.MultiHeadAttention(4, FEATURES, decode=False, rngs=rngs)))
    pair = nnx.Dict(all=make(nnx.Rngs(0).split((2, 3))))
    (change,) = zoo.convert(pair, "softmax", rngs=nnx.Rngs(1)).changes
    np.testing.assert_array_equal(change.after.query.kernel[...], pair.all.query.kernel[...])
    assert change.after.query.kernel.ndim == 5


def test_stacked_along_another_axis_is_refused():
    make = nnx.vmap(lambda rngs: nnx.MultiHeadAttention(2, FEATURES, decode=False, rngs=rngs), out_axes=1)
    with pytest.raises(ValueError, match=r"query/kernel must end in \(16, 2, 8\), got \(16, 3, 2, 8\)"):
        zoo.convert(nnx.Dict(layers=make(nnx.Rngs(0).split(3))), "softmax", rngs=nnx.Rngs(1))


def test_a_conversion_that_keeps_nothing_is_refused_or_said():
    with pytest.raises(ValueError, match="convert: sizes of the new layer must be those of a projection of 'layers/0'"):
        zoo.convert(flax_model(use_bias=False), "linear", num_heads=2, num_kv_heads=2, rngs=nnx.Rngs(1))
    assert "keeps nothing" in str(zoo.convert(flax_model(), "mamba", is_causal=True, rngs=nnx.Rngs(1)).changes[0])


def test_dropout_stays_on_and_the_stream_that_went_is_said():
    model = flax_model(dropout_rate=0.5, deterministic=False)
    converted = zoo.convert(model, "softmax", rngs=nnx.Rngs(1))
    assert converted.changes[0].lost == ("its own stream of rngs (pass rngs in the call)",)
    layer = converted.model.layers[0]
    assert not layer.deterministic and (layer(inputs(9), rngs=nnx.Rngs(0)) != layer(inputs(9), rngs=nnx.Rngs(1))).any()
    assert zoo.convert(flax_model(dropout_rate=0.5), "softmax", rngs=nnx.Rngs(1)).model.layers[0].deterministic


def test_a_layer_without_queries_keeps_its_values():
    model = nnx.Sequential(zoo.SynthesizerAttention(2, FEATURES, max_length=9, rngs=nnx.Rngs(0)))
    (change,) = zoo.convert(model, "softmax", rngs=nnx.Rngs(1)).changes
    assert {"value/kernel", "out/kernel"} < set(change.kept) and "query/kernel" in change.new
    stacked = nnx.vmap(lambda rngs: zoo.SynthesizerAttention(2, FEATURES, max_length=9, rngs=rngs))(nnx.Rngs(0).split(3))
    (change,) = zoo.convert(nnx.Dict(layers=stacked), "softmax", rngs=nnx.Rngs(1)).changes
    assert change.after.query.kernel.shape == (3, FEATURES, 2, FEATURES // 2)


def test_a_rotation_that_the_new_layer_does_not_have_is_said():
    model = nnx.Sequential(zoo.SoftmaxAttention(2, FEATURES, rotary_base=100.0, is_causal=True, rngs=nnx.Rngs(0)))
    (change,) = zoo.convert(model, "gla", rngs=nnx.Rngs(1)).changes
    assert "rotary positions" in change.lost
    with pytest.raises(ValueError, match="rotary_base"):
        zoo.convert(model, "gla", rotary_base=100.0, rngs=nnx.Rngs(1))


def test_annotations_of_variables_stay():
    mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "model", None))
    with jax.set_mesh(mesh):
        model = flax_model(kernel_init=init)
        converted = zoo.convert(model, "linear", rngs=nnx.Rngs(1)).model
        for name in ("query", "key", "value", "out"):
            before, after = (getattr(one.layers[0], name).kernel for one in (model, converted))
            assert after.get_metadata("out_sharding") == (None, "model", None) == before.get_metadata("out_sharding")
            assert after[...].sharding == before[...].sharding


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((nnx.Linear(2, 2, rngs=nnx.Rngs(0)), "local"), "model must hold an attention layer, got none"),
        ((nnx.MultiHeadAttention(2, 4, decode=False, rngs=nnx.Rngs(0)), "local"), "be a module that holds"),
        ((flax_model(), "locl"), "local"),
        ((flax_model(), "linformer"), "LinformerAttention: max_length must be"),
        ((flax_model(), "local", dict(window=3)), "window_size"),
    ],
)
def test_refusals(arguments, message):
    model, name, *given = arguments
    with pytest.raises((ValueError, TypeError), match=message):
        zoo.convert(model, name, rngs=nnx.Rngs(0), **dict(*given))
