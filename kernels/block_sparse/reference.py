"""Block-sparse attention as dense attention under the mask that the lists spell out."""

import jax.numpy as jnp
import numpy as np

from subquad.kernels.softmax import reference, xla


def allowed(blocks: np.ndarray, columns: int) -> np.ndarray:
    """bool [1|N, I, columns]: the pairs of blocks that the lists name."""
    seen = np.zeros((*blocks.shape[:2], columns + 1), bool)
    # The entry -1 falls on the last column, which is cut off.
    np.put_along_axis(seen, blocks, True, axis=2)
    return seen[..., :-1]


def visible(blocks: np.ndarray, block_size: int, queries: int, keys: int, is_causal: bool) -> np.ndarray:
    """bool [1|N, T, S]: what the lists let each query see."""
    seen = allowed(blocks, -(-keys // block_size)).repeat(block_size, 1).repeat(block_size, 2)[:, :queries, :keys]
    return seen & np.tri(queries, keys, dtype=bool) if is_causal else seen


def attention(query, key, value, blocks, block_size: int, mask, is_causal: bool, scale: float):
    """Arguments as checked by `subquad.kernels.block_sparse.attention` -> (out [B, T, N, V], lse [B, T, N])."""
    seen = jnp.asarray(visible(blocks, block_size, query.shape[1], key.shape[1], is_causal))[None]
    mask = seen if mask is None else seen & mask
    return reference.attention(query, key, value, None, xla.Visible(None, None, None, None, mask), None, scale)
