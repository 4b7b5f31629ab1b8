"""Sliding-window attention: every token sees its neighbours."""

from typing import Any, Unpack

import jax.numpy as jnp
import numpy as np
from flax import nnx

from subquad.kernels import softmax
from subquad.zoo.base import Attention, Shell, Support, refuse, require_extend
from subquad.zoo.cache import WindowCache


class LocalAttention(Attention):
    """Softmax attention over a sliding window.

        y_t = sum_{s : t - left <= s <= t + right} softmax_s(q_t . k_s / sqrt(H)) v_s            (section 3.1)

    Cost: time O(T (left + right + 1) N H), memory O(T); one extended token O(left N H) and a cache of `left` tokens
        whatever came before.
    Differs from the paper: the window of a token is exact at the ends of the sequence, where the paper's code pads; no
        dilation; global tokens are another layer.

    Args:
        num_heads: query heads N; must divide qkv_features.
        in_features: features D of the inputs.
        num_kv_heads: key/value heads K; must divide num_heads. None: num_heads.
        window_size: keys that a query sees on each side, itself not counted, in tokens: one number, or (left, right). The
            paper's w is left + right. If causal, one number means (window_size, 0).
        is_causal: a token sees itself and those before it.
        shell: see `Attention`.
    Call:
        inputs_q: [*B, T, D].  mask: True = attend; key padding only, [*B, 1, 1, T].
        segment_ids: [T] or [*B, T]; tokens of different segments do not see each other.
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters; rows that see nothing are the projection of 0.
    Raises: ValueError: a negative window, a window to the right if causal, a pairwise mask.
    Numerics: softmax in float32; agrees with the reference to 1e-5 (float32), 2e-2 (bfloat16).
    Example:
        >>> layer = LocalAttention(4, 64, window_size=16, is_causal=True, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 100, 64))).shape
        (2, 100, 64)
        >>> layer.init_cache(2, max_length=10_000).key.shape
        (2, 16, 4, 16)

    Source: Beltagy et al., Longformer: The Long-Document Transformer, 2020, arXiv 2004.05150.
    """

    supports = Support(cost="T", segment_ids=True, grouped=True, attention_fn=True)

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        window_size: int | tuple[int, int] = 128,
        num_kv_heads: int | None = None,
        is_causal: bool = False,
        rngs: nnx.Rngs,
        **shell: Unpack[Shell],
    ):
        super().__init__(num_heads, in_features, num_kv_heads=num_kv_heads, is_causal=is_causal, rngs=rngs, **shell)
        owner = type(self).__name__
        sides = window_size if isinstance(window_size, tuple | list) else (window_size, 0 if is_causal else window_size)
        if len(sides) != 2 or any(not isinstance(side, int | np.integer) or side < 0 for side in sides):
            refuse(owner, "window_size", repr(window_size), "be a number >= 0 or a pair (left, right) of such",
                   "Count the keys on each side of the query, itself not counted.")
        if is_causal and sides[1]:
            refuse(owner, "window_size", repr(window_size), "have right = 0 when is_causal", f"Use ({sides[0]}, 0).")
        self.window_size = (int(sides[0]), int(sides[1]))

    def attend(self, query, key, value, mask, segment_ids=None):
        return softmax.attention(
            query, key, value, mask=mask, window_size=self.window_size, query_segment_ids=segment_ids,
            key_segment_ids=segment_ids, implementation=self.implementation,
        )

    def init_cache(self, batch_size: int, max_length: int, dtype: Any = None) -> WindowCache:
        """An empty cache. It keeps the last `left` tokens and never fills: max_length bounds nothing."""
        require_extend(self)
        if max_length < 1:
            refuse(type(self).__name__, "max_length", max_length, "be >= 1", "Count the tokens to come.")
        shape = (batch_size, self.window_size[0], self.num_kv_heads, self.head_features)
        zeros = jnp.zeros(shape, self.cache_dtype(dtype))
        return WindowCache(zeros, zeros, jnp.zeros(shape[:2], bool))

    def attend_cached(self, query, key, value, mask, cache):
        left, length = cache.key.shape[1], query.shape[1]
        valid = jnp.ones(key.shape[:2], bool) if mask is None else mask[:, 0, 0]
        key, value, valid = (
            jnp.concatenate([old, new.astype(old.dtype)], axis=1)
            for old, new in zip(cache, (key, value, valid), strict=True)
        )
        # Positions relative to the oldest cached token are known while tracing, so empty tiles are skipped.
        heads = softmax.attention(
            query, key.astype(query.dtype), value.astype(query.dtype), mask=valid[:, None, None],
            query_positions=left + np.arange(length)[None], window_size=self.window_size,
            implementation=self.implementation,
        )
        return heads, WindowCache(key[:, length:], value[:, length:], valid[:, length:])

    def pattern(self, length: int) -> np.ndarray:
        distance = np.arange(length) - np.arange(length)[:, None]
        left, right = self.window_size
        return ((-left <= distance) & (distance <= right))[None]
