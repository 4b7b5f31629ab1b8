"""Performer: softmax attention estimated by positive orthogonal random features, in linear time."""

from typing import Literal, Unpack, get_args

from flax import nnx
from jaxtyping import Array, Float

from subquad.kernels import linear
from subquad.zoo.base import Shell, Support
from subquad.zoo.checks import check_sizes, check_word
from subquad.zoo.features import RandomFeature, RowNorm, random_projection
from subquad.zoo.kernelized.sums import FeatureAttention


class PerformerAttention(FeatureAttention):
    """FAVOR+: attention through random features phi whose products estimate a kernel.

        y_t = phi(q_t)^T sum_s phi(k_s) v_s^T / phi(q_t)^T sum_s phi(k_s),   s <= t if causal   (eq. 4, appendix B.1)
        softmax:  phi(x)_i = M^-1/2 exp(w_i . x' - |x'|^2 / 2),  x' = x / H^1/4                  (eq. 5, Lemma 1)
        relu:     phi(x)_i = M^-1/2 (max(w_i . x, 0) + 0.001)

    With the softmax kernel, numerator and denominator are unbiased estimates of those of softmax attention, and the
    error falls as 1/sqrt(M). The relu kernel estimates no softmax: it is an attention of its own.

    Cost: time O(T N M H), memory O(T N H), whatever M; one extended token O(N M H) and a cache of that size whatever came
        before.
    Differs from the paper: its implementations subtract the largest exponent over all keys, so a causal layer's past
        depends on the future; here each token has a log scale of its own and the sums a running maximum, which is
        exactly causal. They also add 1e-6 to softmax features; here features are floored at 1e-13 of the token's
        largest, and nothing is added to the denominator. Padding is left out of both sums (peers keep its keys in one).
        Features are redrawn where the caller says (`redraw`), never inside a call. Rotary positions (`rotary_base`) are
        not the paper's: query and key are rotated before the features, which estimate the kernel of the rotated ones.

    Args:
        num_heads: query heads N; must divide qkv_features.
        in_features: features D of the inputs.
        is_causal: a token sees itself and those before it.
        num_features: random features M, the same for all heads. More cost more and estimate softmax better.
        kernel: "softmax", or "relu" for the generalised kernel.
        orthogonal: draw the w_i orthogonal in blocks of H.
        row_norm: of the w_i: "chi" as of Gaussian vectors, "sqrt" all sqrt(H).
        shell: see `Attention`.
    Call:
        inputs_q: [*B, T, D].  inputs_kv: [*B, S, D].  mask: True = attend; key padding only, [*B, 1, 1, S].
        segment_ids: [T] or [*B, T]; a segment is a run of equal ids.
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters; fully masked rows hold that of 0.
    Raises: ValueError: sizes that do not divide; an unknown kernel or row_norm; a pairwise mask.
    Numerics: features and sums in float32; agrees with the reference to 1e-5 (float32), 2e-2 (bfloat16).
    Example:
        >>> layer = PerformerAttention(4, 64, num_features=32, is_causal=True, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 100, 64))).shape
        (2, 100, 64)
        >>> layer.projection[...] = layer.redraw(nnx.Rngs(1))

    Source: Choromanski et al., Rethinking Attention with Performers, ICLR 2021, arXiv 2009.14794.
    """

    supports = Support(cost="T", cross=True, segment_ids=True, rotary=True, attention_fn=True)

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        is_causal: bool = False,
        num_features: int = 256,
        kernel: Literal["softmax", "relu"] = "softmax",
        orthogonal: bool = True,
        row_norm: RowNorm = "chi",
        rngs: nnx.Rngs,
        **shell: Unpack[Shell],
    ):
        super().__init__(num_heads, in_features, is_causal=is_causal, rngs=rngs, **shell)
        owner = type(self).__name__
        check_sizes(owner, num_features=num_features)
        check_word(owner, "kernel", kernel, ("softmax", "relu"))
        check_word(owner, "row_norm", row_norm, get_args(RowNorm))
        self.num_features, self.kernel = num_features, kernel
        self.orthogonal, self.row_norm = orthogonal, row_norm
        self.projection = RandomFeature(self.redraw(rngs))

    def redraw(self, rngs: nnx.Rngs) -> Float[Array, "M H"]:
        """New random features, from `rngs.params()`. The layer is unchanged until the caller writes them into it:

            layer.projection[...] = layer.redraw(rngs)

        Between steps that is all; under `jax.jit`, write them into the state that goes in and out. A cache of `extend`
        was made with the features of its time and ends with them.
        """
        return random_projection(
            rngs.params(), self.num_features, self.head_features, orthogonal=self.orthogonal, row_norm=self.row_norm
        )

    def mix(self, query, key, value, mask, **options):
        return linear.random_feature_attention(
            query, key, value, self.projection[...], kernel=self.kernel, mask=mask, is_causal=self.is_causal,
            implementation=self.implementation, **options,
        )
