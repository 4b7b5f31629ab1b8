"""Reformer: attention among the tokens that hash alike, found by sorting."""

from typing import Any, Unpack, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from subquad.kernels import lsh
from subquad.zoo import padding
from subquad.zoo.base import Attention, Shell, Support
from subquad.zoo.cache import KVCache, ReformerCache, append, poisoned, write
from subquad.zoo.checks import check_sizes, check_word, refuse, require_extend
from subquad.zoo.features import RandomFeature

# Directions per round where the number of buckets follows the length: 2 x 64 buckets, enough for 64 chunks.
MAX_ROTATIONS = 64


class ReformerAttention(Attention):
    """Locality-sensitive hashing (LSH) attention: one projection for queries and keys, R rounds of hashing.

        y_i = sum_{j in P_i} exp(q_i . k_j / sqrt(H) - z_i) v_j,   k_j = q_j / |q_j|                (eqs. 2, 6, 8-12)
        P_i = union over rounds r of {j != i : h_r(q_i) = h_r(q_j), j in reach of i}, or {i} if that is empty
        h_r(x) = argmax([x R_r; -x R_r])                                                                (section 2)

    In reach are the tokens of a token's chunk and of `chunks_before` and `chunks_after` chunks beside it, in the order of
    bucket and position (eqs. 5, 7). A key found in several rounds counts once (N_ij of eq. 12).

    Causal, a token sees no later token, but what it sees of the past leaks from the future: tokens are sorted into chunks
    all together, so a later token can move a chunk's border and with it the past keys in reach. Train and evaluate on the
    same footing, or decode with `extend`, which is strictly causal.

    Cost: time O(R T (chunk_size H + log T)), memory O(R T + T N H), the backward pass included; one extended token
        O(S N H) after S tokens.
    Differs from the paper: N_ij counts the rounds in which j is in reach and not only in the same bucket, so every key
        counts exactly once. The number of buckets follows each sample's own length, padding not counted. `extend` has no
        chunks, which have no meaning for one token: a new token sees every cached token that shares a bucket with it in
        some round, as eq. 6 has it, with the number of buckets for max_length tokens. It therefore differs from the full
        call, whose chunks cut long buckets, but not from itself, however a sequence is cut.

    The mechanism is no `attention_fn`: queries and keys are one and the same, and there is no separate key to be given.

    Args:
        num_heads: heads N; must divide qkv_features.
        in_features: features D of the inputs.
        is_causal: a token sees itself (if it sees no other) and those before it.
        num_hashes: rounds R. More rounds miss fewer near keys, at R times the cost; the paper has 1 to 16.
        num_buckets: buckets per round: an even number, or several even factors of it (each factor hashes by itself, which
            is cheaper when there are many). None: 2 x length / chunk_size, as in the paper, at most 128.
        chunk_size: tokens m per chunk of the sorted sequence.
        chunks_before, chunks_after: chunks that a chunk sees beside its own. 1 and 0 are the paper's also where it is not
            causal; 1 and 1 let a bucket's tokens see each other across a border both ways.
        scale: multiplies q_i . k_j. None: 1 / sqrt(H). The authors' code has 1.
        reach, correct_duplicates: see `lsh.attention`. "ring" and False are what Hugging Face's implementation does.
        shell: see `Attention`. With rotary_base a token is rotated before it is hashed, so that a bucket holds what a score
            is large for.
    Call:
        inputs_q: [*B, T, D].  mask: True = attend; key padding only, [*B, 1, 1, T].
        segment_ids: [T] or [*B, T]; each segment is hashed, sorted and cut into chunks as if it were alone.
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters; rows of padding are the output projection of 0.
    Raises: ValueError: sizes that do not divide; an odd number of buckets; inputs_kv; a pairwise mask; segment_ids with
        reach="ring".
    Numerics: hashes, softmax and sums in float32; agrees with the reference to 1e-5 (float32), 2e-2 (bfloat16) where no
        rounding moves a token to another bucket.
    Example:
        >>> layer = ReformerAttention(4, 64, num_hashes=2, chunk_size=16, is_causal=True, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 100, 64))).shape
        (2, 100, 64)
        >>> layer.rotations[...] = layer.redraw(nnx.Rngs(1))

    Source: Kitaev et al., Reformer: The Efficient Transformer, ICLR 2020, arXiv 2001.04451.
    """

    supports = Support(cost="T log T", causal="mask", segment_ids=True, rotary=True)

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        is_causal: bool = False,
        num_hashes: int = 4,
        num_buckets: int | tuple[int, ...] | None = None,
        chunk_size: int = 64,
        chunks_before: int = 1,
        chunks_after: int = 0,
        scale: float | None = None,
        reach: lsh.Reach = "bucket",
        correct_duplicates: bool = True,
        rngs: nnx.Rngs,
        **shell: Unpack[Shell],
    ):
        super().__init__(num_heads, in_features, is_causal=is_causal, rngs=rngs, **shell)
        owner = type(self).__name__
        factors = (2 * MAX_ROTATIONS,) if num_buckets is None else tuple(np.atleast_1d(num_buckets).tolist())
        check_sizes(owner, num_hashes=num_hashes, chunk_size=chunk_size)
        check_sizes(owner, 0, chunks_before=chunks_before, chunks_after=chunks_after)
        if not factors or any(not isinstance(n, int) or n < 2 or n % 2 for n in factors):
            refuse(owner, "num_buckets", repr(num_buckets), "be even, or a tuple of even factors, or None",
                   "A direction and its opposite are two buckets.")
        check_word(owner, "reach", reach, get_args(lsh.Reach))
        if reach == "ring" and correct_duplicates:
            refuse(owner, "correct_duplicates", True, "be False with reach='ring'", "Use reach='chunk'.")
        del self.key  # the paper's keys are its queries
        self.num_hashes, self.factors, self.follows_length = num_hashes, factors, num_buckets is None
        self.chunk_size, self.chunks_before, self.chunks_after = chunk_size, chunks_before, chunks_after
        self.scale, self.reach, self.correct_duplicates = scale, reach, correct_duplicates
        self.rotations = RandomFeature(self.redraw(rngs))

    def redraw(self, rngs: nnx.Rngs) -> Float[Array, "N H R F"]:
        """New hash rotations, from `rngs.params()`. The layer is unchanged until the caller writes them into it:

            layer.rotations[...] = layer.redraw(rngs)

        A cache of `extend` was hashed with the rotations of its time and ends with them.
        """
        shape = (self.num_heads, self.head_features, self.num_hashes, sum(self.factors) // 2)
        return jax.random.normal(rngs.params(), shape, jnp.float32)

    def project(self, inputs_q, inputs_kv=None, inputs_v=None):
        query = self.query(inputs_q)
        return query, query, self.value(inputs_q)

    def attend(self, query, key, value, mask, segment_ids=None):
        lengths = query.shape[1] if mask is None else jnp.broadcast_to(mask[:, 0, 0].sum(-1), query.shape[:1])
        if segment_ids is not None:
            if self.reach == "ring":
                refuse(type(self).__name__, "segment_ids", "an array", "be None with reach='ring'", "Use reach='chunk'.")
            lengths = segment_lengths(segment_ids, mask)
        return lsh.attention(
            query, value, self.hash(query, lengths), num_buckets=int(np.prod(self.factors)), chunk_size=self.chunk_size,
            chunks_before=self.chunks_before, chunks_after=self.chunks_after, mask=mask, segment_ids=segment_ids,
            is_causal=self.is_causal, scale=self.scale, reach=self.reach, correct_duplicates=self.correct_duplicates,
            implementation=self.implementation,
        )

    def hash(
        self, query: Float[Array, "B T N H"], lengths: int | Int[Array, "B"] | Int[Array, "B T"]
    ) -> Int[Array, "B R T N"]:
        """The buckets of tokens of sequences that have so many tokens in all."""
        rotations, used = self.rotations[...], None
        if self.follows_length:
            if isinstance(lengths, int):
                rotations = rotations[..., : min(max(lengths // self.chunk_size, 1), MAX_ROTATIONS)]
            else:
                used = jnp.clip(lengths // self.chunk_size, 1, MAX_ROTATIONS)
        factors = None if self.follows_length else self.factors
        return lsh.hash_buckets(
            query, rotations, factors=factors, num_rotations=used, implementation=self.implementation
        )

    def init_cache(self, batch_size: int, max_length: int, dtype: Any = None) -> ReformerCache:
        """An empty cache; the number of buckets, where it follows the length, follows max_length."""
        require_extend(self, batch_size=batch_size, max_length=max_length)
        if self.reach != "bucket":
            refuse(type(self).__name__, "reach", repr(self.reach), "be 'bucket' for extend", "A cache has no chunks.")
        tokens = KVCache.zeros(batch_size, max_length, self.num_heads, self.head_features, self.cache_dtype(dtype))
        buckets = jnp.zeros((batch_size, self.num_hashes, max_length, self.num_heads), jnp.int32)
        return ReformerCache(*tokens, buckets)

    def attend_cached(self, query, key, value, mask, cache):
        *cached, buckets = cache
        tokens = append(KVCache(*cached), lsh.normalize(query)[0], value, mask)
        new = self.hash(query, cache.key.shape[1])
        buckets = write(buckets, new, cache.length, mask, axis=2)
        heads = lsh.extend(
            query, tokens.key.astype(query.dtype), tokens.value.astype(query.dtype), new, buckets, start=cache.length,
            scale=self.scale, correct_duplicates=self.correct_duplicates, implementation=self.implementation,
        )
        return poisoned(heads, tokens), ReformerCache(*tokens, buckets)


def segment_lengths(segment_ids: Int[Array, "B T"], mask) -> Int[Array, "B T"]:
    """How many tokens the segment of each token has, padding not counted."""
    real = padding.real(mask, segment_ids)
    segment_ids = jnp.where(real, segment_ids, jnp.iinfo(segment_ids.dtype).max)  # padding goes last

    def count(ids, real):
        ordered = jnp.sort(ids)
        return jnp.minimum(jnp.searchsorted(ordered, ids, side="right"), real.sum()) - jnp.searchsorted(ordered, ids)

    return jax.vmap(count)(segment_ids, real)
