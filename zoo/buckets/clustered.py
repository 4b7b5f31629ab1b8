"""Clustered attention: one softmax for each cluster of queries, and its largest weights computed anew for each of them."""

import functools
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from subquad.kernels import gather, precision, softmax
from subquad.zoo.base import Attention, Shell, Support
from subquad.zoo.buckets.rows import real_rows, rows, unrows
from subquad.zoo.checks import check_sizes
from subquad.zoo.features import RandomFeature
from subquad.zoo.projection import in_rows


class ClusteredAttention(Attention):
    """The attention of the mean of a cluster of queries, for all of them; improved, its top keys are each query's own.

        A_c = softmax_s(mean of the q_t in c . k_s / sqrt(H)),   y_t = sum_s A_cs v_s for the cluster c of t     (section 3.2)
        improved, top_c the num_top largest of A_c, m_c their sum:                                                (section 3.3)
        y_t = m_c sum_{s in top_c} softmax_{s in top_c}(q_t . k_s / sqrt(H)) v_s + sum_{s not in top_c} A_cs v_s
        clusters: k-means of the bits sign(p_b . q_t) by their Hamming distance                                 (section 3.2.1)

    The error of A_c is bounded by the distance of a query from its mean, and `improved` is at least as close in L1.

    Cost: time O(T (C + num_top) N H + I T C P N) with C clusters, P bits and I iterations; memory O(T N (H + C + num_top)). No
        extension: clusters are of the whole sequence.
    Differs from the paper: k-means starts from queries at equal distances in the sequence, theirs from random ones; a cluster
        without queries keeps its bits. Rotary positions are not the paper's. Section numbers are cited from memory.

    Args:
        num_heads: heads N; must divide qkv_features.
        in_features: features D of the inputs.
        num_clusters: clusters C of the queries of each head.
        num_top: keys of each cluster that are weighed anew for each query; 0: none, as in the plain form.
        num_bits: random planes P, whose sides are the bits.
        num_iterations: I of k-means, at least 1.
        is_causal: must be False: a mean holds queries of the future.
        shell: see `Attention`. With rotary_base queries are rotated before they are clustered.
    Call:
        inputs_q: [*B, T, D].  mask: True = attend; key padding only, [*B, 1, 1, T].
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters; fully masked rows hold that of 0.
    Raises: ValueError: sizes that are not positive; is_causal; a mask that is not key padding.
    Numerics: bits, softmax and sums in float32; agrees with the reference to 1e-5 (float32), 2e-2 (bfloat16) where no
        rounding moves a query to another cluster.
    Example:
        >>> layer = ClusteredAttention(4, 64, num_clusters=10, num_top=8, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 100, 64))).shape
        (2, 100, 64)
        >>> layer.planes[...] = layer.redraw(nnx.Rngs(1))

    Source: Vyas et al., Fast Transformers with Clustered Attention, NeurIPS 2020, arXiv 2007.04825.
    """

    supports = Support(
        cost="T", causal=False, extend=False, rotary=True, attention_fn=True,
        mixes_all="its clusters are of the queries of the whole sequence",
    )

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        num_clusters: int = 100,
        num_top: int = 32,
        num_bits: int = 63,
        num_iterations: int = 10,
        is_causal: bool = False,
        rngs: nnx.Rngs,
        **shell: Unpack[Shell],
    ):
        super().__init__(num_heads, in_features, is_causal=is_causal, rngs=rngs, **shell)
        check_sizes("ClusteredAttention", num_clusters=num_clusters, num_bits=num_bits, num_iterations=num_iterations)
        check_sizes("ClusteredAttention", 0, num_top=num_top)
        self.num_clusters, self.num_top = num_clusters, num_top
        self.num_bits, self.num_iterations = num_bits, num_iterations
        self.planes = RandomFeature(self.redraw(rngs))

    def redraw(self, rngs: nnx.Rngs) -> Float[Array, "N P H"]:
        """New planes, from `rngs.params()`. The layer is unchanged until the caller writes them into it:

            layer.planes[...] = layer.redraw(rngs)
        """
        return jax.random.normal(rngs.params(), (self.num_heads, self.num_bits, self.head_features), jnp.float32)

    def attend(self, query, key, value, mask):
        real = real_rows(mask, query)
        clusters = self.clusters(query, real)
        options = self.num_clusters, min(self.num_top, key.shape[1]), self.implementation
        heads = in_rows(lambda *rows: attend_by_cluster(*rows, *options), *map(rows, (query, key, value)), real, clusters)
        return unrows(heads, self.num_heads)

    @precision.full
    def clusters(self, query: Float[Array, "B T N H"], real: Bool[Array, "BN T"]) -> Int[Array, "BN T"]:
        """The cluster of each query, C for padding. No gradient passes."""
        query = jax.lax.stop_gradient(query.astype(jnp.float32))
        bits = jnp.einsum("btnh,nph->bntp", query, self.planes[...]) >= 0
        bits = jnp.where(rearrange(bits, "b n t p -> (b n) t p"), 1.0, -1.0)
        count = real.sum(1, keepdims=True, dtype=jnp.int32)  # the real tokens come first
        first = (2 * jnp.arange(self.num_clusters, dtype=jnp.int32)[None] + 1) * count // (2 * self.num_clusters)
        centres = jnp.take_along_axis(bits, first[..., None], axis=1, mode="clip")

        def assigned(centres):
            # The largest product is the least distance.
            nearest = jnp.einsum("btp,bcp->btc", bits, centres).argmax(2).astype(jnp.int32)
            return jnp.where(real, nearest, self.num_clusters)

        def step(centres, _):
            sums = jnp.einsum("btc,btp->bcp", members(assigned(centres), self.num_clusters), bits)
            return jnp.where(sums == 0, centres, jnp.sign(sums)), None

        return assigned(jax.lax.scan(step, centres, None, self.num_iterations)[0])


def members(clusters: Int[Array, "B T"], count: int) -> Float[Array, "B T C"]:
    """1 where a query belongs to a cluster."""
    return jax.nn.one_hot(clusters, count, dtype=jnp.float32)


@precision.full
def attend_by_cluster(
    query, key, value, real: Bool[Array, "B T"], clusters: Int[Array, "B T"], count: int, top: int, implementation
) -> Float[Array, "B T 1 V"]:
    """Attention of the means of `count` clusters of queries [B, T, 1, H], of whose keys the `top` are weighed by each query."""
    member = members(clusters, count)
    means = jnp.einsum("btc,bth->bch", member, query[:, :, 0].astype(jnp.float32))
    means /= jnp.maximum(member.sum(1), 1)[..., None]
    means = means.astype(query.dtype)[:, :, None]
    take = lambda x: jnp.take_along_axis(x, clusters.reshape(*clusters.shape, *(1,) * (x.ndim - 2)), axis=1, mode="clip")
    of_means = functools.partial(softmax.attention, means, key, value, return_lse=True, implementation=implementation)
    if top == 0:
        return take(of_means(mask=real[:, None, None])[0])
    scores = jnp.einsum("bch,bsh->bcs", *(jax.lax.stop_gradient(x[:, :, 0].astype(jnp.float32)) for x in (means, key)))
    found, places = jax.lax.top_k(jnp.where(real[:, None], scores, -jnp.inf), top)
    places = jnp.where(found > -jnp.inf, places, key.shape[1])  # no key
    sample, row = jnp.arange(len(places))[:, None, None], jnp.arange(count)[None, :, None]
    is_rest = jnp.broadcast_to(real[:, None], scores.shape).at[sample, row, places].set(False, mode="drop")
    listed = functools.partial(
        gather.attention, key=key, value=value, correct_duplicates=False, implementation=implementation)
    _, log_top = listed(means, indices=places[:, None], return_lse=True)
    rest, log_rest = of_means(mask=is_rest[:, None])
    share = jnp.where(jnp.isneginf(log_rest), 1, jax.nn.sigmoid(log_top - jnp.where(jnp.isneginf(log_rest), 0, log_rest)))
    share = take(share)[..., None]
    own: Any = listed(query, indices=take(places)[:, None])
    return (share * own.astype(jnp.float32) + (1 - share) * take(rest).astype(jnp.float32)).astype(value.dtype)
