"""alpha-entmax: from softmax (alpha = 1) to sparsemax (alpha = 2) and beyond, as a map and as attention."""

import math
import numbers

import jax.numpy as jnp
from jaxtyping import Array, Float

from subquad.kernels import checks, dispatch
from subquad.kernels.axes import Key, Mask, Output, Positions, Query, Value
from subquad.kernels.entmax import reference, xla
from subquad.kernels.softmax import check_heads, scale_of

__all__ = ["attention", "entmax"]


def entmax(
    logits: Float[Array, "*B"],
    alpha: float | Float[Array, "..."] = 1.5,
    axis: int = -1,
    *,
    implementation: dispatch.Implementation | None = None,
) -> Float[Array, "*B"]:
    """A distribution along an axis that is exactly 0 where logits are small, the more so the larger alpha is.

        p_i = [(alpha - 1) z_i - tau]_+^{1 / (alpha - 1)},   tau such that sum_i p_i = 1                    (1905.05702, eq. 10)
        dp = diag(s) (dz - (s . dz) / sum s) + alpha's part,  s_i = p_i^{2 - alpha} where p_i > 0         (1905.05702, prop. 2)

    alpha = 1 is softmax and alpha = 2 sparsemax; more than 2 is sharper yet. With e = alpha - 1 and P = exp(-m) the largest
    weight, the formula is computed as p_i = P [1 + e u_i]_+^{1 / e}, u_i = P^{-e} (z_i - max z), where 0 <= m <= log n takes
    the place of tau: nothing cancels near alpha = 1, where m is the log-normaliser, nor where P^e is small.

    Cost: time O(n) for each of 3 to 12 steps up to alpha = 2, some 30 above (at most 4 per bit of the mantissa); memory O(n).

    Args:
        logits: z. -inf is never chosen; where all are, p is 0.
        alpha: at least 1. A number is a constant, fastest if it is 1, 1.5 or 2. An array must broadcast to the logits, with 1
            on `axis`; it is differentiable, and what lies below 1 in it counts as 1.
        axis: along which p sums to 1.
        implementation: "xla" or "reference" by bisection; None: "xla".
    Returns: p in the dtype of logits.
    Raises:
        TypeError: logits or an array alpha of integers; an alpha that is no number.
        ValueError: alpha below 1 or not finite; an alpha that does not broadcast; an axis of 0, or that does not exist.
    Numerics: float32 inside. The threshold is found by Newton steps between bounds, and by halving these, to a few units in
        the last place; gradients are by the formulas above, of alpha too, and at a kink that of the logits that are chosen.
        Above alpha = 2 the map itself is steep where a logit enters: there p has an error of rounding^{1 / (alpha - 1)}.
    Example:
        >>> [round(p, 3) for p in entmax(jnp.array([1.0, 0.5, -1.0]), 2.0).tolist()]
        [0.75, 0.25, 0.0]

    Source: Peters, Niculae and Martins, Sparse Sequence-to-Sequence Models, ACL 2019, arXiv 1905.05702; Martins and Astudillo,
        From Softmax to Sparsemax, ICML 2016, arXiv 1602.02068; the gradient of alpha of Correia, Niculae and Martins,
        Adaptively Sparse Transformers, EMNLP 2019, arXiv 1909.00015.
    """
    owner = "entmax.entmax"
    checks.floating(owner, logits=logits)
    if not logits.ndim or 0 in logits.shape:
        raise ValueError(f"{owner}: logits must have at least one axis, none of them 0, got {logits.shape}. Leave nothing out.")
    if not isinstance(axis, numbers.Integral) or not -logits.ndim <= axis < logits.ndim:
        raise ValueError(f"{owner}: axis must be one of the {logits.ndim} axes of logits, got {axis!r}. Count from 0, or -1.")
    alpha = _alpha_of(owner, alpha)
    if not isinstance(alpha, float):
        wanted = [size if place != axis % logits.ndim else 1 for place, size in enumerate(logits.shape)]
        shape = (1,) * (logits.ndim - alpha.ndim) + alpha.shape
        if len(shape) > logits.ndim or any(size not in (1, want) for size, want in zip(shape, wanted, strict=True)):
            raise ValueError(
                f"{owner}: alpha must broadcast to {tuple(wanted)}, the logits with 1 on the axis, got {alpha.shape}. "
                "Give each row of logits one alpha."
            )
        alpha = alpha.reshape(shape)
    implementations = {"xla": xla.entmax, "reference": reference.entmax}
    return dispatch.run(owner, implementations, implementation, logits, alpha, int(axis) % logits.ndim)


def attention(
    query: Query,
    key: Key,
    value: Value,
    alpha: float | Float[Array, ""] | Float[Array, "N"] = 1.5,
    *,
    mask: Mask | None = None,
    is_causal: bool = False,
    query_positions: Positions | None = None,
    key_positions: Positions | None = None,
    scale: float | None = None,
    implementation: dispatch.Implementation | None = None,
) -> Output:
    """Attention whose weights are alpha-entmax of the logits in place of their softmax.

        y_t = sum_s p_ts v_s,   p_t = entmax_alpha(scale q_t . k_s over the visible s)

    Cost: time O(T S) and one search for the threshold of each row, as in `entmax`; memory O(T + S) and a row of tiles, all
        keys by as many queries as a fixed number of bytes holds. The backward pass makes the logits again and searches
        nothing. Keys that causality hides are computed and cleared.

    Args:
        query: [B, T, N, H].
        key: [B, S, K, H]; K divides N, and query head n reads key head n // (N / K).
        value: [B, S, K, V].
        alpha: as in `entmax`: a number, or a differentiable array, one for all heads or one for each, [N].
        mask: bool, True = attend; each axis full or 1, of [B, N, T, S]. What no query sees by it reaches nothing, NaN included.
        is_causal: a query sees positions up to its own.
        query_positions: int, [B, T] or [1, T]; None counts from 0.
        key_positions: int, [B, S] or [1, S]; None counts from 0.
        scale: of the logits. None: 1 / sqrt(H).
        implementation: None takes the best that can run here.
    Returns: [B, T, N, V] in the promoted dtype of query, key and value; rows that see nothing are 0, with gradients of 0.
    Raises:
        TypeError: a mask that is not boolean; positions that are not integers; integers elsewhere; a scale that is no number.
        ValueError: a shape that does not fit; alpha below 1 or not finite; positions without is_causal.
        NotImplementedError: an implementation that does not exist.
    Numerics: logits, weights and sums are float32; see `entmax`.
    Example:
        >>> x = jnp.ones((2, 300, 4, 16))
        >>> attention(x, x, x, jnp.full(4, 1.3), is_causal=True).shape
        (2, 300, 4, 16)

    Source: Correia, Niculae and Martins, Adaptively Sparse Transformers, EMNLP 2019, arXiv 1909.00015, section 3.
    """
    owner = "entmax.attention"
    check_heads(owner, query, key, value)
    (batch, queries, heads, features), keys = query.shape, key.shape[1]
    alpha = _alpha_of(owner, alpha)
    if not isinstance(alpha, float) and alpha.shape not in ((), (heads,)):
        raise ValueError(f"{owner}: alpha must be one number or one for each of {heads} heads, got {alpha.shape}. Reshape it.")
    checks.pairwise(owner, "mask", mask, (batch, heads, queries, keys))
    positions = checks.causal_positions(owner, is_causal, query_positions, key_positions, batch, queries, keys)
    scale = scale_of(owner, scale, features)
    dtype = jnp.result_type(query, key, value)
    query, key, value = (x.astype(dtype) for x in (query, key, value))
    key, value = checks.hide(mask, key, value)
    implementations = {"xla": xla.attention, "reference": reference.attention}
    return dispatch.run(owner, implementations, implementation, query, key, value, alpha, mask, positions, scale)


def _alpha_of(owner: str, alpha):
    """A constant as a number, or an array."""
    if isinstance(alpha, numbers.Real):
        if not 1 <= alpha < math.inf:
            raise ValueError(f"{owner}: alpha must be finite and at least 1, got {alpha}. 1 is softmax, 2 sparsemax.")
        return float(alpha)
    checks.floating(owner, alpha=alpha)
    return jnp.asarray(alpha)
