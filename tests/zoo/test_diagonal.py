"""DiagonalAttention: a window with gaps, at the cost of one without."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad import zoo
from tests import oracle

from .patterned import FEATURES, check_dense, check_extend, check_support, inputs, padding


def make(window_size=2, dilation=(1, 3, 3, 5), is_causal=False, heads=4, **options):
    return zoo.DiagonalAttention(
        heads, FEATURES, window_size=window_size, dilation=dilation, is_causal=is_causal, rngs=nnx.Rngs(0), **options
    )


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("window_size", "dilation"), [(2, (1, 3, 3, 5)), (3, 4), (0, 2), (100, 7)])
def test_attends_to_the_window_and_nothing_else(window_size, dilation, is_causal):
    check_support(make(window_size, dilation, is_causal), 23)


@pytest.mark.sample(2)
@pytest.mark.parametrize(("window_size", "dilation", "is_causal"), [(2, 3, False), ((1, 3), (5, 1, 2, 1), False), (3, 4, True)])
def test_is_softmax_attention_under_its_pattern(window_size, dilation, is_causal):
    check_dense(make(window_size, dilation, is_causal), 29, padding(29))


@pytest.mark.parametrize("is_causal", [False, True])
def test_without_gaps_it_is_local_attention(is_causal):
    layer = make(3, 1, is_causal)
    local = zoo.LocalAttention(4, FEATURES, window_size=3, is_causal=is_causal, rngs=nnx.Rngs(1))
    nnx.update(local, nnx.state(layer))
    np.testing.assert_array_equal(layer(inputs(30)), local(inputs(30)))


@pytest.mark.parametrize("is_causal", [False, True])
def test_it_is_local_attention_to_each_of_the_interleaved_sequences(is_causal):
    layer, x = make(2, 3, is_causal), inputs(30)
    local = zoo.LocalAttention(4, FEATURES, window_size=2, is_causal=is_causal, rngs=nnx.Rngs(1))
    nnx.update(local, nnx.state(layer))
    for start in range(3):
        np.testing.assert_allclose(layer(x)[:, start::3], local(x[:, start::3]), atol=2e-6)


def test_segments_are_separate_sequences():
    layer, x = make(), inputs(30)
    packed = layer(x, segment_ids=jnp.array([0] * 13 + [7] * 17))
    np.testing.assert_allclose(packed[:, :13], layer(x[:, :13]), atol=2e-6)
    np.testing.assert_allclose(packed[:, 13:], layer(x[:, 13:]), atol=2e-6)


@pytest.mark.parametrize("cuts", [[1] * 10 + [30], [3, 17, 20]], ids=str)
@pytest.mark.parametrize(("window_size", "dilation"), [(2, (1, 3, 3, 5)), (6, 2)])
def test_extend_in_any_cutting(window_size, dilation, cuts):
    check_extend(make(window_size, dilation, True), 40, cuts, padding(40), max_length=40)


def test_no_square_is_made():
    layer = make(8)
    text = str(jax.make_jaxpr(jax.grad(lambda x: layer(x).sum()))(inputs(512)))
    assert "512,512" not in text


def test_hugging_face():
    """Its port has no dilation: this is a window."""
    peer = oracle.load("longformer_local")
    layer = zoo.DiagonalAttention(4, 32, window_size=4, dilation=1, rngs=nnx.Rngs(0))

    def before_the_output_projection(inputs, weights):
        held = oracle.holding(layer, {name: x for name, x in weights.items() if "_global" not in name})
        return held.attend(*held.project(inputs["x"]), None).reshape(inputs["x"].shape)

    oracle.compare("diagonal", peer, before_the_output_projection)


def test_a_dilation_may_be_an_array():
    assert make(dilation=np.array([1, 3, 3, 5])).dilation == (1, 3, 3, 5)
    assert make(dilation=np.array(2)).dilation == (2,) * 4


@pytest.mark.parametrize("dilation", [np.array([1.0, 2, 3, 4]), 0, -1, 1.5, (1, 2), (1, 2, 3, 0), "2", None], ids=str)
def test_refused_dilations(dilation):
    with pytest.raises(ValueError, match="DiagonalAttention: dilation must be a number >= 1, or one for each of 4 heads"):
        make(2, dilation)


def test_refused_windows():
    with pytest.raises(ValueError, match="DiagonalAttention: window_size must be a number"):
        make(-1)
    with pytest.raises(ValueError, match=r"DiagonalAttention: window_size must be \(left, 0\) when causal"):
        make((3, 1), is_causal=True)
