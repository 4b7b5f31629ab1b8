"""The two patterns of the Sparse Transformer: nearby keys, and keys in regular steps or columns far away.

Each is two calls of softmax attention, to a near and to a far set of keys that share none, merged by their normalisers. The
far keys of a stride are rows of a column, so the columns go into the batch; summary columns are gathered, block by block.
"""

import numbers

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Int

from subquad.kernels import dispatch, softmax
from subquad.kernels.axes import KeyMask, LogSumExp, Output, Query, Value
from subquad.kernels.patterns import CAUSAL, Band, Columns, Pattern, SameBlock, Strided
from subquad.kernels.softmax import check_heads, online
from subquad.kernels.softmax.xla import Visible

__all__ = ["attention", "fixed"]

IMPLEMENTATIONS = {name: function for name, function in softmax.IMPLEMENTATIONS.items() if name != "cudnn"}
BEFORE, AFTER = Band(None, -1), Band(-1, None)


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
    check(owner, query, key, value, mask)
    length = query.shape[1]
    # A stride over everything reaches nothing but the query itself, whatever its length; a window over everything no more.
    stride, window = min(int(stride), length), None if window_size is None else min(int(window_size), length)

    def near_and_far(run):
        gap = 0 if window is None else window // stride + 1  # strides to the first far row that is in no window
        far = Band(None, -gap) if is_causal else Band(None, -gap) | Band(-gap, None) if gap else None
        parts = [] if window is None else [run(query, key, value, mask, Band(window, 0 if is_causal else window))]
        if gap * stride < length:
            by_column = [rows(x, stride, "b (r c) ... -> (b c) r ...") for x in (query, key, value)]
            valid = real(mask, query, stride, is_causal)
            valid = None if valid is None else rearrange(valid, "b 1 1 (r c) -> (b c) 1 1 r", c=stride)
            out = run(*by_column, valid, far)
            parts.append([rearrange(x, "(b c) r ... -> b (r c) ...", c=stride)[:, :length] for x in out])
        return parts

    pattern = Strided(stride, window) & (CAUSAL if is_causal else None)
    return merged(owner, near_and_far, pattern, query, key, value, mask, scale, return_lse, implementation)


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
    check(owner, query, key, value, mask)
    length, heads = query.shape[1:3]
    # Of a block longer than the sequence nothing counts but where the columns are.
    size = min(int(block_size), max(length, int(columns.max()) + 1))
    columns = np.sort(columns, axis=1)
    summaries = Columns(size, tuple(map(tuple, columns.tolist())))
    count = -(-length // size)
    block_of = lambda block: np.asarray(block, np.int32)[None]

    def near_and_far(run):
        # The query's own block, whole or its columns only.
        blocks = [rows(x, size, "b (i l) ... -> (b i) l ...") for x in (query, key, value)]
        valid = real(mask, query, size, is_causal)
        valid = None if valid is None else rearrange(valid, "b 1 1 (i l) -> (b i) 1 1 l", l=size)
        if not own_block:
            column = jnp.asarray(summaries.allowed(0, np.arange(size), np.arange(summaries.heads)[:, None]))[None, :, None]
            valid = column if valid is None else valid & column
        own = run(*blocks, valid, CAUSAL if is_causal else None)
        parts = [[rearrange(x, "(b i) l ... -> b (i l) ...", i=count)[:, :length] for x in own]]
        if count > 1:  # the columns of the other blocks
            seen = count - 1 if is_causal else count  # the last block comes before no block
            positions = (np.arange(seen)[:, None, None] * size + columns.T).reshape(-1, len(columns))
            head = np.arange(heads) if len(columns) > 1 else slice(None)
            gather = lambda x: x[:, np.minimum(positions, length - 1), head] if len(columns) > 1 else x[:, np.minimum(positions[:, 0], length - 1)]
            valid = real(mask, query, size, is_causal)
            valid = None if valid is None else jnp.moveaxis(valid[:, 0, 0, positions], 1, 2)[:, :, None]
            ids = block_of(np.arange(length) // size), block_of(np.arange(seen).repeat(columns.shape[1]))
            parts.append(run(query, gather(key), gather(value), valid, BEFORE if is_causal else BEFORE | AFTER, *ids))
        return parts

    pattern = (SameBlock(size) | summaries if own_block else summaries) & (CAUSAL if is_causal else None)
    return merged(owner, near_and_far, pattern, query, key, value, mask, scale, return_lse, implementation)


def merged(owner: str, near_and_far, pattern: Pattern, query, key, value, mask, scale, return_lse: bool, implementation):
    """Attention under `pattern`: as one call for "reference", for the others merged from the sets of `near_and_far`."""
    dtype = jnp.result_type(query, key, value)

    def run(query, key, value, mask, pattern, query_positions=None, key_positions=None):
        positions = [
            np.arange(x.shape[1], dtype=np.int32)[None] if given is None else given
            for x, given in ((query, query_positions), (key, key_positions))
        ]
        arrays = (x.astype(dtype) for x in (query, key, value))
        visible = Visible(*positions, None, None, mask)
        return softmax.run(owner, IMPLEMENTATIONS, implementation, *arrays, None, visible, pattern, scale)

    if implementation == "reference":
        parts = [run(query, key, value, mask, pattern)]
    else:
        parts = near_and_far(run)
    out, *sums = parts[0] if len(parts) == 1 else online.merge(*zip(*parts, strict=True))
    return (out, sum(sums)) if return_lse else out


def rows(array, size: int, form: str):
    """[B, T, ...] rearranged in rows of `size` positions, the last one filled with zeros."""
    short = -array.shape[1] % size
    axes = {"c" if "c" in form else "l": size}
    return rearrange(jnp.pad(array, ((0, 0), (0, short), (0, 0), (0, 0))), form, **axes)


def real(mask, query, size: int, is_causal: bool):
    """The key mask of whole rows of `size`: bool [B, 1, 1, rows x size]; None where it hides nothing that is not hidden."""
    batch, length = query.shape[:2]
    short = -length % size
    if mask is None and (is_causal or not short):  # what fills the last row comes after every query
        return None
    mask = jnp.broadcast_to(jnp.ones((), bool) if mask is None else mask, (batch, 1, 1, length))
    return jnp.pad(mask, ((0, 0), (0, 0), (0, 0), (0, short)))


def check(owner: str, query, key, value, mask) -> None:
    """Refuses what does not fit together."""
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
