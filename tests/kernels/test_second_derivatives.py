"""Second derivatives where first ones are 0: the outputs of a query may have no gradient, and be used all the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subquad.kernels import entmax, gather, linear, softmax, strided

MASK = np.ones((1, 1, 1, 6), bool)
CALLS = {
    "softmax": lambda q, k, v, **options: softmax.attention(q, k, v, mask=MASK, **options),
    "segments": lambda q, k, v, **options: softmax.attention(
        q, k, v, query_segment_ids=np.zeros((1, 6), int), key_segment_ids=np.zeros((1, 6), int), **options
    ),
    "fixed": lambda q, k, v, **options: strided.fixed(
        q, k, v, block_size=4, columns=np.array([[3]]), is_causal=True, mask=MASK, **options
    ),
    "gather": lambda q, k, v, **options: gather.attention(q, k, v, np.arange(6).reshape(1, 1, 1, 6), block_size=6, **options),
    "linear": lambda q, k, v, **options: linear.attention(jnp.exp(q), jnp.exp(k), v, mask=MASK, **options),
    "entmax": lambda q, k, v, **options: entmax.attention(q, k, v, alpha=jnp.full(2, 1.5), **options),
}


@pytest.mark.parametrize("name", CALLS)
def test_of_a_readout_that_is_0(name):
    """The penalty of a gradient, by the weights that read the outputs: they start at 0, and so does the gradient."""
    query, key, value, weights = (jax.random.normal(jax.random.key(seed), (1, 6, 2, 4)) for seed in range(4))

    def penalty(readout, implementation):
        loss = lambda query: (CALLS[name](query, key, value, implementation=implementation) @ readout).sum()
        return (jax.grad(loss)(query) * weights).sum()

    found, expected = (jax.grad(penalty)(jnp.zeros(4), implementation) for implementation in ("xla", "reference"))
    assert jnp.abs(expected).max() > 1e-3
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
