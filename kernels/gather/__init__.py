"""Softmax attention in which every query, or block of queries, has a list of the keys that it sees."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from subquad.kernels import checks, dispatch
from subquad.kernels.axes import Key, KeyMask, LogSumExp, Output, Positions, Query, Value
from subquad.kernels.gather import reference, xla
from subquad.kernels.softmax import check_heads, scale_of

__all__ = ["attention"]

OWNER = "gather.attention"
IMPLEMENTATIONS = {"xla": xla.attention, "reference": reference.attention}


def attention(
    query: Query,
    key: Key,
    value: Value,
    indices: Int[Array, "_ _ _ L"],
    *,
    block_size: int = 1,
    mask: KeyMask | None = None,
    is_causal: bool = False,
    query_positions: Positions | None = None,
    key_positions: Positions | None = None,
    correct_duplicates: bool = True,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: dispatch.Implementation | None = None,
) -> Output | tuple[Output, LogSumExp]:
    """Softmax attention over the keys in a list, which may depend on the data.

        y_t = sum_{s in P_t} exp(scale q_t . k_s - lse_t) v_s,   lse_t = log sum_{s in P_t} exp(scale q_t . k_s)
        P_t = {indices_{t' l} : t' = floor(t / block_size), l < L}, without what the mask or causality hides

    Nearest neighbours, memories and selected keys have a list for each query. Clusters and selected blocks have one for each
    block of queries, which is read once for all of them: sort the queries first, so that a cluster is a block.

    Cost: time O(T N L (H + V)) and one sort of the lists; memory O(T N (H + V) + S K (H + V)) and the lists once more. Keys and
        values are gathered for as many lists as a fixed number of bytes holds, and again in the backward pass.

    Args:
        query: [B, T, N, H].
        key: [B, S, K, H]; K divides N, and query head n reads key head n // (N / K).
        value: [B, S, K, V].
        indices: int, places in 0 .. S - 1 of keys; any other number is no key. [B, heads, blocks, L], where the batch may be 1
            (all samples alike), heads 1, K (the query heads of a key head alike) or N, and blocks is ceil(T / block_size).
        block_size: queries that share a list.
        mask: key padding [B, 1, 1, S], True = attend. What is in padding reaches nothing, NaN included.
        is_causal: a query sees positions up to its own.
        query_positions: int, [B, T] or [1, T]; None counts from 0.
        key_positions: int, [B, S] or [1, S]; None counts from 0.
        correct_duplicates: a key counts once, however often a list names it. False: as often as that, which spares the sort:
            right where no list names a key twice.
        scale: of the logits. None: 1 / sqrt(H).
        return_lse: also return the log-sum-exp, by which `softmax.merge` joins attention over disjoint sets of keys.
        implementation: None takes the best that can run here.
    Returns: [B, T, N, V] in the promoted dtype of query, key and value; with `return_lse` also [B, T, N] in float32. A row that
        sees nothing gives 0 and -inf, and gradients of 0.
    Raises:
        TypeError: indices or positions that are not integers; a mask that is not boolean; integers elsewhere.
        ValueError: a shape that does not fit; an axis of 0; positions without is_causal.
        NotImplementedError: an implementation that does not exist.
    Numerics: operands keep their dtype; logits, softmax and sums are float32. Gradients are the same bits every time: where
        several lists name a key its terms are added in a fixed order.
    Example:
        >>> x, value = jnp.ones((1, 3, 1, 4)), jnp.array([1.0, 3.0, 5.0]).reshape(1, 3, 1, 1)
        >>> attention(x, x, value, jnp.array([[0, 1], [2, 2], [-1, -1]])[None, None]).ravel().tolist()
        [2.0, 5.0, 0.0]

    Source: Wu et al., Memorizing Transformers, ICLR 2022, arXiv 2203.08913 (a list for each query); Roy et al., Efficient
        Content-Based Sparse Attention with Routing Transformers, TACL 2021, arXiv 2003.05997 (for a block of them).
    """
    check_heads(OWNER, query, key, value)
    checks.at_least(OWNER, "block_size", block_size, 1, "Count queries.")
    checks.integers(OWNER, indices=indices)
    (batch, queries, heads, features), (_, keys, kv_heads, _) = query.shape, key.shape
    checks.shape(
        OWNER, "indices", indices, "B J I L", "Give a list for each block of queries, and fill short ones with -1.",
        B=(batch, 1), J=(heads, kv_heads, 1), I=-(-queries // block_size),
    )  # fmt: skip
    checks.key_padding(OWNER, mask, batch, keys)
    positions = checks.causal_positions(OWNER, is_causal, query_positions, key_positions, batch, queries, keys)
    scale = scale_of(OWNER, scale, features)
    dtype = jnp.result_type(query, key, value)
    query, key, value = (x.astype(dtype) for x in (query, key, value))
    key, value = checks.hide(mask, key, value)
    if isinstance(indices, np.ndarray):  # of more than 32 bits
        indices = np.clip(indices, -1, keys) if indices.dtype.itemsize > 4 else indices
    indices = jnp.broadcast_to(indices, (batch, *indices.shape[1:])).astype(jnp.int32)
    out, lse = dispatch.run(
        OWNER, IMPLEMENTATIONS, implementation,
        query, key, value, indices, int(block_size), mask, positions, bool(correct_duplicates), scale,
    )  # fmt: skip
    return (out, lse) if return_lse else out
