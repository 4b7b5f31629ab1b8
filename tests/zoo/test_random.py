"""RandomAttention: what it draws, and what that depends on."""

import jax
import numpy as np
import pytest
from flax import nnx

from subquad import zoo

from .patterned import FEATURES, check_dense, check_extend, check_support, inputs, padding


def make(is_causal=False, max_length=40, block_size=4, num_random=3, **options):
    return zoo.RandomAttention(
        4, FEATURES, max_length=max_length, block_size=block_size, num_random=num_random, is_causal=is_causal,
        rngs=nnx.Rngs(0), **options,
    )  # fmt: skip


@pytest.mark.parametrize("is_causal", [False, True])
def test_attends_to_its_pattern_and_nothing_else(is_causal):
    for length in (5, 38):
        check_support(make(is_causal), length)


@pytest.mark.sample(2)
@pytest.mark.parametrize("is_causal", [False, True])
def test_is_softmax_attention_under_its_pattern(is_causal):
    check_dense(make(is_causal), 29, padding(29))


@pytest.mark.parametrize("is_causal", [False, True])
def test_with_as_many_blocks_as_there_are_it_is_softmax_attention(is_causal):
    layer = make(is_causal, num_random=10)
    full = zoo.SoftmaxAttention(4, FEATURES, is_causal=is_causal, rngs=nnx.Rngs(1))
    nnx.update(full, nnx.state(layer))
    np.testing.assert_allclose(layer(inputs(40)), full(inputs(40)), atol=2e-6)


def test_draws_are_the_constructors():
    """The same at every length; others by head and by seed; in causal attention whatever the longest input."""
    whole = make().pattern(40)
    for length in (1, 17, 39):
        np.testing.assert_array_equal(make().pattern(length), whole[:, :length, :length])
    assert (whole[0] != whole[1]).any() and (whole != make(random_seed=1).pattern(40)).any()
    np.testing.assert_array_equal(make(True).pattern(40), make(True, max_length=400).pattern(40))


@pytest.mark.parametrize("cuts", [[1] * 12 + [25], [3, 17, 17]], ids=str)
def test_extend_in_any_cutting(cuts):
    check_extend(make(True), 37, cuts, padding(37), max_length=40)


def test_no_square_is_made():
    layer = make(max_length=512, block_size=16)
    assert "512,512" not in str(jax.make_jaxpr(jax.grad(lambda x: layer(x).sum()))(inputs(512)))


def test_refusals():
    for word, options in (
        ("block_size", dict(block_size=0)), ("max_length", dict(max_length=0)), ("num_random", dict(num_random=0)),
        ("random_seed", dict(random_seed=-1)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"RandomAttention: {word} must"):
            make(**options)
    with pytest.raises(ValueError, match="RandomAttention: inputs_q must be at most the layer's max_length = 40 tokens"):
        make()(inputs(41))
