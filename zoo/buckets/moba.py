"""Mixture of block attention: each query attends to its own block and to the past blocks whose mean key it likes best."""

from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int

from subquad.kernels import precision
from subquad.zoo.base import Attention, Shell, Support
from subquad.zoo.buckets.blocks import attend_to_blocks, attend_to_listed, best, chosen
from subquad.zoo.cache import KVCache, append, places, poisoned
from subquad.zoo.checks import check_sizes


class MoBACache(NamedTuple):
    """Keys and values of each sample's real tokens so far, by position, and the sums of the keys of each block."""

    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K V"]
    length: Int[Array, "B"]  # real tokens so far; more than S where they did not fit
    sums: Float[Array, "B M K H"]  # float32, whatever the dtype of the layer


class MoBAAttention(Attention):
    """Causal softmax attention to few blocks of keys, which every query and head chooses by the blocks' mean keys.

        y_t = sum_s softmax_s(q_t . k_s / sqrt(H)) v_s,   s <= t of the blocks that t chose               (section 2.2, eq. 2)
        t chooses its own block, and the num_blocks - 1 blocks i before it with the largest q_t . mean_{s in i} k_s  (eq. 3-6)

    The own block is always chosen and never scored, and others are scored when they are complete, so no mean holds a later
    token. Of blocks with equal scores the earlier is chosen. The choice has no gradient: keys learn through the attention
    that they take part in, those of blocks that nobody chose not at all.

    Cost: time O(T (num_blocks block_size + T / block_size) N H), which with block_size = sqrt(T) is T^1.5; memory O(T
        num_blocks N H), and the scores of a block of queries. One extended token O((num_blocks block_size + S / block_size)
        N H) after S tokens.
    Differs from the paper: none known. It trains some layers and phases with full attention: SoftmaxAttention has the same
        parameters. Section and equation numbers are as remembered.

    Args:
        num_heads: query heads N; must divide qkv_features.
        in_features: features D of the inputs.
        num_kv_heads: key/value heads K; must divide num_heads. None: num_heads. Every query head chooses for itself.
        block_size: tokens of a block, counted from the first real token.
        num_blocks: blocks that a query sees, its own among them; at least as many as there are: softmax attention.
        is_causal: must be True.
        shell: see `Attention`.
    Call:
        inputs_q: [*B, T, D].  mask: True = attend; key padding only, [*B, 1, 1, T]; blocks count real tokens.
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters; rows that see nothing hold the output projection of 0.
    Raises: ValueError: is_causal=False; sizes that are not positive or do not divide; a mask that is not key padding.
    Numerics: scores, softmax and sums in float32; agrees with the reference to 1e-5 (float32), 2e-2 (bfloat16) where no
        rounding chooses another block.
    Example:
        >>> layer = MoBAAttention(4, 64, block_size=16, num_blocks=3, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 100, 64))).shape
        (2, 100, 64)

    Source: Lu et al., MoBA: Mixture of Block Attention for Long-Context LLMs, 2025, arXiv 2502.13189.
    """

    supports = Support(
        cost="T^1.5", bidirectional=False, grouped=True, rotary=True, mixes_all="a block may hold the tokens of two sequences"
    )

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        num_kv_heads: int | None = None,
        block_size: int = 512,
        num_blocks: int = 3,
        is_causal: bool = True,
        rngs: nnx.Rngs,
        **shell: Unpack[Shell],
    ):
        super().__init__(num_heads, in_features, num_kv_heads=num_kv_heads, is_causal=is_causal, rngs=rngs, **shell)
        check_sizes("MoBAAttention", block_size=block_size, num_blocks=num_blocks)
        self.block_size, self.num_blocks = int(block_size), int(num_blocks)

    def attend(self, query, key, value, mask):
        sums = jnp.pad(key.astype(jnp.float32), ((0, 0), (0, -key.shape[1] % self.block_size), (0, 0), (0, 0)))
        sums = rearrange(sums, "b (m s) k h -> b m s k h", s=self.block_size).sum(2)
        blocks = chosen(lambda query, positions: self.choose(query, positions, sums), query, self.block_size)
        return attend_to_blocks(query, key, value, blocks, self.block_size, self.implementation)

    @precision.promoting
    def choose(
        self, query: Float[Array, "B T N H"], positions: Int[Array, "B T"], sums: Float[Array, "B M K H"]
    ) -> Int[Array, "B N T P"]:
        """The blocks before its own that each query sees, by the sums of their keys, since all are as long; -1 for none.

        No gradient passes.
        """
        query, sums = jax.lax.stop_gradient((rearrange(query, "b t (k g) h -> b k g t h", k=sums.shape[2]), sums))
        scores = jnp.einsum("bkgth,bmkh->bkgtm", query.astype(jnp.float32), sums, precision="highest")
        blocks = best(scores, (positions // self.block_size)[:, None, None], self.num_blocks - 1)
        return rearrange(blocks, "b k g t p -> b (k g) t p")

    def init_cache(self, batch_size: int, max_length: int, dtype: Any = None) -> MoBACache:
        """An empty cache for `extend`: room for max_length tokens of batch_size sequences."""
        tokens: KVCache = super().init_cache(batch_size, max_length, dtype)
        shape = batch_size, -(-max_length // self.block_size), self.num_kv_heads, self.head_features
        return MoBACache(*tokens, jnp.zeros(shape, jnp.float32))

    def attend_cached(self, query, key, value, mask, cache):
        start, tokens = cache.length, append(KVCache(*cache[:3]), key, value, mask)
        new = key.astype(jnp.float32) if mask is None else jnp.where(mask[:, 0, 0, :, None, None], key, 0).astype(jnp.float32)
        at = places(start, key.shape[1]) // self.block_size
        sums = cache.sums.at[jnp.arange(len(key))[:, None], at].add(new, mode="drop")
        key, value = (x.astype(query.dtype) for x in tokens[:2])
        choose = lambda query, positions: self.choose(query, positions, sums)
        heads = attend_to_listed(query, key, value, start, choose, self.block_size, self.implementation)
        return poisoned(heads, tokens), MoBACache(*tokens, sums)
