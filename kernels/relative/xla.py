"""Relative attention in tiles: those of softmax attention, with the scores by distance added to the logits.

One tile is t queries by s keys. Its distances are a band of t + s neighbours in the table of relative keys, so the position
scores are one product with that band, [t, t + s], whose row a is shifted by a: `skew`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from subquad.kernels import precision
from subquad.kernels.operation import operation
from subquad.kernels.patterns import CAUSAL
from subquad.kernels.relative.reference import SAVED
from subquad.kernels.softmax import online, parts
from subquad.kernels.softmax import xla as tiled
from subquad.kernels.softmax.plan import Plan, plan_of
from subquad.kernels.softmax.sets import KeySet, Visible
from subquad.kernels.softmax.xla import add_at, add_beside, cut, cut_keys, cut_queries, join_keys, join_queries


def attention(query, key, value, relative_key, content_bias, position_bias, visible: Visible, scale):
    def biased(bias):
        precise = jnp.promote_types(query.dtype, jnp.float32)
        return ((query.astype(precise) + bias) * scale).astype(query.dtype)

    key, relative_key = (x.astype(query.dtype) for x in (key, relative_key[: key.shape[1]]))
    return attend((), biased(content_bias), biased(position_bias), key, value, relative_key, visible)


def planned(content, key, value, visible: Visible) -> tuple[Plan, Visible]:
    """The tiles of a call, and what is visible in it: the last query stands at the last key."""
    queries, keys = content.shape[1], key.shape[1]
    positions = (np.arange(first, keys, dtype=np.int32)[None] for first in (keys - queries, 0))
    visible = Visible(*positions, *visible[2:])
    return plan_of(content, key, value, KeySet(CAUSAL, visible)), visible


def band_of(plan: Plan, relative_key):
    """Relative keys [S, N, H] by falling distance, [1, R, 1, N, H], from the last query of the tiles to their first key on.

    Those before 0 are of the future and hold zeros; so do those of padded queries.
    """
    pad_q, pad_k = (tile * count - length for tile, count, length in zip(plan.tiles, plan.counts, plan.rows, strict=True))
    return jnp.pad(jnp.flip(relative_key, axis=0), ((pad_q, plan.rows[0] + pad_k), (0, 0), (0, 0)))[None, :, None]


def near(plan: Plan, band, i, j):
    """The part of the band [K, R, H] that tile (i, j) meets, [K, t + s, H]."""
    return lax.dynamic_slice_in_dim(band, first_of(plan, i, j), sum(plan.tiles), axis=1)


def first_of(plan: Plan, i, j):
    return (plan.counts[0] - 1 - i) * plan.tiles[0] + j * plan.tiles[1]


def skew(scores, keys: int):
    """By falling distance [..., t, t + s] -> by key [..., t, s]: out[a, b] = scores[a, t - 1 - a + b]."""
    rows, width = scores.shape[-2:]
    flat = scores.reshape(*scores.shape[:-2], rows * width)
    flat = lax.slice_in_dim(flat, rows - 1, rows - 1 + rows * (width - 1), axis=-1)
    return flat.reshape(*scores.shape[:-2], rows, width - 1)[..., :keys]


def unskew(sheet, scores):
    """The transpose of `skew`, [..., t, s] -> [..., t, t + s], and the sheet with the scores on it.

    The sheet holds [..., t + 1, t + s - 1] zeros around where the scores are laid. A loop carries it, as an array that is
    padded anew takes a CPU as long as the products with it.
    """
    rows, keys = scores.shape[-2:]
    sheet = lax.dynamic_update_slice(sheet, scores, (0,) * (scores.ndim - 1) + (rows - 1,))
    flat = sheet.reshape(*scores.shape[:-2], -1)[..., : rows * (rows + keys)]
    return sheet, flat.reshape(*scores.shape[:-2], rows, rows + keys)


def dot(equation, a, b):
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))


class Positions:
    """What makes the position scores of one part."""

    def __init__(self, plan: Plan, part, position, band):
        self.plan, self.queries = plan, cut_queries(plan, part, position, 1)
        self.band = parts.share(plan.parts, band, part)[0, :, 0].swapaxes(0, 1)

    def scores(self, i, js):
        # The band comes first in a product: else XLA on a CPU gives [.., r, t], which every later step transposes.
        by_distance = dot("krh,bkgth->bkgtr", near(self.plan, self.band, i, js[0]), self.queries[i])
        return skew(by_distance, self.plan.tiles[1])


@precision.full
def forward(_, content, position, key, value, relative_key, visible: Visible):
    plan, seen = planned(content, key, value, visible)
    band = band_of(plan, relative_key)
    scores_of = lambda part: Positions(plan, part, position, band).scores
    out, *sums = tiled.attend(plan, 1.0, content, key, value, None, seen, scores_of)
    out = out.astype(value.dtype)
    return out, (content, position, key, value, relative_key, visible, out, *sums)


@precision.full
def backward(_, saved, grad_out):
    *arguments, visible, out, maximum, log_normaliser = saved
    content, position, key, value, relative_key = arguments
    plan, seen = planned(content, key, value, visible)
    no_lse, is_masked = jnp.zeros((), maximum.dtype), visible.is_masked
    sums = maximum, log_normaliser
    *rows, content, position = online.backward_rows(out, sums, grad_out, no_lse, is_masked, content, position)
    band, precise = band_of(plan, relative_key), maximum.dtype

    def gradients_of(part):
        tiles, positions = cut(plan, part, content, key, None, seen), Positions(plan, part, position, band)
        values = cut_keys(plan, part, value, "h s")
        *sums, delta, grad_outs = (cut_queries(plan, part, x, 1) for x in (*rows, grad_out))

        def step(carry, i, js):
            grad_content, grad_position, grad_key, grad_value, grad_band, sheet = carry
            logits = tiled.logits_of(plan, 1.0, tiles, i, js, positions.scores(i, js))
            weights = online.weights_of(logits, *(x[i][..., None] for x in sums))
            grad_weights = dot("bkgtv,bkvs->bkgts", grad_outs[i], values[js[0]])
            grad_scores = (weights * (grad_weights - delta[i][..., None])).astype(content.dtype)
            sheet, grad_by_distance = unskew(sheet, grad_scores)
            start, change = first_of(plan, i, js[0]), dot("bkgth,bkgtr->khr", positions.queries[i], grad_by_distance)
            old = lax.dynamic_slice_in_dim(grad_band, start, change.shape[2], axis=2)
            return (
                add_at(grad_content, dot("bkgts,bkhs->bkgth", grad_scores, tiles.key[js[0]]), i),
                add_at(grad_position, dot("krh,bkgtr->bkgth", near(plan, positions.band, i, js[0]), grad_by_distance), i),
                add_beside(grad_key, dot("bkgth,bkgts->bkhs", tiles.query[i], grad_scores), js),
                add_beside(grad_value, dot("bkgtv,bkgts->bkvs", grad_outs[i], weights.astype(grad_out.dtype)), js),
                lax.dynamic_update_slice_in_dim(grad_band, old + change, start, axis=2),
                sheet,
            )

        # Gradients summed over queries have the features before the positions: a product that transposes a tile of weights
        # takes twice the time of one that transposes a tile of queries.
        like = tiles.query, positions.queries, tiles.key, values, positions.band.swapaxes(1, 2)
        tile, keys = plan.tiles
        sheet = jnp.zeros((*tiles.query.shape[1:4], tile + 1, tile + keys - 1), content.dtype)
        start = *(jnp.zeros(x.shape, precise) for x in like), sheet
        *queries, grad_key, grad_value, grad_band, _ = tiled.sweep(plan, part, step, start)
        keys = (join_keys(plan, x) for x in (grad_key, grad_value))
        return *(join_queries(plan, x) for x in queries), *keys, jnp.moveaxis(grad_band, 2, 0)[None, :, None]

    shapes = [tiled.columns_of(plan, x) for x in arguments[:4]] + [jax.ShapeDtypeStruct(band.shape, precise)]
    *grads, grad_band = parts.part_by_part(plan.parts, gradients_of, shapes, (3,) * 5, rows)
    first = plan.tiles[0] * plan.counts[0] - plan.rows[0]
    grad_relative = jnp.flip(grad_band[0, first : first + plan.rows[1], 0], axis=0).astype(relative_key.dtype)
    grads = (tiled.in_order(x, like) for x, like in zip(grads, arguments[:4], strict=True))
    return *grads, grad_relative, jax.tree.map(lambda _: None, visible)


attend = operation(
    forward,
    backward,
    arrays=("b t n h", "b t n h", "b s n h", "b s n v", "r n h", Visible(None, None, "b t", "b s", "b n t s")),
    outputs="b t n v",
    saved=("b t n", "b t n"),
    shared=[[7], [8], [9]],
    name=SAVED,
)
