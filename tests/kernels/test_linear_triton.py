"""The Triton kernels of linear attention, interpreted, with the small tiles that a GPU gets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subquad.kernels import launch, linear

pytestmark = pytest.mark.interpret


def draw(length=37, features=24, values=20):
    keys = jax.random.split(jax.random.key(0), 5)
    shape = 1, length, 1
    query, key = (jax.random.normal(k, (*shape, 24)) for k in keys[:2])
    return query, key, jax.random.normal(keys[2], (*shape, values)), jax.random.normal(keys[3], (features, 24))


@pytest.mark.parametrize("kernel", ["softmax", "given"])
@pytest.mark.parametrize("is_causal", [True, False])
def test_states_and_values_in_several_blocks(kernel, is_causal, monkeypatch):
    """The state passes through registers block by block, and blocks of value features add up."""
    try:
        launch.require("interpret")
    except launch.Declined as reason:
        pytest.skip(str(reason))
    from subquad.kernels.linear import triton

    monkeypatch.setattr(triton, "_tile_sizes", lambda *_: (16, 16, 16, 4))
    interpreted = triton.heuristic
    monkeypatch.setattr(triton, "heuristic", lambda name, mode, **sizes: interpreted(name, "triton", **sizes))
    query, key, value, projection = draw()
    if kernel == "given":
        query, key = jnp.exp(query), jnp.exp(key)

    def run(implementation):
        def call(query, key, value):
            options = dict(is_causal=is_causal, implementation=implementation)
            if kernel == "given":
                return linear.attention(query, key, value, **options)
            return linear.random_feature_attention(query, key, value, projection, kernel=kernel, **options)

        out, pull = jax.vjp(jax.jit(call), query, key, value)
        return out, *pull(jnp.cos(out))

    for got, want in zip(run("interpret"), run("reference"), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * float(jnp.abs(want).max()))
