"""`jax.export` leaves the batch size open: one exported layer serves batches of any size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad import zoo
from tests.zoo.cases import CASES, FEATURES, inputs, sampled

SIZE = jax.export.symbolic_shape("b")[0]


@sampled
@pytest.mark.parametrize("name", CASES)
def test_a_layer_is_exported_for_batches_of_any_size(name):
    layer = CASES[name].make(bool(CASES[name].supports.causal))
    shapes = jax.ShapeDtypeStruct((SIZE, 9, FEATURES), jnp.float32), jax.ShapeDtypeStruct((SIZE, 1, 1, 9), bool)
    exported = jax.export.export(jax.jit(lambda x, mask: layer(x, mask=mask)))(*shapes)
    for batch in (1, 3):
        is_real = np.arange(9) % 4 >= np.arange(batch)[:, None]
        x, mask = inputs(9, batch=batch), jnp.asarray(is_real[:, None, None])
        found, expected = exported.call(x, mask), layer(x, mask=mask)
        np.testing.assert_allclose(found[is_real], expected[is_real], atol=CASES[name].tolerance)


def test_a_step_is_exported_for_batches_of_any_size():
    layer = CASES["softmax"].make(True)
    cache = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((SIZE, *leaf.shape[1:]), leaf.dtype), layer.init_cache(1, 5))
    exported = jax.export.export(jax.jit(layer.extend))(jax.ShapeDtypeStruct((SIZE, 2, FEATURES), jnp.float32), cache)
    found, cache = exported.call(inputs(2, batch=3), layer.init_cache(3, 5))
    np.testing.assert_allclose(found, layer.extend(inputs(2, batch=3), layer.init_cache(3, 5))[0], atol=1e-5)
    assert cache.length.tolist() == [2, 2, 2]


def test_a_call_that_draws_is_not_exported_with_an_open_batch():
    layer = zoo.SoftmaxAttention(2, FEATURES, dropout_rate=0.5, rngs=nnx.Rngs(0))
    draw = lambda x: layer(x, deterministic=False, rngs=nnx.Rngs(1))
    with pytest.raises(ValueError, match="deterministic: must be True where jax.export"):
        jax.export.export(jax.jit(draw))(jax.ShapeDtypeStruct((SIZE, 5, FEATURES), jnp.float32))
