"""The weights of alpha-entmax, the largest of them, and the slope in alpha: of logits below their maximum, in float32.

With e = alpha - 1, z = logit - maximum and P the largest weight, a weight is

    p = P q,   q = [1 + e u]_+^(1 / e),   u = P^-e z.

What is searched is m = -log P, which lies between 0 and log n: the threshold itself, maximum - (1 - P^e) / e, has no digits
left for P where P^e is small. alpha is a number, or an array that broadcasts to the logits.
"""

import functools

import jax
import jax.numpy as jnp

PATIENCE = 20  # steps before one that only halves is tried
LEAST = -1e3  # z that is less than this, -inf too, has a weight of 0 at any alpha, as exp(z) has


def scaled(logits, found, alpha):
    """u of logits below their maximum; `found` is m."""
    return jnp.maximum(logits, LEAST) * _bounded_exp(_epsilon(alpha) * found)


def ratios(u, alpha):
    """(q, q^(2 - alpha) where q > 0): the weights by the largest one, and how fast they grow with their logits."""
    if isinstance(alpha, float) and alpha in (1.0, 1.5, 2.0):
        if alpha == 1:
            return (jnp.exp(u),) * 2
        base = jnp.maximum(1 + (alpha - 1) * u, 0)
        return (base, (base > 0).astype(u.dtype)) if alpha == 2 else (base * base, base)
    logarithm = _logarithm(u, alpha)
    chosen = logarithm > -jnp.inf
    return jnp.exp(logarithm), jnp.where(chosen, jnp.exp((1 - _epsilon(alpha)) * jnp.where(chosen, logarithm, 0)), 0)


def weights(u, found, alpha):
    """p."""
    return jnp.exp(-found) * ratios(u, alpha)[0]


def steepness(found, alpha):
    """P^(2 - alpha), by which the second of the `ratios` becomes the slope of a weight; what is too large is bounded."""
    return _bounded_exp((_epsilon(alpha) - 1) * found)


def search(logits, alpha):
    """m of each row of logits [..., n], which are at most 0 and 0 at their largest: [..., 1]. NaN rows get anything."""
    is_constant = isinstance(alpha, float)
    return _search(alpha if is_constant else None, logits, None if is_constant else alpha)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _search(constant, logits, alpha):
    """`search`: m = log sum q(m).

    Newton's steps on log_alpha(sum p) in the threshold, a straight line where all logits are equal, and convex for
    alpha <= 2: they then come from below and pass nothing. Elsewhere, or where they are many, every third step halves what is
    left between the bounds, as does a step that would leave them. m - log sum q grows at least as fast as m: it bounds the
    error.
    """
    alpha = constant if alpha is None else alpha
    epsilon, digits = _epsilon(alpha), jnp.finfo(logits.dtype)

    def step(state):
        count, middle, low, high, done = state
        q, r = ratios(scaled(logits, middle, alpha), alpha)
        total, slope = q.sum(-1, keepdims=True), r.sum(-1, keepdims=True)
        wanted = jnp.log(total)
        low, high = jnp.where(wanted >= middle, middle, low), jnp.where(wanted >= middle, high, middle)
        newton = middle - _log1p_over(total / slope * _expm1_over(middle - wanted, epsilon), epsilon)
        halved = (count % 3 == 2) & ((epsilon > 1) | (count > PATIENCE))
        inside = (newton > low) & (newton < high) & ~halved
        nearest = jnp.where(inside, newton, (low + high) / 2)
        close = lambda x, y: jnp.abs(x - y) <= 2 * digits.eps * jnp.maximum(1, y)
        # Above alpha = 2 a short step says nothing: the slope is infinite where a logit enters.
        arrived = close(low, high) | close(wanted, middle) | (close(newton, middle) & (epsilon <= 1))
        nearest = jnp.where(arrived, jnp.clip(newton, low, high), nearest)
        # A row that is done stays as it is, whatever its neighbours need.
        return count + 1, jnp.where(done, middle, nearest), low, high, done | arrived

    def goes_on(state):
        return (state[0] < 4 * (digits.nmant + 1)) & ~state[4].all()

    low = jnp.zeros_like(logits[..., :1])
    high = low + jnp.log(jnp.asarray(logits.shape[-1], logits.dtype)) * (1 + 4 * digits.eps)
    # One key, or none: nothing to search.
    done = ~(logits.max(-1, keepdims=True) == 0) | (high == 0)
    return jax.lax.while_loop(goes_on, step, (0, low, low, high, done))[1]


@_search.defjvp
def _search_jvp(constant, primals, tangents):
    """The sum of the weights stays 1. Gradients by hand ask for none of this; their own gradients do."""
    logits, alpha = primals
    found = _search(constant, logits, alpha)
    of_rows = constant if alpha is None else alpha
    u = scaled(logits, found, of_rows)
    r = ratios(u, of_rows)[1]
    change, total = r * _bounded_exp(_epsilon(of_rows) * found) * tangents[0], r.sum(-1, keepdims=True)
    if alpha is not None:
        change += slope_at_largest(u, found, alpha) * tangents[1]
    return found, change.sum(-1, keepdims=True) / jnp.where(total > 0, total, 1)


def slope_at_largest(u, found, alpha):
    """dq / d alpha at a given P and logit: u = P^-e z changes as well."""
    return slope_in_alpha(u, alpha) + found * u * ratios(u, alpha)[1]


def slope_in_alpha(u, alpha):
    """dq / d alpha at a given u: q l^2 (1 - exp(-v) - v) / v^2 with l = log q and v = (alpha - 1) l."""
    epsilon = _epsilon(alpha)
    logarithm = _logarithm(u, alpha)
    chosen = logarithm > -jnp.inf
    logarithm = jnp.where(chosen, logarithm, 0)
    v = epsilon * logarithm
    near = v > -0.5
    series = jnp.ones_like(v)
    for k in range(16, 2, -1):  # 1 - exp(-v) - v cancels near 0
        series = 1 - v / k * series
    q = jnp.exp(logarithm)
    far = (q - jnp.exp((1 - epsilon) * logarithm) - q * v) / jnp.where(near, 1, epsilon) ** 2
    return jnp.where(chosen, jnp.where(near, -(q * logarithm) * logarithm * series / 2, far), 0)


def _epsilon(alpha):
    return alpha - 1 if isinstance(alpha, float) else jnp.maximum(alpha - 1, 0)


def _logarithm(u, alpha):
    """log q = log1p(e u) / e, whose limit at e = 0 is u; -inf where q is 0."""
    epsilon = _epsilon(alpha)
    never = jnp.isneginf(u) | (1 + epsilon * u <= 0)
    u = jnp.where(never, 0, u)
    return jnp.where(never, -jnp.inf, _over(jnp.log1p(epsilon * u), u, epsilon))


def _expm1_over(x, epsilon):
    """(exp(e x) - 1) / e, whose limit at e = 0 is x."""
    return _over(jnp.expm1(epsilon * x), x, epsilon)


def _log1p_over(x, epsilon):
    """log(1 + e x) / e, whose limit at e = 0 is x."""
    return _over(jnp.log1p(epsilon * x), x, epsilon)


def _over(dividend, limit, epsilon):
    return jnp.where(epsilon > 0, dividend / jnp.where(epsilon > 0, epsilon, 1), limit)


def _bounded_exp(x):
    """exp(x), and where it would be infinite a number that `LEAST` may still multiply: 0 times infinity is NaN."""
    return jnp.exp(jnp.minimum(x, jnp.log(jnp.finfo(x.dtype).max) - 10))
