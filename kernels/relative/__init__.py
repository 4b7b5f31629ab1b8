"""Causal attention with relative positions and memory (Transformer-XL)."""

from jaxtyping import Array, Float

from subquad.kernels import checks, dispatch
from subquad.kernels.axes import Mask, Output, Positions, Query
from subquad.kernels.relative import reference, xla
from subquad.kernels.softmax import scale_of
from subquad.kernels.softmax.sets import Visible

OPERATION = "relative.attention"
SAVED = reference.SAVED
IMPLEMENTATIONS = dispatch.implementations("attention", xla, reference)


def attention(
    query: Query,
    key: Float[Array, "B S N H"],
    value: Float[Array, "B S N V"],
    relative_key: Float[Array, "R N H"],
    content_bias: Float[Array, "N H"],
    position_bias: Float[Array, "N H"],
    *,
    mask: Mask | None = None,
    query_segment_ids: Positions | None = None,
    key_segment_ids: Positions | None = None,
    scale: float | None = None,
    implementation: dispatch.Implementation | None = None,
) -> Output:
    """Softmax attention whose scores depend on content and on distance, over a memory and the segment after it.

        a_ij = (q_i + u) . k_j + (q_i + v) . r_{i-j}                                       (section 3.3)
        y_i = sum_j softmax_j(scale a_ij) v_j,    j <= i

    The keys are the M = S - T of the memory, then those of the T queries: query t stands at position M + t.

    Cost: time O(T S (H + V)), and O(T + S) memory per head beyond one tile; the backward pass recomputes the scores.
    Differs from the paper: a mask; rows that see no key are 0.

    Args:
        query: [B, T, N, H].
        key: [B, S, N, H] with S >= T, memory first.
        value: [B, S, N, V].
        relative_key: [R, N, H], the projected encoding W_R R_d of distance d = 0, 1, 2, ... in tokens; R >= S.
        content_bias: [N, H], the u of the paper.
        position_bias: [N, H], the v of the paper.
        mask: True = attend; each axis full or 1, of [B, N, T, S]. Key padding is [B, 1, 1, S]. What no
            query sees by it reaches nothing, NaN included.
        query_segment_ids, key_segment_ids: int, [B, T] or [1, T] and [B, S] or [1, S]; both or neither. A query sees keys
            of its own segment only, at the distances that they have in the whole sequence.
        scale: of the scores. None: 1 / sqrt(H).
        implementation: None takes the best that can run here.
    Returns: [B, T, N, V] in the dtype of value.
    Raises:
        ValueError: shapes that do not fit.
        TypeError: a mask that is not boolean; segments that are not integers; arrays of integers; a scale that is not a number.
        NotImplementedError: the implementation does not exist, or declines this call.
    Numerics: scores, softmax and sums in float32; agrees with the reference to 1e-5 (float32), 2e-2 (bfloat16).
    Example:
        >>> x = jnp.ones((2, 5, 4, 8))
        >>> attention(x, x, x, jnp.ones((5, 4, 8)), jnp.zeros((4, 8)), jnp.zeros((4, 8))).shape
        (2, 5, 4, 8)

    Source: Dai et al., Transformer-XL, ACL 2019, arXiv 1901.02860.
    """
    dispatch.check_name(OPERATION, implementation)
    _check(query, key, value, relative_key, content_bias, position_bias, mask)
    segments = checks.segments(OPERATION, query_segment_ids, key_segment_ids, *query.shape[:2], key.shape[1])
    visible = Visible(None, None, *segments, mask)
    scale = scale_of(OPERATION, scale, query.shape[-1])
    key, value = checks.hide(mask, key, value)
    arrays = query, key, value, relative_key, content_bias, position_bias
    dtype = value.dtype  # also where a wide relative_key, made of positions, is met in 64 bits
    return dispatch.run(OPERATION, IMPLEMENTATIONS, implementation, *arrays, visible, scale).astype(dtype)


def _check(query, key, value, relative_key, content_bias, position_bias, mask):
    checks.floating(
        OPERATION, query=query, key=key, value=value, relative_key=relative_key, content_bias=content_bias,
        position_bias=position_bias,
    )  # fmt: skip
    checks.shape(OPERATION, "query", query, "B T N H", "Flatten the batch axes.")
    B, T, N, H = query.shape
    checks.shape(OPERATION, "key", key, "B S N H", "Repeat grouped heads first.", B=B, N=N, H=H)
    S = key.shape[1]
    if S < T:
        raise ValueError(
            f"{OPERATION}: key must hold memory and segment, S >= T = {T}, got {key.shape}. "
            "Put the memory before the segment's keys."
        )
    checks.shape(OPERATION, "value", value, "B S N V", "One value per key.", B=B, S=S, N=N)
    checks.shape(OPERATION, "relative_key", relative_key, "R N H", "Encode the distances 0 to S - 1.", N=N, H=H)
    if len(relative_key) < S:
        raise ValueError(
            f"{OPERATION}: relative_key must have R >= S = {S} rows, got {relative_key.shape}. Encode the distances 0 to S - 1."
        )
    for name, bias in (("content_bias", content_bias), ("position_bias", position_bias)):
        checks.shape(OPERATION, name, bias, "N H", "Use one vector per head.", N=N, H=H)
    checks.pairwise(OPERATION, "mask", mask, (B, N, T, S))


__all__ = ["SAVED", "attention"]
