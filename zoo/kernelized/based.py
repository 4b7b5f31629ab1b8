"""Based: linear attention whose weights are the exponential's Taylor polynomial."""

from typing import Unpack

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from subquad.kernels import precision
from subquad.zoo.base import Shell, Support
from subquad.zoo.gated.output import widen
from subquad.zoo.kernelized.sums import FeatureAttention


class BasedAttention(FeatureAttention):
    """Attention whose weights are those of softmax to the second order, over narrow queries and keys: Based.

        y_t = sum_s w_ts v_s / sum_s w_ts,   w_ts = 1 + u_ts + u_ts^2 / 2,   u_ts = q_t . k_s / sqrt(H),   s <= t if causal
        w_ts = phi(q_t) . phi(k_s),   phi(x) = [1, x'_i, x'_i^2 / sqrt(2), x'_i x'_j for i < j],   x' = x / H^{1/4}

    Near u = 0 a weight is that of softmax; it is never less than 1/2. The paper's models alternate it with softmax attention in
    a window of 64 tokens and with gated short convolutions, which see where things stand; alone it is the part that recalls.

    Cost: time O(T N H^2 V), memory O(T N (H^2 + V)); one extended token O(N H^2 V) and a cache of that size whatever came
        before. There are 1 + H + H (H + 1) / 2 features, 153 where H is 16.
    Differs from the paper: products of x'_i and x'_j are one feature, not two, and nothing is added to the denominator, to
        which its code adds 1e-6. Projections have biases unless `use_bias=False`. Rotary positions (`rotary_base`) are not the
        paper's.

    Args:
        num_heads: query heads N; must divide qkv_features and value_features.
        in_features: features D of the inputs.
        num_kv_heads: key/value heads K; must divide num_heads. None: num_heads. Fewer save parameters only.
        qkv_features: features of all query heads together, N x H. None: 16 N, as in the paper.
        value_features: features of all value heads together, N x V. None: D.
        is_causal: a token sees itself and those before it.
        shell: see `Attention`.
    Call:
        inputs_q: [*B, T, D].  inputs_kv: [*B, S, D].  mask: True = attend; key padding only, [*B, 1, 1, S].
        segment_ids: [T] or [*B, T]; a segment is a run of equal ids.
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters; fully masked rows hold that of 0.
    Raises: ValueError: sizes that do not divide; a pairwise mask.
    Numerics: features and sums in float32; agrees with the reference to 1e-5 (float32), 2e-2 (bfloat16).
    Example:
        >>> layer = BasedAttention(4, 64, is_causal=True, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 100, 64))).shape
        (2, 100, 64)
        >>> outputs, cache = layer.extend(jnp.ones((2, 1, 64)), layer.init_cache(2, 100))
        >>> cache.numerator.shape
        (2, 4, 153, 16)

    Source: Arora et al., Simple Linear Attention Language Models Balance the Recall-Throughput Tradeoff, ICML 2024, arXiv
        2402.18668; code: HazyResearch/based.
    """

    supports = Support(cost="T", cross=True, segment_ids=True, grouped=True, rotary=True)
    by_head = True

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        num_kv_heads: int | None = None,
        value_features: int | None = None,
        is_causal: bool = False,
        rngs: nnx.Rngs,
        **shell: Unpack[Shell],
    ):
        shell.setdefault("qkv_features", 16 * num_heads)
        super().__init__(
            num_heads, in_features, num_kv_heads=num_kv_heads, is_causal=is_causal, rngs=rngs, **shell
        )
        widen(self, in_features if value_features is None else value_features, shell, rngs)
        self.num_features = 1 + self.head_features * (self.head_features + 3) // 2

    def mix(self, query, key, value, mask, **options):
        return self.weigh(taylor_features(query), taylor_features(key), value, mask, **options)


@precision.promoting
def taylor_features(inputs: Float[Array, "*B H"]) -> Float[Array, "*B M"]:
    """phi(x), made in float32: phi(x) . phi(y) = 1 + u + u^2 / 2 with u = x . y / sqrt(H)."""
    x = precision.wide(inputs) * inputs.shape[-1] ** -0.25
    products = (x[..., i : i + 1] * x[..., i + 1 :] for i in range(x.shape[-1] - 1))
    return jnp.concatenate([jnp.ones_like(x[..., :1]), x, x**2 * 0.5**0.5, *products], -1).astype(inputs.dtype)
