"""What is masked out reaches no kept output and no gradient, whatever it holds; of a call with padding: test_contract.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.zoo.cases import CASES, EXTENDING, POISONS, inputs, sampled

LENGTH = 9
IS_REAL = np.array([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 0, 1, 0, 0]], bool)
CROSSING = [name for name in CASES if CASES[name].supports.cross]


def poisoned(x, is_real, value):
    return jnp.where(is_real[..., None], x, value)


def assert_nothing_changes(run, x, is_real, *fixed):
    """`run` of x gives the same numbers, bit by bit, for every poison, and 0 as the poison's gradient."""
    expected = run(poisoned(x, is_real, 0.0), *fixed)
    for value in POISONS:
        pairs = zip(*(jax.tree.leaves(found) for found in (run(poisoned(x, is_real, value), *fixed), expected)), strict=True)
        for actual, wanted in pairs:
            np.testing.assert_array_equal(actual, wanted, err_msg=f"padding of {value}")
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(expected))


def with_gradients(layer, function):
    """The outputs, and the gradients of parameters and inputs, of `function(layer, x, *fixed)`."""
    graph, params, rest = nnx.split(layer, nnx.Param, ...)

    def loss(params, x, *fixed):
        outputs = function(nnx.merge(graph, params, rest), x, *fixed)
        return jnp.sum(jnp.sin(outputs)), outputs

    return jax.jit(lambda x, *fixed: jax.grad(loss, (0, 1), has_aux=True)(params, x, *fixed))


@sampled
@pytest.mark.parametrize("name", EXTENDING)
def test_padding_that_extends_a_sequence_reaches_nothing_that_is_kept(name):
    def extend(layer, x):
        mask, cache = jnp.asarray(IS_REAL[:, None, None]), layer.init_cache(2, LENGTH)
        first, cache = layer.extend(x[:, :5], cache, mask=mask[..., :5])
        second, _ = layer.extend(x[:, 5:], cache, mask=mask[..., 5:])
        return jnp.where(IS_REAL[..., None], jnp.concatenate([first, second], 1), 0.0)

    assert_nothing_changes(with_gradients(CASES[name].make(True), extend), inputs(LENGTH), IS_REAL)


@pytest.mark.parametrize("name", CROSSING)
def test_padding_of_inputs_kv_reaches_nothing(name):
    queries = inputs(4, seed=1)
    run = with_gradients(CASES[name].make(), lambda layer, x: layer(queries, x, mask=jnp.asarray(IS_REAL[:, None, None])))
    assert_nothing_changes(run, inputs(LENGTH), IS_REAL)


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].supports.pairwise_mask])
def test_a_token_that_a_pairwise_mask_hides_from_all_reaches_nothing(name):
    mask = jnp.asarray(IS_REAL[:, None, :, None] & IS_REAL[:, None, None, :]) & jnp.tri(LENGTH, dtype=bool)[None, None]
    run = with_gradients(CASES[name].make(), lambda layer, x: layer(x, mask=mask))
    assert_nothing_changes(run, inputs(LENGTH), IS_REAL)
