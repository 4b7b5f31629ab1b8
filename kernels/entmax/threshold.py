"""The powers of alpha-entmax, its threshold, and the slope in alpha: of logits below their maximum, in float32.

With e = alpha - 1 a weight is p = [1 + e y]_+^(1 / e), y = logit - maximum - m. alpha is a number, or an array that
broadcasts to the logits.
"""

import functools

import jax
import jax.numpy as jnp

PATIENCE = 20  # steps before one that only halves is tried


def powers(y, alpha):
    """(p, s = p^(2 - alpha) where p > 0): the weights, and how fast they grow with their logits."""
    if isinstance(alpha, float) and alpha in (1.0, 1.5, 2.0):
        if alpha == 1:
            return (jnp.exp(y),) * 2
        base = jnp.maximum(1 + (alpha - 1) * y, 0)
        return (base, (base > 0).astype(y.dtype)) if alpha == 2 else (base * base, base)
    logarithm = _logarithm(y, alpha)
    chosen = logarithm > -jnp.inf
    return jnp.exp(logarithm), jnp.where(chosen, jnp.exp((1 - _epsilon(alpha)) * jnp.where(chosen, logarithm, 0)), 0)


def search(logits, alpha):
    """m of each row of logits [..., n], which are at most 0 and 0 at their largest: [..., 1]. NaN rows get anything."""
    is_constant = isinstance(alpha, float)
    return _search(alpha if is_constant else None, logits, None if is_constant else alpha)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _search(constant, logits, alpha):
    """`search`.

    Newton's steps on log_alpha(sum p), which is a straight line where all logits are equal, and convex for alpha <= 2: they
    then come from below and pass nothing. Elsewhere, or where they are many, every third step halves what is left between the
    bounds, as does a step that would leave them.
    """
    alpha = constant if alpha is None else alpha
    epsilon, digits = _epsilon(alpha), jnp.finfo(logits.dtype)

    def step(state):
        count, middle, low, high, done = state
        p, s = powers(logits - middle, alpha)
        total, slope = p.sum(-1, keepdims=True), s.sum(-1, keepdims=True)
        low, high = jnp.where(total >= 1, middle, low), jnp.where(total >= 1, high, middle)
        log_total = jnp.log(jnp.maximum(total, digits.tiny))
        newton = middle + _expm1_over(log_total, epsilon) * jnp.exp((1 - epsilon) * log_total) / jnp.maximum(slope, digits.tiny)
        halved = (count % 3 == 2) & ((epsilon > 1) | (count > PATIENCE))
        inside = (newton > low) & (newton < high) & ~halved
        nearest = jnp.where(inside, newton, (low + high) / 2)
        close = lambda x, y: jnp.abs(x - y) <= 2 * digits.eps * jnp.maximum(1, y)
        # Above alpha = 2 a short step says nothing: the slope is infinite where a logit enters.
        arrived = close(low, high) | (close(newton, middle) & (epsilon <= 1))
        nearest = jnp.where(arrived, jnp.clip(newton, low, high), nearest)
        # A row that is done stays as it is, whatever its neighbours need.
        return count + 1, jnp.where(done, middle, nearest), low, high, done | arrived

    def goes_on(state):
        return (state[0] < 4 * (digits.nmant + 1)) & ~state[4].all()

    size = jnp.log(jnp.asarray(logits.shape[-1], logits.dtype))
    low = jnp.zeros_like(logits[..., :1])
    high = low + -_expm1_over(-size, epsilon) * (1 + 4 * digits.eps)
    # One key, or none: nothing to search.
    done = ~(logits.max(-1, keepdims=True) == 0) | (high == 0)
    return jax.lax.while_loop(goes_on, step, (0, low, low, high, done))[1]


@_search.defjvp
def _search_jvp(constant, primals, tangents):
    """The sum of the weights stays 1. Gradients by hand ask for none of this; their own gradients do."""
    logits, alpha = primals
    found = _search(constant, logits, alpha)
    y, of_rows = logits - found, constant if alpha is None else alpha
    s = powers(y, of_rows)[1]
    change, total = s * tangents[0], s.sum(-1, keepdims=True)
    if alpha is not None:
        change += slope_in_alpha(y, alpha) * tangents[1]
    return found, change.sum(-1, keepdims=True) / jnp.where(total > 0, total, 1)


def slope_in_alpha(y, alpha):
    """dp / d alpha at a given y: p l^2 (1 - exp(-v) - v) / v^2 with l = log p and v = (alpha - 1) l."""
    epsilon = _epsilon(alpha)
    logarithm = _logarithm(y, alpha)
    chosen = logarithm > -jnp.inf
    logarithm = jnp.where(chosen, logarithm, 0)
    v = epsilon * logarithm
    near = v > -0.5
    series = jnp.ones_like(v)
    for k in range(16, 2, -1):  # 1 - exp(-v) - v cancels near 0
        series = 1 - v / k * series
    p = jnp.exp(logarithm)
    far = (p - jnp.exp((1 - epsilon) * logarithm) - p * v) / jnp.where(near, 1, epsilon) ** 2
    return jnp.where(chosen, jnp.where(near, -(p * logarithm) * logarithm * series / 2, far), 0)


def _epsilon(alpha):
    return alpha - 1 if isinstance(alpha, float) else jnp.maximum(alpha - 1, 0)


def _logarithm(y, alpha):
    """log p = log1p(e y) / e, whose limit at e = 0 is y; -inf where p is 0."""
    epsilon = _epsilon(alpha)
    never = jnp.isneginf(y) | (1 + epsilon * y <= 0)
    y = jnp.where(never, 0, y)
    logarithm = jnp.log1p(epsilon * y) / jnp.where(epsilon > 0, epsilon, 1)
    return jnp.where(never, -jnp.inf, jnp.where(epsilon > 0, logarithm, y))


def _expm1_over(x, epsilon):
    """(exp(e x) - 1) / e, whose limit at e = 0 is x."""
    return jnp.where(epsilon > 0, jnp.expm1(epsilon * x) / jnp.where(epsilon > 0, epsilon, 1), x)
