"""Every option of every model reaches it: the shapes it has, what it starts from, what it computes."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad import zoo
from subquad.zoo.encoder import EncoderOptions

SIZES = dict(vocab_size=11, in_features=16, num_layers=2, mlp_features=24, max_length=20, mixer="local",
             mixer_options=dict(num_heads=2, window_size=3))  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 11, (2, 12))
ONES = nnx.initializers.ones

# The variables of an encoder with an option, and their shapes; None: there is no such variable.
SHAPES = [
    (dict(vocab_size=13), {"embed/embedding": (13, 16)}),
    (dict(in_features=8), {"embed/embedding": (11, 8), "blocks/0/mixer/query/kernel": (8, 2, 4), "norm/scale": (8,)}),
    (dict(num_layers=3), {"blocks/2/mlp/inner/kernel": (16, 24), "blocks/3/mlp/inner/kernel": None}),
    (dict(num_layers=1), {"blocks/1/mlp/inner/kernel": None}),
    (dict(mlp_features=5), {"blocks/1/mlp/inner/kernel": (16, 5), "blocks/1/mlp/outer/kernel": (5, 16)}),
    (dict(mlp_features=0), {"blocks/0/mlp/inner/kernel": None, "blocks/0/mlp_norm/scale": None}),
    (dict(max_length=30), {"positions/embedding": (30, 16)}),
    (dict(positions=None), {"positions/embedding": None}),
    (dict(positions="sinusoidal"), {"positions/embedding": None}),
    (dict(mixer="softmax", mixer_options=dict(num_heads=4)), {"blocks/1/mixer/query/kernel": (16, 4, 4)}),
    (dict(mixer=["local", "softmax"], mixer_options=[dict(num_heads=2), dict(num_heads=4, num_kv_heads=1)]),
     {"blocks/0/mixer/key/kernel": (16, 2, 8), "blocks/1/mixer/key/kernel": (16, 1, 4)}),
]  # fmt: skip


def variables(model) -> dict[str, np.ndarray]:
    return {"/".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def encoder(**options):
    return zoo.Encoder(**{**SIZES, **options}, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("options,shapes", SHAPES, ids=lambda value: ",".join(value))
def test_shapes(options, shapes):
    found = {path: leaf.shape for path, leaf in variables(encoder(**options)).items()}
    assert {path: found.get(path) for path in shapes} == shapes


def test_an_embedding_of_the_users():
    given = nnx.Embed(7, 16, rngs=nnx.Rngs(9))
    for words in (dict(SIZES, vocab_size=None), dict(SIZES, vocab_size=7)):
        for kind in (zoo.Encoder, zoo.CausalLM):
            model = kind(**words, embed=given, rngs=nnx.Rngs(0))
            model = model if kind is zoo.Encoder else model.encoder
            assert model.embed is given and model.vocab_size == 7
    for kind in (zoo.Encoder, zoo.CausalLM):
        with pytest.raises(ValueError, match="vocab_size must be None, or embed's num_embeddings = 7, got 8"):
            kind(**dict(SIZES, vocab_size=8), embed=given, rngs=nnx.Rngs(0))


def test_initialisers_that_would_draw_nothing():
    for name, options in (("embedding_init", dict(embed=nnx.Embed(11, 16, rngs=nnx.Rngs(9)))),
                          ("position_init", dict(positions="sinusoidal")), ("position_init", dict(positions=None))):
        with pytest.raises(ValueError, match=f"Encoder: {name} must be left out with {next(iter(options))}"):
            encoder(**options, **{name: ONES})


def test_initialisers_and_dtypes():
    found = variables(encoder(embedding_init=ONES, position_init=nnx.initializers.constant(2.0)))
    assert (found["embed/embedding"] == 1).all() and (found["positions/embedding"] == 2).all()
    table = variables(encoder(vocab_size=4000, in_features=64))["embed/embedding"]  # of variance 1 / D
    assert table.var() == pytest.approx(1 / 64, rel=0.02) and abs(table.mean()) < 2e-3
    for model in (
        encoder(param_dtype=jnp.bfloat16), zoo.Classifier(3, **SIZES, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)),
        zoo.DualEncoder(3, **SIZES, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)),
        zoo.CausalLM(**SIZES, tie_embeddings=False, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)),
    ):  # fmt: skip
        assert {str(leaf.dtype) for leaf in variables(model).values()} == {"bfloat16"}
    half = dict(SIZES, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    shape = lambda model, *tokens: jax.eval_shape(model, *tokens).dtype
    assert shape(zoo.Encoder(**half), TOKENS) == shape(zoo.Classifier(3, **half), TOKENS) == jnp.bfloat16
    assert shape(zoo.DualEncoder(3, **half), TOKENS, TOKENS) == shape(zoo.CausalLM(**half), TOKENS) == jnp.bfloat16
    modules = [module for _, module in nnx.iter_graph(zoo.Encoder(**half)) if hasattr(module, "dtype")]
    kinds = (nnx.Linear, nnx.LinearGeneral, nnx.LayerNorm, nnx.Embed)
    assert {module.dtype for module in modules if isinstance(module, kinds)} == {jnp.bfloat16}


def test_the_order_of_a_block():
    """Normalisation before the mixer and before the network, and what came in is added to what comes out of each."""
    (block,) = encoder(num_layers=1).blocks
    x = jax.random.normal(jax.random.key(0), (2, 12, 16))
    for norm in (block.mixer_norm, block.mlp_norm):
        norm.scale[...] = jax.random.normal(jax.random.key(1), (16,))

    def normal(x, norm):
        centred = x - x.mean(-1, keepdims=True)
        return centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * norm.scale[...] + norm.bias[...]

    hidden = x + block.mixer(normal(x, block.mixer_norm))
    inner = normal(hidden, block.mlp_norm) @ block.mlp.inner.kernel[...] + block.mlp.inner.bias[...]
    want = hidden + jax.nn.gelu(inner) @ block.mlp.outer.kernel[...] + block.mlp.outer.bias[...]
    np.testing.assert_allclose(block(x), want, atol=2e-5)


def test_what_the_encoder_adds_up():
    for kind in (None, "learned", "sinusoidal"):
        model = encoder(positions=kind, num_layers=1, mlp_features=0)
        model.blocks[0].mixer.out.kernel[...] = jnp.zeros((2, 8, 16))  # the mixer says nothing
        added = {
            None: 0,
            "learned": model.positions.embedding[...][:12] if kind == "learned" else 0,
            "sinusoidal": zoo.positions.sinusoidal(jnp.arange(12), 16),
        }[kind]
        want = model.norm(model.embed.embedding[...][TOKENS] + added)
        np.testing.assert_allclose(model(TOKENS), want, atol=1e-5)


def test_heads():
    deep = variables(zoo.Classifier(3, head_features=(9, 5), **SIZES, rngs=nnx.Rngs(0)))
    assert [deep[f"head/{name}/kernel"].shape for name in ("inner/0", "inner/1", "outer")] == [(16, 9), (9, 5), (5, 3)]
    assert variables(zoo.Classifier(3, **SIZES, rngs=nnx.Rngs(0)))["head/outer/kernel"].shape == (16, 3)
    pair = lambda **options: variables(zoo.DualEncoder(3, **options, **SIZES, rngs=nnx.Rngs(0)))
    assert pair()["head/inner/0/kernel"].shape == (64, 16) and pair()["head/outer/kernel"].shape == (16, 3)
    assert pair(head_features=(), interaction="concat")["head/outer/kernel"].shape == (32, 3)


@pytest.mark.parametrize("interaction", ["nli", "concat"])
@pytest.mark.parametrize("pooling", ["mean", "max", "first", "last"])
def test_what_the_heads_see(interaction, pooling):
    """The vectors of each sequence, of its real tokens alone wherever they stand, in the order of eq. 1 of LRA."""
    options = {**SIZES, "mixer": lambda **_: Nothing(), "mixer_options": None, "mlp_features": 0, "positions": None}
    model = zoo.DualEncoder(3, pooling=pooling, interaction=interaction, head_features=(), **options, rngs=nnx.Rngs(0))
    mask = jnp.array([[False] * 3 + [True] * 5 + [False] + [True] * 2 + [False], [True] * 4 + [False] * 8])
    other, other_mask = TOKENS[:, ::-1], mask[:, ::-1]

    def pooled(tokens, mask):
        hidden = np.asarray(model.encoder.norm(model.encoder.embed(tokens)))
        pick = {"mean": lambda x: x.mean(0), "max": lambda x: x.max(0), "first": lambda x: x[0], "last": lambda x: x[-1]}
        return np.stack([pick[pooling](hidden[i][np.asarray(mask[i])]) for i in range(2)])

    a, b = pooled(TOKENS, mask), pooled(other, other_mask)
    seen = [a, b, a * b, a - b] if interaction == "nli" else [a, b]
    want = np.concatenate(seen, -1) @ model.head.outer.kernel[...] + model.head.outer.bias[...]
    np.testing.assert_allclose(model(TOKENS, other, mask=mask, other_mask=other_mask), want, atol=2e-5)


class Nothing(nnx.Module):
    def __call__(self, inputs, **_):
        return jnp.zeros_like(inputs)


def test_every_option_has_a_test():
    tested = {word for options, _ in SHAPES for word in options} | {"embedding_init", "position_init", "dtype", "param_dtype"}
    # In test_draws, test_model, test_block, test_reversible and test_stack.
    tested |= {"embed", "dropout_rate", "remat", "norm", "norm_order", "reversible", "drop_path_rate", "experts"}
    tested |= {"layer_groups"}
    assert set(EncoderOptions.__annotations__) <= tested, "a new option needs a row in SHAPES or a test"
    known = {"pooling", "interaction", "head_features", "num_classes", "tie_embeddings"} | tested | {"self", "rngs", "encoder"}
    for model in (zoo.Encoder, zoo.Classifier, zoo.DualEncoder, zoo.CausalLM):
        assert set(inspect.signature(model.__init__).parameters) <= known
