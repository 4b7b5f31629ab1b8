"""DPFP: linear attention whose features are products of the parts of a token, sparse and without random numbers."""

from typing import Unpack

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from subquad.zoo.base import Shell, Support
from subquad.zoo.checks import check_sizes, refuse
from subquad.zoo.kernelized.sums import FeatureAttention


class DPFPAttention(FeatureAttention):
    """Linear attention with a deterministic parameter-free projection: products of a key's own rectified features.

        y_t = phi(q_t)^T sum_s phi(k_s) v_s^T / phi(q_t)^T sum_s phi(k_s),   s <= t if causal
        phi(x) = [r * roll(r, 1), ..., r * roll(r, nu)],   r = relu([x, -x]),   roll(r, j)_i = r_{i-j}         (section 5.3)

    There are 2 nu H features, of which few are not 0: keys that point apart share none, so that a state holds more of them.

    Cost: time O(T nu N H^2), memory O(T nu N H); one extended token O(nu N H^2) and a cache of that size whatever came before.
    Differs from the paper: this is its feature map in linear attention, not its update by the delta rule, which is
        `DeltaNet`'s. Nothing is added to the denominator; where no feature of a query meets one of a key, the row is 0. Rotary
        positions (`rotary_base`) are not the paper's: query and key are rotated before the features, as in `LinearAttention`.
        Section numbers are as remembered.

    Args:
        num_heads: query heads N; must divide qkv_features.
        in_features: features D of the inputs.
        num_kv_heads: key/value heads K; must divide num_heads. None: num_heads. Fewer save parameters only.
        nu: how many neighbours each rectified feature is multiplied with, below 2 H.
        is_causal: a token sees itself and those before it.
        shell: see `Attention`.
    Call:
        inputs_q: [*B, T, D].  inputs_kv: [*B, S, D].  mask: True = attend; key padding only, [*B, 1, 1, S].
        segment_ids: [T] or [*B, T]; a segment is a run of equal ids.
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters; fully masked rows hold that of 0.
    Raises: ValueError: sizes that do not divide; nu out of range; a pairwise mask.
    Numerics: sums in float32; agrees with the reference to 1e-5 (float32), 2e-2 (bfloat16). A row whose products are all small
        has its rounding divided by their sum.
    Example:
        >>> layer = DPFPAttention(4, 64, nu=2, is_causal=True, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 100, 64))).shape
        (2, 100, 64)

    Source: Schlag, Irie and Schmidhuber, Linear Transformers Are Secretly Fast Weight Programmers, ICML 2021,
        arXiv 2102.11174.
    """

    supports = Support(cost="T", cross=True, segment_ids=True, grouped=True, rotary=True, attention_fn=True)
    by_head = True

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        num_kv_heads: int | None = None,
        nu: int = 3,
        is_causal: bool = False,
        rngs: nnx.Rngs,
        **shell: Unpack[Shell],
    ):
        super().__init__(num_heads, in_features, num_kv_heads=num_kv_heads, is_causal=is_causal, rngs=rngs, **shell)
        check_sizes("DPFPAttention", nu=nu)
        if nu >= 2 * self.head_features:
            refuse("DPFPAttention", "nu", nu, f"be below 2 H = {2 * self.head_features}", "Further rolls bring the same again.")
        self.nu, self.num_features = int(nu), 2 * int(nu) * self.head_features

    def mix(self, query, key, value, mask, **options):
        return self.weigh(features(query, self.nu), features(key, self.nu), value, mask, **options)


def features(inputs: Float[Array, "*B H"], nu: int) -> Float[Array, "*B M"]:
    """relu([x, -x]) times itself, rolled by 1 to nu places: M = 2 nu H."""
    rectified = nnx.relu(jnp.concatenate([inputs, -inputs], axis=-1))
    return jnp.concatenate([rectified * jnp.roll(rectified, by, axis=-1) for by in range(1, nu + 1)], axis=-1)
