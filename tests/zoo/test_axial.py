"""AxialAttention: rows and columns of an image, at the cost of both; a peer that adds two layers up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad import zoo
from tests import oracle

from .patterned import FEATURES, check_dense, check_extend, check_support, inputs, padding

AXES = ("row", "column", "both")


def make(row_length=5, axis="both", is_causal=False, heads=4, **options):
    return zoo.AxialAttention(
        heads, FEATURES, row_length=row_length, axis=axis, is_causal=is_causal, rngs=nnx.Rngs(0), **options
    )


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("is_causal", [False, True])
def test_attends_to_its_pattern_and_nothing_else(axis, is_causal):
    for length in (3, 23):
        check_support(make(5, axis, is_causal), length)


@pytest.mark.sample(2)
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("is_causal", [False, True])
def test_is_softmax_attention_under_its_pattern(axis, is_causal):
    check_dense(make(5, axis, is_causal), 28, padding(28))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("row_length", "axis"), [(33, "row"), (1, "column")])
def test_of_a_single_row_or_column_it_is_softmax_attention(row_length, axis, is_causal):
    layer = make(row_length, axis, is_causal)
    full = zoo.SoftmaxAttention(4, FEATURES, is_causal=is_causal, rngs=nnx.Rngs(1))
    nnx.update(full, nnx.state(layer))
    np.testing.assert_allclose(layer(inputs(33)), full(inputs(33)), atol=2e-6)


def test_a_transposed_image_has_its_axes_exchanged():
    x = inputs(30)
    across = x.reshape(2, 6, 5, -1).swapaxes(1, 2).reshape(x.shape)
    along_columns = make(6, "column")(across).reshape(2, 5, 6, -1).swapaxes(1, 2).reshape(x.shape)
    np.testing.assert_allclose(make(5, "row")(x), along_columns, atol=2e-6)


@pytest.mark.sample(2)
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("cuts", [[1] * 12 + [25], [3, 17, 17]], ids=str)
def test_extend_in_any_cutting(axis, cuts):
    check_extend(make(5, axis, True), 37, cuts, padding(37), max_length=41)


def test_no_square_is_made():
    layer = make(32)
    assert "512,512" not in str(jax.make_jaxpr(jax.grad(lambda x: layer(x).sum()))(inputs(512)))


def test_axial_attention():
    """The package adds a layer along columns to one along rows, each with maps of its own: the heads of one layer here."""
    peer = oracle.load("axial_sum")
    assert peer.meta["cfg"]["sum_axial_out"] and peer.inputs["x"].shape == (2, 4, 6, 8)
    layer = zoo.AxialAttention(4, 8, row_length=6, qkv_features=16, rngs=nnx.Rngs(0))

    def forward(inputs, weights):
        maps = {}
        for name, rows in (("to_q", slice(0, 8)), ("to_kv", slice(0, 8)), ("to_kv", slice(8, 16))):
            columns, along = (weights[f"axial_attentions.{i}.fn.{name}.weight"][rows].T.reshape(8, 2, 4) for i in (0, 1))
            maps[f"{('query', 'key', 'value')[len(maps)]}.kernel"] = jnp.stack([along, columns], 2)
        columns, along = (weights[f"axial_attentions.{i}.fn.to_out.weight"].T.reshape(2, 4, 8) for i in (0, 1))
        bias = sum(weights[f"axial_attentions.{i}.fn.to_out.bias"] for i in (0, 1))
        held = oracle.holding(layer, maps | {"out.kernel": jnp.stack([along, columns], 1), "out.bias": bias})
        return held(inputs["x"].reshape(2, 24, 8)).reshape(2, 4, 6, 8)

    oracle.compare("axial", peer, forward)


def test_refusals():
    for word, options in (
        ("row_length", dict(row_length=0)), ("axis", dict(axis="rows")), ("num_heads", dict(heads=1)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"AxialAttention: {word} must"):
            make(**options)
    with pytest.raises(ValueError, match="Did you mean 'row'"):
        make(axis="rows")
