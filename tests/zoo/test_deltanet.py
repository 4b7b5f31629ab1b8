"""DeltaNet against its formula, token by token; what only the delta rule can do; and the authors' recurrence."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad.zoo.delta.deltanet import DeltaNet
from tests import oracle

from .delta import applied, bare, cache_of, convolved, normed, perturbed, read, sigmoid, unit

FEATURES = 6


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def build(**options):
    return DeltaNet(2, FEATURES, rngs=nnx.Rngs(0), **options)


def shares(x):
    x = np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))
    return x / x.sum(-1, keepdims=True)


@pytest.mark.parametrize(("features", "options"), [
    (unit, dict(value_features=10, negative_eigenvalues=True)),
    (shares, dict(num_kv_heads=1, normalization="sum", conv_width=None)),
])  # fmt: skip
def test_the_formula_token_by_token(features, options):
    layer, x = perturbed(build(**options)), normal(2, 9, FEATURES)
    query, key, value = (
        convolved(getattr(layer.rule, name), applied(getattr(layer, name), x)) for name in ("query", "key", "value")
    )
    key, value = (np.repeat(heads, 2 // heads.shape[2], 2) for heads in (key, value))
    beta = (2 if layer.negative_eigenvalues else 1) * sigmoid(applied(layer.rate, x))
    outputs = normed(layer.rule.norm, read(features(query), features(key), value, beta, np.ones_like(beta)))
    np.testing.assert_allclose(layer(x), applied(layer.out, outputs), atol=1e-4)


def test_a_value_is_overwritten():
    """At a rate of 1 a key reads the last value that was written under it, whatever else its state holds; at right angles
    keys do not disturb each other: the state is that of linear attention."""
    layer, (first, second), values = bare(build()), np.linalg.qr(normal(2, 3, 3))[0][0, :2], normal(1, 4, 2, 3, seed=1)
    key = jnp.broadcast_to(jnp.stack([first, second, second, first])[None, :, None], (1, 4, 2, 3))
    heads, _ = layer.rule(key, key, values, jnp.ones((1, 4, 2)), None, None, None)
    np.testing.assert_allclose(heads, values, atol=1e-5)
    both = jnp.broadcast_to((first + second)[None, None, None], (1, 4, 2, 3))
    heads, _ = layer.rule(both, key, values, jnp.ones((1, 4, 2)), None, None, None)
    np.testing.assert_allclose(heads[0, 3], values[0, 2] + values[0, 3], atol=1e-5)


def test_a_negative_eigenvalue_counts_modulo_two():
    """At a rate of 2 along its key a state is reflected: its sign is the parity of the ones so far, for ever."""
    ones = np.random.default_rng(0).integers(0, 2, (3, 500))
    key = jnp.broadcast_to(jnp.asarray([0.6, 0.0, 0.8]), (3, 500, 2, 3))
    state = jnp.broadcast_to(key[:, 0, :, :, None] * jnp.asarray([1.0, -2.0, 0.5]), (3, 2, 3, 3))
    rates = jnp.repeat(jnp.asarray(2.0 * ones)[..., None], 2, 2)
    heads, _ = bare(build()).rule(key, key, jnp.zeros_like(key), rates, None, None, None, cache=cache_of(state))
    sign = 1 - 2 * (np.cumsum(ones, 1) % 2)
    np.testing.assert_allclose(heads, sign[..., None, None] * np.broadcast_to([1.0, -2.0, 0.5], (3, 500, 2, 3)), atol=1e-4)


def test_refusals():
    with pytest.raises(ValueError, match="DeltaNet: normalization must be a known name"):
        build(normalization="l3")
    with pytest.raises(ValueError, match="DeltaNet: conv_width must be a positive integer"):
        build(conv_width=0)
    with pytest.raises(ValueError, match="DeltaNet: value_features must be a multiple of num_heads"):
        build(value_features=7)


def test_oracle():
    """The recurrence of the authors' library, which multiplies queries by M^-1/2, from a state to the state after it."""
    peer, layer = oracle.load("delta_rule"), bare(build())

    def run(inputs, _):
        heads = (inputs[name].swapaxes(1, 2) for name in ("q", "k", "v", "beta"))
        query, key, value, beta = heads
        query = query * query.shape[-1] ** -0.5
        o, cache = layer.rule(query, key, value, beta, None, None, None, cache=cache_of(inputs["s0"]))
        return {"o": o.swapaxes(1, 2), "h": cache.state}

    oracle.compare("deltanet", peer, run, of="mechanism")
