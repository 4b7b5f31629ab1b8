"""Differential attention: the difference of two softmax attentions, in which what both do by habit cancels."""

from typing import Unpack

import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from subquad.kernels import precision
from subquad.zoo.base import Attention, Shell, Support
from subquad.zoo.cache import append, poisoned
from subquad.zoo.checks import check_number, check_rotary, refuse
from subquad.zoo.extending import attend_to_cache


class DifferentialAttention(Attention):
    """Attention by the difference of two softmax maps: the mechanism of the Differential Transformer.

        o_t = (sum_s softmax_s(q1_t . k1_s / sqrt(H/2)) v_s) - lambda (sum_s softmax_s(q2_t . k2_s / sqrt(H/2)) v_s)    (eq. 1)
        lambda = exp(l_q1 . l_k1) - exp(l_q2 . l_k2) + lambda_init                                                  (eq. 2)
        y_t = W_o concat_n((1 - lambda_init) g * o_tn / rms(o_tn)),    s <= t if causal                              (eq. 3)

    q1 and q2 are the halves of a head's H features of the query, k1 and k2 those of the key. The four vectors l, of H/2
    features, are one for all heads, as is the gain g.

    Cost: time O(T^2 N H), memory O(T); one extended token O(S N H) after S tokens. The two maps take the products of one of
        softmax attention for the queries and keys, and twice those for the values.
    Differs from the paper: a row that may see no key gives 0. lambda_init is one number for the caller to choose; the paper
        has 0.8 - 0.6 exp(-0.3 (l - 1)) in layer l = 1, 2, ..., and finds 0.8 throughout as good. The paper has no biases
        (use_bias) and half as many heads as a Transformer of the same width. Rotary positions (`rotary_base`), off by default,
        rotate each half; its code turns neighbouring features, which permutes rows of W_q and W_k. Numbers of equations are
        as remembered.

    Args:
        num_heads: query heads N; must divide qkv_features.
        in_features: features D of the inputs.
        num_kv_heads: key/value heads K; must divide num_heads. None: num_heads.
        lambda_init: what lambda starts around, in [0, 1).
        is_causal: a token sees those at its position and before.
        shell: see `Attention`. qkv_features / num_heads = H must be even, and with rotary_base a multiple of 4.
    Call:
        inputs_q: [*B, T, D].  inputs_kv: [*B, S, D].  mask: [*B, N, T, S], each axis full or 1, for both maps.
        segment_ids: [T] or [*B, T]; tokens of different segments do not see each other.
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters; fully masked rows are the output projection of 0.
    Raises: ValueError: sizes that do not divide; an odd H; a lambda_init outside [0, 1); a mask of another shape.
    Numerics: softmax, lambda and norm in float32; agrees with the reference to 1e-5 (float32), 2e-2 (bfloat16), relative to
        the size of o: where both maps are nearly alike and lambda nearly 1, the norm makes their rounding as large as that.
    Example:
        >>> layer = DifferentialAttention(4, 64, is_causal=True, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 100, 64))).shape
        (2, 100, 64)

    Source: Ye et al., Differential Transformer, ICLR 2025, arXiv 2410.05258; code: microsoft/unilm, Diff-Transformer.
    """

    supports = Support(cost="T^2", cross=True, pairwise_mask=True, segment_ids=True, grouped=True, rotary=True)

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        num_kv_heads: int | None = None,
        lambda_init: float = 0.8,
        is_causal: bool = False,
        rngs: nnx.Rngs,
        **shell: Unpack[Shell],
    ):
        super().__init__(num_heads, in_features, num_kv_heads=num_kv_heads, is_causal=is_causal, rngs=rngs, **shell)
        owner = type(self).__name__
        if self.head_features % 2:
            refuse(owner, "num_heads", num_heads, f"leave an even number of {self.head_features * num_heads} features to each",
                   "A head's queries are two halves.")
        if self.rotary_base is not None:
            check_rotary(owner, self.supports, self.rotary_base, self.head_features // 2)
        check_number(owner, "lambda_init", lambda_init, "[0, 1)", "0.8 is the paper's of deep layers.")
        self.lambda_init = lambda_init
        draw, half = nnx.initializers.normal(0.1), self.head_features // 2
        self.lambda_query = nnx.Param(draw(rngs.params(), (2, half), self.param_dtype))
        self.lambda_key = nnx.Param(draw(rngs.params(), (2, half), self.param_dtype))
        self.norm = nnx.RMSNorm(
            self.head_features, epsilon=1e-5, dtype=self.dtype, param_dtype=self.param_dtype, rngs=rngs
        )

    def project(self, inputs_q, inputs_kv=None, inputs_v=None):
        """Query and key heads of H / 2 features, the first halves of all before the second halves; and the values."""
        query, key, value = super().project(inputs_q, inputs_kv, inputs_v)
        return halves(query), halves(key), value

    def attend(self, query, key, value, mask, segment_ids=None):
        mask = mask if mask is None or mask.shape[1] == 1 else jnp.concatenate([mask, mask], axis=1)
        return self._difference(super().attend(query, key, twice(value), mask, segment_ids=segment_ids))

    def attend_cached(self, query, key, value, mask, cache):
        start, cache = cache.length, append(cache, whole(key), value, mask)
        maps = zip(jnp.split(query, 2, axis=2), jnp.split(cache.key, 2, axis=3), strict=True)
        both = [attend_to_cache(self.sees, query, cache._replace(key=key), start, self.implementation) for query, key in maps]
        return poisoned(self._difference(jnp.concatenate(both, axis=2)), cache), cache

    def weight(self) -> Float[Array, ""]:
        """lambda."""
        query, key = (x[...].astype(jnp.float32) for x in (self.lambda_query, self.lambda_key))
        first, second = jnp.exp(jnp.sum(query * key, axis=1))
        return first - second + self.lambda_init

    @precision.promoting
    def _difference(self, both: Float[Array, "B T M H"]) -> Float[Array, "B T N H"]:
        """The heads of the output, of what the first maps of all M / 2 heads gave and then the second maps."""
        first, second = jnp.split(both, 2, axis=2)
        return (1 - self.lambda_init) * self.norm(first - self.weight().astype(first.dtype) * second)


def halves(heads: Float[Array, "B T N H"]) -> Float[Array, "B T 2*N H//2"]:
    """The first halves of all heads, then the second."""
    return rearrange(heads, "b t n (i h) -> b t (i n) h", i=2)


def whole(heads: Float[Array, "B T M H"]) -> Float[Array, "B T M//2 2*H"]:
    """The heads that these are the halves of."""
    return rearrange(heads, "b t (i n) h -> b t n (i h)", i=2)


def twice(value: Float[Array, "B S K H"]) -> Float[Array, "B S 2*K H"]:
    """The values for the first maps of all heads and for the second maps."""
    return jnp.concatenate([value, value], axis=2)
