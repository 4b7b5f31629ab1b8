"""Hedgehog: linear attention whose features are trained to give the weights of softmax attention."""

import math
from typing import Literal, Unpack, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from subquad.kernels import precision
from subquad.zoo import padding
from subquad.zoo.base import Shell, Support
from subquad.zoo.checks import check_call, check_word
from subquad.zoo.kernelized.sums import FeatureAttention
from subquad.zoo.positions import run_starts
from subquad.zoo.projection import in_pieces

Activation = Literal["softmax", "exp"]
BLOCK = 128  # queries whose weights are held at a time
SMALLEST = 1e-30  # of a product of features, so that it has a logarithm


class HedgehogAttention(FeatureAttention):
    """Linear attention with a feature map of exponentials, learned for each head, of queries and of keys.

        y_t = phi_q(q_t)^T sum_s phi_k(k_s) v_s^T / phi_q(q_t)^T sum_s phi_k(k_s),   s <= t if causal
        phi(x) = softmax([z, -z]) over its 2 H features, or exp([z, -z]),   z = W x + b                      (section 4)

    A trained softmax attention becomes this layer in two steps: `zoo.convert` keeps its projections, and `distillation_loss`
    trains W and b, which nothing else needs, until weights are much like those that softmax had. Then the model is trained on.

    Cost: time O(T N H^2), memory O(T N H); one extended token O(N H^2) and a cache of that size whatever came before.
    Differs from the paper: its text was not at hand; the equations are as others report them. It has exponentials; a softmax
        in their place is that of the known code, where the sum of a key's features is 1. Nothing is added to the denominator.
        W starts as the identity, b as 0. Rotary positions (`rotary_base`) come before the features, as in a converted model.

    Args:
        num_heads: query heads N; must divide qkv_features.
        in_features: features D of the inputs.
        num_kv_heads: key/value heads K; must divide num_heads. None: num_heads. Fewer save parameters only.
        activation: "softmax" or "exp". Exponentials of any size: a logarithm of the largest is carried beside them.
        is_causal: a token sees itself and those before it.
        shell: see `Attention`.
    Call:
        inputs_q: [*B, T, D].  inputs_kv: [*B, S, D].  mask: True = attend; key padding only, [*B, 1, 1, S].
        segment_ids: [T] or [*B, T]; a segment is a run of equal ids.
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters; fully masked rows hold that of 0.
    Raises: ValueError: sizes that do not divide; an unknown activation; a pairwise mask.
    Numerics: features and sums in float32; agrees with the reference to 1e-5 (float32), 2e-2 (bfloat16).
    Example:
        >>> layer = HedgehogAttention(4, 64, is_causal=True, rngs=nnx.Rngs(0))
        >>> x = jnp.ones((2, 100, 64))
        >>> layer(x).shape, layer.distillation_loss(x).shape
        ((2, 100, 64), ())

    Source: Zhang et al., The Hedgehog and the Porcupine: Expressive Linear Attentions with Softmax Mimicry, ICLR 2024,
        arXiv 2402.04347.
    """

    supports = Support(cost="T", cross=True, segment_ids=True, grouped=True, rotary=True)

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        num_kv_heads: int | None = None,
        activation: Activation = "softmax",
        is_causal: bool = False,
        rngs: nnx.Rngs,
        **shell: Unpack[Shell],
    ):
        super().__init__(num_heads, in_features, num_kv_heads=num_kv_heads, is_causal=is_causal, rngs=rngs, **shell)
        check_word("HedgehogAttention", "activation", activation, get_args(Activation))
        self.activation, self.num_features = activation, 2 * self.head_features
        identity = lambda heads: nnx.Param(jnp.tile(jnp.eye(self.head_features, dtype=self.param_dtype), (heads, 1, 1)))
        shift = lambda heads: nnx.Param(jnp.zeros((heads, self.head_features), self.param_dtype))
        self.query_map, self.query_shift = identity(self.num_heads), shift(self.num_heads)
        self.key_map, self.key_shift = identity(self.num_kv_heads), shift(self.num_kv_heads)

    def mix(self, query, key, value, mask, **options):
        query, key, log_scale = self._features(query, key)
        if log_scale is not None:
            log_scale = jnp.repeat(log_scale, self.num_heads // self.num_kv_heads, axis=2)
        return self.weigh(query, key, value, mask, key_log_scale=log_scale, **options)

    def _features(self, query, key):
        """Features of queries and of keys, and the logarithms of what those of keys are to be multiplied with, or None."""
        of_query, of_key = (self.query_map[...], self.query_shift[...]), (self.key_map[...], self.key_shift[...])
        of = lambda maps: lambda heads: features(heads, *maps, self.activation).astype(heads.dtype)
        log_scale = None if self.activation == "softmax" else log_largest(key, *of_key)
        return in_pieces(of(of_query), query), in_pieces(of(of_key), key), log_scale

    @precision.full
    def distillation_loss(
        self, inputs: Float[Array, "*B T D"], *, mask: Bool[Array, "*B 1 1 T"] | None = None,
        segment_ids: Int[Array, "..."] | None = None,
    ) -> Float[Array, ""]:  # fmt: skip
        """How far the weights are from those of softmax attention with the same projections (section 4).

            - mean_t sum_s p_ts log a_ts,   p_ts = softmax_s(q_t . k_s / sqrt(H)),   a_ts = w_ts / sum_s w_ts,
            w_ts = phi_q(q_t) . phi_k(k_s)

        The mean is over real queries and heads. Gradients stop at queries and keys: they reach the feature maps alone. It is
        least, the entropy of p, where both are the same.

        Cost: time O(T^2 N H), memory O(T N H) and the weights of a block of queries, as blocks are computed one by one and
            again in the backward pass.
        Args:
            inputs, mask, segment_ids: as in a call.
        Returns: float32.
        """
        call = check_call(self, self.num_heads, inputs, None, None, mask, None, segment_ids)
        order = None if call.mask is None else padding.real_first(call.mask, call.inputs_q.shape[0])
        x, segments = call.inputs_q, call.extras.get("segment_ids", jnp.zeros(call.inputs_q.shape[:2], jnp.int32))
        if order is not None:
            x, segments = order.pack(x), order.pack(segments)
        segments = jnp.cumsum(run_starts(segments), axis=1)
        is_real = jnp.ones(x.shape[:2], bool) if order is None else order.mask
        query, key = jax.lax.stop_gradient(tuple(precision.wide(heads) for heads in self.rotate(*self.project(x)[:2])))
        query_features, key_features, log_scale = self._features(query, key)
        groups, keys = self.num_heads // self.num_kv_heads, jnp.arange(x.shape[1])
        key, key_features = (jnp.repeat(heads, groups, axis=2) for heads in (key, key_features))

        @jax.checkpoint
        def of_block(block):
            query, query_features, is_row, rows, own = block
            visible = is_real[:, None, None] & (own[:, None, :, None] == segments[:, None, None])
            if self.is_causal:
                visible &= rows[0][:, None] >= keys
            visible |= rows[0][:, None] == keys  # padding sees itself, since a softmax of nothing has no gradient
            logits = jnp.einsum("btnh,bsnh->bnts", query, key) / math.sqrt(self.head_features)
            products = jnp.einsum("btnm,bsnm->bnts", query_features, key_features)
            log_weights = jnp.log(jnp.maximum(products, SMALLEST))
            if log_scale is not None:
                log_weights += jnp.repeat(log_scale, groups, axis=2).swapaxes(1, 2)[:, :, None]
            teacher, student = (
                jax.nn.log_softmax(jnp.where(visible, numbers, -jnp.inf)) for numbers in (logits, log_weights)
            )
            cross_entropy = -jnp.sum(jnp.where(visible, jnp.exp(teacher) * student, 0.0), axis=-1)
            return jnp.sum(jnp.where(is_row[:, None], cross_entropy, 0.0))

        rows = jnp.broadcast_to(keys, is_real.shape)
        blocks = (padding.in_blocks(array, BLOCK) for array in (query, query_features, is_real, rows, segments))
        total = jax.lax.map(of_block, tuple(jnp.moveaxis(array, 1, 0) for array in blocks)).sum()
        return total / (self.num_heads * jnp.maximum(is_real.sum(), 1))


@precision.promoting
def logits_of(heads: Float[Array, "*B N H"], weights: Float[Array, "N H H"], shift: Float[Array, "N H"]):
    """z = W x + b of each head, in float32 at least."""
    wide = [precision.wide(x) for x in (heads, weights, shift)]
    return jnp.einsum("...nh,nhm->...nm", *wide[:2], precision=jax.lax.Precision.HIGHEST) + wide[2]


def features(
    heads: Float[Array, "*B N H"], weights: Float[Array, "N H H"], shift: Float[Array, "N H"], activation: Activation
) -> Float[Array, "*B N 2*H"]:
    """softmax([z, -z]); of "exp" the exponentials, divided by the largest, which counts as a constant: see `log_largest`."""
    z = logits_of(heads, weights, shift)
    both = jnp.concatenate([z, -z], axis=-1)
    if activation == "softmax":
        return jax.nn.softmax(both)
    return jnp.exp(both - jax.lax.stop_gradient(both.max(-1, keepdims=True)))


def log_largest(heads, weights, shift) -> Float[Array, "*B N"]:
    """The logarithm of the largest exponential of each token."""
    return jax.lax.stop_gradient(jnp.abs(logits_of(heads, weights, shift)).max(-1))
