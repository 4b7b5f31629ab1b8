"""Exact softmax attention in O(T) memory, and the merge of partial results."""

import functools
import math
import numbers
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from subquad.kernels import checks, dispatch
from subquad.kernels.axes import Array, Bias, Key, LogSumExp, Mask, Output, Positions, Query, Value
from subquad.kernels.patterns import Band, Pattern
from subquad.kernels.softmax import cudnn, online, reference, xla
from subquad.kernels.softmax.sets import KeySet, Visible, one_by_one

__all__ = ["SAVED", "attention", "merge"]

OWNER = "softmax.attention"
SAVED = reference.SAVED
LARGEST_SIDE = 1 << 30  # of a window: what is added to a position in int32
IMPLEMENTATIONS = {
    **{name: one_by_one(f) for name, f in dispatch.triton("subquad.kernels.softmax.triton", "attention").items()},
    "xla": xla.attention,
    "reference": one_by_one(reference.attention),
}


def attention(
    query: Query,
    key: Key,
    value: Value,
    *,
    mask: Mask | None = None,
    bias: Bias | None = None,
    is_causal: bool = False,
    window_size: int | tuple[int | None, int | None] | None = None,
    pattern: Pattern | None = None,
    query_positions: Positions | np.ndarray | None = None,
    key_positions: Positions | np.ndarray | None = None,
    query_segment_ids: Positions | None = None,
    key_segment_ids: Positions | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: dispatch.Implementation | None = None,
) -> Output | tuple[Output, LogSumExp]:
    """Softmax attention over the visible keys.

        y_t = sum_s softmax_s(scale q_t . k_s + bias_ts) v_s        lse_t = log sum_s exp(scale q_t . k_s + bias_ts)

    Visible is what the mask and the pattern allow, whose segment is the query's, and whose position p satisfies
    q - left <= p <= q + right for the window (left, right), with right at most 0 if causal.

    Cost: memory O(T + S) (plus the mask and bias that are passed in). Time O(T S) for the pairs of tiles that hold
        something visible, so O(T x window) with a window and half for causal: an exact number of steps that is fixed
        while tracing, for positions that are None or NumPy arrays. Positions that are JAX arrays are compared, and all
        tiles are visited.

    Args:
        query: [B, T, N, H].
        key: [B, S, K, H]; K divides N, and query head n reads key head n // (N / K).
        value: [B, S, K, V].
        mask: bool, True = attend; each axis full or 1, of [B, N, T, S]. What is in a key or value that no query sees by it
            reaches nothing, NaN and infinities included. What only some queries see must be finite, of any size: a weight
            of 0 hides it from the others, but 0 times NaN or infinity is NaN. So it is with a future, a window or a segment.
            Queries that see nothing may be padding too; where there is a mask or segments, so may those whose outputs nobody
            uses, but for "reference".
        bias: added to the logits; each axis full or 1, of [B, N, T, S]; differentiable. -inf hides a key.
        is_causal: a query sees positions up to its own.
        window_size: keys seen on each side, the query's own position not counted; one number or (left, right), with
            None for no limit on that side.
        pattern: which positions see which, as `subquad.kernels.patterns` says it; for all heads, or for each of N.
        query_positions: int, [B, T] or [1, T]; None counts from 0.
        key_positions: int, [B, S] or [1, S]; None counts from 0.
        query_segment_ids, key_segment_ids: int, [B, T] or [1, T] and [B, S] or [1, S]; both or neither.
        scale: of the logits. None: 1 / sqrt(H).
        return_lse: also return the log-sum-exp.
        implementation: None takes the best that can run here. cuDNN, which that may be on Hopper GPUs, takes no sequence that
            is sharded over a mesh, and says so when it is compiled: pass "triton" there.
    Returns: [B, T, N, V] in the promoted dtype of query, key and value; with `return_lse` also [B, T, N] in float32,
        natural logarithm. A row that sees nothing gives 0 and -inf, and gradients of 0.
    Raises:
        TypeError: a mask that is not boolean; positions or segments that are not integers.
        ValueError: a shape that does not fit; a negative window, or one of 2^30 and more that cannot be known to cover all.
        NotImplementedError: an implementation that cannot serve this call, with the reason.
    Numerics: operands keep their dtype; logits, softmax and sums are float32. Agrees with the reference to 1e-5
        (float32), 2e-2 (bfloat16). The gradient recomputes the weights from the log-sum-exp, which "xla" keeps as
        maximum and log(normaliser): right at any finite logits. Triton keeps their sum, whose rounding is in the weights of
        its gradients: 1 % from logits of about 1e5 on; they stay finite. Every implementation gives the same bits every time,
        but for cuDNN's gradients.
    Example:
        >>> x = jnp.ones((2, 300, 4, 16))
        >>> out, lse = attention(x, x, x, is_causal=True, window_size=32, return_lse=True)
        >>> out.shape, lse.shape
        ((2, 300, 4, 16), (2, 300, 4))

    Source: Vaswani et al., Attention Is All You Need, 2017, arXiv 1706.03762; the online softmax of Milakov and
        Gimelshein, 2018, arXiv 1805.02867; the recomputing backward pass of Dao et al., FlashAttention, 2022,
        arXiv 2205.14135.
    """
    dispatch.check_name(OWNER, implementation)
    check_heads(OWNER, query, key, value)
    (batch, queries, heads, _), keys = query.shape, key.shape[1]
    checks.pairwise(OWNER, "mask", mask, (batch, heads, queries, keys))
    checks.pairwise(OWNER, "bias", bias, (batch, heads, queries, keys))
    band = band_of(window_size, is_causal)
    if pattern is not None and pattern.heads not in (1, heads):
        raise ValueError(
            f"{OWNER}: pattern must tell 1 head or {heads} apart, got one that tells {pattern.heads}. "
            "Give each query head its own."
        )
    segments = checks.segments(OWNER, query_segment_ids, key_segment_ids, batch, queries, keys)
    given = (("query_positions", query_positions, queries), ("key_positions", key_positions, keys))
    positions = [checks.row(OWNER, name, array, batch, length) for name, array, length in given]
    positions = [counted(n) if x is None else x for x, n in zip(positions, (queries, keys), strict=True)]
    band = needed(band, *positions)
    pattern = pattern if band is None else band & pattern
    by_cudnn = functools.partial(cudnn.attention, return_lse=return_lse, by_name=implementation == "cudnn")
    implementations = {"cudnn": one_by_one(by_cudnn), **IMPLEMENTATIONS}
    sets = (KeySet(pattern, Visible(*positions, *segments, mask)),)
    key, value = checks.hide(mask, key, value)
    out, *sums = run(OWNER, implementations, implementation, query, (key,), (value,), bias, sets, scale)
    return (out, sum(sums)) if return_lse else out


def run(owner: str, implementations, implementation, query, keys, values, bias, sets: tuple[KeySet, ...], scale):
    """Out, maximum and log(normaliser) of checked arguments, for every operation that is softmax attention to sets of keys."""
    scale = scale_of(owner, scale, query.shape[3])
    dtype = jnp.result_type(query, *keys, *values)
    query, keys, values = jax.tree.map(lambda x: x.astype(dtype), (query, keys, values))
    nowhere = lambda visible: visible._replace(query_positions=None, key_positions=None)
    sets = tuple(one if one.pattern is not None else one._replace(visible=nowhere(one.visible)) for one in sets)
    return dispatch.run(owner, implementations, implementation, query, keys, values, bias, sets, scale)


def merge(
    outputs: Sequence[Float[Array, "B T N V"]], lses: Sequence[Float[Array, "B T N"]]
) -> tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """One result from attention over disjoint sets of keys.

        lse = log sum_i exp(lse_i)        y = sum_i exp(lse_i - lse) y_i

    Args:
        outputs: of `attention(..., return_lse=True)`, one per set of keys.
        lses: likewise.
    Returns: what one `attention` over the union would have returned; 0 and -inf for rows that see nothing.
    Example:
        >>> q, k = jnp.ones((1, 5, 2, 4)), jnp.arange(48.0).reshape(1, 6, 2, 4)
        >>> parts = [attention(q, x, x, return_lse=True) for x in (k[:, :2], k[:, 2:])]
        >>> bool(jnp.allclose(merge(*zip(*parts))[0], attention(q, k, k), atol=1e-5))
        True
    """
    out, *sums = online.merge(list(outputs), *zip(*map(online.split_lse, lses), strict=True))
    return out, sum(sums)


def check_heads(owner: str, query, key, value) -> None:
    """Refuses query, key and value whose shapes do not go together."""
    checks.floating(owner, query=query, key=key, value=value)
    checks.shape(owner, "query", query, "B T N H", "Flatten the batch axes into one.")
    batch, _, heads, features = query.shape
    checks.shape(owner, "key", key, "B S K H", "Project it to the query's features.", B=batch, H=features)
    if heads % key.shape[2]:
        raise ValueError(f"{owner}: key must have K heads with K dividing {heads}, got {key.shape}. Repeat some heads.")
    batch, keys, kv_heads, _ = key.shape
    checks.shape(owner, "value", value, "B S K V", "Give it the key's length and heads.", B=batch, S=keys, K=kv_heads)


def band_of(window_size, is_causal: bool) -> tuple[int | None, int | None] | None:
    """(left, right) limits of the visible positions around the query's; None where there is no limit."""
    both = window_size if isinstance(window_size, tuple | list) else (window_size, window_size)
    if len(both) != 2 or any(not (side is None or isinstance(side, numbers.Integral) and side >= 0) for side in both):
        raise ValueError(
            f"{OWNER}: window_size must be None, a number >= 0 or a pair (left, right) of such, got {window_size!r}. "
            "Count the keys on each side of the query, itself not counted."
        )
    left, right = (None if side is None else int(side) for side in both)
    if is_causal:
        right = 0
    return None if left is None and right is None else (left, right)


def counted(length: int) -> np.ndarray:
    """Positions that count from 0, [1, length]."""
    return np.arange(length, dtype=np.int32)[None]


def needed(band, query_positions, key_positions) -> Band | None:
    """The limits of `band` that hide anything, by positions that are known: a position plus a large limit would overflow."""
    if band is None:
        return None
    left, right = band
    if isinstance(query_positions, np.ndarray) and isinstance(key_positions, np.ndarray):
        (first_query, last_query), (first_key, last_key) = (
            (int(positions.min()), int(positions.max())) for positions in (query_positions, key_positions)
        )
        left = None if left is not None and left >= last_query - first_key else left
        right = None if right is not None and right >= last_key - first_query else right
    largest = max(side or 0 for side in (left, right))
    if largest >= LARGEST_SIDE:
        raise ValueError(
            f"{OWNER}: window_size must be below 2^30 where positions are not known to lie within it, got {largest}. "
            "Pass None for no limit."
        )
    return None if left is None and right is None else Band(left, right)


def scale_of(owner: str, scale, features: int) -> float:
    """The scale of the logits as a number."""
    if scale is None:
        return 1 / math.sqrt(features)
    if not isinstance(scale, numbers.Real):
        raise TypeError(f"{owner}: scale must be a number, got {type(scale).__name__}. Multiply the query by a learned scale.")
    return float(scale)
