"""Induced set attention: tokens attend to a few learned points that have attended to the tokens."""

from typing import Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from subquad.kernels import precision, softmax
from subquad.zoo.base import Attention, Shell, Support
from subquad.zoo.checks import check_sizes
from subquad.zoo.padding import any_key
from subquad.zoo.projection import projection


class InducedSetAttention(Attention):
    """The attention of Set Transformer's ISAB: M inducing points gather from the set, and its elements from these.

        y_t = Multihead(x_t, h, h),   h = MAB(i, x)                                                       (section 3.1, eq. 9)
        MAB(i, x) = LN(a + relu(W a + b)),   a = LN(i + Multihead(i, x, x))                                     (eqs. 6 and 7)

    ISAB(x) = MAB(x, h) is this layer in a `Block(norm_order="post")`, whose residual, norms and network are those of the outer
    MAB. No position and no order matters: the layer is permutation equivariant.

    Cost: time O((T + S) M N H), memory O(T + S); no extension: the points gather from the whole set.
    Differs from the paper: residual, norms and network of the outer MAB belong to the block around the layer. The authors' code
        divides logits by sqrt(D) in place of sqrt(H), adds the projected query in place of the query, has no map behind its
        heads, and no norms by default. Points start normal with variance 1, as large as an element after a norm. Section and
        equation numbers are cited from memory.

    Args:
        num_heads: heads N; must divide qkv_features.
        in_features: features D of the inputs, and of the points.
        num_inducing: points M.
        is_causal: must be False: the points gather from the whole set.
        shell: see `Attention`.
    Call:
        inputs_q: [*B, T, D].  inputs_kv: [*B, S, D].  mask: True = attend; key padding only, [*B, 1, 1, S].
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters; fully masked rows hold that of 0.
    Raises: ValueError: sizes that do not divide; is_causal; a pairwise mask.
    Numerics: softmax and norms in float32; agrees with the reference to 1e-5 (float32), 2e-2 (bfloat16).
    Example:
        >>> layer = InducedSetAttention(4, 64, num_inducing=16, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 100, 64))).shape
        (2, 100, 64)

    Source: Lee et al., Set Transformer, ICML 2019, arXiv 1810.00825; code: juho-lee/set_transformer.
    """

    supports = Support(
        cost="T", causal=False, cross=True, extend=False, mixes_all="its points gather from the whole set"
    )

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        num_inducing: int = 32,
        is_causal: bool = False,
        rngs: nnx.Rngs,
        **shell: Unpack[Shell],
    ):
        super().__init__(num_heads, in_features, is_causal=is_causal, rngs=rngs, **shell)
        check_sizes("InducedSetAttention", num_inducing=num_inducing)
        heads, dtypes = (num_heads, self.head_features), dict(dtype=self.dtype, param_dtype=self.param_dtype)
        self.num_inducing = num_inducing
        self.inducing = nnx.Param(nnx.initializers.normal(1.0)(rngs.params(), (num_inducing, in_features), self.param_dtype))
        self.induce_query = projection(shell, in_features, heads, rngs=rngs)
        self.induce_out = projection(shell, heads, in_features, axis=(-2, -1), rngs=rngs)
        self.induce_norm = nnx.LayerNorm(in_features, **dtypes, rngs=rngs)
        self.induce_mlp = projection(shell, in_features, in_features, rngs=rngs)
        self.induced_norm = nnx.LayerNorm(in_features, **dtypes, rngs=rngs)
        self.induced_key, self.induced_value = (projection(shell, in_features, heads, rngs=rngs) for _ in range(2))

    def attend(self, query, key, value, mask):
        induced = self.induce(key, value, mask)
        return softmax.attention(
            query, self.induced_key(induced), self.induced_value(induced), mask=any_key(mask, self.num_inducing),
            implementation=self.implementation,
        )

    @precision.promoting
    def induce(self, key, value, mask) -> Float[Array, "B M D"]:
        """h, what the points become, of the keys and values of the set."""
        points = self.inducing[...][None]
        query = self.induce_query(points).astype(key.dtype)
        query = jnp.broadcast_to(query, (len(key), *query.shape[1:]))
        gathered = self.induce_out(softmax.attention(query, key, value, mask=mask, implementation=self.implementation))
        hidden = self.induce_norm(points.astype(gathered.dtype) + gathered)
        return self.induced_norm(hidden + jax.nn.relu(self.induce_mlp(hidden)))
