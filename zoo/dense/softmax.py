"""Softmax attention: every token sees every other, exactly."""

import math
from typing import Any, Unpack

import jax.numpy as jnp
from flax import nnx

from subquad.kernels import softmax
from subquad.zoo import positions as encodings
from subquad.zoo.base import Attention, Shell, Support
from subquad.zoo.cache import KVCache, append, poisoned
from subquad.zoo.checks import refuse, require_extend


class SoftmaxAttention(Attention):
    """Scaled dot-product attention with any mask, grouped heads and rotary positions.

        y_t = sum_s softmax_s(q_t . k_s / sqrt(H)) v_s,    s <= t if causal                          (eq. 1)

    Cost: time O(T^2 N H), memory O(T) (tiles with a running maximum, recomputed in the backward pass); one extended token
        O(S N H) after S tokens.
    Differs from the paper: a row that may see no key gives 0; rotary positions (`rotary_base`) and grouped heads
        (`num_kv_heads`) are later inventions and off by default.

    The parameters are those of `nnx.MultiHeadAttention`: a checkpoint of one loads into the other.

    Args:
        num_heads: query heads N; must divide qkv_features.
        in_features: features D of the inputs.
        num_kv_heads: key/value heads K; must divide num_heads. None: num_heads; 1: multi-query attention.
        is_causal: a token sees those at its position and before.
        rotary_base: longest wavelength of rotary positions in units of 2 pi tokens, usually 10000. None: no rotation.
        shell: see `Attention`.
    Call:
        inputs_q: [*B, T, D].  inputs_kv: [*B, S, D].  mask: [*B, N, T, S], each axis full or 1.
        positions: [T] or [*B, T]; causality and rotation compare them, so one of both must be on.  segment_ids: [T] or [*B, T].
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters; fully masked rows are the output projection of 0.
    Raises: ValueError: sizes that do not divide; a rotary_base that is not positive; a mask or positions of another shape.
    Numerics: softmax in float32; agrees with the reference to 1e-5 (float32), 2e-2 (bfloat16).
    Example:
        >>> layer = SoftmaxAttention(4, 64, num_kv_heads=2, is_causal=True, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 100, 64))).shape
        (2, 100, 64)

    Source: Vaswani et al., Attention Is All You Need, 2017, arXiv 1706.03762.
    """

    supports = Support(
        cost="T^2", cross=True, pairwise_mask=True, segment_ids=True, positions=True, grouped=True, attention_fn=True
    )

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        num_kv_heads: int | None = None,
        is_causal: bool = False,
        rotary_base: float | None = None,
        rngs: nnx.Rngs,
        **shell: Unpack[Shell],
    ):
        super().__init__(num_heads, in_features, num_kv_heads=num_kv_heads, is_causal=is_causal, rngs=rngs, **shell)
        if rotary_base is not None and self.head_features % 2:
            raise ValueError(
                f"SoftmaxAttention: rotary_base must be None with an odd number of head features, got {rotary_base} "
                f"with {self.head_features}. Choose qkv_features / num_heads even."
            )
        if rotary_base is not None and not 0 < rotary_base < math.inf:
            refuse("SoftmaxAttention", "rotary_base", rotary_base, "be None or a positive number", "10000 is usual.")
        self.rotary_base = rotary_base

    def attend(self, query, key, value, mask, positions=None, segment_ids=None):
        if positions is not None and not self.is_causal and self.rotary_base is None:
            refuse("SoftmaxAttention", "positions", "an array", "be None where neither causality nor rotation compares them",
                   "Pass is_causal=True or rotary_base to the constructor.")
        if self.rotary_base is not None:
            at = jnp.arange(query.shape[1])[None] if positions is None else positions
            query = encodings.rotary(query, at, self.rotary_base)
            at = jnp.arange(key.shape[1])[None] if positions is None else positions
            key = encodings.rotary(key, at, self.rotary_base)
        return softmax.attention(
            query, key, value, mask=mask, is_causal=self.is_causal, query_positions=positions, key_positions=positions,
            query_segment_ids=segment_ids, key_segment_ids=segment_ids, implementation=self.implementation,
        )

    def init_cache(self, batch_size: int, max_length: int, dtype: Any = None) -> KVCache:
        require_extend(self, batch_size=batch_size, max_length=max_length)
        return KVCache.zeros(batch_size, max_length, self.num_kv_heads, self.head_features, self.cache_dtype(dtype))

    def attend_cached(self, query, key, value, mask, cache):
        at = cache.length[:, None] + jnp.arange(query.shape[1])
        if self.rotary_base is not None:
            query = encodings.rotary(query, at, self.rotary_base)
            key = encodings.rotary(key, at, self.rotary_base)
        cache = append(cache, key, value, mask)
        heads = softmax.attention(
            query, cache.key.astype(query.dtype), cache.value.astype(query.dtype), is_causal=True, query_positions=at,
            key_positions=jnp.arange(cache.key.shape[1])[None], implementation=self.implementation,
        )
        return poisoned(heads, cache), cache
