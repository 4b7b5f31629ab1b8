"""Entmax attention: weights that are exactly 0 where logits are small, as sparse as each head learns to be."""

from typing import Literal, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from subquad.kernels import entmax
from subquad.zoo import masks
from subquad.zoo.base import Attention, Shell, Support
from subquad.zoo.cache import append, places, poisoned
from subquad.zoo.checks import refuse
from subquad.zoo.dense.softmax import both


class EntmaxAttention(Attention):
    """Scaled dot-product attention with alpha-entmax in place of softmax.

        y_t = sum_s p_ts v_s,    p_t = entmax_alpha(q_t . k_s / sqrt(H)),    s <= t if causal
        entmax_alpha(z)_s = [(alpha - 1) z_s - tau]_+^(1 / (alpha - 1)),   tau such that they sum to 1          (section 3)
        alpha_n = 1 + sigmoid(a_n) for each head n, where it is learned                                        (section 3.2)

    alpha = 1 is softmax, 2 sparsemax.

    Cost: time O(T S N H) and a search for tau in each row, memory O(T + S) and a row of tiles; one extended token O(S N H)
        after S tokens.
    Differs from the paper: tau is searched for at every alpha, with none of its special cases by sorting. A row that may see
        no key gives 0. Rotary positions (`rotary_base`) and grouped heads (`num_kv_heads`) are later inventions.

    Args:
        num_heads: query heads N; must divide qkv_features.
        in_features: features D of the inputs.
        num_kv_heads: key/value heads K; must divide num_heads. None: num_heads.
        alpha: at least 1, the same in all heads; "learned": a parameter of each head, between 1 and 2, of normal a at first.
        is_causal: a token sees those at its position and before.
        shell: see `Attention`.
    Call:
        inputs_q: [*B, T, D].  inputs_kv: [*B, S, D].  mask: [*B, N, T, S], each axis full or 1.
        positions: [T] or [*B, T]; causality and rotation compare them, so one of both must be on.
        segment_ids: [T] or [*B, T]; with them a mask of all pairs is made, of T x T bytes.
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters; fully masked rows are the output projection of 0.
    Raises: ValueError: sizes that do not divide; an alpha below 1; a mask or positions of another shape.
    Numerics: entmax in float32; agrees with the reference to 1e-5 (float32), 2e-2 (bfloat16); gradients by the paper's
        formulas, that of alpha too.
    Example:
        >>> layer = EntmaxAttention(4, 64, alpha="learned", is_causal=True, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 100, 64))).shape
        (2, 100, 64)

    Source: Correia, Niculae and Martins, Adaptively Sparse Transformers, EMNLP 2019, arXiv 1909.00015; Peters, Niculae and
        Martins, Sparse Sequence-to-Sequence Models, ACL 2019, arXiv 1905.05702.
    """

    supports = Support(
        cost="T^2", cross=True, pairwise_mask=True, segment_ids=True, positions=True, grouped=True, rotary=True,
        attention_fn=True,
    )

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        num_kv_heads: int | None = None,
        alpha: float | Literal["learned"] = 1.5,
        is_causal: bool = False,
        rngs: nnx.Rngs,
        **shell: Unpack[Shell],
    ):
        super().__init__(num_heads, in_features, num_kv_heads=num_kv_heads, is_causal=is_causal, rngs=rngs, **shell)
        is_learned = isinstance(alpha, str) and alpha == "learned"
        if not is_learned and (not isinstance(alpha, int | float) or not 1 <= alpha < float("inf")):
            refuse(type(self).__name__, "alpha", repr(alpha), "be a number of at least 1, or 'learned'",
                   "1 is softmax, 2 sparsemax.")
        self.alpha = alpha
        if is_learned:
            numbers = jax.random.normal(rngs.params(), (num_heads,), jnp.float32)
            self.alpha_logits = nnx.Param(numbers.astype(self.param_dtype))

    def alphas(self) -> float | Float[Array, "N"]:
        """alpha, or that of each head."""
        return float(self.alpha) if self.alpha != "learned" else 1 + nnx.sigmoid(self.alpha_logits[...].astype(jnp.float32))

    def attend(self, query, key, value, mask, positions=None, segment_ids=None, key_positions=None):
        if positions is not None and not self.is_causal and self.rotary_base is None:
            refuse(type(self).__name__, "positions", "an array", "be None where neither causality nor rotation compares them",
                   "Pass is_causal=True or rotary_base to the constructor.")
        if segment_ids is not None:
            mask = both(mask, masks.segment_mask(segment_ids, segment_ids))
        at_keys = positions if key_positions is None else key_positions
        positions, at_keys = (positions, at_keys) if self.is_causal else (None, None)
        return entmax.attention(
            query, key, value, self.alphas(), mask=mask, is_causal=self.is_causal, query_positions=positions,
            key_positions=at_keys, implementation=self.implementation,
        )

    def attend_cached(self, query, key, value, mask, cache):
        at, cache = places(cache.length, query.shape[1]), append(cache, key, value, mask)
        heads = entmax.attention(
            query, cache.key.astype(query.dtype), cache.value.astype(query.dtype), self.alphas(), is_causal=True,
            query_positions=at, key_positions=jnp.arange(cache.key.shape[1])[None], implementation=self.implementation,
        )
        return poisoned(heads, cache), cache
