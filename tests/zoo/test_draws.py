"""Where each draw of a model acts: every dropout, by a mask of its own, and every sampled token by a key of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad import zoo
from subquad.zoo.block import Block

TOKENS = np.arange(24).reshape(2, 12) % 11
SIZES = dict(vocab_size=11, in_features=64, num_layers=2, mlp_features=32, max_length=12)


class Ones(nnx.Module):
    """A mixer, network or normalisation that says 1 everywhere: what remains is dropout."""

    def __call__(self, inputs, **_):
        return jnp.ones_like(inputs)


class Same(nnx.Module):
    def __call__(self, inputs):
        return inputs


def encoder(rate, **options):
    return zoo.Encoder(**{**SIZES, **options}, mixer=lambda **_: Ones(), dropout_rate=rate, rngs=nnx.Rngs(0))


def test_everything_can_be_dropped():
    """Dropout of rate 1 after the embeddings, every mixer and every network leaves nothing."""
    call = dict(deterministic=False, rngs=nnx.Rngs(dropout=0))
    model = encoder(1.0)
    model.norm = Same()
    np.testing.assert_array_equal(model(TOKENS, **call), 0)
    block, x = model.blocks[0], jax.random.normal(jax.random.key(0), (2, 12, 64))
    np.testing.assert_array_equal(block(x, **call), x)
    bare = Block(Ones(), 64, mlp_features=0, dropout_rate=1.0, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(bare(x, **call), x)


def shares(sums, parts):
    """How often each number of the kept ones occurs among `parts` dropouts of rate 1/2, and how often it should."""
    kept = np.bincount(np.asarray(sums / 2, int).ravel(), minlength=parts + 1) / sums.size
    return kept, np.array([1, 2, 1]) / 4 if parts == 2 else np.array([1, 4, 6, 4, 1]) / 16


def test_mixer_and_network_drop_by_masks_of_their_own():
    block = Block(Ones(), 64, mlp_features=32, dropout_rate=0.5, rngs=nnx.Rngs(0))
    block.mlp = Ones()
    sums = block(jnp.zeros((8, 12, 64)), deterministic=False, rngs=nnx.Rngs(dropout=0))
    kept, expected = shares(sums, 2)
    np.testing.assert_allclose(kept, expected, atol=0.04)


def test_layers_drop_by_masks_of_their_own():
    model = encoder(0.5, positions=None, embedding_init=nnx.initializers.zeros)
    model.norm = Same()
    for block in model.blocks:
        block.mlp = Ones()
    run = lambda rngs: model(np.tile(TOKENS, (4, 1)), deterministic=False, rngs=rngs)
    rngs = nnx.Rngs(dropout=0)
    first, second = run(rngs), run(rngs)
    kept, expected = shares(first, 4)
    np.testing.assert_allclose(kept, expected, atol=0.04)
    # Nor is a call's mask that of the call before, or a sample's that of its neighbour, or a token's that of the next.
    for one, other in ((first, second), (first[:4], first[4:]), (first[:, 1:], first[:, :-1])):
        assert abs(np.corrcoef(np.ravel(one), np.ravel(other))[0, 1]) < 0.1


def test_embeddings_drop_by_a_mask_of_their_own():
    model = encoder(0.5, positions=None, num_layers=1, mlp_features=0, embedding_init=nnx.initializers.constant(3.0))
    model.norm = Same()
    sums = model(np.tile(TOKENS, (4, 1)), deterministic=False, rngs=nnx.Rngs(dropout=0))
    found = [float((sums == value).mean()) for value in (0, 2, 6, 8)]  # 6 of the embedding, 2 of the mixer
    np.testing.assert_allclose(found, 0.25, atol=0.04)


def test_every_token_is_drawn_by_a_key_of_its_own():
    """Where all logits are equal, tokens are uniform draws: none follows from its neighbour in time or in the batch."""
    model = zoo.CausalLM(
        **SIZES | dict(num_layers=1, mlp_features=0), mixer="performer", mixer_options=dict(num_heads=2, num_features=4),
        embedding_init=nnx.initializers.zeros, rngs=nnx.Rngs(0),
    )
    prompt, call = np.zeros((150, 2), int), dict(temperature=1.0, rngs=nnx.Rngs(dropout=0))
    at_once = np.asarray(model.generate(prompt, 6, **call))
    one_by_one = np.stack(list(zoo.stream(model, prompt, 6, **call)), axis=1)
    for drawn in (at_once, one_by_one):
        for i in range(6):
            for j in range(i):
                assert (drawn[:, i] == drawn[:, j]).mean() < 0.25, f"tokens {j} and {i} of 11 possible ones are mostly equal"
            assert np.bincount(drawn[:, i], minlength=11).max() < 40
    assert (at_once == one_by_one).mean() < 0.25  # the next call draws anew


DROPS = {
    "softmax": lambda: zoo.SoftmaxAttention(2, 16, dropout_rate=0.5, rngs=nnx.Rngs(0)),
    "lightconv": lambda: zoo.LightConv(16, num_heads=2, dropout_rate=0.5, rngs=nnx.Rngs(0)),
    "lsra": lambda: zoo.LSRA(16, num_heads=2, dropout_rate=0.5, rngs=nnx.Rngs(0)),
    "experts": lambda: zoo.Experts(16, 8, num_experts=2, dropout_rate=0.5, rngs=nnx.Rngs(0)),
    "block": lambda: Block(Ones(), 16, mlp_features=0, dropout_rate=0.5, rngs=nnx.Rngs(0)),
}
X = jax.random.normal(jax.random.key(0), (2, 12, 16))


@pytest.mark.parametrize("name", DROPS)
def test_flaxs_view_turns_dropout_on_and_off(name):
    layer = DROPS[name]()
    on = nnx.view(layer, deterministic=False)
    assert (on(X, rngs=nnx.Rngs(0)) != on(X, rngs=nnx.Rngs(1))).any()
    np.testing.assert_array_equal(layer(X), nnx.view(on, deterministic=True)(X))
    assert nnx.view(zoo.LinearAttention(2, 16, rngs=nnx.Rngs(0)), deterministic=False)(X).shape == X.shape  # it draws nothing


@pytest.mark.parametrize("name", DROPS)
def test_what_a_call_draws_from(name):
    layer = DROPS[name]()
    draw = lambda rngs: layer(X, deterministic=False, rngs=rngs)
    stream = nnx.Rngs(dropout=0).dropout  # as Flax's attention takes it; it counts on
    rngs = nnx.Rngs(dropout=0)
    one, other = draw(stream), draw(stream)
    np.testing.assert_array_equal(one, draw(rngs))
    np.testing.assert_array_equal(other, draw(rngs))
    assert (one != other).any()
    for wrong in (jax.random.key(0), 0):
        with pytest.raises(TypeError, match=r"rngs must be an nnx.Rngs, got .*Pass nnx.Rngs\(dropout=key\)"):
            draw(wrong)
    if name != "block":  # whose dropout is Flax's
        with pytest.raises(ValueError, match="rngs must have a stream 'dropout' or a default one, got those of params"):
            draw(nnx.Rngs(params=0))


def test_rngs_of_a_constructor_without_parameters():
    with pytest.raises(ValueError, match="SoftmaxAttention: rngs must have a stream 'params' or a default one, got those of"):
        zoo.SoftmaxAttention(2, 16, rngs=nnx.Rngs(dropout=0))
    with pytest.raises(TypeError, match="SoftmaxAttention: rngs must be an nnx.Rngs, got int"):
        zoo.SoftmaxAttention(2, 16, rngs=0)
