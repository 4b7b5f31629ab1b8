"""Matrix iterations by their equations."""

import jax
import jax.numpy as jnp

from subquad.kernels import precision

LEAST = -1e30  # in place of -inf, which is NaN in differences


def pseudo_inverse(matrix, iterations):
    """See `matrix.pseudo_inverse`."""
    a = precision.wide(matrix)
    z = scale(a) * a.swapaxes(2, 3)
    for _ in range(iterations):
        z = improve(a, z)
    return z.astype(matrix.dtype)


def scale(a):
    """1 / (|A|_1 |A|_inf), [B, N, 1, 1]; 0 for a matrix of zeros."""
    norms = [jnp.abs(a).sum(axis, keepdims=True).max((2, 3), keepdims=True) for axis in (2, 3)]
    product = norms[0] * norms[1]
    return jnp.where(product > 0, 1 / jnp.where(product > 0, product, 1), 0)


def improve(a, z):
    """One iteration."""
    identity = jnp.eye(a.shape[2], dtype=a.dtype)
    times = lambda x, y: jnp.matmul(x, y, precision="highest")
    x = times(a, z)
    return times(z, 13 * identity - times(x, 15 * identity - times(x, 7 * identity - x))) / 4


def sinkhorn(logits, iterations, is_causal):
    """See `matrix.sinkhorn`."""
    allowed, x = allow(logits, is_causal)
    for _ in range(iterations):
        x = jnp.where(allowed, x - normaliser(x, 3), LEAST)
        x = jnp.where(allowed, x - normaliser(x, 2), LEAST)
    return jnp.exp(x).astype(logits.dtype)


def allow(logits, is_causal):
    """(which pairs are allowed, finite logits of at least float32)."""
    allowed = logits > -jnp.inf
    if is_causal:
        allowed = allowed & jnp.tri(logits.shape[2], dtype=bool)
    return allowed, jnp.where(allowed, precision.wide(logits), LEAST)


def normaliser(x, axis):
    """log sum exp along an axis, which is kept; 0 where nothing is allowed."""
    largest = jax.lax.stop_gradient(x.max(axis, keepdims=True))
    some = largest > LEAST / 2
    total = jnp.exp(x - jnp.where(some, largest, 0)).sum(axis, keepdims=True)
    return jnp.where(some, largest + jnp.log(jnp.where(some, total, 1)), 0)
