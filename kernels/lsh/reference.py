"""LSH attention as its definition: dense, O(T^2)."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from subquad.kernels import precision
from subquad.kernels.softmax import online

# Of query, gain of the keys, value, buckets and segments, and of what attention returns.
AXES = dict(arrays=("b t n h", "b t n", "b t n v", "b r t n", "b t"), outputs="b t n v", shared=())


class Layout(NamedTuple):
    """Everything static about a call of `lsh.attention`."""

    num_buckets: int
    chunk_size: int
    before: int
    after: int
    is_causal: bool
    reach: str
    correct_duplicates: bool
    has_segments: bool


def hash_buckets(vectors, rotations, factors, num_rotations):
    """See `lsh.hash_buckets`."""
    rotations = precision.wide(jnp.broadcast_to(rotations, (vectors.shape[2], *rotations.shape[1:])))
    rotated = jnp.einsum("btnh,nhrf->brtnf", precision.wide(vectors), rotations, precision=jax.lax.Precision.HIGHEST)
    if num_rotations is not None:
        used = jnp.arange(rotated.shape[-1]) < num_rotations[:, None, :, None, None]
        rotated = jnp.where(used, rotated, 0)
    bucket, unit, column = 0, 1, 0
    for factor in factors:
        part = rotated[..., column : column + factor // 2]
        bucket += unit * jnp.argmax(jnp.concatenate([part, -part], axis=-1), axis=-1)
        unit, column = unit * factor, column + factor // 2
    return bucket.astype(jnp.int32)


@precision.full
def attention(layout, query_key, value, buckets, mask, segment_ids, scale):
    """See `lsh.attention`."""
    batch, length, heads, _ = query_key.shape
    real = jnp.ones((batch, 1, length), bool) if mask is None else jnp.broadcast_to(mask[:, 0], (batch, 1, length))
    segments = jnp.zeros((batch, length), int) if segment_ids is None else segment_ids
    together = segments[:, None, :, None] == segments[:, None, None, :]
    buckets = rearrange(buckets, "b r t n -> r b n t")
    at = jnp.arange(length)

    def chunk_of(buckets):
        """Of each token: how many of its segment come before it, in chunks."""
        own, other = buckets[..., :, None], buckets[..., None, :]
        before = (other < own) | (other == own) & (at < at[:, None])
        return (before & together & real[:, :, None]).sum(-1) // layout.chunk_size

    chunks = [chunk_of(names) for names in buckets]
    counts = jnp.zeros((batch, heads, length, length), jnp.int32)
    per_round = math.ceil(length / layout.chunk_size)
    rounds = len(chunks)
    for r, (names, chunk) in enumerate(zip(buckets, chunks, strict=True)):
        offset = chunk[..., None, :] - chunk[..., :, None]
        reached = (-layout.before <= offset) & (offset <= layout.after) & together
        if layout.reach == "bucket":
            reached &= names[..., None, :] == names[..., :, None]
        if layout.reach != "ring":
            counts += reached
            continue
        for other in range(rounds):
            offset = (other - r) * per_round + chunks[other][..., None, :] - chunk[..., :, None]
            for step in range(-layout.before, layout.after + 1):
                counts += (offset - step) % (rounds * per_round) == 0
    if layout.correct_duplicates:
        counts = jnp.minimum(counts, 1)

    query, wide_value = precision.wide(query_key), precision.wide(value)
    key = query * inverse_norm(query)[..., None]
    visible = at[:, None] > at if layout.is_causal else at[:, None] != at
    outputs = _softmax(query, key, wide_value, wide_value, counts * visible, real, real, scale)
    return outputs.astype(value.dtype)


@precision.full
def extend(query, key, value, query_buckets, key_buckets, start, mask, scale, correct_duplicates):
    """See `lsh.extend`."""
    batch, length = query.shape[:2]
    places = key.shape[1]
    real = jnp.ones((batch, 1, places), bool) if mask is None else jnp.broadcast_to(mask[:, 0], (batch, 1, places))
    same = query_buckets[:, :, :, None] == key_buckets[:, :, None]
    counts = rearrange(same.sum(1), "b t s n -> b n t s")
    if correct_duplicates:
        counts = jnp.minimum(counts, 1)
    own = jnp.reshape(start, (-1, 1)) + jnp.arange(length)[None]  # the place in the cache of each new token, [B|1, T]
    counts = counts * (own[:, None, :, None] > jnp.arange(places)[None, None, None])
    key, wide_value = precision.wide(key), precision.wide(value)
    own_value = jnp.take_along_axis(wide_value, own[..., None, None], axis=1, mode="clip")
    real_query = jnp.take_along_axis(real, own[:, None], axis=2, mode="clip")
    return _softmax(precision.wide(query), key, wide_value, own_value, counts, real_query, real, scale).astype(value.dtype)


def inverse_norm(query):
    """1 / |q|, and 0 (with a gradient of 0) where q is 0; at least float32."""
    square = jnp.sum(precision.wide(query) ** 2, axis=-1)
    return jnp.where(square > 0, jax.lax.rsqrt(jnp.where(square > 0, square, 1)), 0)


def _softmax(query, key, value, own_value, counts, real_query, real_key, scale):
    """Softmax over keys that weigh `counts` [B, N, T, S]; the own value where a real query sees nothing."""
    counts = jnp.where(real_key[:, :, None, :] & real_query[:, :, :, None], counts, 0)
    weights, lse = online.counted(online.rounded(scale * jnp.einsum("btnh,bsnh->bnts", query, key)), counts)
    alone = rearrange(real_query & jnp.isneginf(lse), "b n t -> b t n 1")
    return jnp.where(alone, own_value, jnp.einsum("bnts,bsnv->btnv", weights, value))
