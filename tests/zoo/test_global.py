"""GlobalAttention: a long and a global input, four ways between them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad import zoo

from .patterned import FEATURES, check_definition, inputs


def make(radius=3, num_global=4, sharing="none", heads=4, **options):
    """A layer whose maps all differ."""
    layer = zoo.GlobalAttention(
        heads, FEATURES, radius=radius, num_global=num_global, sharing=sharing, rngs=nnx.Rngs(0), **options
    )
    state, key = nnx.state(layer), jax.random.key(1)
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(key, len(leaves))
    nnx.update(layer, tree.unflatten([x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]))
    return layer


def dense(layer, x):
    """The definition for real tokens alone, [1, T, D]: every logit of both inputs, and one softmax over them."""
    count, length = layer.num_global, x.shape[1]
    at = np.arange(length)
    near = abs(at[:, None] - at) <= layer.radius
    is_long = at >= count
    repeat = lambda heads: jnp.repeat(heads, layer.num_heads // layer.num_kv_heads, 2)

    def attend(query, maps, allowed):
        """`maps`: of keys and values, of those that are global and those that are long."""
        pairs = [[repeat(getattr(layer, name)(x)) for name in names] for names in maps]
        logits = [jnp.einsum("btnh,bsnh->bnts", query, key) / layer.head_features**0.5 for key, _ in pairs]
        kinds = [allowed & ~is_long, allowed & is_long]
        both = [jnp.where(kind, x, -1e30) for kind, x in zip(kinds, logits, strict=True)]
        values = jnp.concatenate([value for _, value in pairs], 1)
        return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(jnp.concatenate(both, -1)), values)

    to_long = attend(layer.query(x), (("key_to_global", "value_to_global"), ("key", "value")), near | ~is_long)
    rows = attend(layer.query_global(x), (("key_global", "value_global"), ("key_to_long", "value_to_long")), np.ones_like(near))
    return layer.out(jnp.where(is_long[:, None, None], to_long, rows))


@pytest.mark.parametrize(("radius", "num_global", "kv_heads"), [(3, 4, 4), (0, 1, 2), (40, 7, 4)])
def test_the_definition(radius, num_global, kv_heads):
    """Outputs and every gradient, among the real tokens of each sample."""
    check_definition(make(radius, num_global, num_kv_heads=kv_heads), dense)


def test_without_global_tokens_it_is_local_attention():
    layer = make(3, 0)
    local = zoo.LocalAttention(4, FEATURES, window_size=3, rngs=nnx.Rngs(1))
    nnx.update(local, nnx.state(layer))
    np.testing.assert_array_equal(layer(inputs(30)), local(inputs(30)))


def test_with_two_sets_of_maps_it_is_longformer():
    layer = make(3, 4, "query")
    longformer = zoo.LongformerAttention(4, FEATURES, window_size=3, num_global=4, rngs=nnx.Rngs(1))
    nnx.update(longformer, nnx.state(layer))
    np.testing.assert_array_equal(layer(inputs(30)), longformer(inputs(30)))


@pytest.mark.parametrize("radius", [3, 40])
def test_with_one_set_of_maps_it_is_attention_under_its_pattern(radius):
    """With a radius over everything, full attention to both inputs."""
    layer = make(radius, 4, "all")
    full = zoo.SoftmaxAttention(4, FEATURES, rngs=nnx.Rngs(1))
    nnx.update(full, nnx.state(layer))
    want = full(inputs(30), mask=jnp.asarray(layer.pattern(30))[None])
    np.testing.assert_allclose(layer(inputs(30)), want, atol=2e-6)
    assert layer.pattern(30).all() == (radius == 40)


def test_all_maps_start_as_one():
    build = lambda sharing: zoo.GlobalAttention(4, FEATURES, radius=3, num_global=4, sharing=sharing, rngs=nnx.Rngs(0))
    one, other = map(build, ("none", "all"))
    np.testing.assert_allclose(one(inputs(30)), other(inputs(30)), atol=2e-6)


def test_no_square_is_made():
    layer = make(16)
    assert "512,512" not in str(jax.make_jaxpr(jax.grad(lambda x: layer(x).sum()))(inputs(512)))


def test_refusals():
    for word, options in (("radius", dict(radius=-1)), ("num_global", dict(num_global=-1)), ("sharing", dict(sharing="some"))):
        with pytest.raises(ValueError, match=f"GlobalAttention: {word} must"):
            make(**options)
    with pytest.raises(ValueError, match="would share the global tokens of the first"):
        make()(inputs(5), segment_ids=jnp.zeros((2, 5), int))
