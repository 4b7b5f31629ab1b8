"""Locality-sensitive hashing (LSH) attention: a token sees the tokens that hash as it does, through sorted chunks."""

import math
import numbers
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from subquad.kernels import checks, dispatch, precision
from subquad.kernels.axes import KeyMask, Positions
from subquad.kernels.lsh import reference, xla

Reach = Literal["bucket", "chunk", "ring"]
Buckets = Int[Array, "B R T N"]


def hash_buckets(
    vectors: Float[Array, "B T N H"],
    rotations: Float[Array, "N H R F"] | Float[Array, "1 H R F"],
    *,
    factors: tuple[int, ...] | None = None,
    num_rotations: Int[Array, "B"] | Int[Array, "B T"] | None = None,
    implementation: dispatch.Implementation | None = None,
) -> Buckets:
    """The bucket of each vector in each of R rounds of angular hashing: the nearest of 2 F random directions.

        h(x) = argmax([x R; -x R]),   2 F buckets                                                  (section 2, LSH)

    With `factors` (n_1, n_2, ...) a round has n_1 n_2 ... buckets for the price of n_1 + n_2 + ...: the first n_1 / 2
    columns give the lowest digit h_1, the next n_2 / 2 the second, and the bucket is h_1 + n_1 h_2 + ...

    Cost: time O(R T N H F), memory O(R T N).

    Args:
        vectors: what is hashed; only the direction counts. No gradient passes.
        rotations: independent normal numbers, per head or for all heads.
        factors: even numbers whose sum is 2 F. None: one factor, 2 F.
        num_rotations: how many columns each sample or token uses, the first ones, 1 <= n <= F: it then has 2 n buckets,
            numbered 0..n-1 and F..F+n-1. None: all. One factor only.
        implementation: None takes the best that can run here.
    Returns: int32 [B, R, T, N], below the product of the factors.
    Raises:
        TypeError: arrays of integers.
        ValueError: shapes that do not fit, axes of 0; factors that are odd or do not sum to 2 F.
        NotImplementedError: an implementation that does not exist here.
    Numerics: products in float32 at the highest precision, because a bucket is a decision.
    Example:
        >>> hash_buckets(jnp.array([1.0, -1.0]).reshape(1, 2, 1, 1), jnp.ones((1, 1, 1, 1))).ravel().tolist()
        [0, 1]

    Source: Andoni et al., Practical and Optimal LSH for Angular Distance, 2015, arXiv 1509.02897; Kitaev et al., Reformer,
        ICLR 2020, arXiv 2001.04451, section 2. The factors are those of the authors' implementation.
    """
    owner = "lsh.hash_buckets"
    checks.floating(owner, vectors=vectors, rotations=rotations)
    checks.shape(owner, "vectors", vectors, "B T N H", "Flatten the batch axes.")
    batch, length, heads, features = vectors.shape
    checks.shape(owner, "rotations", rotations, "N H R F", "Draw them for these heads.", N=(heads, 1), H=features)
    columns = rotations.shape[-1]
    factors = (2 * columns,) if factors is None else tuple(factors)
    if any(factor < 2 or factor % 2 for factor in factors) or sum(factors) != 2 * columns:
        raise ValueError(
            f"{owner}: factors must be even and sum to 2 F = {2 * columns}, got {factors}. Draw other rotations."
        )
    if num_rotations is not None:
        if len(factors) > 1 or num_rotations.shape not in ((batch,), (batch, length)):
            raise ValueError(
                f"{owner}: num_rotations must have shape [B] = ({batch},) or [B, T] = ({batch}, {length}) and one factor, got "
                f"{num_rotations.shape} with {len(factors)} factors. Leave it None."
            )
        num_rotations = jnp.broadcast_to(num_rotations.reshape(batch, -1), (batch, length)).astype(jnp.int32)
    return dispatch.run(
        owner, dispatch.implementations("hash_buckets", xla, reference), implementation,
        jax.lax.stop_gradient(vectors), jax.lax.stop_gradient(rotations), factors, num_rotations,
    )  # fmt: skip


def attention(
    query_key: Float[Array, "B T N H"],
    value: Float[Array, "B T N V"],
    buckets: Buckets,
    *,
    num_buckets: int,
    chunk_size: int,
    chunks_before: int = 1,
    chunks_after: int = 0,
    mask: KeyMask | None = None,
    segment_ids: Positions | None = None,
    is_causal: bool = False,
    scale: float | Float[Array, ""] | None = None,
    reach: Reach = "bucket",
    correct_duplicates: bool = True,
    implementation: dispatch.Implementation | None = None,
) -> Float[Array, "B T N V"]:
    """Softmax attention of a shared query and key over the tokens that share a bucket in at least one round.

        y_i = sum_{j in P_i} exp(scale q_i . k_j - z_i) v_j,   k_j = q_j / |q_j|                    (eqs. 2, 6)
        P_i = union over rounds r of {j : h_r(q_i) = h_r(q_j)} and {j : j in reach of i in round r}  (eqs. 4, 6, 7)
        reach: floor(s_i / m) - before <= floor(s_j / m) <= floor(s_i / m) + after                       (eqs. 5, 7)

    s_i is the place of token i after a stable sort by bucket and position, m the chunk size, and z_i makes the weights sum
    to 1. A key reached in N_ij rounds counts once: the rounds, each a softmax over its chunks, weigh it by 1 / N_ij and are
    summed by their normalisers (eqs. 9-12). A token does not see itself, unless it sees no other: then y_i = v_i.

    Cost: time O(R T m (1 + before + after) (H + V + R)) and one sort, memory O(T (H + V) + R T), the backward pass
        included: the weights are computed again there.
    Differs from the paper: N_ij counts the rounds in which j is in reach, not only in the same bucket, so that every key
        counts exactly once; the two are equal where no bucket outgrows its chunks. "Does not see itself" is exact rather
        than a logit of -100,000. There is nothing before the first chunk of a round and nothing after its last.

    Args:
        query_key: queries, and keys before their normalisation. A key of length 0 stays 0.
        value: V may differ from H.
        buckets: from `hash_buckets`, 0..num_buckets-1.
        num_buckets: number of bucket names in use or not, for the sort.
        chunk_size: tokens m of a chunk of the sorted sequence; T need not be a multiple.
        chunks_before, chunks_after: chunks that a chunk sees beside its own. The paper's are 1 and 0.
        mask: key padding [B, 1, 1, T], True = attend. Padding is sorted behind all tokens, so that neither it nor its
            amount moves a chunk; its rows are 0.
        segment_ids: int, [B, T] or [1, T]: of sequences that are packed into one. Tokens of different segments do not see
            each other. They are sorted by segment first, and chunks begin anew with each, so that every segment gives what it
            gives alone. A chunk then visits one more on each side.
        is_causal: a token sees no later token. The sort and the chunks are made of all tokens either way.
        scale: multiplies q_i . k_j. None: 1 / sqrt(H). The authors' code has 1.
        reach: "bucket" is the paper's. "chunk" lets a token see everything in the reach of its chunk, whatever its
            bucket. "ring" is that with the chunks of all rounds in one ring, so that the first chunk of a round also sees
            the last chunk of the round before it: what Hugging Face's and lucidrains' implementations do.
        correct_duplicates: False leaves the factor 1 / N_ij out, as these implementations do by default.
        implementation: None takes the best that can run here.
    Returns: [B, T, N, V] in the dtype of value.
    Raises:
        TypeError: mask is not boolean, buckets are not integers, other arrays or the scale are no numbers with a fraction.
        ValueError: shapes that do not fit, axes of 0, sizes out of range, an unknown reach, a ring with correct_duplicates or
            segment_ids.
        NotImplementedError: an implementation that does not exist here.
    Numerics: logits, softmax and sums in float32; Triton rounds the normalised keys to the dtype of the queries. From round to
        round a token's log-sum-exp is one float32, whose rounding is in its weights where several keys are equally near: an
        error of 2e-5 at logits of 1e3, 3e-3 at 1e5.
    Example:
        >>> x, value = jnp.ones((1, 3, 1, 4)), jnp.array([1.0, 3.0, 5.0]).reshape(1, 3, 1, 1)
        >>> buckets = jnp.array([0, 1, 0]).reshape(1, 1, 3, 1)
        >>> attention(x, value, buckets, num_buckets=2, chunk_size=4).ravel().tolist()
        [5.0, 3.0, 1.0]

    Source: Kitaev et al., Reformer: The Efficient Transformer, ICLR 2020, arXiv 2001.04451, section 2 and appendix A.
    """
    owner = "lsh.attention"
    _check_tokens(owner, "query_key", query_key, value, "buckets", buckets, mask)
    checks.at_least(owner, "num_buckets", num_buckets, 1, "Count those of lsh.hash_buckets.")
    checks.at_least(owner, "chunk_size", chunk_size, 1, "Count tokens.")
    checks.at_least(owner, "chunks_before", chunks_before, 0, "0 is the chunk alone.")
    checks.at_least(owner, "chunks_after", chunks_after, 0, "0 is the chunk alone.")
    if reach not in get_args(Reach):
        raise ValueError(f"{owner}: reach must be a known word, got {reach!r}. {dispatch.nearest(reach, get_args(Reach))}")
    if reach == "ring" and correct_duplicates:
        raise ValueError(
            f"{owner}: correct_duplicates must be False with reach='ring', where a key has no round of its own, got True. "
            "Use reach='chunk'."
        )
    if segment_ids is not None:
        if reach == "ring":
            raise ValueError(
                f"{owner}: segment_ids must be None with reach='ring', which goes through all tokens, got some. "
                "Use reach='chunk'."
            )
        batch, length = query_key.shape[:2]
        segment_ids = checks.row(owner, "segment_ids", segment_ids, batch, length)
        segment_ids = jnp.broadcast_to(segment_ids, (batch, length))
    layout = reference.Layout(
        num_buckets=int(num_buckets),
        chunk_size=int(min(chunk_size, query_key.shape[1])),
        before=int(chunks_before),
        after=int(chunks_after),
        is_causal=bool(is_causal),
        reach=reach,
        correct_duplicates=bool(correct_duplicates),
        has_segments=segment_ids is not None,
    )
    scale = _scale_of(owner, scale, query_key.shape[-1])
    query_key, value = checks.hide(mask, query_key, value)
    return dispatch.run(
        owner, dispatch.implementations("attention", xla, reference), implementation,
        layout, query_key, value, buckets, mask, segment_ids, scale,
    )  # fmt: skip


def extend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S N H"],
    value: Float[Array, "B S N V"],
    query_buckets: Buckets,
    key_buckets: Int[Array, "B R S N"],
    *,
    start: int | Int[Array, ""] | Int[Array, "B"],
    mask: KeyMask | None = None,
    scale: float | Float[Array, ""] | None = None,
    correct_duplicates: bool = True,
    implementation: dispatch.Implementation | None = None,
) -> Float[Array, "B T N V"]:
    """Attention of T new tokens to all earlier tokens that share a bucket with them: `attention` without its chunks.

        y_i = sum_{j in P_i} exp(scale q_i . k_j - z_i) v_j,   P_i = {j < i : h_r(q_i) = h_r(q_j) in some round r}  (eq. 6)

    A token that sees no other sees itself. A sorted chunk needs the whole sequence; a cache does not have it, and needs no
    chunks either: nothing is ever out of reach.

    Cost: time O(T S N (H + V + R)), memory O(S) per tile of queries, the backward pass included.

    Args:
        query: of the new tokens, which are also in the cache.
        key: the normalised keys of all tokens, in the order of their positions: `normalize(query)[0]`.
        value: of all tokens.
        query_buckets, key_buckets: from `hash_buckets`.
        start: the place in the cache of the first new token, the same for all samples or one for each.
        mask: True = attend; False for empty places and padding. A padded query gives 0.
        scale, correct_duplicates, implementation: as in `attention`.
    Returns: [B, T, N, V] in the dtype of value.
    Raises: as `attention`.
    Numerics: softmax in float32.
    Example:
        >>> x, buckets = jnp.ones((1, 3, 1, 4)), jnp.array([0, 1, 0]).reshape(1, 1, 3, 1)
        >>> value = jnp.array([1.0, 3.0, 5.0]).reshape(1, 3, 1, 1)
        >>> extend(x[:, 2:], x, value, buckets[:, :, 2:], buckets, start=2).ravel().tolist()
        [1.0]

    Source: Kitaev et al., 2020, arXiv 2001.04451, eq. 6.
    """
    owner = "lsh.extend"
    _check_tokens(owner, "key", key, value, "key_buckets", key_buckets, mask)
    checks.floating(owner, query=query)
    (batch, _, heads, features), rounds = key.shape, key_buckets.shape[1]
    checks.shape(owner, "query", query, "B T N H", "Take it from the tokens of the cache.", B=batch, N=heads, H=features)
    _check_buckets(owner, "query_buckets", query_buckets, query, R=rounds)
    if jnp.shape(start) not in ((), (query.shape[0],)) or not jnp.issubdtype(jnp.result_type(start), jnp.integer):
        raise ValueError(
            f"{owner}: start must be an integer, or one for each of {query.shape[0]} samples, got {jnp.result_type(start)} of "
            f"shape {jnp.shape(start)}. Count the tokens before."
        )
    scale = _scale_of(owner, scale, query.shape[-1])
    if mask is not None:
        own = jnp.reshape(start, (-1, 1, 1, 1)) + jnp.arange(query.shape[1])[None, None, None]  # [B|1, 1, 1, T]
        real = jnp.take_along_axis(jnp.broadcast_to(mask, (len(query), *mask.shape[1:])), own, axis=3, mode="clip")
        (query,), (key, value) = checks.hide(real, query), checks.hide(mask, key, value)
    return dispatch.run(
        owner, dispatch.implementations("extend", xla, reference), implementation,
        query, key, value, query_buckets, key_buckets, start, mask, scale, correct_duplicates,
    )  # fmt: skip


@precision.promoting
def normalize(query: Float[Array, "*B H"]) -> tuple[Float[Array, "*B H"], Float[Array, "*B"]]:
    """The keys q / |q| of queries, in their dtype, and 1 / |q| in float32; both 0, without gradient, where q is 0."""
    gain = reference.inverse_norm(query)
    return (query * gain[..., None]).astype(query.dtype), gain


def _scale_of(owner: str, scale, features: int):
    """The factor of the logits: a number or a scalar array."""
    if scale is None:
        return 1 / math.sqrt(features)
    if isinstance(scale, numbers.Real):
        return scale
    checks.floating(owner, scale=scale)
    if jnp.shape(scale):
        raise ValueError(f"{owner}: scale must be a number or a scalar array, got shape {jnp.shape(scale)}. Scale the query.")
    return scale


def _check_tokens(owner: str, name: str, keys, value, name_of_buckets: str, buckets, mask) -> None:
    checks.floating(owner, **{name: keys}, value=value)
    checks.shape(owner, name, keys, "B T N H", "Flatten the batch axes.")
    batch, length, heads, _ = keys.shape
    instead = "Every token has a query, a key and a value."
    checks.shape(owner, "value", value, "B T N V", instead, B=batch, T=length, N=heads)
    _check_buckets(owner, name_of_buckets, buckets, keys)
    checks.key_padding(owner, mask, batch, length, "Buckets decide the rest.")


def _check_buckets(owner: str, name: str, buckets, tokens, **rounds) -> None:
    checks.integers(owner, **{name: buckets})
    batch, length, heads, _ = tokens.shape
    checks.shape(owner, name, buckets, "B R T N", "Use lsh.hash_buckets.", B=batch, T=length, N=heads, **rounds)
