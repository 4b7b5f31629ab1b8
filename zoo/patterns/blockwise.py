"""Blockwise attention: every head pairs blocks of queries with blocks of keys by a permutation."""

from collections.abc import Sequence
from typing import Unpack

import numpy as np
from flax import nnx

from subquad.kernels.patterns import BlockPermutation
from subquad.zoo.base import Attention, Shell, Support
from subquad.zoo.checks import check_sizes, refuse


class BlockwiseAttention(Attention):
    """Softmax attention in which the queries of block i see the keys of block pi(i), another pi for each head.

        y_t = sum_s softmax_s(q_t . k_s / sqrt(H)) v_s,    s in block pi_h(t // block_size)    (section 3)
        pi_h(i) = (i + shift_h) mod n,    n = ceil(max_length / block_size)

    Cost: time O(T block_size N H), memory O(T); one extended token O(block_size N H), cache O(max_length).
    Differs from the paper: none where is_causal=False: as there, a shorter input is one of max_length padded at its end,
        so that a head whose block of keys lies past the end gives 0. The paper is bidirectional; causal attention here
        masks by position and by default shifts to earlier blocks, so the first |shift| blocks of such a head give 0.

    Args:
        num_heads: query heads N; must divide qkv_features.
        in_features: features D of the inputs.
        max_length: the longest input, in tokens; its blocks are what the permutations permute.
        block_size: tokens per block; the last block may be shorter. The paper's n blocks are block_size=max_length/n.
        shifts: one for each head. None: 0, the identity, for most heads, and 1 and 2 for a sixth of the heads each (at
            least one each, from three heads on), as in the paper's best division (8:2:2 of 12 heads, and modulo two
            blocks 10:2); negative when causal.
        is_causal: a token sees itself and those before it, within the blocks of each head.
        shell: see `Attention`.
    Call:
        inputs_q: [*B, T, D] with T <= max_length.  mask: True = attend; key padding only, [*B, 1, 1, T].
        segment_ids: [T] or [*B, T]; blocks are counted from the start of the whole input.
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters; a head that sees nothing adds 0.
    Raises: ValueError: an input longer than max_length; shifts that are not one number per head; a mask that is not key
        padding.
    Numerics: softmax in float32; agrees with the reference to 1e-5 (float32), 2e-2 (bfloat16).
    Example:
        >>> layer = BlockwiseAttention(6, 96, max_length=512, block_size=256, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 100, 96))).shape, layer.shifts
        ((2, 100, 96), (0, 0, 0, 0, 1, 2))

    Source: Qiu et al., Blockwise Self-Attention for Long Document Understanding (BlockBERT), 2020, arXiv 1911.02972.
    """

    supports = Support(cost="T", is_pattern=True, segment_ids=True, rotary=True, attention_fn=True)

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        max_length: int,
        block_size: int = 128,
        shifts: Sequence[int] | None = None,
        is_causal: bool = False,
        rngs: nnx.Rngs,
        **shell: Unpack[Shell],
    ):
        super().__init__(num_heads, in_features, is_causal=is_causal, rngs=rngs, **shell)
        check_sizes("BlockwiseAttention", max_length=max_length, block_size=block_size)
        if shifts is None:
            shifted = max(1, num_heads // 6)
            ones, twos = (shifted if num_heads > least else 0 for least in (1, 2))
            shifts = [0] * (num_heads - ones - twos) + [1] * ones + [2] * twos
            shifts = [-shift if is_causal else shift for shift in shifts]
        if np.shape(shifts) != (num_heads,) or any(not isinstance(shift, int | np.integer) for shift in shifts):
            refuse("BlockwiseAttention", "shifts", shifts, f"be one whole number for each of {num_heads} heads",
                   "Use 0 for the identity.")
        self.max_length, self.block_size, self.shifts = int(max_length), int(block_size), tuple(map(int, shifts))
        self.sees = BlockPermutation(self.block_size, -(-self.max_length // self.block_size), self.shifts) & self.sees
