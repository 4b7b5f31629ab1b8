"""Longformer's attention: a sliding window, and some global tokens that have projections of their own."""

from typing import Any, Unpack

import jax
import jax.numpy as jnp
from flax import nnx

from subquad.kernels import softmax
from subquad.kernels.patterns import CAUSAL, Band, GlobalKeys, GlobalQueries, Pattern
from subquad.zoo.base import Attention, Shell, Support
from subquad.zoo.cache import LongformerCache, append, places, poisoned, write
from subquad.zoo.checks import check_sizes
from subquad.zoo.extending import attend_to_cache
from subquad.zoo.patterns.local import sides_of


class LongformerAttention(Attention):
    """Softmax attention to a window and to global tokens, which attend to everything with projections of their own.

        y_t = sum_s softmax_s(q_t . k_s / sqrt(H)) v_s,       t - left <= s <= t + right  or  s < g,  for t >= g
        y_t = sum_s softmax_s(q'_t . k'_s / sqrt(H)) v'_s,    all s,                                  for t < g
        q, k, v = W_q x, W_k x, W_v x;    q', k', v' = W'_q x, W'_k x, W'_v x    (section 3.1, global attention)

    The g = num_global global tokens are the first real ones of each sample: a token for classification, or a question that
    stands before its document. Others are moved to the front by whoever builds the input.

    Cost: time O(T (W + g) N H), memory O(T), with W = left + right + 1; one extended token O((W + g) N H), cache
        O(max_length).
    Differs from the paper: a window is counted in keys on each side, so the paper's (even) window w is window_size=w/2; no
        dilation; global tokens are a prefix. Causal attention, which the paper has with windows alone, lets all see the
        global tokens before them, and global tokens see the tokens before them.

    Args:
        num_heads: query heads N; must divide qkv_features.
        in_features: features D of the inputs.
        window_size: tokens that a query sees on each side, itself not counted; one number or (left, right).
        num_global: g, at least 0. With 0 there are no global projections, and this is `LocalAttention`.
        num_kv_heads: key/value heads K; must divide num_heads. None: num_heads.
        is_causal: a token sees itself and those before it.
        shell: see `Attention`. The global projections start as copies of the local ones, as the paper's do.
    Call:
        inputs_q: [*B, T, D].  mask: True = attend; key padding only, [*B, 1, 1, T]; windows and global tokens count real
            tokens.
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters; rows that see nothing are the projection of 0.
    Raises: ValueError: a negative window or number; a right side when causal; a mask that is not key padding.
    Numerics: softmax in float32; agrees with the reference to 1e-5 (float32), 2e-2 (bfloat16).
    Example:
        >>> layer = LongformerAttention(4, 64, window_size=16, num_global=1, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 100, 64))).shape
        (2, 100, 64)

    Source: Beltagy et al., Longformer, 2020, arXiv 2004.05150.
    """

    supports = Support(
        cost="T", grouped=True, rotary=True, mixes_all="all packed sequences would share the global tokens of the first"
    )

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        window_size: int | tuple[int, int] = 256,
        num_global: int = 1,
        num_kv_heads: int | None = None,
        is_causal: bool = False,
        rngs: nnx.Rngs,
        **shell: Unpack[Shell],
    ):
        super().__init__(num_heads, in_features, num_kv_heads=num_kv_heads, is_causal=is_causal, rngs=rngs, **shell)
        check_sizes("LongformerAttention", 0, num_global=num_global)
        self.num_global, self.window_size = int(num_global), sides_of("LongformerAttention", window_size, is_causal)
        near: Pattern = Band(*self.window_size)
        self.sees = near
        if self.num_global:
            near |= GlobalKeys(0, self.num_global)
            self.sees = near & CAUSAL if is_causal else near | GlobalQueries(0, self.num_global)
            self.query_global, self.key_global, self.value_global = map(copied, (self.query, self.key, self.value))
        self.local = near & (CAUSAL if is_causal else None)

    def project(self, inputs_q, inputs_kv=None, inputs_v=None):
        """Query, key and value heads, each local and global: (all of the tokens, those that a global token asks for)."""
        local = super().project(inputs_q)
        first = inputs_q[:, : self.num_global]  # of an extension, the only ones that may be global
        seen = first if self.is_causal else inputs_q
        if not self.num_global:
            return tuple((heads, None) for heads in local)
        return tuple(zip(local, (self.query_global(first), self.key_global(seen), self.value_global(seen)), strict=True))

    def rotate(self, query, key, query_positions=None, key_positions=None):
        return rotated(super().rotate, query, key, query_positions, key_positions)

    def attend(self, query, key, value, mask):
        return attend_with_globals(query, key, value, mask, self.local, self.is_causal, self.implementation)

    def init_cache(self, batch_size: int, max_length: int, dtype: Any = None) -> LongformerCache:
        """An empty cache for `extend`: room for max_length tokens of batch_size sequences."""
        cache = super().init_cache(batch_size, max_length, dtype)
        shape = (batch_size, self.num_global, *cache.key.shape[2:])
        # Two arrays: one array in two places cannot be donated.
        return LongformerCache(*cache, *(jnp.zeros(shape, cache.key.dtype) for _ in range(2)))

    def attend_cached(self, query, key, value, mask, cache):
        start, local = cache.length, append(cache, key[0], value[0], mask)
        heads = attend_to_cache(self.local, query[0], local, start, self.implementation)
        kept = cache[3:]
        if query[1] is not None:
            # Of tokens behind the last global one, none is written.
            some = jnp.ones((1, 1, 1, 1), bool) if mask is None else mask
            kept = tuple(write(old, new, start, some) for old, new in zip(kept, (key[1], value[1]), strict=True))
            at = places(start, query[1].shape[1])
            rows = softmax.attention(
                query[1], *(array.astype(query[1].dtype) for array in kept), pattern=CAUSAL, query_positions=at,
                key_positions=jnp.arange(self.num_global)[None], implementation=self.implementation,
            )
            rows = jnp.where((at < self.num_global)[..., None, None], rows, heads[:, : at.shape[1]])
            heads = jnp.concatenate([rows, heads[:, at.shape[1] :]], axis=1)
        return poisoned(heads, local), LongformerCache(*local, *kept)


# ------------------------------------------------------------ heads in pairs: of all tokens, and those that global ones ask for


def copied(module: nnx.Module) -> nnx.Module:
    """A module with the same values in variables of its own."""
    graph, state = nnx.split(module)
    return nnx.merge(graph, jax.tree.map(jnp.copy, state))


def rotated(rotate, query, key, query_positions, key_positions):
    """`rotate` of both queries and their keys; the second of a pair are the first tokens, or None."""
    of = lambda positions, heads: None if positions is None else positions[:, : heads.shape[1]]
    pairs = [
        (None, None) if q is None else rotate(q, k, of(query_positions, q), of(key_positions, k))
        for q, k in zip(query, key, strict=True)
    ]
    return tuple(zip(*pairs, strict=True))


def attend_with_globals(query, key, value, mask, pattern, is_causal, implementation):
    """Attention under a pattern, and in the place of its first rows that of the global queries to all of their keys."""
    heads = softmax.attention(query[0], key[0], value[0], mask=mask, pattern=pattern, implementation=implementation)
    if query[1] is None:
        return heads
    mask = None if mask is None else mask[..., : key[1].shape[1]]
    rows = softmax.attention(query[1], key[1], value[1], mask=mask, is_causal=is_causal, implementation=implementation)
    return jnp.concatenate([rows, heads[:, rows.shape[1] :]], axis=1)
