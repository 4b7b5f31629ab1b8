"""Kernelized attention: values weighted by a Gaussian of the distance between query and key, without a normaliser."""

from typing import Unpack

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from subquad.kernels import precision, softmax
from subquad.zoo.base import Attention, Shell, Support
from subquad.zoo.cache import append, places, poisoned


class KernelizedAttention(Attention):
    """Attention whose weights are a Gaussian kernel of query and key, and do not sum to 1.

        y_t = sum_s exp(-|q_t - k_s|^2 / (2 sqrt(H))) v_s,   s <= t if causal

    It is softmax attention with the norms taken out: exp(q . k / sqrt(H)) between two diagonal matrices in place of one
    (section 4.1). Positive definite, so that landmarks can stand for it: `SkyformerAttention`.

    Cost: time O(T^2 N H), memory O(T); one extended token O(t N H), cache O(max_length).
    Differs from the paper: the authors' code also drops weights. The paper is bidirectional; the causal sum is a restriction of
        it. Rotary positions (`rotary_base`) are not the paper's; rotation changes no norm: the kernel is one of distances.

    Args:
        num_heads: query heads N; must divide qkv_features.
        in_features: features D of the inputs.
        num_kv_heads: key/value heads K; must divide num_heads. None: num_heads.
        is_causal: a token sees itself and those before it.
        shell: see `Attention`.
    Call:
        inputs_q: [*B, T, D].  inputs_kv: [*B, S, D].  mask: True = attend; broadcasts to [*B, N, T, S].
        segment_ids: [T] or [*B, T]; tokens of different segments do not see each other.
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters; fully masked rows hold that of 0.
    Raises: ValueError: sizes that do not divide.
    Numerics: logits and sums in float32, by way of a log-sum-exp: the size of a sum loses as many digits as |q|^2 / (2 sqrt(H))
        has before its point. Agrees with the reference to 1e-5 (float32), 2e-2 (bfloat16).
    Example:
        >>> layer = KernelizedAttention(4, 64, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 100, 64))).shape
        (2, 100, 64)

    Source: Chen et al., Skyformer: Remodel Self-Attention with Gaussian Kernel and Nystrom Method, NeurIPS 2021,
        arXiv 2111.00035; code: pkuzengqi/Skyformer.
    """

    supports = Support(
        cost="T^2", cross=True, pairwise_mask=True, segment_ids=True, grouped=True, rotary=True, attention_fn=True
    )

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        num_kv_heads: int | None = None,
        is_causal: bool = False,
        rngs: nnx.Rngs,
        **shell: Unpack[Shell],
    ):
        super().__init__(num_heads, in_features, num_kv_heads=num_kv_heads, is_causal=is_causal, rngs=rngs, **shell)

    def attend(self, query, key, value, mask, segment_ids=None):
        return gaussian_sums(
            query, key, value, mask=mask, pattern=self.sees, query_segment_ids=segment_ids, key_segment_ids=segment_ids,
            implementation=self.implementation,
        )

    def attend_cached(self, query, key, value, mask, cache):
        at, cache = places(cache.length, query.shape[1]), append(cache, key, value, mask)
        heads = gaussian_sums(
            query, cache.key.astype(query.dtype), cache.value.astype(query.dtype), pattern=self.sees, query_positions=at,
            key_positions=jnp.arange(cache.key.shape[1])[None], implementation=self.implementation,
        )
        return poisoned(heads, cache), cache


@precision.promoting
def gaussian_sums(
    query: Float[Array, "B T N H"], key: Float[Array, "B S K H"], value: Float[Array, "B S K V"], **options
) -> Float[Array, "B T N V"]:
    """sum_s exp(-|q_t - k_s|^2 / (2 sqrt(H))) v_s over the keys that the options of `softmax.attention` show; memory O(T + S).

    The key's norm is a bias of the softmax; its normaliser and the query's norm are a factor of what it gives.
    """
    scale, groups = query.shape[3] ** -0.5, query.shape[2] // key.shape[2]
    half_norm = lambda x: 0.5 * scale * jnp.sum(jnp.square(precision.wide(x)), axis=-1)
    bias = -jnp.repeat(half_norm(key), groups, axis=2).swapaxes(1, 2)[:, :, None]  # [B, N, 1, S]
    means, log_sums = softmax.attention(query, key, value, bias=bias, scale=scale, return_lse=True, **options)
    return (means * jnp.exp(log_sums - half_norm(query))[..., None]).astype(means.dtype)
