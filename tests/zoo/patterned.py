"""Checks that every layer with a fixed pattern shares."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from subquad import zoo
from tests.assertions import assert_close

FEATURES = 16


def inputs(length: int, batch: int = 2, seed: int = 0):
    return jax.random.normal(jax.random.key(seed), (batch, length, FEATURES))


def padding(length: int, batch: int = 2, seed: int = 1):
    """A key mask with holes, the first tokens of one sample among them."""
    is_real = np.random.default_rng(seed).random((batch, 1, 1, length)) < 0.8
    is_real[0, ..., : length // 6] = False
    return jnp.asarray(is_real)


def check_definition(layer, dense, length: int = 29) -> None:
    """Outputs and every gradient are those of `dense(layer, x)` for the real tokens x [1, n, D] of each sample."""
    mask = padding(length)
    weight = inputs(length, seed=4) * mask[:, 0, 0, :, None]

    def loss(layer, x):
        y = layer(x, mask=mask)
        return jnp.sum(y * weight), y * (weight != 0)

    def definition(layer, x):
        places = [np.flatnonzero(real) for real in np.asarray(mask)[:, 0, 0]]
        rows = [jnp.zeros((length, FEATURES)).at[at].set(dense(layer, x[i : i + 1, at])[0]) for i, at in enumerate(places)]
        y = jnp.stack(rows)
        return jnp.sum(y * weight), y * (weight != 0)

    x = inputs(length)
    (grads, y), (want_grads, want) = (nnx.jit(nnx.grad(f, argnums=(0, 1), has_aux=True))(layer, x) for f in (loss, definition))
    assert_close(y, want, 5e-6)
    assert_close(jax.tree.leaves(grads), jax.tree.leaves(want_grads), 2e-5)


def weights(layer, length: int) -> np.ndarray:
    """The attention weights [N, T, S] of random queries and keys: the outputs for one-hot values."""
    shape = (1, length, layer.num_heads, layer.head_features)
    query, key = (jax.random.normal(jax.random.key(seed), shape) for seed in (2, 3))
    value = jnp.broadcast_to(jnp.eye(length)[None, :, None], (1, length, layer.num_heads, length))
    return np.asarray(jax.jit(lambda *arrays: layer.attend(*arrays, None))(query, key, value)[0]).swapaxes(0, 1)


def check_support(layer, length: int) -> None:
    """`layer.pattern` is exactly what the layer attends to, and the weights of a row sum to 1."""
    found, pattern = weights(layer, length), layer.pattern(length)
    assert pattern.dtype == bool and pattern.shape in ((1, length, length), found.shape)
    np.testing.assert_array_equal(found > 0, np.broadcast_to(pattern, found.shape))
    np.testing.assert_allclose(found.sum(-1), np.broadcast_to(pattern, found.shape).any(-1), atol=1e-5)


def among_real(layer, mask, length: int) -> np.ndarray:
    """The layer's pattern among the real tokens of each sample, wherever padding stands: bool [B, N|1, T, T]."""
    allowed = []
    for is_real in np.asarray(mask)[:, 0, 0]:
        real = np.flatnonzero(is_real)
        pattern = layer.pattern(len(real))
        allowed.append(np.zeros((len(pattern), length, length), bool))
        allowed[-1][:, real[:, None], real] = pattern
    return np.stack(allowed)


def check_dense(layer, length: int, mask=None) -> None:
    """The layer is softmax attention under the mask of its pattern, among real tokens: outputs and every gradient."""
    dense = zoo.SoftmaxAttention(layer.num_heads, FEATURES, num_kv_heads=layer.num_kv_heads, rngs=nnx.Rngs(0))
    nnx.update(dense, nnx.state(layer, nnx.Param))
    everything = jnp.ones((2, 1, 1, length), bool)
    allowed = jnp.asarray(among_real(layer, everything if mask is None else mask, length))
    # Outputs at padding mean nothing.
    weight = inputs(length, seed=4) * (everything if mask is None else mask)[:, 0, 0, :, None]

    def loss(model, x, mask):
        y = model(x, mask=mask) * (weight != 0)
        return jnp.sum(y * weight), y

    gradient = nnx.jit(nnx.grad(loss, argnums=(0, 1), has_aux=True))
    (grads, y), (want_grads, want) = gradient(layer, inputs(length), mask), gradient(dense, inputs(length), allowed)
    assert_close(y, want, 5e-6)
    assert_close(jax.tree.leaves(grads), jax.tree.leaves(want_grads), 2e-5)


def check_extend(layer, length: int, cuts: list[int], mask=None, max_length: int | None = None):
    """However the sequence is cut, `extend` gives what one call gives. Returns the last cache."""
    x = inputs(length)
    expected = layer(x, mask=mask)
    step = jax.jit(lambda x, cache, mask: layer.extend(x, cache, mask=mask))
    cache, start, outputs = layer.init_cache(2, max_length or length), 0, []
    for width in cuts:
        part = slice(start, start + width)
        y, cache = step(x[:, part], cache, None if mask is None else mask[..., part])
        outputs.append(y)
        start += width
    assert start == length
    is_real = True if mask is None else mask[:, 0, 0, :, None]  # outputs at padding mean nothing
    np.testing.assert_allclose(jnp.concatenate(outputs, 1) * is_real, expected * is_real, atol=1e-5)
    return cache
