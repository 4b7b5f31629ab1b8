"""Forgetting attention: softmax attention whose logits fall by what the tokens between query and key forget."""

from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from subquad.kernels import precision, softmax
from subquad.zoo.base import Attention, Shell, Support
from subquad.zoo.cache import KVCache, append, places, poisoned, write
from subquad.zoo.checks import require_extend
from subquad.zoo.positions import run_starts
from subquad.zoo.projection import projection


class ForgettingCache(NamedTuple):
    """Keys, values and sums of log forget gates of each sample's real tokens so far: the token at position t in slot t of S."""

    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K V"]
    length: Int[Array, "B"]  # real tokens so far; more than S where they did not fit
    log_kept: Float[Array, "B S N"]  # sum of log f up to each token, in float32
    total: Float[Array, "B N"]  # that up to the newest


class ForgettingAttention(Attention):
    """Softmax attention with a forget gate of each head: the mechanism of the Forgetting Transformer (FoX).

        y_t = sum_{s <= t} softmax_s(q_t . k_s / sqrt(H) + D_ts) v_s
        D_ts = sum_{r=s+1..t} log f_r = c_t - c_s,   f_t = sigmoid(w_f . x_t + b_f),   c_t = sum_{r<=t} log f_r

    A gate is of a token and a query head. c_t is the same for all keys of a row, which a softmax does not see: -c_s, a bias of
    each key, is all that is added to logits. So the gates take no T x T array.

    Cost: time O(T^2 N H), memory O(T); one extended token O(S N H) after S tokens.
    Differs from the paper: this is the layer that its code has without options, of the block named after Llama; the output
        gate, the norms of queries, keys and outputs and the shift of keys and values that its "Pro" block adds are not here.
        Its projections have no biases but the gate's (use_bias). Rotary positions (`rotary_base`) are off by default, as
        there: gates do without. Grouped heads (`num_kv_heads`) share keys and values, not gates.

    Args:
        num_heads: query heads N; must divide qkv_features.
        in_features: features D of the inputs.
        num_kv_heads: key/value heads K; must divide num_heads. None: num_heads.
        is_causal: must be True: a gate forgets what came before.
        shell: see `Attention`.
    Call:
        inputs_q: [*B, T, D].  mask: True = attend; key padding only, [*B, 1, 1, T]: what is hidden forgets nothing.
        segment_ids: [T] or [*B, T]; a segment is a run of equal ids.
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters; rows that see nothing hold the output projection of 0.
    Raises: ValueError: is_causal=False; sizes that do not divide; a pairwise mask.
    Numerics: gates, their sums and softmax in float32; agrees with the reference to 1e-5 (float32), 2e-2 (bfloat16). A logit
        loses as many digits as the sum of all -log f so far has before its point, 1e-3 at 10,000.
    Example:
        >>> layer = ForgettingAttention(4, 64, num_kv_heads=2, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 100, 64))).shape
        (2, 100, 64)

    Source: Lin et al., Forgetting Transformer: Softmax Attention with a Forget Gate, ICLR 2025, arXiv 2503.02130; code:
        zhixuan-lin/forgetting-transformer.
    """

    supports = Support(cost="T^2", bidirectional=False, segment_ids=True, grouped=True, rotary=True)

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        num_kv_heads: int | None = None,
        is_causal: bool = True,
        rngs: nnx.Rngs,
        **shell: Unpack[Shell],
    ):
        super().__init__(num_heads, in_features, num_kv_heads=num_kv_heads, is_causal=is_causal, rngs=rngs, **shell)
        self.forget_gate = projection(shell, in_features, num_heads, rngs=rngs)

    def project(self, inputs_q, inputs_kv=None, inputs_v=None):
        """Query, key and value heads, and log f [B, T, N]."""
        return *super().project(inputs_q), nnx.log_sigmoid(precision.wide(self.forget_gate(inputs_q)))

    def attend(self, query, key, value, log_forget, mask, segment_ids=None):
        starts = None if segment_ids is None else run_starts(segment_ids)
        segments = None if starts is None else jnp.cumsum(starts, axis=1)
        return softmax.attention(
            query, key, value, mask=mask, bias=of_keys(sums_so_far(log_forget, starts)), is_causal=True,
            query_segment_ids=segments, key_segment_ids=segments, implementation=self.implementation,
        )

    def init_cache(self, batch_size: int, max_length: int, dtype: Any = None) -> ForgettingCache:
        """An empty cache for `extend`: room for max_length tokens of batch_size sequences."""
        require_extend(self, batch_size=batch_size, max_length=max_length)
        tokens = KVCache.zeros(batch_size, max_length, self.num_kv_heads, self.head_features, self.cache_dtype(dtype))
        sums = jnp.zeros((batch_size, max_length, self.num_heads), jnp.float32)
        return ForgettingCache(*tokens, sums, sums[:, 0])

    def attend_cached(self, query, key, value, log_forget, mask, cache):
        if mask is not None:
            log_forget = jnp.where(mask[:, 0, 0, :, None], log_forget, 0)
        log_kept = cache.total[:, None] + jnp.cumsum(log_forget, axis=1)
        tokens = append(KVCache(*cache[:3]), key, value, mask)
        total = log_kept[:, -1].astype(cache.total.dtype)
        cache, start = ForgettingCache(*tokens, write(cache.log_kept, log_kept, cache.length, mask), total), cache.length
        heads = softmax.attention(
            query, cache.key.astype(query.dtype), cache.value.astype(query.dtype), bias=of_keys(cache.log_kept), is_causal=True,
            query_positions=places(start, query.shape[1]), key_positions=jnp.arange(cache.key.shape[1])[None],
            implementation=self.implementation,
        )
        return poisoned(heads, cache), cache


def sums_so_far(log_forget: Float[Array, "B T N"], starts: Bool[Array, "B T"] | None) -> Float[Array, "B T N"]:
    """Sums up to each token, which begin anew where a segment starts, so that none has a part in another's gradient."""
    if starts is None:
        return jnp.cumsum(log_forget, axis=1)

    def join(before, after):
        (sums, any_start), (more, starts) = before, after
        return jnp.where(starts, more, sums + more), any_start | starts

    starts = jnp.broadcast_to(starts[..., None], log_forget.shape)
    return jax.lax.associative_scan(join, (log_forget, starts), axis=1)[0]


def of_keys(log_kept: Float[Array, "B S N"]) -> Float[Array, "B N 1 S"]:
    """The bias of each key, -c_s."""
    return -log_kept.swapaxes(1, 2)[:, :, None]
