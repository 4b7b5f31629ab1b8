"""SMYRF: queries and keys sorted apart, by hashes that put a query beside the keys it has large products with."""

import functools
from typing import Unpack

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float

from subquad.kernels import precision, softmax
from subquad.kernels.patterns import SameBlock
from subquad.zoo import padding
from subquad.zoo.base import Attention, Shell, Support
from subquad.zoo.buckets.rows import rows, unrows
from subquad.zoo.checks import check_sizes
from subquad.zoo.features import RandomFeature
from subquad.zoo.projection import in_rows


class SmyrfAttention(Attention):
    """Softmax attention within clusters of C queries and C keys, in R rounds of asymmetric hashing.

        y_t = sum_r exp(z_rt - z_t) sum_s softmax_s(q_t . k_s / sqrt(H)) v_s,   s of the cluster of t in round r
        z_rt = log sum_s exp(q_t . k_s / sqrt(H)),  z_t = log sum_r exp(z_rt)
        cluster of a query: floor(its rank by a_r . F(q) / C),  of a key: floor(its rank by a_r . G(k) / C)
        F(q) = [q; 0; sqrt(M^2 - |q|^2)],  G(k) = [k; sqrt(M^2 - |k|^2); 0],  M^2 = max |q|^2 + max |k|^2

    |F(q) - G(k)|^2 = 2 M^2 - 2 q . k: near in the larger space is large as a product, and what is near projects to near
    places in the order of both. Clusters are equally large, whatever the data.

    Cost: time O(R T (C H + log T) N), memory O(T N H (R + 1)); no extension: the order is that of the whole sequence.
    Differs from the paper: ranks go by a . x, as its code has it, where the text has floor((a . x + b) / r) with ties. Lengths
        need not be multiples of C: the last cluster is smaller. A key found in several rounds counts as often, as there.
        1 / sqrt(H), which its code leaves to the caller. Rotary positions are not the paper's. The equations are from its code
        and from memory.

    Args:
        num_heads: heads N; must divide qkv_features.
        in_features: features D of the inputs.
        num_hashes: rounds R. More rounds miss fewer large products, at R times the cost.
        cluster_size: queries, and keys, C of a cluster.
        is_causal: must be False: a token's rank depends on all others.
        shell: see `Attention`. With rotary_base tokens are rotated before they are hashed.
    Call:
        inputs_q: [*B, T, D].  mask: True = attend; key padding only, [*B, 1, 1, T].
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters; fully masked rows hold that of 0.
    Raises: ValueError: sizes that are not positive; is_causal; a mask that is not key padding.
    Numerics: hashes, softmax and sums in float32; agrees with the reference to 1e-5 (float32), 2e-2 (bfloat16) where no
        rounding moves a token to another cluster.
    Example:
        >>> layer = SmyrfAttention(4, 64, num_hashes=2, cluster_size=16, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 100, 64))).shape
        (2, 100, 64)
        >>> layer.directions[...] = layer.redraw(nnx.Rngs(1))

    Source: Daras et al., SMYRF: Efficient Attention using Asymmetric Clustering, NeurIPS 2020, arXiv 2010.05315.
    """

    supports = Support(
        cost="T log T", causal=False, extend=False, rotary=True, attention_fn=True,
        mixes_all="its clusters are cut from the order of all tokens",
    )

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        num_hashes: int = 4,
        cluster_size: int = 64,
        is_causal: bool = False,
        rngs: nnx.Rngs,
        **shell: Unpack[Shell],
    ):
        super().__init__(num_heads, in_features, is_causal=is_causal, rngs=rngs, **shell)
        check_sizes("SmyrfAttention", num_hashes=num_hashes, cluster_size=cluster_size)
        self.num_hashes, self.cluster_size = num_hashes, cluster_size
        self.directions = RandomFeature(self.redraw(rngs))

    def redraw(self, rngs: nnx.Rngs) -> Float[Array, "R N _"]:
        """New directions a of every round and head, from `rngs.params()`. The layer is unchanged until the caller writes them:

            layer.directions[...] = layer.redraw(rngs)
        """
        return jax.random.normal(rngs.params(), (self.num_hashes, self.num_heads, self.head_features + 2), jnp.float32)

    def attend(self, query, key, value, mask):
        real = padding.real(mask, query)
        places = hashes(query, key, real, self.directions[...])
        real = jnp.repeat(real, self.num_heads, axis=0)
        attend = lambda *arrays: attend_by_rank(*arrays, self.cluster_size, self.implementation)
        heads = in_rows(attend, *map(rows, (query, key, value)), real, *places)
        return unrows(heads, self.num_heads)


def hashes(query, key, real: Bool[Array, "B T"], directions: Float[Array, "R N _"]):
    """a . F(q) and a . G(k) of every round, each [(B N), R, T]. No gradient passes."""
    query, key = (jax.lax.stop_gradient(x.astype(jnp.float32)) for x in (query, key))
    squares = [jnp.where(real[..., None], jnp.square(x).sum(-1), 0) for x in (query, key)]
    most = sum(x.max(1, keepdims=True) for x in squares)
    rest = [jnp.sqrt(jnp.maximum(most - x, 0)) for x in squares]
    dot = lambda x: jnp.einsum("btnh,rnh->rbnt", x, directions[..., :-2], precision="highest")
    at = lambda x, column: jnp.einsum("btn,rn->rbnt", x, directions[..., column], precision="highest")
    return tuple(rearrange(x, "r b n t -> (b n) r t") for x in (dot(query) + at(rest[0], -1), dot(key) + at(rest[1], -2)))


def attend_by_rank(query, key, value, real: Bool[Array, "B T"], of_queries, of_keys, size: int, implementation):
    """Attention of queries to the keys whose rank lies in the same `size` places, merged over rounds.

    Args:
        query, key, value: [B, T, 1, H].
        of_queries, of_keys: [B, R, T], what ranks them in each round; padding goes last.
    """
    take = lambda x, at: jnp.take_along_axis(x, at.reshape(*at.shape, *(1,) * (x.ndim - 2)), axis=1)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def round_(merged, places):
        queries, keys = (jnp.argsort(jnp.where(real, x, jnp.inf), axis=1, stable=True) for x in places)
        found = softmax.attention(
            take(query, queries), take(key, keys), take(value, keys), mask=take(real, keys)[:, None, None],
            pattern=SameBlock(size), return_lse=True, implementation=implementation,
        )
        back = jnp.argsort(queries, axis=1)
        out, lse = (take(x, back) for x in found)
        out, lse = softmax.merge([merged[0], precision.wide(out)], [merged[1], lse])
        return (out, lse), None

    dtype = jnp.promote_types(value.dtype, jnp.float32)
    start = jnp.zeros(value.shape, dtype), jnp.full(query.shape[:3], -jnp.inf, dtype)
    (heads, _), _ = jax.lax.scan(round_, start, (of_queries.swapaxes(0, 1), of_keys.swapaxes(0, 1)))
    return heads.astype(value.dtype)
