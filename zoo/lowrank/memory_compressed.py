"""Memory-compressed attention: a strided convolution makes one key and value of every few."""

from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from subquad.kernels import precision, softmax
from subquad.kernels.patterns import CAUSAL, SameBlock
from subquad.zoo import padding
from subquad.zoo.base import Attention, Shell, Support
from subquad.zoo.cache import MemoryCompressedCache, counts, pieces, places, poisoned, write
from subquad.zoo.checks import check_sizes, require_extend
from subquad.zoo.padding import in_blocks, pad_end
from subquad.zoo.projection import Projection, projection


class MemoryCompressedAttention(Attention):
    """Softmax attention to compressed keys, each a convolution of C neighbouring ones.

        y_t = sum_j softmax_j(q_t . k'_j / sqrt(H)) v'_j,   k'_j = b + sum_c W_c k_{C j + c},  v'_j likewise   (section 4.2.3)
        causal:  j over the blocks of C tokens before that of t, and the tokens of its own block up to t as they are

    The convolutions have width and stride C, and matrices W_c of their own for each head, and for keys and values.

    Cost: time O(T S N H / C), memory O(T + S); one extended token O(S N H / C) after S tokens, cache O(S / C).
    Differs from the paper: it does not say what a token sees before the first block is over; here its own block, uncompressed,
        also later. Its code, known here by a port, compresses inputs and not keys, and shows all tokens the first; a well-known
        package has a learned key (`null_key`), and shows a block from its last token on. Convolutions here mix the features of
        a head, not those of all heads. Blocks count from the first token; the last one, if it is not whole, is filled with 0.
        Rotary positions are not the paper's: keys are rotated before they are compressed. Section number from memory.

    Args:
        num_heads: query heads N; must divide qkv_features.
        in_features: features D of the inputs.
        compression: tokens C of a compressed key; the paper's is 3.
        null_key: a learned key and value that all tokens see, and in causal attention nothing uncompressed.
        num_kv_heads: key/value heads K; must divide num_heads. None: num_heads.
        is_causal: a token sees itself and those before it.
        shell: see `Attention`.
    Call:
        inputs_q: [*B, T, D].  inputs_kv: [*B, S, D].  mask: True = attend; key padding only, [*B, 1, 1, S].
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters; rows that see nothing hold the projection of 0.
    Raises: ValueError: sizes that do not divide or are not positive; a pairwise mask.
    Numerics: convolution and softmax in float32; agrees with the reference to 1e-5 (float32), 2e-2 (bfloat16).
    Example:
        >>> layer = MemoryCompressedAttention(4, 64, is_causal=True, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 100, 64))).shape
        (2, 100, 64)

    Source: Liu et al., Generating Wikipedia by Summarizing Long Sequences, ICLR 2018, arXiv 1801.10198; code:
        tensorflow/tensor2tensor.
    """

    supports = Support(
        cost="T^2", cross=True, grouped=True, rotary=True, mixes_all="its blocks are counted from the first token of all"
    )

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        compression: int = 3,
        null_key: bool = False,
        num_kv_heads: int | None = None,
        is_causal: bool = False,
        rngs: nnx.Rngs,
        **shell: Unpack[Shell],
    ):
        super().__init__(num_heads, in_features, num_kv_heads=num_kv_heads, is_causal=is_causal, rngs=rngs, **shell)
        check_sizes("MemoryCompressedAttention", compression=compression)
        self.compression, shape = int(compression), (self.num_kv_heads, self.head_features)
        self.compress_key, self.compress_value = (
            projection(shell, compression * self.head_features, shape, rngs=rngs) for _ in range(2)
        )
        null = lambda: nnx.Param(jnp.zeros(shape, self.param_dtype)) if null_key else None
        self.null_key, self.null_value = null(), null()

    def attend(self, query, key, value, mask):
        if self.is_causal:
            compressed = self.compress(key, value)
            return self._attend_causal(query, (key, value), compressed, mask, counted(query), counted(key))
        real = padding.real(mask, key)
        compressed = self.compress(*(padding.clear(x, real) for x in (key, value)))
        visible = in_blocks(real, self.compression).any(-1)
        if self.null_key is not None:
            visible = jnp.pad(visible, ((0, 0), (1, 0)), constant_values=True)
        return softmax.attention(
            query, *self.with_null(*compressed), mask=visible[:, None, None], implementation=self.implementation
        )

    def compress(self, key: Float[Array, "B S K H"], value: Float[Array, "B S K H"]):
        """The keys and values of all blocks of C; what the last one lacks counts as 0."""
        pairs = (self.compress_key, key), (self.compress_value, value)
        return tuple(convolved(convolution, in_blocks(x, self.compression)) for convolution, x in pairs)

    def with_null(self, key, value):
        """Compressed keys and values, behind the learned ones if there are such."""
        if self.null_key is None:
            return key, value
        ahead = lambda null, x: jnp.concatenate(
            [jnp.broadcast_to(null[...].astype(x.dtype), (len(x), 1, *null.shape)), x], axis=1)
        return ahead(self.null_key, key), ahead(self.null_value, value)

    def _attend_causal(self, query, own, compressed, mask, query_positions, own_positions):
        """Attention to the compressed blocks that are over, and to the own block.

        Args:
            own: (key, value) of some tokens, the own block of each query among them, at `own_positions`.
            compressed: the same of all blocks.
        """
        ends = self.compression * np.arange(1, compressed[0].shape[1] + 1, dtype=np.int32)
        if self.null_key is not None:  # visible to the last token of the block
            ends = np.concatenate([[-1], ends - 1]).astype(np.int32)
        options: dict[str, Any] = dict(query_positions=query_positions, implementation=self.implementation)
        far = softmax.attention(
            query, *self.with_null(*compressed), is_causal=True, key_positions=ends[None], return_lse=True, **options
        )
        if self.null_key is not None:
            return far[0]
        near = softmax.attention(
            query, *own, mask=mask, pattern=SameBlock(self.compression) & CAUSAL, key_positions=own_positions,
            return_lse=True, **options,
        )
        return softmax.merge(*zip(far, near, strict=True))[0]

    def init_cache(self, batch_size: int, max_length: int, dtype: Any = None) -> MemoryCompressedCache:
        """An empty cache for `extend`: room for max_length tokens, and as many more as the last block has."""
        require_extend(self, batch_size=batch_size, max_length=max_length)
        zeros = lambda length: jnp.zeros(
            (batch_size, length, self.num_kv_heads, self.head_features), self.cache_dtype(dtype))
        blocks, size = -(-max_length // self.compression), self.compression
        return MemoryCompressedCache(
            zeros(blocks), zeros(blocks), jnp.zeros(batch_size, jnp.int32), zeros(size), zeros(size)
        )

    def attend_cached(self, query, key, value, mask, cache):
        length, size = query.shape[1], self.compression
        start, block = cache.length, cache.length // size
        after = start + counts(query, mask)
        # The block that is open, and the new tokens behind what it has: all in whole blocks.
        touched = -(-(length + size - 1) // size)
        put = jax.vmap(lambda x, new, at: jax.lax.dynamic_update_slice_in_dim(x, new, at, 0))
        lay = lambda open_, new: put(pad_end(open_.astype(new.dtype), (touched - 1) * size), new, start - block * size)
        own = lay(cache.open_key, key), lay(cache.open_value, value)
        # A block that is not over is compressed again when it is; until then none sees it.
        some = jnp.ones((len(query), 1, 1, touched), bool)
        compressed = [
            write(old, new, block, some) for old, new in zip((cache.key, cache.value), self.compress(*own), strict=True)
        ]
        rest = [pieces(pad_end(x, size), after // size * size - block * size, size) for x in own]
        opened = (x.astype(cache.key.dtype) for x in rest)
        found = MemoryCompressedCache(*compressed, after, *opened)
        heads = self._attend_causal(
            query, own, [x.astype(query.dtype) for x in compressed], None, places(start, length),
            places(block * size, touched * size),
        )
        return poisoned(heads, found), found

    def pattern(self, length: int) -> np.ndarray:
        full = super().pattern(length)
        if not self.is_causal or self.null_key is None:
            return full
        last = np.arange(length) // self.compression * self.compression + self.compression - 1
        return full & (last[None] <= np.arange(length)[:, None])[None]


@precision.promoting
@precision.full
def convolved(convolution: Projection, blocks: Float[Array, "B J C K H"]) -> Float[Array, "B J K H"]:
    """Each block through the map [C H, K, H] of its heads."""
    wide = jnp.promote_types(blocks.dtype, jnp.float32)  # on a CPU, bfloat16 products have bfloat16 sums
    kernel = rearrange(convolution.kernel[...], "(c h) k v -> c h k v", c=blocks.shape[2]).astype(wide)
    mixed = jnp.einsum("bjckh,chkv->bjkv", blocks.astype(wide), kernel, precision=convolution.precision)
    return (mixed if convolution.bias is None else mixed + convolution.bias[...].astype(wide)).astype(blocks.dtype)


def counted(tokens) -> np.ndarray:
    return np.arange(tokens.shape[1], dtype=np.int32)[None]
