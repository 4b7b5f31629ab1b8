"""Softmax attention: every token sees every other, exactly."""

import functools
import math
from collections.abc import Callable
from typing import Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from subquad.kernels import precision, softmax
from subquad.zoo import dropout, masks
from subquad.zoo.base import Attention, Shell, Support
from subquad.zoo.checks import check_rate, refuse


class SoftmaxAttention(Attention):
    """Scaled dot-product attention with any mask, grouped heads and rotary positions.

        y_t = sum_s softmax_s(q_t . k_s / sqrt(H)) v_s,    s <= t if causal                          (eq. 1)

    Cost: time O(T^2 N H), memory O(T) (tiles with a running maximum, recomputed in the backward pass); one extended token
        O(S N H) after S tokens.
    Differs from the paper: a row that may see no key gives 0; rotary positions (`rotary_base`) and grouped heads
        (`num_kv_heads`) are later inventions and off by default, as is dropout of the weights (`dropout_rate`).

    The parameters are those of `nnx.MultiHeadAttention`: a checkpoint of one loads into the other.

    Args:
        num_heads: query heads N; must divide qkv_features.
        in_features: features D of the inputs.
        num_kv_heads: key/value heads K; must divide num_heads. None: num_heads; 1: multi-query attention.
        is_causal: a token sees those at its position and before.
        dropout_rate: probability of dropping an attention weight; `train()` and `eval()` turn it on and off, off to begin
            with. With it a call takes memory O(T S): all weights are made. `extend` drops nothing.
        broadcast_dropout: all samples and heads drop the same pairs of query and key, as in Flax; False: each its own.
        shell: see `Attention`.
    Call:
        inputs_q: [*B, T, D].  inputs_kv: [*B, S, D].  mask: [*B, N, T, S], each axis full or 1.
        positions: [T] or [*B, T]; causality and rotation compare them, so one of both must be on.  segment_ids: [T] or [*B, T].
        deterministic: without dropout; None takes what `train()` or `eval()` set.  rngs: `rngs.dropout()` draws the dropout.
        sow_weights: as in Flax, sows the weights [*B, N, T, S], before dropout; they take memory O(T S).
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters; fully masked rows are the output projection of 0.
    Raises: ValueError: sizes that do not divide; a rotary_base that is not positive; a mask or positions of another shape;
        a dropout_rate outside 0..1; dropout without rngs.
    Numerics: softmax in float32; agrees with the reference to 1e-5 (float32), 2e-2 (bfloat16).
    Example:
        >>> layer = SoftmaxAttention(4, 64, num_kv_heads=2, is_causal=True, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 100, 64))).shape
        (2, 100, 64)

    Source: Vaswani et al., Attention Is All You Need, 2017, arXiv 1706.03762.
    """

    supports = Support(
        cost="T^2", cross=True, pairwise_mask=True, segment_ids=True, positions=True, grouped=True, rotary=True,
        attention_fn=True, weights=True,
    )

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        num_kv_heads: int | None = None,
        is_causal: bool = False,
        dropout_rate: float = 0.0,
        broadcast_dropout: bool = True,
        rngs: nnx.Rngs,
        **shell: Unpack[Shell],
    ):
        super().__init__(num_heads, in_features, num_kv_heads=num_kv_heads, is_causal=is_causal, rngs=rngs, **shell)
        check_rate("SoftmaxAttention", dropout_rate)
        self.dropout_rate, self.broadcast_dropout = dropout_rate, broadcast_dropout
        self.deterministic = True  # `train()` and `eval()` set it

    def draws(self, deterministic, rngs):
        return dropout.draws(self, deterministic, rngs)

    def attend(
        self, query, key, value, mask, positions=None, segment_ids=None, dropout_rng=None,
        *, key_positions=None, bias=None, sow=None,
    ):
        """The mechanism, as in `Attention`.

        Args:
            key_positions: int [B|1, S], where they are not those of the queries.
            bias: added to the logits; each axis full or 1, of [B, N, T, S].
            sow: is given the weights [B, N, T, S] before dropout, where all of them are wanted.
        """
        if positions is not None and key_positions is None:
            if not self.is_causal and self.rotary_base is None:
                refuse("SoftmaxAttention", "positions", "an array",
                       "be None where neither causality nor rotation compares them",
                       "Pass is_causal=True or rotary_base to the constructor.")
            key_positions = positions
        if dropout_rng is not None or sow is not None:
            if self.implementation not in (None, "xla", "reference"):
                raise NotImplementedError(
                    f"SoftmaxAttention: implementation {self.implementation!r} stores no weights to drop or to sow. "
                    "Pass implementation=None, dropout_rate=0 or sow_weights=False."
                )
            if self.is_causal:
                at = [jnp.arange(x.shape[1])[None] if given is None else given
                      for x, given in ((query, positions), (key, key_positions))]
                mask = both(mask, masks.causal_mask(*at))
            if segment_ids is not None:
                mask = both(mask, masks.segment_mask(segment_ids, segment_ids))

            def on_weights(weights):
                if sow is not None:
                    sow(weights.astype(query.dtype))
                if dropout_rng is None:
                    return weights
                shape = (1, 1, *weights.shape[2:]) if self.broadcast_dropout else None  # samples and heads drop the same
                return dropout.drop(dropout_rng, self.dropout_rate, weights, shape)

            return weighted_mean(query, key, value, mask, bias, on_weights)
        return softmax.attention(
            query, key, value, mask=mask, bias=bias, is_causal=self.is_causal, query_positions=positions,
            key_positions=key_positions, query_segment_ids=segment_ids, key_segment_ids=segment_ids,
            implementation=self.implementation,
        )


@precision.full
def weighted_mean(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K V"],
    mask: Bool[Array, "_ _ _ _"] | None,
    bias: Float[Array, "_ _ _ _"] | None,
    on_weights: Callable[[Float[Array, "B N T S"]], Float[Array, "B N T S"]],
) -> Float[Array, "B T N V"]:
    """Softmax attention with all its weights at once, in float32: memory O(T S).

    Args:
        on_weights: what it returns takes the place of the weights.
    """
    groups = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x, groups, axis=2) for x in (key, value))
    product = functools.partial(jnp.einsum, preferred_element_type=np.promote_types(query.dtype, np.float32))
    logits = product("btnh,bsnh->bnts", query, key) / math.sqrt(query.shape[3])
    if bias is not None:
        logits += bias.astype(logits.dtype)
    if mask is not None:
        logits = jnp.where(mask, logits, -jnp.inf)
    # A row that sees nothing gives 0, and constants in place of its logits keep -inf - -inf out of the gradient.
    empty = jnp.isneginf(logits.max(-1, keepdims=True))
    weights = jnp.where(empty, 0.0, jax.nn.softmax(jnp.where(empty, 0.0, logits)))
    return product("bnts,bsnv->btnv", on_weights(weights).astype(value.dtype), value).astype(query.dtype)


def both(mask, other):
    """What both masks show; None shows all."""
    return other if mask is None else mask & other
