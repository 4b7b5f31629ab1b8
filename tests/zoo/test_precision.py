"""Float32 has all its digits, on a GPU too, where no test on a CPU would see that."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from tests.assertions import products

from .cases import CASES, DIRECTIONS, EXTENDING, FEATURES, label

LENGTH = 23


@pytest.mark.parametrize("name,is_causal", DIRECTIONS, ids=label)
def test_products_of_float32_have_a_precision(name, is_causal):
    """The default is TF32 on a GPU and bfloat16 on a TPU. Projections have the user's, which none else is given here."""
    layer = nnx.eval_shape(lambda: CASES[name].make(is_causal, precision=jax.lax.Precision.HIGH))
    graphdef, state = nnx.split(layer)

    def run(state, x):
        layer = nnx.merge(graphdef, state)
        extended = layer.extend(x, layer.init_cache(2, LENGTH)) if is_causal and name in EXTENDING else None
        return layer(x), extended

    traced = jax.make_jaxpr(run)(state, jax.ShapeDtypeStruct((2, LENGTH, FEATURES), jnp.float32))
    assert None not in set(products(traced.jaxpr))
