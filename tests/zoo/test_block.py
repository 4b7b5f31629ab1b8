"""The residual block: where dropout acts, and that no two draws are one."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad import zoo
from subquad.zoo.model import INTERACTIONS


class Ones(nnx.Module):
    """A mixer whose every output is 1."""

    def __init__(self, in_features, rngs):
        pass

    def __call__(self, inputs, **call):
        return jnp.ones_like(inputs)


def block_of_ones(rate, mlp_features=4):
    block = zoo.Block(Ones(8, nnx.Rngs(0)), 8, mlp_features=mlp_features, dropout_rate=rate, rngs=nnx.Rngs(0))
    if mlp_features:
        block.mlp.outer.kernel[...] *= 0
        block.mlp.outer.bias[...] += 10
    return block


def test_dropout_acts_after_the_mixer_and_after_the_network_with_a_draw_of_its_own():
    x = jnp.zeros((4, 50, 8))
    added = np.asarray(block_of_ones(0.5)(x, deterministic=False, rngs=nnx.Rngs(0)))
    assert set(np.unique(added)) == {0, 2, 20, 22}
    for value in (0, 2, 20, 22):  # a quarter each: the two draws know nothing of each other
        assert abs((added == value).mean() - 0.25) < 0.05
    np.testing.assert_array_equal(block_of_ones(0.5)(x, rngs=nnx.Rngs(0)), 11 + x)
    np.testing.assert_array_equal(block_of_ones(1.0)(x + 3, deterministic=False, rngs=nnx.Rngs(0)), x + 3)
    np.testing.assert_array_equal(block_of_ones(1.0, mlp_features=0)(x + 3, deterministic=False, rngs=nnx.Rngs(0)), x + 3)


def test_embeddings_are_dropped():
    options = dict(vocab_size=5, in_features=8, num_layers=1, mlp_features=0, max_length=50, positions=None, mixer=Ones)
    seen = []

    class Seen(Ones):
        def __call__(self, inputs, **call):
            seen.append(inputs)
            return 0 * inputs

    model = zoo.Encoder(**{**options, "mixer": Seen}, dropout_rate=0.5, rngs=nnx.Rngs(0))
    model.blocks[0].mixer_norm = lambda hidden: hidden
    model.embed.embedding[...] = jnp.ones((5, 8))
    model(jnp.zeros((4, 50), jnp.int32), deterministic=False, rngs=nnx.Rngs(0))
    assert set(np.unique(seen[0])) == {0, 2} and abs((seen[0] == 0).mean() - 0.5) < 0.05


def test_layers_and_sequences_draw_apart():
    options = dict(vocab_size=5, in_features=8, num_layers=2, mlp_features=0, max_length=50, positions=None, mixer=Ones)
    model = zoo.Encoder(**options, dropout_rate=0.5, rngs=nnx.Rngs(0))
    model.embed.embedding[...] *= 0
    model.norm = lambda hidden: hidden
    added = np.asarray(model(jnp.zeros((4, 50), jnp.int32), deterministic=False, rngs=nnx.Rngs(0)))
    assert set(np.unique(added)) == {0, 2, 4} and abs((added == 2).mean() - 0.5) < 0.05
    dual = zoo.DualEncoder(2, interaction="concat", **options, dropout_rate=0.5, rngs=nnx.Rngs(0))
    pooled = []
    dual.head = lambda both: pooled.append(both) or both
    x = jnp.zeros((4, 50), jnp.int32)
    dual(x, x, deterministic=False, rngs=nnx.Rngs(0))
    a, b = jnp.split(pooled[0], 2, axis=-1)
    assert (a != b).any() and set(INTERACTIONS) == {"nli", "concat"}


def test_what_a_block_cannot_be_is_refused():
    for options, word in ((dict(mlp_features=-1), "mlp_features"), (dict(mlp_features=1, dropout_rate=2), "dropout_rate")):
        with pytest.raises(ValueError, match=f"Block: {word} must"):
            zoo.Block(Ones(8, nnx.Rngs(0)), 8, **options, rngs=nnx.Rngs(0))
