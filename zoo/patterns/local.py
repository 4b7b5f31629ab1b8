"""Sliding-window attention: every token sees its neighbours."""

from typing import Any, Unpack

import jax.numpy as jnp
import numpy as np
from flax import nnx

from subquad.kernels import softmax
from subquad.kernels.patterns import Band
from subquad.zoo.base import Attention, Shell, Support
from subquad.zoo.cache import LocalCache, counts, last
from subquad.zoo.checks import refuse, require_extend


class LocalAttention(Attention):
    """Softmax attention to the tokens within a window around the query.

        y_t = sum_s softmax_s(q_t . k_s / sqrt(H)) v_s,    t - left <= s <= t + right    (section 3.1, sliding window)

    Cost: time O(T W N H), memory O(T), with W = left + right + 1; one extended token O(W N H), cache O(W), whatever came
        before.
    Differs from the paper: a window is counted in keys on each side, so the paper's (even) window w is window_size=w/2;
        no dilation, no global tokens (Longformer as a whole has both); the window may be one-sided or uneven; causal
        attention keeps its left side.

    Args:
        num_heads: query heads N; must divide qkv_features.
        in_features: features D of the inputs.
        window_size: tokens that a query sees on each side, itself not counted; one number or (left, right).
        num_kv_heads: key/value heads K; must divide num_heads. None: num_heads.
        is_causal: a token sees itself and those before it.
        shell: see `Attention`.
    Call:
        inputs_q: [*B, T, D].  mask: True = attend; key padding only, [*B, 1, 1, T]; a window
            counts real tokens.
        segment_ids: [T] or [*B, T].
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters; rows that see nothing are the projection of 0.
    Raises: ValueError: a negative window; a right side when causal; a mask that is not key padding.
    Numerics: softmax in float32; agrees with the reference to 1e-5 (float32), 2e-2 (bfloat16).
    Example:
        >>> layer = LocalAttention(4, 64, window_size=16, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 100, 64))).shape
        (2, 100, 64)

    Source: Beltagy et al., Longformer, 2020, arXiv 2004.05150.
    """

    supports = Support(cost="T", is_pattern=True, segment_ids=True, grouped=True, rotary=True, attention_fn=True)

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        window_size: int | tuple[int, int] = 256,
        num_kv_heads: int | None = None,
        is_causal: bool = False,
        rngs: nnx.Rngs,
        **shell: Unpack[Shell],
    ):
        super().__init__(num_heads, in_features, num_kv_heads=num_kv_heads, is_causal=is_causal, rngs=rngs, **shell)
        self.window_size = sides_of("LocalAttention", window_size, is_causal)
        self.sees = Band(*self.window_size)

    def init_cache(self, batch_size: int, max_length: int, dtype: Any = None) -> LocalCache:
        """An empty cache; it holds one window and never fills, so max_length does not matter."""
        require_extend(self, batch_size=batch_size, max_length=max_length)
        shape = (batch_size, self.window_size[0], self.num_kv_heads, self.head_features)
        # Two arrays: one array in two places cannot be donated.
        key, value = (jnp.zeros(shape, self.cache_dtype(dtype)) for _ in range(2))
        return LocalCache(key, value, jnp.zeros(batch_size, jnp.int32))

    def attend_cached(self, query, key, value, mask, cache):
        tokens, window = query.shape[1], self.window_size[0]
        keys, values = (
            jnp.concatenate([old, new.astype(old.dtype)], axis=1) for old, new in ((cache.key, key), (cache.value, value))
        )
        # The newest of the window lies just before the new tokens: distances are known, whatever came before.
        at = np.arange(window + tokens)[None]
        heads = softmax.attention(
            query, keys.astype(query.dtype), values.astype(query.dtype),
            mask=(at >= window - cache.seen[:, None])[:, None, None], window_size=self.window_size,
            query_positions=at[:, window:], key_positions=at, implementation=self.implementation,
        )
        newest = (last(array, window, tokens, mask) for array in (keys, values))
        return heads, LocalCache(*newest, cache.seen + counts(query, mask))


def sides_of(owner: str, window_size: int | tuple[int, int], is_causal: bool) -> tuple[int, int]:
    """(left, right) of a window, checked: one number for both sides, or two; no right side when causal."""
    sides = tuple(window_size) if isinstance(window_size, tuple | list) else (window_size, window_size)
    if len(sides) != 2 or any(not isinstance(side, int | np.integer) or side < 0 for side in sides):
        refuse(owner, "window_size", repr(window_size), "be a number >= 0 or a pair (left, right) of such",
               "Count the tokens on each side of the query, itself not counted.")
    if is_causal and isinstance(window_size, tuple | list) and sides[1]:
        refuse(owner, "window_size", window_size, "be (left, 0) when causal", "Pass the left side only.")
    return int(sides[0]), 0 if is_causal else int(sides[1])
