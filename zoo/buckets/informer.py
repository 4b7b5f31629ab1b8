"""Informer's ProbSparse attention: the queries with something to find see all keys, the others the mean of all values."""

import math
from typing import Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from subquad.kernels import softmax
from subquad.zoo.base import Attention, Shell, Support
from subquad.zoo.buckets.rows import real_rows, rows, unrows
from subquad.zoo.checks import check_sizes
from subquad.zoo.features import RandomFeature

MOST_LOGARITHM = 24  # ln of the longest sequence, rounded up: so many samples are drawn, times the factor


class InformerAttention(Attention):
    """Softmax attention of the u queries whose scores of some keys differ most; the mean of the values for all others.

        y_t = sum_s softmax_s(q_t . k_s / sqrt(H)) v_s   for the u largest M(q_t),   y_t = mean_s v_s   for the rest
        M(q_t) = max_s l_ts - mean_s l_ts,   l_ts = q_t . k_s / sqrt(H),   s of a sample of u keys              (eq. 4)
        u = factor x ceil(ln(1 + T)), at most T

    A query whose scores are all alike would see the mean of all values anyway, which is what M, the distance of its largest
    score from their mean, tells.

    Cost: time O(u T N H), memory O(T N (H + u)); no extension: queries are ranked among all of the sequence.
    Differs from the paper: the same keys are sampled for all queries and heads, as in Hugging Face's code, where the authors
        draw u of them for each query. The mean in M is that of the sample; their code divides its sum by T. The decoder's
        form, which ranks queries by looking ahead and fills in sums that grow with the position, is left out: it is not
        causal. Samples are drawn where the caller says (`redraw`), never inside a call. Rotary positions are not the
        paper's. The number of the equation is cited from memory.

    Args:
        num_heads: heads N; must divide qkv_features.
        in_features: features D of the inputs.
        factor: queries, and sampled keys, per unit of the logarithm of the length: the paper's c.
        is_causal: must be False: which queries are answered depends on all tokens.
        shell: see `Attention`.
    Call:
        inputs_q: [*B, T, D].  mask: True = attend; key padding only, [*B, 1, 1, T].
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters; fully masked rows hold that of 0.
    Raises: ValueError: a factor that is not positive; is_causal; a mask that is not key padding.
    Numerics: M, softmax and sums in float32; agrees with the reference to 1e-5 (float32), 2e-2 (bfloat16) where no rounding
        changes which queries are answered.
    Example:
        >>> layer = InformerAttention(4, 64, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 100, 64))).shape
        (2, 100, 64)
        >>> layer.sample[...] = layer.redraw(nnx.Rngs(1))

    Source: Zhou et al., Informer: Beyond Efficient Transformer for Long Sequence Time-Series Forecasting, AAAI 2021,
        arXiv 2012.07436.
    """

    supports = Support(
        cost="T log T", causal=False, extend=False, rotary=True, attention_fn=True,
        mixes_all="it ranks all queries, and averages all values",
    )

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        factor: int = 5,
        is_causal: bool = False,
        rngs: nnx.Rngs,
        **shell: Unpack[Shell],
    ):
        super().__init__(num_heads, in_features, is_causal=is_causal, rngs=rngs, **shell)
        check_sizes("InformerAttention", factor=factor)
        self.factor = factor
        self.sample = RandomFeature(self.redraw(rngs))

    def redraw(self, rngs: nnx.Rngs) -> Float[Array, "U"]:
        """New samples, from `rngs.params()`: where in a sequence, from 0 to 1. The layer is unchanged until the caller writes
        them into it:

            layer.sample[...] = layer.redraw(rngs)
        """
        return jax.random.uniform(rngs.params(), (self.factor * MOST_LOGARITHM,), jnp.float32)

    def attend(self, query, key, value, mask):
        length = query.shape[1]
        real = real_rows(mask, query)
        count = real.sum(1, dtype=jnp.int32)  # the real tokens come first
        most = self.factor * math.ceil(math.log1p(length))
        used = self.factor * jnp.ceil(jnp.log1p(count.astype(jnp.float32))).astype(jnp.int32)
        sample = jnp.floor(self.sample[:most][None] * count[:, None].astype(jnp.float32)).astype(jnp.int32)
        query, key, value = map(rows, (query, key, value))
        measure = spread(query, key, sample, jnp.arange(most)[None] < used[:, None])
        heads = answer(query, key, value, real, measure, min(most, length), used, self.implementation)
        return unrows(heads, self.num_heads)


def spread(query, key, sample: Int[Array, "B U"], is_used: Bool[Array, "#B U"]) -> Float[Array, "B T"]:
    """M of each query: its largest score of the sampled keys less their mean. No gradient passes."""
    query, key = (jax.lax.stop_gradient(x[:, :, 0].astype(jnp.float32)) for x in (query, key))
    keys = jnp.take_along_axis(key, sample[..., None], axis=1, mode="clip")
    scores = jnp.einsum("bth,buh->btu", query, keys, precision="highest") * query.shape[-1] ** -0.5
    is_used = jnp.broadcast_to(is_used[:, None], scores.shape)
    largest = scores.max(2, where=is_used, initial=-jnp.inf)
    return largest - scores.sum(2, where=is_used) / jnp.maximum(is_used.sum(2, dtype=jnp.float32), 1)


def answer(query, key, value, real: Bool[Array, "B T"], measure: Float[Array, "B T"], most: int, used, implementation):
    """Softmax attention for the `used` [B] real queries of the largest measures, at most `most`; the mean value for others."""
    measure, places = jax.lax.top_k(jnp.where(real, measure, -jnp.inf), most)
    is_answered = (jnp.arange(most)[None] < jnp.reshape(used, (-1, 1))) & (measure > -jnp.inf)
    asking = jnp.take_along_axis(query, places[..., None, None], axis=1)
    answers = softmax.attention(asking, key, value, mask=real[:, None, None], implementation=implementation)
    shown = jnp.where(real[..., None, None], value.astype(jnp.float32), 0)
    mean = shown.sum(1, keepdims=True) / jnp.maximum(real.sum(1, dtype=jnp.float32), 1)[:, None, None, None]
    rest = jnp.broadcast_to(mean.astype(value.dtype), (*query.shape[:3], value.shape[3]))
    places = jnp.where(is_answered, places, query.shape[1])
    return rest.at[jnp.arange(len(query))[:, None], places].set(answers, mode="drop")
