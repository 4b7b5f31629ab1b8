"""Block-sparse attention on the kernels of dense attention: the lists of blocks become rows of tiles.

Blocks that are no multiple of a tile share tiles; there an element looks its block up in the small array of allowed pairs.
"""

import numpy as np

from subquad.kernels import launch
from subquad.kernels.block_sparse.reference import allowed
from subquad.kernels.softmax import triton as flash
from subquad.kernels.softmax.xla import Visible


def attention(query, key, value, blocks, block_size: int, mask, is_causal: bool, scale: float, *, mode: launch.Mode):
    """Arguments as checked by `subquad.kernels.block_sparse.attention` -> (out [B, T, N, V], lse [B, T, N])."""
    pairs = allowed(blocks, -(-key.shape[1] // block_size))
    rows = (np.arange(length, dtype=np.int32)[None] if is_causal else None for length in (query.shape[1], key.shape[1]))
    visible, band = Visible(*rows, None, None, mask), (None, 0) if is_causal else None
    return flash.listed(query, key, value, None, visible, band, scale, pairs, block_size, mode)
