"""LongT5's attention: a window, and global tokens that every call makes of blocks of its input."""

import functools
import math
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax import lax

from subquad.kernels import softmax
from subquad.zoo import padding
from subquad.zoo.base import Attention, Shell, Support
from subquad.zoo.checks import check_number, check_sizes, refuse
from subquad.zoo.projection import head_by_head

EPSILON = 1e-6  # added to the mean square of a global token
QUERIES = 512  # whose biases to all global tokens exist at a time


class LongT5Attention(Attention):
    """Softmax attention to a window and to transient global tokens, with biases of relative positions.

        y_t = sum over one softmax of  q_t . k_s + b(s - t),  |s - t| <= radius,   and of  q_t . W_k g_j + b'(j - i),  all j
        g_j = N(sum of the x of block j),    i the block of t    (section 3.2, transient global attention)

    Blocks have block_size tokens; those left over at the end belong to the last whole block. b and b' are numbers for each head
    and bucket of distances, as T5's. N(x) = x / rms(x) times a learned scale.

    Cost: time O(T (radius + T / block_size) N H), memory O(T); with block_size=None O(T) both.
    Differs from the paper: T5's layers share the biases of the first; here each layer has its own. What the paper says nothing
        of is as in its published code (block sums, tokens left over, separate biases). A sequence shorter than a block is one.

    Args:
        num_heads: query heads N; must divide qkv_features.
        in_features: features D of the inputs.
        radius: tokens that a query sees on each side, itself not counted.
        block_size: tokens of a global token. None: there are none, which is LongT5's local attention.
        num_buckets: of distances, half of them for each direction.
        max_distance: from here on distances share a bucket.
        scale: of the logits. T5 has no 1 / sqrt(H): its queries start smaller by that, as they do here
            unless kernel_init is given.
        is_causal: must be False: global tokens hold all tokens.
        shell: see `Attention`; T5's projections have use_bias=False.
    Call:
        inputs_q: [*B, T, D].  mask: True = attend; key padding only, [*B, 1, 1, T]; windows and blocks count real tokens.
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters; rows that see nothing are the projection of 0.
    Raises: ValueError: sizes below 1; a number of buckets that is no multiple of 4; is_causal; a mask that is not key padding.
    Numerics: softmax in float32; agrees with the reference to 1e-5 (float32), 2e-2 (bfloat16).
    Example:
        >>> layer = LongT5Attention(4, 64, radius=15, block_size=16, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 100, 64))).shape
        (2, 100, 64)

    Source: Guo et al., LongT5: Efficient Text-To-Text Transformer for Long Sequences, 2021, arXiv 2112.07916; the buckets of
        Raffel et al., T5, 2019, arXiv 1910.10683.
    """

    supports = Support(
        cost="T^2", causal=False, extend=False, mixes_all="global tokens are made of all tokens, whatever their sequence"
    )

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        radius: int = 127,
        block_size: int | None = 16,
        num_buckets: int = 32,
        max_distance: int = 128,
        scale: float = 1.0,
        is_causal: bool = False,
        rngs: nnx.Rngs,
        **shell: Unpack[Shell],
    ):
        super().__init__(num_heads, in_features, is_causal=is_causal, rngs=rngs, **shell)
        check_sizes("LongT5Attention", radius=radius, block_size=1 if block_size is None else block_size,
                    num_buckets=num_buckets, max_distance=max_distance)  # fmt: skip
        check_number("LongT5Attention", "scale", scale, "(-inf, inf)", "1 is T5's.")
        if num_buckets % 4 or max_distance <= num_buckets // 4:
            refuse("LongT5Attention", "num_buckets", num_buckets,
                   f"be a multiple of 4 and below 4 max_distance = {4 * max_distance}", "T5 has 32, up to a distance of 128.")
        self.radius, self.block_size, self.scale = int(radius), None if block_size is None else int(block_size), scale
        self.num_buckets, self.max_distance = int(num_buckets), int(max_distance)
        if "kernel_init" not in shell:  # T5 draws smaller queries instead of dividing logits
            self.query.kernel[...] *= self.head_features**-0.5
        draw = nnx.initializers.normal(in_features**-0.5)
        biases = lambda: nnx.Param(draw(rngs.params(), (num_buckets, num_heads), self.param_dtype))
        self.bias = biases()
        if self.block_size is not None:
            self.global_bias = biases()
            self.global_scale = nnx.Param(jnp.ones(in_features, self.param_dtype))

    def project(self, inputs_q, inputs_kv=None, inputs_v=None):
        """Heads, and the inputs themselves, which global tokens are made of."""
        return *super().project(inputs_q), inputs_q

    def attend(self, query, key, value, inputs, mask):
        real = padding.real(mask, inputs)
        table = lambda bias: jnp.broadcast_to(bias[...][None], (len(inputs), *bias.shape))  # as heads have it
        if self.block_size is None:
            near = lambda *arrays: self._near(*arrays)[0]
            return head_by_head(near, query, key, value, table(self.bias), by_sample=(real,))
        tokens, exists, block = self._global_tokens(inputs, real)
        far_key, far_value = (projection(tokens).astype(query.dtype) for projection in (self.key, self.value))

        def attend(query, key, value, bias, far_key, far_value, far_bias, real, exists, block):
            near = self._near(query, key, value, bias, real)
            far = self._far(query, far_key, far_value, far_bias, exists, block)
            return softmax.merge(*zip(near, far, strict=True))[0]

        heads = query, key, value, table(self.bias), far_key, far_value, table(self.global_bias)
        return head_by_head(attend, *heads, by_sample=(real, exists, block))

    def _near(self, query, key, value, table, real):
        """Outputs and log-sum-exp over the window: of blocks as long as it reaches, to themselves and their neighbours.

        Heads are samples and blocks are heads, as biases [B, buckets, N] are of heads and not of blocks.
        """
        (length, heads), size = query.shape[1:3], self.radius + 1
        count = -(-length // size)
        pad = lambda x, before, after: jnp.pad(x, ((0, 0), (before, after), *[(0, 0)] * (x.ndim - 2)))
        own = rearrange(pad(query, 0, count * size - length), "b (i t) n h -> (b n) t i h", i=count)

        def around(x, order):
            x = rearrange(pad(x, size, (count + 1) * size - length), "b (i t) ... -> b i t ...", t=size)
            return rearrange(jnp.concatenate([x[:, :-2], x[:, 1:-1], x[:, 2:]], 2), order)

        distance = np.arange(3 * size) - size - np.arange(size)[:, None]
        bias = jnp.where(abs(distance)[None, ..., None] <= self.radius, table[:, self.bucket(distance)], -jnp.inf)
        key, value = (around(x, "b i t n h -> (b n) t i h") for x in (key, value))
        out, lse = softmax.attention(
            own, key, value, mask=jnp.repeat(around(real, "b i t -> b i 1 t"), heads, axis=0),
            bias=rearrange(bias, "b t s n -> (b n) 1 t s"), return_lse=True, **self._options(),
        )  # fmt: skip
        return tuple(rearrange(x, "(b n) t i ... -> b (i t) n ...", n=heads)[:, :length] for x in (out, lse))

    def _far(self, query, key, value, table, exists, block):
        """Outputs and log-sum-exp over the global tokens: of some queries after the others, each with its biases."""
        length, count, size = query.shape[1], key.shape[1], QUERIES
        by_distance = table[:, self.bucket(np.arange(1 - count, count))].swapaxes(1, 2)

        @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(softmax.SAVED))
        def attend(query, block):
            row = lambda biases, block: lax.dynamic_slice_in_dim(biases, count - 1 - block, count, axis=1)
            rows = jax.vmap(jax.vmap(row, (None, 0), 1))(by_distance, block)
            return softmax.attention(
                query, key, value, mask=exists[:, None, None], bias=rows, return_lse=True, **self._options()
            )

        if length <= size:
            return attend(query, block)
        chunks = (rearrange(padding.in_blocks(x, size), "b i t ... -> i b t ...") for x in (query, block))
        found = lax.map(lambda chunk: attend(*chunk), tuple(chunks))
        return tuple(rearrange(x, "i b t ... -> b (i t) ...")[:, :length] for x in found)

    def _global_tokens(self, inputs, real):
        """N of the sums of the real tokens of each block [B, J, D], which of them exist [B, J], and the block of each token."""
        (batch, length, features), size = inputs.shape, self.block_size
        count = max(1, length // size)
        whole = jnp.maximum(real.sum(1, keepdims=True) // size, 1)  # blocks of each sample
        block = jnp.minimum(jnp.arange(length)[None] // size, whole - 1)
        sums = jnp.zeros((batch, count, features), jnp.promote_types(inputs.dtype, jnp.float32))
        sums = sums.at[jnp.arange(batch)[:, None], block].add(jnp.where(real[..., None], inputs, 0).astype(sums.dtype))
        sums *= lax.rsqrt((sums**2).mean(-1, keepdims=True) + EPSILON)
        tokens = (sums * self.global_scale[...].astype(sums.dtype)[None, None]).astype(inputs.dtype)
        return tokens, (jnp.arange(count)[None] < whole) & real.any(1, keepdims=True), block

    def _options(self) -> dict[str, Any]:
        return dict(scale=self.scale, implementation=self.implementation)

    def bucket(self, distance):
        """T5's buckets, half of them for keys after the query: one for each small distance, then wider and wider ones."""
        half = self.num_buckets // 2
        exact, size = half // 2, jnp.abs(distance)
        wide = jnp.log(jnp.maximum(size, 1) / exact) / math.log(self.max_distance / exact) * (half - exact)
        wide = jnp.minimum(exact + wide.astype(jnp.int32), half - 1)
        return jnp.where(size < exact, size, wide) + jnp.where(distance > 0, half, 0)

    def pattern(self, length: int) -> np.ndarray:
        at = np.arange(length)
        near = abs(at[:, None] - at) <= self.radius
        return (near if self.block_size is None else np.ones_like(near))[None]
