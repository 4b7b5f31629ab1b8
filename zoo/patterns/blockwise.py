"""Blockwise attention: every head pairs blocks of queries with blocks of keys by a permutation."""

from collections.abc import Sequence
from typing import Any, Unpack

import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from flax import nnx

from subquad.kernels import block_sparse, softmax
from subquad.zoo.base import Attention, Shell, Support
from subquad.zoo.cache import KVCache, append, pieces, places, poisoned
from subquad.zoo.checks import refuse, require_extend
from subquad.zoo.patterns.steps import in_chunks


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

    supports = Support(cost="T", rotary=True, attention_fn=True)

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
        for name, size in (("max_length", max_length), ("block_size", block_size)):
            if not isinstance(size, int | np.integer) or size < 1:
                refuse("BlockwiseAttention", name, repr(size), "be a positive integer", "Count tokens.")
        if shifts is None:
            shifted = max(1, num_heads // 6)
            ones, twos = (shifted if num_heads > least else 0 for least in (1, 2))
            shifts = [0] * (num_heads - ones - twos) + [1] * ones + [2] * twos
            shifts = [-shift if is_causal else shift for shift in shifts]
        if np.shape(shifts) != (num_heads,) or any(not isinstance(shift, int | np.integer) for shift in shifts):
            refuse(
                "BlockwiseAttention",
                "shifts",
                shifts,
                f"be one whole number for each of {num_heads} heads",
                "Use 0 for the identity.",
            )
        self.max_length, self.block_size = int(max_length), int(block_size)
        self.shifts = tuple(int(shift) for shift in shifts)

    def _blocks(self, length: int) -> np.ndarray:
        """int [N, ceil(length / block_size), 1]: the block of keys of each block of queries, -1 past the end."""
        if length > self.max_length:
            refuse(
                "BlockwiseAttention",
                "inputs_q",
                f"{length} tokens",
                f"have at most max_length = {self.max_length}",
                "Construct the layer with a larger max_length.",
            )
        count = -(-length // self.block_size)
        blocks = self._keys_of(np.arange(count)[None], np.array(self.shifts)[:, None])
        return np.where(blocks < count, blocks, -1)[..., None]

    def _keys_of(self, block, shift):
        """pi(block)."""
        return (block + shift) % -(-self.max_length // self.block_size)

    def attend(self, query, key, value, mask):
        return block_sparse.attention(
            query,
            key,
            value,
            self._blocks(query.shape[1]),
            block_size=self.block_size,
            mask=mask,
            is_causal=self.is_causal,
            implementation=self.implementation,
        )

    def init_cache(self, batch_size: int, max_length: int, dtype: Any = None) -> KVCache:
        require_extend(self, batch_size=batch_size, max_length=max_length)
        if max_length > self.max_length:
            refuse(
                "BlockwiseAttention",
                "max_length",
                max_length,
                f"be at most that of the layer, {self.max_length}",
                "Construct the layer with a larger max_length.",
            )
        return KVCache.zeros(batch_size, max_length, self.num_heads, self.head_features, self.cache_dtype(dtype))

    def attend_cached(self, query, key, value, mask, cache):
        start, batch = cache.length, len(query)
        cache = append(cache, key, value, mask)
        room, shifts = cache.key.shape[1], jnp.array(self.shifts)[None, :, None]
        # A chunk of at most one block lies in at most two blocks, and so do the keys that one head shows it.
        reach = min(room, 2 * self.block_size)

        def chunk(query, start):
            at = jnp.minimum(places(start, query.shape[1]), self.max_length - 1)
            wanted = self._keys_of(at[:, None] // self.block_size, shifts)  # block of keys, [B, N, t]
            # Where the two wanted blocks are no neighbours, the one with the larger number lies in the future.
            first = jnp.clip(wanted.min(2) * self.block_size, 0, room - reach)
            of = places(first, reach)  # position of keys, [B, N, s]
            own = lambda array: rearrange(pieces(array, first, reach), "b s n h -> (b n) s 1 h").astype(query.dtype)
            by_head = lambda array: rearrange(array, "b n s -> (b n) s")
            heads = softmax.attention(
                rearrange(query, "b t n h -> (b n) t 1 h"),
                own(cache.key),
                own(cache.value),
                is_causal=True,
                query_positions=repeat(at, "b t -> (b n) t", n=self.num_heads),
                key_positions=by_head(of),
                query_segment_ids=by_head(wanted),
                key_segment_ids=by_head(of // self.block_size),
                implementation=self.implementation,
            )
            return rearrange(heads, "(b n) t 1 h -> b t n h", b=batch)

        return poisoned(in_chunks(chunk, query, start, self.block_size), cache), cache

    def allowed(self, query_positions, key_positions):
        """Whether a query may see a key: positions [*B, T] and [*B, S] -> bool [*B, N, T, S]."""
        query, key = query_positions[..., None, :, None], key_positions[..., None, None, :]
        shifts = np.array(self.shifts, np.int32).reshape(*(1,) * (query.ndim - 3), -1, 1, 1)
        seen = key // self.block_size == self._keys_of(query // self.block_size, shifts)
        return seen & (key <= query) if self.is_causal else seen

    def pattern(self, length: int) -> np.ndarray:
        return self.allowed(np.arange(length), np.arange(length))
