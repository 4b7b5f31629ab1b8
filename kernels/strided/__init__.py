"""The two patterns of the Sparse Transformer: nearby keys, and keys in regular steps or columns far away."""

import numbers

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from subquad.kernels import checks, dispatch
from subquad.kernels.axes import KeyMask, LogSumExp, Output, Query, Value
from subquad.kernels.softmax import check_heads, scale_of
from subquad.kernels.strided import reference, xla
from subquad.kernels.strided.pattern import Pattern

__all__ = ["attention", "fixed"]

IMPLEMENTATIONS = {
    **dispatch.triton("subquad.kernels.strided.triton", "attention"),
    "xla": xla.attention,
    "reference": reference.attention,
}


def attention(
    query: Query,
    key: Query,
    value: Value,
    *,
    stride: int,
    window_size: int | None,
    mask: KeyMask | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: dispatch.Implementation | None = None,
) -> Output | tuple[Output, LogSumExp]:
    """Softmax attention to the keys nearby and to every l-th key, l = `stride`.

        y_t = sum_s softmax_s(scale q_t . k_s) v_s,    |t - s| <= window_size or (t - s) mod l = 0,  s <= t if causal

    Cost: time O(T (window_size + T / l)), memory O(T): a key that is in both sets is met once, and no key is gathered.

    Args:
        query, key: [B, T, N, H].
        value: [B, T, N, V].
        stride: l, in positions.
        window_size: keys near the query on each side, itself not counted. None: only every l-th key, itself included.
        mask: key padding, bool [B, 1, 1, T] or [1, 1, 1, T], True = attend. What padding holds reaches nothing, NaN
            included.
        is_causal: a query sees positions up to its own.
        scale: of the logits. None: 1 / sqrt(H).
        return_lse: also return the log-sum-exp.
        implementation: None takes the best that can run here.
    Returns: [B, T, N, V] in the promoted dtype of query, key and value; with `return_lse` also [B, T, N] in float32,
        natural logarithm. A row that sees nothing gives 0 and -inf, and gradients of 0.
    Raises:
        TypeError: a mask that is not boolean.
        ValueError: a shape that does not fit, a stride below 1, a negative window.
        NotImplementedError: an implementation that does not exist or declines.
    Numerics: operands keep their dtype; logits, softmax and sums are float32. Agrees with the reference to 1e-5
        (float32), 2e-2 (bfloat16).
    Example:
        >>> x = jnp.ones((1, 300, 4, 16))
        >>> attention(x, x, x, stride=16, window_size=16, is_causal=True).shape
        (1, 300, 4, 16)

    Source: Child et al., Generating Long Sequences with Sparse Transformers, 2019, arXiv 1904.10509, section 4.3.
    """
    owner = "strided.attention"
    if window_size is not None and (not isinstance(window_size, numbers.Integral) or window_size < 0):
        raise ValueError(f"{owner}: window_size must be None or a number >= 0, got {window_size!r}. Count keys on each side.")
    check_stride(owner, "stride", stride)
    length, near = query.shape[1], window_size is not None
    # A stride over everything reaches nothing but the query itself, whatever its length; a window over everything no more.
    window = min(int(window_size), length) if near else 0
    pattern = Pattern(min(int(stride), length), near, bool(is_causal), window)
    return run(owner, pattern, query, key, value, mask, scale, return_lse, implementation)


def fixed(
    query: Query,
    key: Query,
    value: Value,
    *,
    block_size: int,
    columns: Int[np.ndarray, "_ c"],
    own_block: bool = True,
    mask: KeyMask | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: dispatch.Implementation | None = None,
) -> Output | tuple[Output, LogSumExp]:
    """Softmax attention to the query's own block and to some columns of every block, l = `block_size`.

        y_t = sum_s softmax_s(scale q_t . k_s) v_s,    s // l = t // l or s mod l in columns,  s <= t if causal

    Cost: time O(T (l + c T / l)), memory O(T), for c columns.

    Args:
        query, key: [B, T, N, H].
        value: [B, T, N, V].
        block_size: l, in positions; the last block may be shorter.
        columns: NumPy int [N, c], or [1, c] for all heads: positions within a block, each at most once.
        own_block: False: only the columns.
        mask, is_causal, scale, return_lse, implementation: see `attention`.
    Returns: see `attention`.
    Raises:
        TypeError: columns that are not a NumPy array of integers; a mask that is not boolean.
        ValueError: a shape that does not fit, a block size below 1, a column that does not exist or is listed twice.
        NotImplementedError: an implementation that does not exist or declines.
    Numerics: see `attention`.
    Example:
        >>> x = jnp.ones((1, 300, 4, 16))
        >>> fixed(x, x, x, block_size=16, columns=np.array([[14, 15]]), is_causal=True).shape
        (1, 300, 4, 16)

    Source: Child et al., Generating Long Sequences with Sparse Transformers, 2019, arXiv 1904.10509, section 4.3.
    """
    owner = "strided.fixed"
    check_stride(owner, "block_size", block_size)
    check_columns(owner, columns, query.shape[2], block_size)
    listed = tuple(tuple(sorted(map(int, row))) for row in columns)
    # Of a block longer than the sequence nothing counts but where the columns are.
    block = min(int(block_size), max(query.shape[1], int(columns.max()) + 1))
    pattern = Pattern(block, bool(own_block), bool(is_causal), columns=listed)
    return run(owner, pattern, query, key, value, mask, scale, return_lse, implementation)


def run(owner: str, pattern: Pattern, query, key, value, mask, scale, return_lse: bool, implementation):
    """What both functions do with their pattern."""
    check_heads(owner, query, key, value)
    if key.shape != query.shape:
        raise ValueError(f"{owner}: key must have the query's shape {query.shape}, got {key.shape}. Repeat grouped heads.")
    batch, length = query.shape[:2]
    if mask is not None and mask.dtype != bool:
        raise TypeError(f"{owner}: mask must be boolean, True = attend, got {mask.dtype}. Use mask.astype(bool).")
    if mask is not None and mask.shape not in ((batch, 1, 1, length), (1, 1, 1, length)):
        raise ValueError(
            f"{owner}: mask must be key padding of shape {(batch, 1, 1, length)}, got {mask.shape}. "
            "Use softmax.attention for pairwise masks."
        )
    dtype = jnp.result_type(query, key, value)
    query, key, value = (x.astype(dtype) for x in (query, key, value))
    key, value = checks.hide(mask, key, value)
    valid, scale = None if mask is None else mask[:, 0, 0], scale_of(owner, scale, query.shape[3])
    out, lse = dispatch.run(owner, IMPLEMENTATIONS, implementation, query, key, value, valid, pattern, scale)
    return (out, lse) if return_lse else out


def check_stride(owner: str, name: str, size) -> None:
    if not isinstance(size, numbers.Integral) or size < 1:
        raise ValueError(f"{owner}: {name} must be a positive integer, got {size!r}. Count positions.")


def check_columns(owner: str, columns, heads: int, block_size: int) -> None:
    """Refuses columns that are not NumPy integers, do not fit, or come twice."""
    if not isinstance(columns, np.ndarray) or not np.issubdtype(columns.dtype, np.integer):
        kind = getattr(columns, "dtype", None)
        raise TypeError(
            f"{owner}: columns must be a NumPy array of integers, got {type(columns).__name__} of {kind}. Build them in NumPy."
        )
    if columns.ndim != 2 or columns.shape[0] not in (1, heads) or not columns.shape[1]:
        raise ValueError(f"{owner}: columns must have shape [1 or {heads}, c], got {columns.shape}. One list per head.")
    if columns.min() < 0 or columns.max() >= block_size:
        raise ValueError(
            f"{owner}: columns must lie in 0 .. {block_size - 1}, got {columns.min()} .. {columns.max()}. "
            "Count from the start of a block."
        )
    ordered = np.sort(columns, axis=1)
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        raise ValueError(f"{owner}: columns must list a column at most once per head, got one twice. Remove it.")
