"""Routing attention: tokens attend to the tokens that a k-means clustering puts beside them."""

import functools
from typing import Any, Literal, Unpack, get_args

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from subquad.kernels import gather, softmax
from subquad.zoo import padding
from subquad.zoo.base import Attention, Shell, Support
from subquad.zoo.buckets.rows import real_rows, rows, unrows
from subquad.zoo.cache import KVCache, RoutingCache, append, counts, poisoned, write
from subquad.zoo.checks import check_call, check_number, check_sizes, check_word, refuse
from subquad.zoo.features import Centroids, unit
from subquad.zoo.projection import in_pieces, in_rows

Selection = Literal["top", "last"]


class RoutingAttention(Attention):
    """Softmax attention within clusters: each of C centroids mu gathers queries and keys that point its way.

        y_t = mean over clusters c that took q_t of sum_s softmax_s(q_t . k_s / sqrt(H)) v_s,  s of the keys that c took
        "top":   c takes the w queries, and the w keys, with the largest mu_c . x                   (algorithm 1)
        "last":  y_t = sum_s softmax_s(..) v_s,  s of the last w tokens up to t of the cluster argmax_c mu_c . q_t
        q, k:    normalised to mean 0 and variance 1 over the features of a head; k = q where causal         (section 4.1)

    Every head has centroids of its own, which no gradient moves. `updated_centroids` says where they go next, and a model
    whose `set_attributes(moves_centroids=True)` was called writes that after every call with deterministic=False, as batch
    norms do. They are variables of the type `Centroids`, which optimisers of `nnx.Param` leave alone and checkpoints keep.

    Causal, a token sees no later token. With "top" the past it sees still leaks from the future: a later token that is
    nearer to a centroid takes the place of an earlier one. "last" is strictly causal, and the same at every length.

    Cost: time O(T (C + w) N H), memory O(T N (C + H)); with C = sqrt(T) clusters, and so w = T / C, it is T^1.5. One extended
        token O(S N H) after S tokens, cache O(S N H).
    Differs from the paper: a token that no cluster took has its own value, where the paper leaves it out (0); one that several
        took has the mean, where the paper adds up. The selection "last" is not the paper's. All heads route: the paper lets
        half of them attend locally, and layers beside this one can do that. Which cluster a token belongs to is what
        `extend` goes by, as "last" does; after "top" it therefore differs from the call, but not from itself, however a
        sequence is cut. Section numbers are cited from memory.

    Args:
        num_heads: heads N; must divide qkv_features.
        in_features: features D of the inputs.
        num_clusters: centroids C of each head.
        window_size: tokens w of a cluster. None, with "top" alone: the number of real tokens over C, rounded up.
        selection: "top" or "last", which needs is_causal and window_size.
        normalize: False: the mechanism takes q and k as they are projected, and clusters go by their directions.
        is_causal: a token sees itself and those before it, of its clusters; keys are the queries.
        shell: see `Attention`. With rotary_base a token is rotated before it is routed.
    Call:
        inputs_q: [*B, T, D].  mask: True = attend; key padding only, [*B, 1, 1, T].
        deterministic: False: in training, where centroids move if they may.
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters.
    Raises: ValueError: sizes that are not positive; "last" without is_causal or window_size; a mask that is not key padding.
    Numerics: scores of clusters, softmax and sums in float32; agrees with the reference to 1e-5 (float32), 2e-2 (bfloat16)
        where no rounding moves a token to another cluster.
    Example:
        >>> layer = RoutingAttention(4, 64, num_clusters=8, rngs=nnx.Rngs(0))
        >>> x = nnx.Rngs(1).params.normal((2, 100, 64))
        >>> layer(x).shape
        (2, 100, 64)
        >>> layer.centroids[...] = layer.updated_centroids(x)

    Source: Roy et al., Efficient Content-Based Sparse Attention with Routing Transformers, TACL 2021, arXiv 2003.05997.
    """

    supports = Support(
        cost="T^1.5", causal="mask", rotary=True, mixes_all="its clusters choose among the tokens of the whole sequence"
    )

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        num_clusters: int = 16,
        window_size: int | None = None,
        selection: Selection = "top",
        normalize: bool = True,
        is_causal: bool = False,
        rngs: nnx.Rngs,
        **shell: Unpack[Shell],
    ):
        super().__init__(num_heads, in_features, is_causal=is_causal, rngs=rngs, **shell)
        check_sizes("RoutingAttention", num_clusters=num_clusters)
        check_word("RoutingAttention", "selection", selection, get_args(Selection))
        if selection == "last" and window_size is None:
            refuse("RoutingAttention", "window_size", None, "be a positive integer", "Choose one.")
        if window_size is not None:
            check_sizes("RoutingAttention", window_size=window_size)
        if selection == "last" and not is_causal:
            refuse("RoutingAttention", "selection", "'last'", "be 'top' with is_causal=False", "It has no last tokens.")
        if is_causal:
            del self.key  # the paper's causal keys are its queries
        self.num_clusters, self.window_size, self.selection, self.normalize = num_clusters, window_size, selection, normalize
        self.moves_centroids = False  # see the class; `set_attributes` sets it
        drawn = jax.random.normal(rngs.params(), (num_heads, num_clusters, self.head_features), jnp.float32)
        self.centroids = Centroids(unit(drawn))

    def __call__(self, inputs_q, inputs_kv=None, inputs_v=None, *, mask=None, deterministic=None, **call):
        outputs = super().__call__(inputs_q, inputs_kv, inputs_v, mask=mask, deterministic=deterministic, **call)
        if self.moves_centroids and deterministic is False:
            self.centroids[...] = self.updated_centroids(inputs_q, mask=mask)
        return outputs

    def project(self, inputs_q, inputs_kv=None, inputs_v=None):
        prepare = functools.partial(in_pieces, standardized) if self.normalize else lambda heads: heads
        query = prepare(self.query(inputs_q))
        return query, query if self.is_causal else prepare(self.key(inputs_q)), self.value(inputs_q)

    def attend(self, query, key, value, mask):
        length = query.shape[1]
        real = real_rows(mask, query)
        centroids = self.centroids_of_rows(len(query))
        query, key, value = map(rows, (query, key, value))
        if self.selection == "last":
            clusters = jnp.where(real, in_rows(self.nearest, query, centroids), self.num_clusters)
            heads = attend_to_last(query, key, value, clusters, self.window_size, self.implementation)
        else:
            most = -(-length // self.num_clusters) if self.window_size is None else min(self.window_size, length)
            used = -(-real.sum(1) // self.num_clusters) if self.window_size is None else jnp.full(len(real), most)
            choose = lambda x, centroids, real, used: largest(self.scores(x, centroids), real, most, used)
            lists = [in_rows(choose, x, centroids, real, used) for x in ((query,) if self.is_causal else (query, key))]
            attend = lambda *rows: attend_within(*rows, self.is_causal, self.implementation)
            heads = in_rows(attend, query, key, value, lists[0], lists[-1])
        return unrows(heads, self.num_heads)

    def centroids_of_rows(self, batch: int) -> Float[Array, "BN C H"]:
        return jnp.tile(self.centroids[...], (batch, 1, 1))

    def scores(self, rows: Float[Array, "R T 1 H"], centroids: Float[Array, "R C H"]) -> Float[Array, "R C T"]:
        """mu . x of every centroid and token. No gradient passes."""
        rows = jax.lax.stop_gradient(rows[:, :, 0].astype(jnp.float32))
        rows = rows if self.normalize else unit(rows)
        return jnp.einsum("rth,rch->rct", rows, centroids, precision="highest")

    def nearest(self, rows: Float[Array, "R T 1 H"], centroids: Float[Array, "R C H"]) -> Int[Array, "R T"]:
        """The centroid with the largest score."""
        return self.scores(rows, centroids).argmax(1)

    def nearest_of_heads(self, heads: Float[Array, "B T N H"]) -> Int[Array, "B T N"]:
        found = in_rows(self.nearest, rows(heads), self.centroids_of_rows(len(heads)))
        return rearrange(found, "(b n) t -> b t n", n=self.num_heads)

    def updated_centroids(
        self, inputs: Float[Array, "*B T D"], *, mask: Bool[Array, "*B 1 1 T"] | None = None, decay: float = 0.999,
        normalize: bool = True,
    ) -> Float[Array, "N C H"]:
        """Where the centroids move with these inputs of the layer. The layer is unchanged until the caller writes them into it:

            layer.centroids[...] = layer.updated_centroids(inputs)

        mu_c <- decay mu_c + (1 - decay) / 2 (sum of q_t + sum of k_t),  of the t with argmax_c' mu_c' . x_t = c   (section 4.1)

        Args:
            inputs: as in a call; under `jax.jit`, write the result into the state that goes in and out.
            mask: key padding, which takes no part.
            decay: 0 starts from the data.
            normalize: the sum counts by its direction alone, so that large clusters do not grow larger; one without members
                stays where it is. False: the equation.
        """
        check_number("RoutingAttention", "decay", decay, "[0, 1]", "The paper's is 0.999.")
        call = check_call(self, self.num_heads, inputs, None, None, mask, None, None)
        inputs, is_real = call.inputs_q, jnp.ones(call.inputs_q.shape[:2], bool)
        if call.mask is not None:
            order = padding.real_first(call.mask, len(inputs))
            inputs, is_real = order.pack(inputs), order.mask
        heads = self.rotate(*self.project(inputs)[:2])
        total = jnp.zeros_like(self.centroids[...])
        for x in heads:
            nearest = self.nearest_of_heads(x)
            x = jax.lax.stop_gradient(x.astype(jnp.float32))
            x = x if self.normalize else unit(x)
            member = jax.nn.one_hot(jnp.where(is_real[..., None], nearest, -1), self.num_clusters, dtype=jnp.float32)
            total += jnp.einsum("btnc,btnh->nch", member, x, precision="highest") / 2
        if normalize:
            total = jnp.where((total != 0).any(-1, keepdims=True), unit(total), self.centroids[...])
        return decay * self.centroids[...] + (1 - decay) * total

    def init_cache(self, batch_size: int, max_length: int, dtype: Any = None) -> RoutingCache:
        """An empty cache; the window, where it follows the length, follows max_length."""
        tokens: KVCache = super().init_cache(batch_size, max_length, dtype)
        places = jnp.zeros((batch_size, max_length, self.num_heads), jnp.int32)
        members = jnp.zeros((batch_size, self.num_heads, self.num_clusters), jnp.int32)
        return RoutingCache(*tokens, places=places, members=members)

    def attend_cached(self, query, key, value, mask, cache):
        *cached, places, members = cache
        tokens, room = append(KVCache(*cached), key, value, mask), cache.key.shape[1]
        window = -(-room // self.num_clusters) if self.window_size is None else self.window_size
        nearest = self.nearest_of_heads(query)
        is_new = jnp.arange(query.shape[1])[None] < counts(query, mask)[:, None]
        member = jax.nn.one_hot(jnp.where(is_new[..., None], nearest, -1), self.num_clusters, dtype=jnp.int32)
        earlier = members[:, None] + jnp.cumsum(member, axis=1) - member
        rank = jnp.take_along_axis(earlier, nearest[..., None], axis=3)[..., 0]
        # A place for every token: those of a cluster in a row, and more than a window between clusters.
        at = nearest.astype(jnp.int32) * (room + window) + rank
        places = write(places, at, cache.length, mask)
        by_head = lambda x: rearrange(x, "b t n -> (b n) t")
        written = jnp.arange(room)[None, :, None] < tokens.length[:, None, None]
        heads = softmax.attention(
            *(rows(x.astype(query.dtype)) for x in (query, *tokens[:2])), is_causal=True,
            window_size=(window - 1, 0), query_positions=by_head(at),
            key_positions=by_head(jnp.where(written, places, -window)), implementation=self.implementation,
        )
        heads = unrows(heads, self.num_heads)
        return poisoned(heads, tokens), RoutingCache(*tokens, places, members + member.sum(1))


def largest(scores: Float[Array, "B C T"], real: Bool[Array, "B T"], most: int, used) -> Int[Array, "B C W"]:
    """The places of each cluster's `used` [B] largest scores of real tokens, at most `most`; T for no place."""
    length = scores.shape[2]
    score, place = jax.lax.top_k(jnp.where(real[:, None], scores, -jnp.inf), most)
    is_used = jnp.arange(most)[None, None] < jnp.reshape(used, (-1, 1, 1))
    return jnp.where(is_used & (score > -jnp.inf), place, length)


def attend_within(query, key, value, queries, keys, is_causal: bool, implementation) -> Float[Array, "B T 1 V"]:
    """Attention of the queries that each cluster lists to the keys that it lists, [B, C, W]; T is no place.

    A query in several lists has the mean, one in none its own value.
    """
    places = rearrange(queries, "b c w -> b (c w)")
    rows = jnp.take_along_axis(query, places[..., None, None], axis=1, mode="clip")
    heads: Any = gather.attention(
        rows, key, value, keys[:, None], block_size=queries.shape[2], is_causal=is_causal,
        query_positions=places if is_causal else None, correct_duplicates=False, implementation=implementation,
    )
    sample = jnp.arange(len(query))[:, None]
    into = lambda like, x: jnp.zeros(like, jnp.float32).at[sample, places].add(x, mode="drop")
    total, taken = into(value.shape, heads.astype(jnp.float32)), into((*query.shape[:2], 1, 1), 1.0)
    return jnp.where(taken > 0, (total / jnp.maximum(taken, 1)).astype(value.dtype), value)


def attend_to_last(query, key, value, clusters: Int[Array, "B T"], window: int, implementation) -> Float[Array, "B T 1 V"]:
    """Attention to the last `window` tokens of the own cluster: a sliding window over the tokens sorted by cluster."""
    order = jnp.argsort(clusters, axis=1, stable=True)
    take = lambda x, at: jnp.take_along_axis(x, at.reshape(*at.shape, *(1,) * (x.ndim - 2)), axis=1)
    ids = take(clusters, order)
    heads = softmax.attention(
        *(take(x, order) for x in (query, key, value)), is_causal=True, window_size=(window - 1, 0), query_segment_ids=ids,
        key_segment_ids=ids, implementation=implementation,
    )
    return take(heads, jnp.argsort(order, axis=1))


def standardized(heads: Float[Array, "*B H"]) -> Float[Array, "*B H"]:
    """Mean 0 and variance 1 over the features of each head: layer normalisation without scale and bias."""
    x = heads.astype(jnp.float32)
    x = x - x.mean(-1, keepdims=True)
    return (x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)).astype(heads.dtype)
