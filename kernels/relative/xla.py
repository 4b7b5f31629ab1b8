"""Relative attention in tiles: a running maximum forward, scores recomputed backward.

One tile is C_q queries by C_k keys. Its distances are a band of C_q + C_k neighbours in the table of relative keys, so
the position scores are one product with that band, [C_q, C_q + C_k], whose row a is shifted by a: `_skew`.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax


class Tiles(NamedTuple):
    """How queries and keys are cut, and where the first query stands among the keys."""

    query: int
    key: int
    offset: int


# The largest array of a tile, in elements: well under the 32 MiB above which the allocator asks the system each time.
TILE_ELEMENTS = 1 << 22


def choose_tiles(heads: int, queries: int, keys: int) -> Tiles:
    """Even tiles of at most 256 x 256, smaller where `heads` (batch times heads) of them would be too large."""

    def even(length, limit):
        return -(-length // -(-length // limit))

    tile_q, tile_k = even(queries, 256), even(keys, 256)
    while heads * tile_q * (tile_q + tile_k) > TILE_ELEMENTS and max(tile_q, tile_k) > 16:
        if tile_k > tile_q:
            tile_k = even(keys, -(-tile_k // 2))
        else:
            tile_q = even(queries, -(-tile_q // 2))
    return Tiles(tile_q, tile_k, keys - queries)


def attention(query, key, value, relative_key, content_bias, position_bias, *, mask, scale):
    B, T, N, _ = query.shape
    S = key.shape[1]
    tiles = choose_tiles(B * N, T, S)
    pad_q, pad_k = -T % tiles.query, -S % tiles.key

    def biased(bias):
        precise = jnp.promote_types(query.dtype, jnp.float32)
        return _cut(((query.astype(precise) + bias) * scale).astype(query.dtype), pad_q, tiles.query)

    # Distances in descending order, from that of the last query to the first key, to that of the first query to the
    # last key. Those before 0 are of the future and hold zeros; so do those of padded queries.
    band = jnp.flip(relative_key[:S].astype(query.dtype), axis=0)
    band = rearrange(jnp.pad(band, ((pad_q, T + pad_k), (0, 0), (0, 0))), "r n h -> n r h")

    if mask is None:
        mask = jnp.ones((1, 1, 1, 1), bool)
    mask = jnp.broadcast_to(mask, (*mask.shape[:3], S))
    mask = jnp.pad(mask, ((0, 0), (0, 0), (0, pad_q if mask.shape[2] > 1 else 0), (0, pad_k)))

    out = _attend(
        tiles, biased(content_bias), biased(position_bias), _cut(key.astype(query.dtype), pad_k, tiles.key),
        _cut(value, pad_k, tiles.key), band, mask,
    )  # fmt: skip
    return rearrange(out, "i b n c v -> b (i c) n v")[:, :T]


def _cut(array, padding, size):
    array = jnp.pad(array, ((0, 0), (0, padding), (0, 0), (0, 0)))
    return rearrange(array, "b (i c) n h -> i b n c h", c=size)


def _skew(scores, keys):
    """By falling distance [..., C_q, C_q + C_k] -> by key [..., C_q, C_k]: out[a, b] = scores[a, C_q - 1 - a + b]."""
    rows, width = scores.shape[-2:]
    flat = scores.reshape(*scores.shape[:-2], rows * width)
    flat = lax.slice_in_dim(flat, rows - 1, rows - 1 + rows * (width - 1), axis=-1)
    return flat.reshape(*scores.shape[:-2], rows, width - 1)[..., :keys]


def _unskew(scores):
    """The transpose of `_skew`: [..., C_q, C_k] -> [..., C_q, C_q + C_k]."""
    rows, keys = scores.shape[-2:]
    batch = [(0, 0)] * (scores.ndim - 2)
    flat = jnp.pad(scores, [*batch, (0, 0), (0, rows - 1)]).reshape(*scores.shape[:-2], -1)
    return jnp.pad(flat, [*batch, (rows - 1, 1)]).reshape(*scores.shape[:-2], rows, rows + keys)


def _dot(equation, a, b):
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))


def _band_start(tiles, counts, i, j):
    return (counts[0] - 1 - i) * tiles.query + j * tiles.key


def _band_slice(tiles, counts, band, i, j):
    return lax.dynamic_slice_in_dim(band, _band_start(tiles, counts, i, j), tiles.query + tiles.key, axis=1)


def _scores(tiles, counts, content, position, key, band, mask, i, j):
    """The scores of tile (i, j), [B, N, C_q, C_k]; -inf where the query may not see the key."""
    at_q = tiles.offset + i * tiles.query + jnp.arange(tiles.query)
    at_k = j * tiles.key + jnp.arange(tiles.key)
    seen = lax.dynamic_slice_in_dim(mask, j * tiles.key, tiles.key, axis=3)
    if mask.shape[2] > 1:
        seen = lax.dynamic_slice_in_dim(seen, i * tiles.query, tiles.query, axis=2)
    near = _band_slice(tiles, counts, band, i, j)
    scores = _dot("bnqh,bnkh->bnqk", content, key) + _skew(_dot("bnqh,nrh->bnqr", position, near), tiles.key)
    return jnp.where(seen & (at_k <= at_q[:, None]), scores, -jnp.inf)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(tiles, content, position, key, value, band, mask):
    return _forward(tiles, content, position, key, value, band, mask)[0]


def _forward(tiles, content, position, key, value, band, mask):
    counts = content.shape[0], key.shape[0]
    shape = content.shape[1:4]
    precise = jnp.promote_types(content.dtype, jnp.float32)

    def query_tile(xs):
        i, content, position = xs

        def key_tile(carry, xs):
            top, total, out = carry
            j, key, value = xs
            scores = _scores(tiles, counts, content, position, key, band, mask, i, j)
            new_top = jnp.maximum(top, scores.max(-1))
            base = jnp.where(new_top == -jnp.inf, 0.0, new_top)
            weights = jnp.exp(scores - base[..., None])
            shrink = jnp.exp(top - base)
            out = out * shrink[..., None] + _dot("bnqk,bnkv->bnqv", weights.astype(value.dtype), value)
            return (new_top, total * shrink + weights.sum(-1), out), None

        empty = (jnp.full(shape, -jnp.inf, precise), jnp.zeros(shape, precise),
                 jnp.zeros((*shape, value.shape[-1]), precise))  # fmt: skip
        (top, total, out), _ = lax.scan(key_tile, empty, (jnp.arange(counts[1]), key, value))
        some = total > 0
        total = jnp.where(some, total, 1.0)
        return (out / total[..., None]).astype(value.dtype), jnp.where(some, top, 0.0) + jnp.log(total)

    return lax.map(query_tile, (jnp.arange(counts[0]), content, position))


def _forward_saving(tiles, content, position, key, value, band, mask):
    out, lse = _forward(tiles, content, position, key, value, band, mask)
    return out, (content, position, key, value, band, mask, out, lse)


def _backward(tiles, saved, d_out):
    content, position, key, value, band, mask, out, lse = saved
    counts = content.shape[0], key.shape[0]
    precise = jnp.promote_types(content.dtype, jnp.float32)

    def query_tile(carry, xs):
        d_key, d_value, d_band = carry
        i, content, position, out, lse, d_out = xs
        inner = (out.astype(precise) * d_out.astype(precise)).sum(-1)

        def key_tile(carry, xs):
            d_content, d_position, d_band = carry
            j, key, value, d_key, d_value = xs
            weights = jnp.exp(_scores(tiles, counts, content, position, key, band, mask, i, j) - lse[..., None])
            d_weights = _dot("bnqv,bnkv->bnqk", d_out, value)
            d_scores = (weights * (d_weights - inner[..., None])).astype(content.dtype)
            d_by_distance = _unskew(d_scores)
            d_value += _dot("bnqk,bnqv->bnkv", weights.astype(d_out.dtype), d_out)
            d_key += _dot("bnqk,bnqh->bnkh", d_scores, content)
            d_content += _dot("bnqk,bnkh->bnqh", d_scores, key)
            near = _band_slice(tiles, counts, band, i, j)
            d_position += _dot("bnqr,nrh->bnqh", d_by_distance, near)
            d_near = _band_slice(tiles, counts, d_band, i, j) + _dot("bnqr,bnqh->nrh", d_by_distance, position)
            d_band = lax.dynamic_update_slice_in_dim(d_band, d_near, _band_start(tiles, counts, i, j), axis=1)
            return (d_content, d_position, d_band), (d_key, d_value)

        empty = jnp.zeros(content.shape, precise)
        (d_content, d_position, d_band), (d_key, d_value) = lax.scan(
            key_tile, (empty, empty, d_band), (jnp.arange(counts[1]), key, value, d_key, d_value)
        )
        return (d_key, d_value, d_band), (d_content.astype(content.dtype), d_position.astype(position.dtype))

    empty = tuple(jnp.zeros(x.shape, precise) for x in (key, value, band))
    (d_key, d_value, d_band), (d_content, d_position) = lax.scan(
        query_tile, empty, (jnp.arange(counts[0]), content, position, out, lse, d_out)
    )
    return (
        d_content, d_position, d_key.astype(key.dtype), d_value.astype(value.dtype), d_band.astype(band.dtype), None,
    )  # fmt: skip


_attend.defvjp(_forward_saving, _backward)
