"""Linformer: softmax attention to a fixed number of learned mixtures of the keys."""

from typing import Any, Literal, Unpack, get_args

import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from subquad.kernels import precision, softmax
from subquad.kernels.axes import KeyMask
from subquad.zoo.base import Attention, Shell, Support
from subquad.zoo.checks import check_length, check_sizes, check_word, refuse

Sharing = Literal["none", "headwise", "key_value", "layerwise"]


class LinformerProjection(nnx.Module):
    """The matrices E and F that mix S keys and values into M of each: k'_m = sum_s E_sm k_s, v'_m = sum_s F_sm v_s.

    One module given to many layers is one set of parameters: the paper's layerwise sharing.

    Args:
        max_length: rows of E and F; S tokens use the first S of them.
        num_landmarks: columns M.
        num_heads: a pair of matrices for each of so many heads. None: all heads share them.
        share_key_value: F is E.
        param_dtype: dtype of the parameters.
        rngs: `rngs.params()` draws them, with variance 1 / max_length.
    Example:
        >>> shared = LinformerProjection(512, 64, rngs=nnx.Rngs(0))
        >>> layers = [
        ...     LinformerAttention(4, 32, sharing="layerwise", projection=shared, rngs=nnx.Rngs(i)) for i in range(3)]
        >>> layers[2](layers[0](jnp.ones((2, 100, 32)))).shape
        (2, 100, 32)
    """

    def __init__(
        self,
        max_length: int,
        num_landmarks: int = 256,
        *,
        num_heads: int | None = None,
        share_key_value: bool = True,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        heads = {} if num_heads is None else dict(num_heads=num_heads)
        check_sizes("LinformerProjection", max_length=max_length, num_landmarks=num_landmarks, **heads)
        self.max_length, self.num_landmarks, self.num_heads = max_length, num_landmarks, num_heads
        shape = (max_length, num_landmarks) if num_heads is None else (num_heads, max_length, num_landmarks)

        def draw():
            return nnx.Param(nnx.initializers.normal(max_length**-0.5)(rngs.params(), shape, param_dtype))

        self.key = draw()
        self.value = None if share_key_value else draw()

    @precision.full
    def __call__(
        self, key: Float[Array, "B S N H"], value: Float[Array, "B S N V"], mask: KeyMask | None
    ) -> tuple[Float[Array, "B M N H"], Float[Array, "B M N V"]]:
        """The M mixtures of S <= max_length keys and of their values; those of padding count as 0."""
        mixed = []
        for inputs, matrix in ((key, self.key), (value, self.key if self.value is None else self.value)):
            if mask is not None:
                inputs = jnp.where(mask[:, 0, 0, :, None, None], inputs, 0)
            # Cast first: on the CPU a sum of bfloat16 products is either bfloat16 or not implemented.
            rows = matrix[..., : inputs.shape[1], :].astype(jnp.float32)
            if self.num_heads is None:
                # Tokens first, the rest on one axis: else XLA on a CPU transposes the inputs, at the cost of the product.
                tokens = rearrange(inputs.astype(jnp.float32), "b s n h -> s (b n h)")
                sums = jnp.einsum("sm,sk->mk", rows, tokens)
                sums = rearrange(sums, "m (b n h) -> b m n h", b=inputs.shape[0], n=inputs.shape[2])
            else:
                sums = jnp.einsum("bsnh,nsm->bmnh", inputs.astype(jnp.float32), rows)
            mixed.append(sums.astype(inputs.dtype))
        return mixed[0], mixed[1]


class LinformerAttention(Attention):
    """Softmax attention over M learned mixtures of the keys, whatever their number.

        y_t = sum_m softmax_m(q_t . k'_m / sqrt(H)) v'_m,   k' = E^T k,  v' = F^T v                            (eq. 7)

    Cost: time O((T + S) M N H), memory O(T + M); no extension: every mixture contains every token.
    Differs from the paper: padding tokens are set to 0 before they are mixed, so that neither they nor their number
        change a result; shorter sequences use the first rows of E and F. The paper has one length and no padding. E and
        F start with variance 1 / max_length, so that mixtures start as large as keys are; its proof draws with 1 / M.
        With `rotary_base`, not in the paper, queries and keys are rotated by their positions before keys are mixed.

    Args:
        num_heads: query heads N; must divide qkv_features.
        in_features: features D of the inputs.
        max_length: largest number S of keys; E and F have so many rows. With layerwise sharing, that of `projection`.
        num_landmarks: mixtures M, the paper's k. None: 256; with layerwise sharing, those of `projection`.
        sharing: of E and F. "none": a pair for every head; "headwise": one pair; "key_value": E = F, for all heads;
            "layerwise": one matrix for all layers, which is `projection`.
        projection: the module that the layers share with layerwise sharing; else None.
        is_causal: must be False: a mixture holds tokens of the future.
        shell: see `Attention`.
    Call:
        inputs_q: [*B, T, D].  inputs_kv: [*B, S, D].  mask: True = attend; key padding only, [*B, 1, 1, S].
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters; fully masked rows hold that of 0.
    Raises: ValueError: sizes that do not divide; more than max_length keys; is_causal; a pairwise mask; an unknown
        sharing; a projection without layerwise sharing, or none with it.
    Numerics: mixtures and softmax are summed in float32; agrees with the reference to 1e-5 (float32), 2e-2 (bfloat16).
    Example:
        >>> layer = LinformerAttention(4, 64, max_length=512, num_landmarks=32, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 100, 64))).shape
        (2, 100, 64)

    Source: Wang et al., Linformer: Self-Attention with Linear Complexity, 2020, arXiv 2006.04768.
    """

    supports = Support(
        cost="T", causal=False, cross=True, extend=False, rotary=True,
        mixes_all="each of its keys is a mixture of all tokens of the sequence",
    )

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        max_length: int | None = None,
        num_landmarks: int | None = None,
        sharing: Sharing = "headwise",
        projection: LinformerProjection | None = None,
        is_causal: bool = False,
        rngs: nnx.Rngs,
        **shell: Unpack[Shell],
    ):
        super().__init__(num_heads, in_features, is_causal=is_causal, rngs=rngs, **shell)
        owner = type(self).__name__
        check_word(owner, "sharing", sharing, get_args(Sharing))
        if sharing == "layerwise":
            if not isinstance(projection, LinformerProjection):
                refuse(owner, "projection", repr(projection), "be a LinformerProjection with sharing='layerwise'",
                       "Build one and give it to every layer.")
            for name, size in (("max_length", max_length), ("num_landmarks", num_landmarks)):
                if size is not None:
                    refuse(owner, name, size, "be None with sharing='layerwise'", "The projection has its own.")
            if projection.num_heads not in (None, num_heads):
                refuse(owner, "projection", f"one for {projection.num_heads} heads", f"be for all heads or {num_heads}",
                       "Leave its num_heads out.")
        elif projection is not None:
            refuse(owner, "projection", "a module", f"be None with sharing={sharing!r}", "Use sharing='layerwise'.")
        elif max_length is None:
            refuse(owner, "max_length", None, "be the largest number of tokens", "Pass max_length=...")
        else:
            projection = LinformerProjection(
                max_length, 256 if num_landmarks is None else num_landmarks,
                num_heads=num_heads if sharing == "none" else None, share_key_value=sharing == "key_value",
                param_dtype=self.param_dtype, rngs=rngs,
            )
        self.projection = projection

    def attend(self, query, key, value, mask):
        check_length(type(self).__name__, "inputs_kv", key.shape[1], self.projection.max_length)
        key, value = self.projection(key, value, mask)
        return softmax.attention(query, key, value, implementation=self.implementation)
