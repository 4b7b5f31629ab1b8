"""alpha-entmax by bisection, every logit at once; JAX differentiates two Newton steps from the threshold."""

import jax
import jax.numpy as jnp

from subquad.kernels import precision

LEAST = -1e3  # logits below the maximum by more have a weight of 0 at any alpha, as exp(LEAST) has


def entmax(logits, alpha, axis):
    """See `entmax.entmax`."""
    precise = jnp.promote_types(logits.dtype, jnp.float32)
    return _entmax(logits.astype(precise), jnp.asarray(alpha, precise), axis).astype(logits.dtype)


@precision.full
def attention(query, key, value, alpha, mask, positions, scale):
    """See `entmax.attention`; positions (queries', keys') are those of a causal call."""
    precise = jnp.promote_types(query.dtype, jnp.float32)
    heads = query.shape[2]
    key, value = (jnp.repeat(x.astype(precise), heads // key.shape[2], axis=2) for x in (key, value))
    seen = jnp.ones((1, 1, 1, 1), bool) if mask is None else mask
    if positions is not None:
        seen = seen & (positions[1][:, None, None, :] <= positions[0][:, None, :, None])
    logits = scale * jnp.einsum("btnh,bsnh->bnts", query.astype(precise), key)
    alpha = jnp.broadcast_to(jnp.asarray(alpha, precise), heads)[None, :, None, None]
    weights = _entmax(jnp.where(seen, logits, -jnp.inf), alpha, -1)
    return jnp.einsum("bnts,bsnv->btnv", weights, value).astype(query.dtype)


def _entmax(logits, alpha, axis):
    """By m = -log P of the largest weight P: p = P [1 + e u]_+^(1 / e), u = P^-e (logit - maximum), e = alpha - 1."""
    epsilon = jnp.where(alpha >= 1, alpha - 1, 0)
    seen = jnp.isfinite(logits)
    largest = jax.lax.stop_gradient(jnp.max(logits, axis, keepdims=True))
    logits = jnp.where(seen, logits - jnp.where(jnp.isfinite(largest), largest, 0), 0)
    logits = jnp.maximum(logits, LEAST)

    def ratio(found, exponent=1.0):
        exponential = jnp.exp(jnp.minimum(epsilon * found, jnp.log(jnp.finfo(logits.dtype).max) - 10))
        return _power(logits * exponential, epsilon, exponent) * seen

    def total(found, exponent=1.0):
        return jnp.where(seen.any(axis, keepdims=True), ratio(found, exponent).sum(axis, keepdims=True), 1)

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        above = jnp.log(total(middle)) >= middle
        return jnp.where(above, middle, low), jnp.where(above, high, middle)

    # At 0 the largest alone gives 1, and at log(n) no logit gives more than 1 / n.
    low = jnp.zeros_like(total(0.0))
    high = low + jnp.log(jnp.asarray(logits.shape[axis], logits.dtype)) + 1e-3
    found = jax.lax.stop_gradient(jax.lax.fori_loop(0, 60, halve, (low, high))[0])
    for _ in range(2):  # one for a gradient, two for its gradient
        found += (jnp.log(total(found)) - found) * total(found) / total(found, 1 - epsilon)
    return jnp.exp(-found) * ratio(found)


def _power(y, epsilon, exponent=1.0):
    """[1 + epsilon y]_+^(exponent / epsilon), whose limit at 0 is exp(exponent y)."""
    base = 1 + epsilon * y
    chosen = base > 0
    small = epsilon < 1e-6
    near = y - epsilon * y**2 / 2 + epsilon**2 * y**3 / 3  # of log(1 + epsilon y) / epsilon
    logarithm = jnp.where(small, near, jnp.log1p(jnp.where(chosen, epsilon * y, 0)) / jnp.where(small, 1, epsilon))
    return jnp.where(chosen, jnp.exp(exponent * jnp.where(chosen, logarithm, 0)), 0)
