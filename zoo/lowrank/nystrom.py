"""Nystromformer: softmax attention by way of landmarks, means of segments of the sequence."""

from typing import Any, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from subquad.kernels import convolution, dispatch, matrix, precision, softmax
from subquad.kernels.axes import KeyMask
from subquad.zoo.base import Attention, Shell, Support
from subquad.zoo.checks import check_sizes


class NystromAttention(Attention):
    """Softmax attention through M landmarks: three small softmax matrices in the place of the large one.

        y = F A^+ B v + conv(v),   F = softmax(q k~^T / sqrt(H)), A = softmax(q~ k~^T / sqrt(H)), B = softmax(q~ k^T / sqrt(H))
        q~_m, k~_m = means of q_t, k_t over the m-th of M segments
        A^+ by `num_iterations` of Z <- Z (13 I - A Z (15 I - A Z (7 I - A Z))) / 4

    Cost: time O(T M N H + M^3 N), memory O(T M); no extension: a landmark contains tokens of the future.
    Differs from the paper: landmarks are means of real tokens, in M segments whose lengths differ by one at most; the paper
        pads to equal ones, and its code takes padding for tokens of 0. M tokens or fewer are each its own landmark, and the
        formula is kept, where the code changes to softmax. The iteration starts from each matrix's own norms; the code
        divides by a maximum over all samples, so that one changes another. Rotary positions (`rotary_base`) are not the
        paper's: query and key are rotated before their means.

    Args:
        num_heads: query heads N; must divide qkv_features.
        in_features: features D of the inputs.
        num_landmarks: M, segments of the sequence.
        num_iterations: of the pseudo-inverse. Where few do not converge (nearly equal landmarks), small directions are lost.
        conv_width: taps of the depthwise convolution of the values, one set for each head, around each token. 35 is that of
            the authors' code for Long Range Arena, 33 in their language models. None: no convolution.
        is_causal: must be False: a landmark holds tokens of the future.
        shell: see `Attention`.
    Call:
        inputs_q: [*B, T, D].  mask: True = attend; key padding only, [*B, 1, 1, T].
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters; fully masked rows hold that of 0.
    Raises: ValueError: sizes that do not divide; is_causal; a pairwise mask.
    Numerics: means, A and its inverse in float32; agrees with the reference to 1e-5 (float32), 2e-2 (bfloat16) times
        the size of the inverse. `implementation` is that of attention; the convolution is XLA's beside any but "reference".
    Example:
        >>> layer = NystromAttention(4, 64, num_landmarks=16, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 100, 64))).shape
        (2, 100, 64)

    Source: Xiong et al., Nystromformer: A Nystrom-Based Algorithm for Approximating Self-Attention, AAAI 2021,
        arXiv 2102.03902; code: mlpen/Nystromformer.
    """

    supports = Support(
        cost="T", causal=False, extend=False, rotary=True, attention_fn=True,
        mixes_all="each of its landmarks is a mean over a part of the whole sequence",
    )

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        num_landmarks: int = 64,
        num_iterations: int = 6,
        conv_width: int | None = 35,
        is_causal: bool = False,
        rngs: nnx.Rngs,
        **shell: Unpack[Shell],
    ):
        super().__init__(num_heads, in_features, is_causal=is_causal, rngs=rngs, **shell)
        width: dict[str, Any] = {} if conv_width is None else dict(conv_width=conv_width)
        check_sizes("NystromAttention", num_landmarks=num_landmarks, num_iterations=num_iterations, **width)
        self.num_landmarks, self.num_iterations = num_landmarks, num_iterations
        draw = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # as PyTorch's convolutions start
        taps = None if conv_width is None else draw(rngs.params(), (conv_width, num_heads), self.param_dtype)
        self.taps = None if taps is None else nnx.Param(taps)

    def attend(self, query, key, value, mask):
        query_landmarks, is_landmark = segment_means(query, mask, self.num_landmarks)
        key_landmarks, _ = segment_means(key, mask, self.num_landmarks)
        between = landmark_weights(query_landmarks, key_landmarks, is_landmark)
        inverse = self.invert(between)
        attention = lambda *arrays, mask: softmax.attention(*arrays, mask=mask, implementation=self.implementation)
        gathered = attention(query_landmarks.astype(key.dtype), key, value, mask=mask)
        mixed = mix(inverse, gathered)
        outputs = attention(query, key_landmarks.astype(key.dtype), mixed, mask=is_landmark[:, None, None])
        if self.taps is None:
            return outputs
        flat, taps = value.reshape(*value.shape[:2], -1), self.taps[...].astype(value.dtype)
        local = convolution.depthwise(
            flat, taps, mask=mask, implementation=dispatch.reference_or_best(self.implementation)
        )
        return outputs + local.reshape(value.shape)

    def invert(self, between: Float[Array, "B N M M"]) -> Float[Array, "B N M M"]:
        """The pseudo-inverse of the landmarks' weights."""
        return matrix.pseudo_inverse(between, iterations=self.num_iterations, implementation=self.implementation)


@precision.promoting
@precision.full
def segment_means(
    tokens: Float[Array, "B T N H"], mask: KeyMask | None, count: int
) -> tuple[Float[Array, "B M N H"], Bool[Array, "_ M"]]:
    """Means of `count` segments of each sample's real tokens, which are its first ones; and which of them there are."""
    position, segment = jnp.arange(tokens.shape[1]), jnp.arange(count)
    real = jnp.array([tokens.shape[1]]) if mask is None else mask.sum((1, 2, 3))
    used = jnp.minimum(real, count)[:, None]
    segment_of_token = jnp.where(position < real[:, None], position * used // jnp.maximum(real, 1)[:, None], -1)
    belongs = (segment_of_token[..., None] == segment).astype(jnp.float32)  # [B | 1, T, M]
    sizes = jnp.maximum(belongs.sum(1), 1)[..., None, None]
    tokens = precision.wide(tokens)
    if mask is None:
        sums = jnp.einsum("tm,btnh->bmnh", belongs[0], tokens)
    else:
        sums = jnp.einsum("btm,btnh->bmnh", belongs, tokens)
    return sums / sizes, segment < used


@precision.promoting
@precision.full
def landmark_weights(query, key, is_landmark) -> Float[Array, "B N M M"]:
    """Softmax weights of landmarks [B, M, N, H] among themselves; rows and columns of those that are none hold 0."""
    logits = jnp.einsum("bmnh,blnh->bnml", query, key) * query.shape[-1] ** -0.5
    both = (is_landmark[:, :, None] & is_landmark[:, None])[:, None]
    return jnp.where(both, jax.nn.softmax(jnp.where(is_landmark[:, None, None], logits, -1e30), axis=-1), 0)


@precision.promoting
@precision.full
def mix(inverse: Float[Array, "B N M M"], values: Float[Array, "B M N V"]) -> Float[Array, "B M N V"]:
    """An inverse of the landmarks' matrix times what each of them gathered."""
    return jnp.einsum("bnml,blnv->bmnv", inverse, values).astype(values.dtype)
