"""Stick-breaking attention: keys break their part off a stick of length 1, the newest first."""

import functools
import math
from typing import Unpack

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int

from subquad.kernels import dispatch, precision
from subquad.kernels.patterns import CAUSAL, Band
from subquad.zoo.base import Attention, Shell, Support
from subquad.zoo.cache import append, places, poisoned
from subquad.zoo.extending import in_chunks
from subquad.zoo.positions import run_starts

EARLIER = CAUSAL & ~Band(0, 0)  # the tokens before
BLOCK = 64  # queries whose weights are held at a time


class StickBreakingAttention(Attention):
    """Causal attention whose weights are parts of a stick: each key, from the newest on, takes its part of what is left.

        y_t = sum_{s < t} A_ts v_s,    A_ts = b_ts prod_{s<r<t} (1 - b_tr),    b_ts = sigmoid(q_t . k_s / sqrt(H))   (section 3)

    So of two keys with the same logit the newer counts more, with no positions added. Weights sum to at most 1; the rest of the
    stick, prod_{s<t} (1 - b_ts), is given to nobody, or with `remainder` to a vector of each head that is learned.

    Cost: time O(T^2 N H), memory O(T): weights of a block of queries at a time, made again in the backward pass; one extended
        token O(S N H) after S tokens.
    Differs from the paper: none known. As there a token does not see itself, so that the first one gives 0, unless
        `attend_current`. The remainder's vector is that of the authors' later code, off by default; its norm of heads is left
        to the block. Rotary positions are off by default: the paper does without. Section numbers are as remembered.

    Args:
        num_heads: query heads N; must divide qkv_features.
        in_features: features D of the inputs.
        num_kv_heads: key/value heads K; must divide num_heads. None: num_heads.
        attend_current: a token's own key is the first to break the stick.
        remainder: what is left of the stick weighs a learned vector of each head, 0 at first.
        is_causal: must be True: a stick is broken from the present into the past.
        shell: see `Attention`.
    Call:
        inputs_q: [*B, T, D].  mask: True = attend; key padding only, [*B, 1, 1, T]: what is hidden takes no part.
        segment_ids: [T] or [*B, T]; a segment is a run of equal ids.
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters; rows that see nothing hold the output projection of 0.
    Raises: ValueError: is_causal=False; sizes that do not divide; a pairwise mask.
    Numerics: logits, logarithms of parts and their sums in float32; agrees with the reference to 1e-5 (float32), 2e-2
        (bfloat16).
    Example:
        >>> layer = StickBreakingAttention(4, 64, num_kv_heads=2, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 100, 64))).shape
        (2, 100, 64)

    Source: Tan et al., Scaling Stick-Breaking Attention: An Efficient Implementation and In-depth Study, ICLR 2025, arXiv
        2410.17980.
    """

    supports = Support(cost="T^2", bidirectional=False, segment_ids=True, grouped=True, rotary=True)

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        num_kv_heads: int | None = None,
        attend_current: bool = False,
        remainder: bool = False,
        is_causal: bool = True,
        rngs: nnx.Rngs,
        **shell: Unpack[Shell],
    ):
        super().__init__(num_heads, in_features, num_kv_heads=num_kv_heads, is_causal=is_causal, rngs=rngs, **shell)
        self.attend_current = attend_current
        self.sees = CAUSAL if attend_current else EARLIER
        self.rest = nnx.Param(jnp.zeros((num_heads, self.head_features), self.param_dtype)) if remainder else None

    def attend(self, query, key, value, mask, segment_ids=None):
        segments = None if segment_ids is None else jnp.cumsum(run_starts(segment_ids), axis=1)
        return self._break(query, key, value, jnp.zeros(len(query), jnp.int32), segments)

    def attend_cached(self, query, key, value, mask, cache):
        start, cache = cache.length, append(cache, key, value, mask)
        key, value = (x.astype(query.dtype) for x in cache[:2])
        return poisoned(self._break(query, key, value, start), cache), cache

    def _break(self, query, key, value, start, segments=None):
        run = lambda size: functools.partial(stick_breaking, size, self.attend_current)
        both = {"xla": run(BLOCK), "reference": run(query.shape[1])}
        heads, left = dispatch.run(
            "stick_breaking.attention", both, self.implementation, query, key, value, start, segments
        )
        return heads if self.rest is None else heads + (left[..., None] * self.rest[...]).astype(heads.dtype)


@precision.full
def stick_breaking(
    size: int,
    attend_current: bool,
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K V"],
    start: Int[Array, "B"],
    segments: Int[Array, "B S"] | None = None,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """Attention of queries at the positions from `start` on to keys at those from 0 on, and what is left of each stick.

    Args:
        size: queries whose weights are made at a time.
        attend_current: a query sees the key at its own position.
        segments: numbers of segments; queries see the keys of their own.
    """
    columns, kv_heads, scale = jnp.arange(key.shape[1]), key.shape[2], 1 / math.sqrt(key.shape[3])

    @jax.checkpoint
    def of_block(query, start):
        rows = places(start, query.shape[1])
        seen = columns <= rows[..., None] - (not attend_current)
        if segments is not None:
            own = jnp.take_along_axis(segments, jnp.minimum(rows, segments.shape[1] - 1), axis=1)
            seen &= own[..., None] == segments[:, None]
        seen = seen[:, None, None]
        query = rearrange(query, "b t (k g) h -> b k g t h", k=kv_heads)
        logits = scale * jnp.einsum("bkgth,bskh->bkgts", query, key, preferred_element_type=jnp.float32)
        logits = jnp.where(seen, logits, 0)
        kept = jnp.where(seen, -jax.nn.softplus(logits), 0)  # log(1 - b), of what a key leaves
        left = jax.lax.cumsum(kept, axis=4, reverse=True)  # by a key and those after it
        before = jnp.pad(left[..., 1:], ((0, 0),) * 4 + ((0, 1),))
        weights = jnp.where(seen, jnp.exp(jax.nn.log_sigmoid(logits) + before), 0)
        heads = jnp.einsum("bkgts,bskv->bkgtv", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
        both = jnp.concatenate([heads, jnp.exp(left[..., :1])], axis=-1)
        return rearrange(both, "b k g t v -> b t (k g) v")

    both = in_chunks(of_block, query, start, size)
    return both[..., :-1].astype(value.dtype), both[..., -1]
