"""The delta rule in NumPy, token by token in float64, and layers with nothing but the rule, for the tests of its layers."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from subquad.zoo.delta.rule import DeltaCache


def sigmoid(x):
    return 1 / (1 + np.exp(-np.float64(x)))


def silu(x):
    return x * sigmoid(x)


def softplus(x):
    return np.logaddexp(0, np.float64(x))


def unit(x):
    return x / np.sqrt(np.sum(x**2, -1, keepdims=True) + 1e-6)


def applied(module, x):
    """W x + b."""
    kernel = np.float64(module.kernel[...])
    y = np.tensordot(np.float64(x), kernel, kernel.ndim - len(np.shape(module.bias[...])))
    return y + np.float64(module.bias[...])


def convolved(convolution, heads):
    """silu of the causal convolution of each feature of [B, T, N, M]; as they are without one."""
    if convolution is None:
        return heads
    taps = np.float64(convolution.taps[...]).reshape(-1, *heads.shape[2:])
    shifted = lambda j: np.pad(heads, ((0, 0), (j, 0), (0, 0), (0, 0)))[:, : heads.shape[1]]
    return silu(sum(tap * shifted(j) for j, tap in enumerate(taps)))


def read(query, key, value, beta, decay, starts=1):
    """What queries read after each token's writes: all [B, T, N, ...] of as many heads, decay a number or one per channel.

    `starts` writes to a token, each with a key, a value and a rate; the decay is before the first of them.
    """
    batch, length, heads, features = query.shape
    state, outputs = np.zeros((batch, heads, features, value.shape[-1])), []
    for t in range(length):
        state = np.reshape(decay[:, t], (batch, heads, -1, 1)) * state
        for i in range(t * starts, (t + 1) * starts):
            error = value[:, i] - np.einsum("bnm,bnmv->bnv", key[:, i], state)
            state = state + beta[:, i, :, None, None] * key[:, i, :, :, None] * error[:, :, None]
        outputs.append(np.einsum("bnm,bnmv->bnv", query[:, t], state))
    return np.stack(outputs, 1)


def normed(norm, heads):
    return heads / np.sqrt(np.mean(heads**2, -1, keepdims=True) + 1e-5) * np.float64(norm.scale[...])


def perturbed(layer, seed=0):
    """The layer with all its parameters off their initial values."""
    rng = np.random.default_rng(seed)
    for _, leaf in nnx.to_flat_state(nnx.state(layer, nnx.Param)):
        leaf[...] = leaf[...] + jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype)
    return layer


def bare(layer):
    """A copy whose rule has neither convolutions, features nor a norm: it reads states of the queries and keys it is given."""
    layer = nnx.clone(layer)
    rule = layer.rule
    rule.query = rule.key = rule.value = nnx.data(None)
    rule.features, rule.norm = lambda heads: heads, lambda heads, gate: heads
    return layer


def cache_of(state):
    recent = [jnp.zeros((len(state), 0, 0))] * 3
    return DeltaCache(jnp.asarray(state), *recent, jnp.zeros(len(state), jnp.int32))
