"""Efficient attention: queries choose among averages of the values, one for each feature of the keys."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from subquad.kernels import linear, precision, scan
from subquad.zoo.base import Attention, Support
from subquad.zoo.cache import EfficientCache, counts
from subquad.zoo.checks import require_extend
from subquad.zoo.positions import run_starts
from subquad.zoo.projection import head_by_head, in_pieces

NOTHING = -1e30  # the logarithm of a sum of no keys; finite, so that differences are


class EfficientAttention(Attention):
    """Attention with a softmax of the query over its features, and of the keys over their positions.

        y_t = sum_h rho(q_t)_h G_h,   G_h = sum_s exp(k_sh) v_s / sum_s exp(k_sh),   rho = softmax over the H features of a head
        causal: G_th, the same with both sums over s <= t

    Feature h of the keys is a distribution over positions, and G_h the mean of the values under it; queries mix these means.

    Cost: time O(T N H^2), memory O(T N H); one extended token O(N H^2) and a cache of that size whatever came before. The
        causal form computes a recurrence with a decay for each feature.
    Differs from the paper: it has no causal form; this one divides each mean by its own sum over the past, kept relative to a
        running sum, so that no exponential overflows and a loud future key changes nothing before it. As in the paper, logits
        are not scaled. The authors' code is for images, and adds its input to the output.

    Args:
        num_heads: query heads N; must divide qkv_features.
        in_features: features D of the inputs.
        num_kv_heads: key/value heads K; must divide num_heads. None: num_heads. Fewer save parameters only.
        is_causal: a token sees itself and those before it.
        shell: see `Attention`.
    Call:
        inputs_q: [*B, T, D].  inputs_kv: [*B, S, D].  mask: True = attend; key padding only, [*B, 1, 1, S].
        segment_ids: [T] or [*B, T]; a segment is a run of equal ids.
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters; fully masked rows hold that of 0.
    Raises: ValueError: sizes that do not divide; a pairwise mask.
    Numerics: exponentials and sums in float32; agrees with the reference to 1e-5 (float32), 2e-2 (bfloat16). The weights of a
        row sum to 1.
    Example:
        >>> layer = EfficientAttention(4, 64, is_causal=True, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 100, 64))).shape
        (2, 100, 64)

    Source: Shen et al., Efficient Attention: Attention with Linear Complexities, WACV 2021, arXiv 1812.01243; code:
        cmsflash/efficient-attention.
    """

    supports = Support(cost="T", cross=True, segment_ids=True, grouped=True, attention_fn=True)

    def attend(self, query, key, value, mask, segment_ids=None):
        if self.is_causal:
            starts = None if segment_ids is None else run_starts(segment_ids)
            attend = lambda *arrays: causal(*arrays, None, self.implementation)[0]
            return head_by_head(attend, query, *self._repeated(key, value, mask), by_sample=(mask, starts))
        key, value = self._repeated(key, value, mask)
        # Each feature's key weights sum to 1, and so do a query's weights over features: linear.attention divides by 1.
        return linear.attention(
            in_pieces(over_features, query), softmax_over_keys(key, segment_ids, self.implementation), value, mask=mask,
            segment_ids=segment_ids, implementation=self.implementation,
        )

    def init_cache(self, batch_size: int, max_length: int, dtype: Any = None) -> EfficientCache:
        """An empty cache: float32 averages, no keys or values. So max_length bounds nothing, and dtype rounds nothing."""
        require_extend(self, batch_size=batch_size, max_length=max_length)
        shape = batch_size, self.num_heads, self.head_features
        average = jnp.zeros((*shape, self.head_features), jnp.float32)
        return EfficientCache(average, jnp.full(shape, NOTHING, jnp.float32), jnp.zeros(batch_size, jnp.int32))

    def attend_cached(self, query, key, value, mask, cache):
        key, value = self._repeated(key, value, mask)
        heads, average, log_sum = causal(query, key, value, mask, None, cache, self.implementation)
        return heads, EfficientCache(average, log_sum, cache.seen + counts(query, mask))

    def _repeated(self, key, value, mask):
        """Keys and values of all heads; the keys of padding count as NOTHING."""
        key, value = (jnp.repeat(heads, self.num_heads // self.num_kv_heads, axis=2) for heads in (key, value))
        return key if mask is None else jnp.where(mask[:, 0, 0, :, None, None], key, NOTHING), value


def causal(query, key, value, mask, starts, cache, implementation):
    """Heads, and the averages and log sums after the last token."""
    before = jnp.full_like(precision.wide(key[:, 0]), NOTHING) if cache is None else cache.log_sum
    log_sum = sums_so_far(key, before, starts, implementation)
    # The sums are in units of exp(log_sum), which are constants to the recurrence; the factors of 1 have their derivatives.
    units = jax.lax.stop_gradient(log_sum)
    log_decay = units[:, :-1] - units[:, 1:]
    if starts is not None:
        log_decay = jnp.where(starts[..., None, None], NOTHING, log_decay)
    query = in_pieces(lambda x, sums: over_features(x) * one(-sums).astype(x.dtype), query, log_sum[:, 1:])
    heads, average = linear.gated(
        query, in_pieces(shares, key, units[:, 1:]), value, log_decay, mask=mask, return_state=True,
        initial_state=None if cache is None else cache.average * one(before)[..., None],
        implementation=implementation,
    )
    return heads, average * one(-log_sum[:, -1])[..., None], log_sum[:, -1]


def over_features(query: Float[Array, "*B H"]) -> Float[Array, "*B H"]:
    return jax.nn.softmax(precision.wide(query), axis=-1).astype(query.dtype)


def shares(key: Float[Array, "*B H"], log_sum: Float[Array, "*B H"]) -> Float[Array, "*B H"]:
    """exp(k) over a sum of such."""
    return jnp.exp(precision.wide(key) - log_sum).astype(key.dtype)


def sums_so_far(
    key: Float[Array, "B T N H"], before: Float[Array, "B N H"], starts: Bool[Array, "B T"] | None, implementation
) -> Float[Array, "B T+1 N H"]:
    """log sum_{s <= t} exp(k_s) before the first key and after each; `before` is the first, NOTHING where there was no key.

    Args:
        starts: where a segment begins, whose sums take nothing from those before.
    """
    logits = jnp.concatenate([before[:, None], precision.wide(key)], axis=1)
    return running_log_sum(logits, None if starts is None else jnp.pad(starts, ((0, 0), (1, 0))), implementation)


def one(x):
    """1, with the derivative of exp(x) relative to itself."""
    return jnp.exp(x - jax.lax.stop_gradient(x))


@precision.promoting
def softmax_over_keys(
    key: Float[Array, "B S N H"], segment_ids: Int[Array, "B S"] | None, implementation
) -> Float[Array, "B S N H"]:
    """exp(k_s) over its sum, of all keys or of those in the same run of equal ids."""
    if segment_ids is None:
        sums = jax.nn.logsumexp(precision.wide(key), axis=1, keepdims=True)
        return in_pieces(shares, key, jnp.broadcast_to(sums, key.shape))
    starts, place = run_starts(segment_ids), jnp.arange(key.shape[1])
    ends = jnp.pad(starts[:, 1:], ((0, 0), (0, 1)), constant_values=True)
    last_of_run = jax.lax.cummin(jnp.where(ends, place, key.shape[1]), axis=1, reverse=True)
    sums = running_log_sum(precision.wide(key), starts, implementation)
    return in_pieces(shares, key, jnp.take_along_axis(sums, last_of_run[..., None, None], axis=1))


def running_log_sum(
    logits: Float[Array, "B T N H"], starts: Bool[Array, "B T"] | None, implementation
) -> Float[Array, "B T N H"]:
    """log sum_{s <= t} exp(x_s), from the last start on. Its gradient is a recurrence that keeps inputs and outputs alone."""
    starts = jnp.zeros((1, logits.shape[1]), bool) if starts is None else starts

    def forward(logits, starts):
        def combine(one, other):
            return one[0] | other[0], jnp.where(other[0], other[1], jnp.logaddexp(one[1], other[1]))

        return jax.lax.associative_scan(combine, (starts[..., None, None], logits), axis=1)[1]

    def backward(saved, gradient):
        """What x_s gets from l_t is exp(x_s - l_t) = exp(x_s - l_s) exp(l_s - l_t): the sum over t runs from the end."""
        logits, starts, sums = saved
        kept = jnp.where(starts[:, 1:, None, None], 0, jnp.exp(sums[:, :-1] - sums[:, 1:]))
        kept = jnp.pad(kept, ((0, 0), (0, 1), (0, 0), (0, 0)))
        flat = lambda x: x.reshape(*x.shape[:2], -1)
        later, _ = scan.first_order(flat(kept), flat(gradient), reverse=True)
        return jnp.exp(logits - sums) * later.reshape(sums.shape), None

    if implementation == "reference":
        return forward(logits, starts)
    run = jax.custom_vjp(forward)
    precision.define_passes(run, lambda *given: (forward(*given), (*given, forward(*given))), backward)
    return run(logits, starts)
