"""Induced set attention: the formula by hand, sets without order, the whole ISAB as a block, and the authors' code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad import zoo
from subquad.zoo import masks
from subquad.zoo.lowrank.isab import InducedSetAttention
from tests import oracle

FEATURES, HEADS, POINTS = 16, 2, 5


def build(**options):
    return InducedSetAttention(HEADS, FEATURES, rngs=nnx.Rngs(0), **{"num_inducing": POINTS, **options})


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def multihead(query, key, value, out):
    """[B, T, N, H] to [B, S, N, H], all weights stored, and the map behind."""
    weights = jax.nn.softmax(jnp.einsum("btnh,bsnh->bnts", query, key) * query.shape[-1] ** -0.5, -1)
    return jnp.einsum("bnts,bsnh,nhd->btd", weights, value, out.kernel[...]) + out.bias[...]


def norm(x, scale=1.0, bias=0.0, epsilon=1e-6):
    x = x - x.mean(-1, keepdims=True)
    return x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + epsilon) * scale + bias


def dense(layer, x, context):
    points = jnp.broadcast_to(layer.inducing[...], (len(x), POINTS, FEATURES))
    hidden = norm(points + multihead(layer.induce_query(points), layer.key(context), layer.value(context), layer.induce_out))
    hidden = norm(hidden + jnp.maximum(hidden @ layer.induce_mlp.kernel[...] + layer.induce_mlp.bias[...], 0))
    return multihead(layer.query(x), layer.induced_key(hidden), layer.induced_value(hidden), layer.out)


def test_the_formula():
    layer, x, context = build(), normal(2, 13, FEATURES), normal(2, 9, FEATURES, seed=1)
    np.testing.assert_allclose(layer(x), dense(layer, x, x), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(layer(x, context), dense(layer, x, context), rtol=1e-4, atol=1e-5)


def test_the_order_of_a_set_is_nothing():
    layer, x = build(), normal(2, 13, FEATURES)
    order = jax.random.permutation(jax.random.key(1), 13)
    np.testing.assert_allclose(layer(x[:, order]), layer(x)[:, order], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(layer(x, x[:, order]), layer(x), rtol=1e-4, atol=1e-5)


def test_a_set_may_hold_its_elements_twice():
    """Attention is a mean: what it gathers from all elements twice is what it gathers from them once."""
    layer, x = build(), normal(2, 13, FEATURES)
    np.testing.assert_allclose(layer(x, jnp.concatenate([x, x], axis=1)), layer(x), rtol=1e-4, atol=1e-5)


def test_rows_without_keys_are_the_projection_of_nothing():
    y = build()(normal(2, 7, FEATURES), normal(2, 9, FEATURES, seed=1), mask=masks.padding_mask(jnp.array([9, 0]), 9))
    np.testing.assert_array_equal(y[1], 0)


@pytest.mark.parametrize("change,argument", [(dict(num_inducing=0), "num_inducing"), (dict(is_causal=True), "is_causal")])
def test_refusals(change, argument):
    with pytest.raises(ValueError, match=rf"InducedSetAttention(:| does not support) {argument}"):
        build(**change)


def test_a_block_around_it_is_the_papers_isab():
    """MAB(x, h): eq. 6 is the first half of a block with norms behind the sums, eq. 7 its second."""
    layer, x = build(), normal(2, 13, FEATURES)
    block = zoo.Block(layer, FEATURES, mlp_features=32, norm_order="post", rngs=nnx.Rngs(1))
    hidden = norm(x + dense(layer, x, x))
    np.testing.assert_allclose(block(x), norm(hidden + block.mlp(hidden)), rtol=1e-4, atol=1e-5)


def test_oracle():
    """The authors' code divides by sqrt(D), adds projected queries, so that points are given projected, and has no output maps;
    PyTorch's norms have an epsilon of 1e-5."""
    peer = oracle.load("isab")
    empty, scale = InducedSetAttention(2, 8, num_inducing=4, rngs=nnx.Rngs(0)), 2**-0.5
    for module in (empty.induce_query, empty.induce_out, empty.out):
        module.kernel[...] = jnp.eye(8).reshape(module.kernel.shape) * (scale if module is empty.induce_query else 1)
    empty.induce_norm.epsilon = empty.induced_norm.epsilon = 1e-5
    names = {
        "mab0.fc_k": "key", "mab0.fc_v": "value", "mab0.fc_o": "induce_mlp", "mab1.fc_k": "induced_key",
        "mab1.fc_v": "induced_value", "mab0.ln0": "induce_norm", "mab0.ln1": "induced_norm",
    }  # fmt: skip

    def run(inputs, weights):
        linear = lambda name, x: x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]
        layer = oracle.holding(empty, {name: x for name, x in weights.items() if name.rpartition(".")[0] in names}, names)
        layer.inducing[...] = linear("mab0.fc_q", weights["I"][0])
        layer.query.kernel[...] = weights["mab1.fc_q.weight"].T.reshape(8, 2, 4) * scale
        layer.query.bias[...] = weights["mab1.fc_q.bias"].reshape(2, 4) * scale
        last = lambda name, x: norm(x, weights[f"mab1.{name}.weight"], weights[f"mab1.{name}.bias"], 1e-5)
        hidden = last("ln0", linear("mab1.fc_q", inputs["x"]) + layer(inputs["x"]))
        return last("ln1", hidden + jax.nn.relu(linear("mab1.fc_o", hidden)))

    oracle.compare("isab", peer, run)
