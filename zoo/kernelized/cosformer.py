"""cosFormer: linear attention with ReLU features, whose weights fall with the distance as a cosine."""

import math
from typing import Unpack

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from subquad.zoo.base import Shell, Support
from subquad.zoo.cache import places
from subquad.zoo.checks import check_sizes
from subquad.zoo.kernelized.sums import FeatureAttention
from subquad.zoo.projection import in_pieces


class CosformerAttention(FeatureAttention):
    """Attention whose weights are products of ReLU features, and of the cosine of the distance.

        y_t = sum_s w_ts v_s / sum_s w_ts,   w_ts = relu(q_t) . relu(k_s) cos(pi (t - s) / 2M),   s <= t if causal
        cos(a - b) = cos a cos b + sin a sin b: linear attention with twice the features,   M = max_length

    Cost: time O(T N H^2), memory O(T N H); one extended token O(N H^2) and a cache of that size whatever came before.
    Differs from the paper: M is max_length, the same in every call; the paper's is the length of the call, so that there one
        more token changes the outputs of all before it. The denominator is not clamped (the authors' code: at 1e-6); where no
        feature of a query meets one of a key, the row is 0. In cross-attention both sides count from 0, as in that code.

    Args:
        num_heads: query heads N; must divide qkv_features.
        in_features: features D of the inputs.
        max_length: M, the longest input in tokens, keys of cross-attention included: a longer one would have negative weights.
        num_kv_heads: key/value heads K; must divide num_heads. None: num_heads. Fewer save parameters only.
        is_causal: a token sees itself and those before it.
        shell: see `Attention`.
    Call:
        inputs_q: [*B, T, D].  inputs_kv: [*B, S, D].  mask: True = attend; key padding only, [*B, 1, 1, S].
        segment_ids: [T] or [*B, T]; a segment is a run of equal ids.
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters; fully masked rows hold that of 0.
    Raises: ValueError: sizes that do not divide; more than max_length tokens; a pairwise mask. An extension past max_length,
        which the shapes do not show, gives NaN.
    Numerics: sums in float32; agrees with the reference to 1e-5 (float32), 2e-2 (bfloat16). A row whose products are all small
        has its rounding divided by their sum: 1e-3 in gradients where that is 1e-4.
    Example:
        >>> layer = CosformerAttention(4, 64, max_length=512, is_causal=True, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 100, 64))).shape
        (2, 100, 64)

    Source: Qin et al., cosFormer: Rethinking Softmax in Attention, ICLR 2022, arXiv 2202.08791; code:
        OpenNLPLab/cosFormer.
    """

    supports = Support(cost="T", cross=True, segment_ids=True, grouped=True, attention_fn=True, distances=True)

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        max_length: int,
        num_kv_heads: int | None = None,
        is_causal: bool = False,
        rngs: nnx.Rngs,
        **shell: Unpack[Shell],
    ):
        super().__init__(num_heads, in_features, num_kv_heads=num_kv_heads, is_causal=is_causal, rngs=rngs, **shell)
        check_sizes("CosformerAttention", max_length=max_length)
        self.max_length, self.num_features = int(max_length), 2 * self.head_features

    def attend(self, query, key, value, mask, segment_ids=None, query_positions=None, key_positions=None):
        for name, tokens in (("inputs_q", query.shape[1]), ("inputs_kv", key.shape[1])):
            self._check_length(name, tokens)
        given = (query, query_positions), (key, key_positions)
        at = (jnp.arange(heads.shape[1])[None] if positions is None else positions for heads, positions in given)
        return self.mix(query, key, value, mask, *at, segment_ids=segment_ids)

    def attend_cached(self, query, key, value, mask, cache):
        at = places(cache.seen, query.shape[1])
        heads, cache = super().attend_cached(query, key, value, mask, cache, query_positions=at, key_positions=at)
        return jnp.where((cache.seen > self.max_length)[:, None, None, None], jnp.nan, heads), cache

    def mix(self, query, key, value, mask, query_positions, key_positions, **options):
        query, key = (features(x, at, self.max_length) for x, at in ((query, query_positions), (key, key_positions)))
        return self.weigh(query, key, value, mask, **options)


def features(
    inputs: Float[Array, "B T N H"], positions: Int[Array, "_ T"], max_length: int
) -> Float[Array, "B T N 2*H"]:
    """relu(x) times cosine and sine of the position's angle, which goes from 0 to pi / 2: no feature is negative."""
    angles = jnp.broadcast_to(math.pi / 2 / max_length * positions.astype(jnp.float32), inputs.shape[:2])

    def waves(inputs, angles):
        factors = jnp.stack([jnp.cos(angles), jnp.sin(angles)], -1).astype(inputs.dtype)[:, None, :, None]
        return (nnx.relu(inputs)[:, :, None] * factors).reshape(*inputs.shape[:2], -1)

    return in_pieces(waves, inputs, angles)
