"""Attention over lists of key blocks, per query block and head: softmax attention under a pattern of blocks."""

import numpy as np
from jaxtyping import Int

from subquad.kernels import checks, dispatch, softmax
from subquad.kernels.axes import Key, KeyMask, LogSumExp, Output, Query, Value
from subquad.kernels.patterns import CAUSAL, Blocks
from subquad.kernels.softmax import check_heads, counted
from subquad.kernels.softmax.sets import KeySet, Visible

__all__ = ["attention"]

OWNER = "block_sparse.attention"


def attention(
    query: Query,
    key: Key,
    value: Value,
    blocks: Int[np.ndarray, "_ I L"],
    *,
    block_size: int,
    mask: KeyMask | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: dispatch.Implementation | None = None,
) -> Output | tuple[Output, LogSumExp]:
    """Softmax attention in which each block of queries sees a list of blocks of keys.

        y_t = sum_s softmax_s(scale q_t . k_s) v_s,    s // block_size in blocks[n, t // block_size],  s <= t if causal

    Cost: time O(T block_size L), memory O(T + S) and one tile of logits; rows of unequal lengths cost their own length.

    Args:
        query: [B, T, N, H].
        key: [B, S, K, H]; K divides N, and query head n reads key head n // (N / K).
        value: [B, S, K, V].
        blocks: NumPy int [N, ceil(T / block_size), L], or [1, ...] for all heads: the key blocks that each query block
            sees, in any order, each at most once; -1 = no entry.
        block_size: positions per block, of queries and keys; the last block may be shorter.
        mask: key padding, bool [B, 1, 1, S] or [1, 1, 1, S], True = attend. What padding holds reaches nothing, NaN
            included.
        is_causal: a query sees positions up to its own, within the blocks of its list.
        scale: of the logits. None: 1 / sqrt(H).
        return_lse: also return the log-sum-exp.
        implementation: None takes the best that can run here.
    Returns: [B, T, N, V] in the promoted dtype of query, key and value; with `return_lse` also [B, T, N] in float32,
        natural logarithm. A row that sees nothing gives 0 and -inf, and gradients of 0.
    Raises:
        TypeError: blocks that are not a NumPy array of integers; a mask that is not boolean.
        ValueError: a shape that does not fit, a block that does not exist or is listed twice.
        NotImplementedError: an implementation that does not exist.
    Numerics: operands keep their dtype; logits, softmax and sums are float32. Agrees with the reference to 1e-5
        (float32), 2e-2 (bfloat16).
    Example:
        >>> x = jnp.ones((1, 100, 4, 16))
        >>> attention(x, x, x, np.array([[[0, 1], [1, -1]]]), block_size=64).shape
        (1, 100, 4, 16)

    Source: the lists are those of Qiu et al., Blockwise Self-Attention, 2019, arXiv 1911.02972, and Zaheer et al., Big
        Bird, 2020, arXiv 2007.14062; the online softmax of Milakov and Gimelshein, 2018, arXiv 1805.02867.
    """
    dispatch.check_name(OWNER, implementation)
    check_heads(OWNER, query, key, value)
    batch, queries, heads, _ = query.shape
    keys = key.shape[1]
    checks.at_least(OWNER, "block_size", block_size, 1, "Count positions.")
    rows, columns = -(-queries // block_size), -(-keys // block_size)
    instead = "Give one list per head, or for all, and block of queries; -1 is no entry."
    checks.lists(OWNER, "blocks", blocks, "N I L", -1, columns - 1, instead, N=(heads, 1), I=rows)
    checks.key_padding(OWNER, mask, batch, keys)
    pattern = Blocks.of(blocks, int(block_size), columns) & (CAUSAL if is_causal else None)
    sets = (KeySet(pattern, Visible(counted(queries), counted(keys), None, None, mask)),)
    key, value = checks.hide(mask, key, value)
    out, *sums = softmax.run(OWNER, softmax.IMPLEMENTATIONS, implementation, query, (key,), (value,), None, sets, scale)
    return (out, sum(sums)) if return_lse else out
