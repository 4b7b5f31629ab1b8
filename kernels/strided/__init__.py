"""The two patterns of the Sparse Transformer: nearby keys, and keys in regular steps or columns far away; dilated windows.

Those are softmax attention to two sets of keys that share none. The far keys of a stride are the rows of the query's column, as
are the keys of a dilated window; summary columns are gathered, block by block.
"""

import numbers

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from subquad.kernels import checks, dispatch, softmax
from subquad.kernels.axes import KeyMask, LogSumExp, Output, Positions, Query, Value
from subquad.kernels.padding import pad_to
from subquad.kernels.patterns import CAUSAL, Band, Columns, Dilated, Pattern, SameBlock, Strided
from subquad.kernels.softmax import check_heads, counted
from subquad.kernels.softmax.sets import KeySet, Visible

__all__ = ["attention", "dilated", "fixed"]

BEFORE, AFTER = Band(None, -1), Band(-1, None)


def attention(
    query: Query,
    key: Query,
    value: Value,
    *,
    stride: int,
    window_size: int | None,
    mask: KeyMask | None = None,
    segment_ids: Positions | None = None,
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
        segment_ids: int, [B, T] or [1, T]: a query sees keys of its own segment only.
        is_causal: a query sees positions up to its own.
        scale: of the logits. None: 1 / sqrt(H).
        return_lse: also return the log-sum-exp.
        implementation: None takes the best that can run here.
    Returns: [B, T, N, V] in the promoted dtype of query, key and value; with `return_lse` also [B, T, N] in float32,
        natural logarithm. A row that sees nothing gives 0 and -inf, and gradients of 0.
    Raises:
        TypeError: a mask that is not boolean; segments that are not integers.
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
    checks.at_least(owner, "stride", stride, 1, "Count positions.")
    segments = check(owner, query, key, value, mask, segment_ids)
    key, value = checks.hide(mask, key, value)
    query = finite_padding(query, mask)
    length = query.shape[1]
    # A stride over everything reaches nothing but the query itself, whatever its length; a window over everything no more.
    stride, window = min(int(stride), length), None if window_size is None else min(int(window_size), length)
    if implementation == "reference":
        union = Strided(stride, window) & (CAUSAL if is_causal else None)
        sets = [near(union, length, length, mask, segments)]
        return attend(owner, query, (key,), (value,), sets, scale, return_lse, implementation)
    (query, key, value), mask, segments = in_whole_rows((query, key, value), mask, segments, stride, is_causal)
    padded = query.shape[1]
    sets = [] if window is None else [near(Band(window, 0 if is_causal else window), padded, padded, mask, segments)]
    gap = 0 if window is None else window // stride + 1  # rows to the first of the column that no window holds
    if gap * stride < length:
        far = Band(None, -gap) if is_causal else Band(None, -gap) | Band(-gap, None) if gap else None
        sets.append(near(far, padded // stride, padded // stride, mask, segments)._replace(columns=stride))
    result = attend(owner, query, (key,), (value,), sets, scale, return_lse, implementation)
    return jax.tree.map(lambda x: x[:, :length], result)


def dilated(
    query: Query,
    key: Query,
    value: Value,
    *,
    dilation: int,
    window_size: int | tuple[int, int],
    mask: KeyMask | None = None,
    segment_ids: Positions | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: dispatch.Implementation | None = None,
) -> Output | tuple[Output, LogSumExp]:
    """Softmax attention to every d-th key around the query, d = `dilation`.

        y_t = sum_s softmax_s(scale q_t . k_s) v_s,    s = t + j d,  -left <= j <= right,  j <= 0 if causal

    Cost: time O(T (left + right + 1)), memory O(T), whatever the dilation.

    Args:
        query, key: [B, T, N, H].
        value: [B, T, N, V].
        dilation: d, in positions.
        window_size: keys on each side, itself not counted; one number or (left, right).
        mask, segment_ids, is_causal, scale, return_lse, implementation: see `attention`.
    Returns: see `attention`.
    Raises:
        TypeError: a mask that is not boolean; segments that are not integers.
        ValueError: a shape that does not fit, a dilation below 1, a negative window.
        NotImplementedError: an implementation that does not exist or declines.
    Numerics: see `attention`.
    Example:
        >>> x = jnp.ones((1, 300, 4, 16))
        >>> dilated(x, x, x, dilation=3, window_size=16).shape
        (1, 300, 4, 16)

    Source: Beltagy et al., Longformer, 2020, arXiv 2004.05150, section 3.1.
    """
    owner = "strided.dilated"
    sides = tuple(window_size) if isinstance(window_size, tuple | list) else (window_size, window_size)
    if len(sides) != 2 or any(not isinstance(side, numbers.Integral) or side < 0 for side in sides):
        raise ValueError(f"{owner}: window_size must be a number >= 0 or two, got {window_size!r}. Count keys on each side.")
    checks.at_least(owner, "dilation", dilation, 1, "Count positions.")
    segments = check(owner, query, key, value, mask, segment_ids)
    key, value = checks.hide(mask, key, value)
    length, (left, right) = query.shape[1], (min(int(side), query.shape[1]) for side in sides)
    dilation, right = min(int(dilation), length), 0 if is_causal else right
    if implementation == "reference":
        sets = [near(Dilated(left, right, (dilation,)), length, length, mask, segments)]
        return attend(owner, query, (key,), (value,), sets, scale, return_lse, implementation)
    (query, key, value), mask, segments = in_whole_rows((query, key, value), mask, segments, dilation, is_causal)
    rows = query.shape[1] // dilation
    sets = [near(Band(left, right), rows, rows, mask, segments)._replace(columns=dilation)]
    result = attend(owner, query, (key,), (value,), sets, scale, return_lse, implementation)
    return jax.tree.map(lambda x: x[:, :length], result)


def fixed(
    query: Query,
    key: Query,
    value: Value,
    *,
    block_size: int,
    columns: Int[np.ndarray, "_ c"],
    own_block: bool = True,
    mask: KeyMask | None = None,
    segment_ids: Positions | None = None,
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
        mask, segment_ids, is_causal, scale, return_lse, implementation: see `attention`.
    Returns: see `attention`.
    Raises:
        TypeError: columns that are not a NumPy array of integers; a mask that is not boolean; segments that are not integers.
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
    checks.at_least(owner, "block_size", block_size, 1, "Count positions.")
    instead, heads = "Give each head, or all, positions within a block.", (query.shape[2], 1)
    checks.lists(owner, "columns", columns, "N c", 0, block_size - 1, instead, N=heads)
    segments = check(owner, query, key, value, mask, segment_ids)
    key, value = checks.hide(mask, key, value)
    query = finite_padding(query, mask)
    length, heads = query.shape[1:3]
    # Of a block longer than the sequence nothing counts but where the columns are.
    size = min(int(block_size), max(length, int(columns.max()) + 1))
    columns = np.sort(columns, axis=1)
    summaries = Columns(size, tuple(map(tuple, columns.tolist())))
    causal = CAUSAL if is_causal else None
    if implementation == "reference" or not own_block and not is_causal:
        union = SameBlock(size) | summaries if own_block else summaries
        sets = [near(union & causal, length, length, mask, segments)]
        return attend(owner, query, (key,), (value,), sets, scale, return_lse, implementation)
    if segments is not None and len(columns) > 1:  # the segments of gathered keys would differ by head
        options = dict(block_size=block_size, own_block=own_block, mask=mask, segment_ids=segments, is_causal=is_causal)
        options |= dict(scale=scale, return_lse=return_lse, implementation=implementation)
        one = lambda n: fixed(*(x[:, :, n : n + 1] for x in (query, key, value)), columns=columns[n : n + 1], **options)
        return jax.tree.map(lambda *heads: jnp.concatenate(heads, 2), *map(one, range(heads)))
    own = SameBlock(size) if own_block else SameBlock(size) & summaries
    sets, keys, values = [near(own & causal, length, length, mask, segments)], (key,), (value,)
    if length > size:
        summary_key, summary_value, others = of_other_blocks(key, value, columns, size, mask, segments, is_causal)
        sets, keys, values = [*sets, others], (key, summary_key), (value, summary_value)
    return attend(owner, query, keys, values, sets, scale, return_lse, implementation)


def of_other_blocks(key, value, columns, size: int, mask, segments, is_causal: bool):
    """Keys and values [B, I c, N, ..] in the columns [N|1, c] of I blocks, and who sees them: the queries of other blocks.

    If causal, those of later blocks: the last block has none, and is left out.
    """
    (length, heads), count = key.shape[1:3], -(-key.shape[1] // size)
    blocks = np.arange(count - 1 if is_causal else count)
    positions = (blocks[:, None] * size + columns[:, None]).reshape(len(columns), -1)  # [N|1, I c]
    exists, positions = positions < length, np.minimum(positions, length - 1)  # the last block may be shorter
    if len(columns) == 1:
        gathered = lambda x: x[:, positions[0]]
    else:
        gathered = lambda x: x[:, positions.T, np.arange(heads)]
    seen = None if exists.all() else jnp.asarray(exists[None, :, None])
    if mask is not None:
        seen = exists[None, :, None] & mask[:, 0, 0, positions][:, :, None]
    # Positions are numbers of blocks.
    number = lambda block: np.asarray(block, np.int32)[None]
    of_queries, of_keys = number(np.arange(length) // size), number(blocks.repeat(columns.shape[1]))
    key_segments = None if segments is None else segments[:, positions[0]]
    visible = Visible(of_queries, of_keys, segments, key_segments, seen)
    return gathered(key), gathered(value), KeySet(BEFORE if is_causal else BEFORE | AFTER, visible, source=1)


def attend(owner: str, query, keys, values, sets, scale, return_lse: bool, implementation):
    """What both functions return, of the keys and values of some sets."""
    out, *sums = softmax.run(owner, softmax.IMPLEMENTATIONS, implementation, query, keys, values, None, tuple(sets), scale)
    return (out, sum(sums)) if return_lse else out


def near(pattern: Pattern | None, queries: int, keys: int, mask, segments) -> KeySet:
    """Keys under a pattern of positions that count from 0."""
    return KeySet(pattern, Visible(counted(queries), counted(keys), segments, segments, mask))


def finite_padding(query, mask):
    """Queries [B, T, N, H] with 0 for NaN and for what would overflow in padding, whose outputs mean nothing.

    The merge of two sets would multiply them by a gradient of 0, which is NaN.
    """
    if mask is None:
        return query
    return jnp.where(jnp.moveaxis(mask, 3, 1) | (abs(query) < checks.LARGE), query, 0)


def in_whole_rows(arrays, mask, segments, size: int, is_causal: bool):
    """Arrays, mask and segments up to a multiple of `size` tokens; what is added is seen by none of those there are."""
    length = arrays[0].shape[1]
    if length % size == 0:
        return arrays, mask, segments
    segments = None if segments is None else whole_rows(segments, size)
    return [whole_rows(x, size) for x in arrays], whole_rows_of(mask, length, size, is_causal), segments


def whole_rows(array, size: int):
    """[B, T, ...] with zeros at the end up to a multiple of `size`."""
    return pad_to(array, 1, -(-array.shape[1] // size) * size)


def whole_rows_of(mask, length: int, size: int, is_causal: bool):
    """A mask of keys [B|1, 1, 1, T] for arrays of whole rows; None where causality hides all that it would hide."""
    if mask is None and is_causal:
        return None
    mask = jnp.ones((1, 1, 1, length), bool) if mask is None else mask
    return pad_to(mask, 3, -(-length // size) * size)


def check(owner: str, query, key, value, mask, segment_ids):
    """Refuses what does not fit together; the segments as int32, or None."""
    check_heads(owner, query, key, value)
    if key.shape != query.shape:
        raise ValueError(f"{owner}: key must have the query's shape {query.shape}, got {key.shape}. Repeat grouped heads.")
    batch, length = query.shape[:2]
    checks.key_padding(owner, mask, batch, length)
    return checks.row(owner, "segment_ids", segment_ids, batch, length)
