"""Perceiver: latents read the tokens, attend to themselves in a network of their own, and are read by the tokens."""

from typing import Unpack

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from subquad.kernels import precision, softmax
from subquad.zoo.base import Attention, Shell, Support
from subquad.zoo.checks import check_sizes, refuse
from subquad.zoo.padding import any_key
from subquad.zoo.projection import projection


class LatentBlock(nnx.Module):
    """A residual block of latents, norms first: z <- z + Multihead(LN z, keys),  z <- z + W_2 gelu(W_1 LN z).

    Args:
        features: of the latents.
        heads: how many heads, and the features of each.
        is_self: keys and values are of the normalised latents; else they are given.
        shell: the words of `Shell` that its maps go by.
    """

    def __init__(self, features: int, heads: tuple[int, int], *, is_self: bool, shell: Shell, rngs: nnx.Rngs):
        dtypes = {word: shell[word] for word in ("dtype", "param_dtype") if word in shell}
        self.norm, self.mlp_norm = (nnx.LayerNorm(features, **dtypes, rngs=rngs) for _ in range(2))
        self.query = projection(shell, features, heads, rngs=rngs)
        self.key, self.value = (projection(shell, features, heads, rngs=rngs) if is_self else None for _ in range(2))
        self.out = projection(shell, heads, features, axis=(-2, -1), rngs=rngs)
        self.inner, self.outer = (projection(shell, features, features, rngs=rngs) for _ in range(2))
        self.implementation = shell.get("implementation")

    def __call__(self, latents: Float[Array, "B L Z"], key=None, value=None, mask=None) -> Float[Array, "B L Z"]:
        latents = self.attend(latents, key, value, mask)
        return latents + self.outer(nnx.gelu(self.inner(self.mlp_norm(latents))))

    def attend(self, latents, key=None, value=None, mask=None):
        """The first half."""
        hidden = self.norm(latents)
        if self.key is not None:
            key, value = self.key(hidden), self.value(hidden)
        heads = softmax.attention(
            self.query(hidden).astype(key.dtype), key, value, mask=mask, implementation=self.implementation)
        return latents + self.out(heads)


class PerceiverAttention(Attention):
    """Attention by way of L latents, which a network of their own works on between reading the tokens and being read by them.

        y_t = Multihead(x_t, LN z),   z = (f_n . ... . f_1)^R (g(z_0, x))                      (Perceiver IO, section 3.1)
        g(z, x) = h + MLP(LN h),  h = z + Multihead(LN z, x);    f_i(z) = h + MLP(LN h),  h = z + Multihead(LN z, LN z)

    z_0 is learned. The tokens are the output queries, so that there are as many outputs as inputs.

    Cost: time O((T + S) L N H + R n L^2 Z), memory O(T + S + n L Z); no extension: the latents gather from the whole sequence.
    Differs from the paper: norm, residual and network of inputs and outputs belong to the block around the layer: in one with
        norms first, tokens are normalised as there. There, output queries may be anything, and 8 to 48 layers of latents are
        the whole model; here one mixer has a few. Perceiver AR (arXiv 2202.07765), whose latents are the last
        tokens, is a model: `zoo.PerceiverAR`. Section numbers are from memory.

    Args:
        num_heads: heads N with which latents read and are read; must divide qkv_features. The paper has 1 here.
        in_features: features D of the inputs.
        num_latents: latents L.
        latent_features: their features Z. None: in_features.
        latent_heads: heads with which latents attend to themselves; must divide latent_features. None: num_heads.
        num_layers: n, blocks in which they do.
        num_repeats: R, how often these blocks follow on each other with the same weights.
        is_causal: must be False: the latents gather from the whole sequence.
        shell: see `Attention`.
    Call:
        inputs_q: [*B, T, D].  inputs_kv: [*B, S, D].  mask: True = attend; key padding only, [*B, 1, 1, S].
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters; fully masked rows hold that of 0.
    Raises: ValueError: sizes that do not divide or are not positive; is_causal; a pairwise mask.
    Numerics: softmax and norms in float32; agrees with the reference to 1e-5 (float32), 2e-2 (bfloat16).
    Example:
        >>> layer = PerceiverAttention(4, 64, num_latents=16, latent_features=32, num_layers=2, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 100, 64))).shape
        (2, 100, 64)

    Source: Jaegle et al., Perceiver, ICML 2021, arXiv 2103.03206, and Perceiver IO, ICLR 2022, arXiv 2107.14795.
    """

    supports = Support(
        cost="T", causal=False, cross=True, extend=False, mixes_all="its latents gather from the whole sequence"
    )

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        num_latents: int = 128,
        latent_features: int | None = None,
        latent_heads: int | None = None,
        num_layers: int = 1,
        num_repeats: int = 1,
        is_causal: bool = False,
        rngs: nnx.Rngs,
        **shell: Unpack[Shell],
    ):
        super().__init__(num_heads, in_features, is_causal=is_causal, rngs=rngs, **shell)
        features = in_features if latent_features is None else latent_features
        latent_heads = num_heads if latent_heads is None else latent_heads
        check_sizes("PerceiverAttention", num_latents=num_latents, latent_features=features, latent_heads=latent_heads,
                    num_repeats=num_repeats)  # fmt: skip
        check_sizes("PerceiverAttention", 0, num_layers=num_layers)
        if features % latent_heads:
            refuse("PerceiverAttention", "latent_heads", latent_heads, f"divide latent_features = {features}",
                   "Change one of them.")
        self.num_latents, self.num_repeats = num_latents, num_repeats
        self.latents = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (num_latents, features), self.param_dtype))
        heads, own = (num_heads, self.head_features), (latent_heads, features // latent_heads)
        block = lambda heads, is_self: LatentBlock(features, heads, is_self=is_self, shell=shell, rngs=rngs)
        self.encoder = block(heads, False)
        self.layers = nnx.List(block(own, True) for _ in range(num_layers))
        self.latent_norm = nnx.LayerNorm(features, dtype=self.dtype, param_dtype=self.param_dtype, rngs=rngs)
        self.latent_key, self.latent_value = (projection(shell, features, heads, rngs=rngs) for _ in range(2))

    def attend(self, query, key, value, mask):
        latents = self.encode(key, value, mask)
        return softmax.attention(
            query, self.latent_key(latents), self.latent_value(latents), mask=any_key(mask, self.num_latents),
            implementation=self.implementation,
        )

    @precision.promoting
    def encode(self, key, value, mask) -> Float[Array, "B L Z"]:
        """The latents, normalised, that tokens with these keys and values leave."""
        latents = jnp.broadcast_to(self.latents[...].astype(key.dtype), (len(key), *self.latents.shape))
        latents = self.encoder(latents, key, value, mask)
        for _ in range(self.num_repeats):
            for layer in self.layers:
                latents = layer(latents)
        return self.latent_norm(latents)
