"""Relative attention in tiles: a running maximum forward, scores recomputed backward.

One loop runs over the triples (part of the batch, query tile, key tile) that hold a key which is not of the future. One
tile is t queries by s keys. Its distances are a band of t + s neighbours in the table of relative keys, so the position
scores are one product with that band, [t, t + s], whose row a is shifted by a: `skew`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import lax

from subquad.kernels import precision
from subquad.kernels.operation import operation
from subquad.kernels.relative.reference import SAVED
from subquad.kernels.softmax import online
from subquad.kernels.softmax.plan import balance, cores
from subquad.kernels.softmax.sets import Visible


class Plan(NamedTuple):
    """Everything static about a call: parts of the batch, tile sizes, and by how much the first query follows the first key."""

    parts: int
    query: int
    key: int
    offset: int
    queries: int
    keys: int

    @property
    def counts(self) -> tuple[int, int]:
        """Query tiles and key tiles."""
        return -(-self.queries // self.query), -(-self.keys // self.key)

    def steps(self) -> np.ndarray:
        """int32 [3, P]: (part, query tile, key tile) of every step, those of a query tile in a row."""
        last_query = np.minimum((np.arange(self.counts[0]) + 1) * self.query, self.queries) - 1 + self.offset
        seen = np.arange(self.counts[1]) * self.key <= last_query[:, None]
        return np.stack(np.nonzero(np.broadcast_to(seen, (self.parts, *seen.shape)))).astype(np.int32)


class Tiles(NamedTuple):
    """The arguments cut into tiles: i query tiles and j key tiles of t queries and s keys, p parts of b samples."""

    content: jax.Array  # [p, i, b, N, t, H]
    position: jax.Array  # [p, i, b, N, t, H]
    key: jax.Array  # [p, j, b, N, s, H]
    value: jax.Array  # [p, j, b, N, s, V]
    band: jax.Array  # [N, R, H], distances in descending order
    mask: jax.Array | None  # [p|1, b|1, N|1, T|1, S|1]
    query_segments: jax.Array | None  # [p|1, i, b|1, t]
    key_segments: jax.Array | None  # [p|1, j, b|1, s]


# Elements of the scores of one tile over the heads of a part: on a CPU they should stay in the cache, and a buffer of 32 MiB
# is mapped anew at every step; on an accelerator a step is a kernel launch, so steps should be few.
CPU_TILE, ACCELERATOR_TILE = 1 << 20, 1 << 24


def choose_plan(batch: int, heads: int, queries: int, keys: int) -> Plan:
    """Even tiles, the fewer the queries the more keys, and parts of the batch so small that a tile need not shrink further."""
    # On a CPU fewer queries than keys: t of the t + s distances in the band of a tile belong to no pair. One core likes
    # small tiles; what several share may be larger.
    share = min(cores(), 2)
    cpu, accelerator = (CPU_TILE, 128 * share, 256 * share), (ACCELERATOR_TILE, 1024, 1024)
    limit, rows, columns = cpu if jax.default_backend() == "cpu" else accelerator
    query = balance(queries, rows)
    key = balance(keys, rows * columns // query)
    room = max(1, limit // (heads * query * (query + key)))
    parts = next(parts for parts in range(1, batch + 1) if batch % parts == 0 and batch // parts <= room)
    while heads * (batch // parts) * query * (query + key) > 4 * limit and key > 32:
        query, key = balance(queries, -(-query // 2)), balance(keys, -(-key // 2))
    return Plan(parts, query, key, keys - queries, queries, keys)


def plan_of(content, key) -> Plan:
    batch, queries, heads, _ = content.shape
    return choose_plan(batch, heads, queries, key.shape[1])


def attention(query, key, value, relative_key, content_bias, position_bias, visible: Visible, scale):
    def biased(bias):
        precise = jnp.promote_types(query.dtype, jnp.float32)
        return ((query.astype(precise) + bias) * scale).astype(query.dtype)

    key, relative_key = (x.astype(query.dtype) for x in (key, relative_key[: key.shape[1]]))
    return attend((), biased(content_bias), biased(position_bias), key, value, relative_key, visible)


def cut(plan: Plan, content, position, key, value, relative_key, visible: Visible) -> Tiles:
    """The arguments in tiles: transposed once, contiguous, batch axes first."""
    pad_q, pad_k = (size * count - length for size, count, length in zip(
        (plan.query, plan.key), plan.counts, (plan.queries, plan.keys), strict=True))  # fmt: skip
    # From the distance of the last query to the first key, down to that of the first query to the last key. Those before 0
    # are of the future and hold zeros; so do those of padded queries.
    band = jnp.pad(jnp.flip(relative_key, axis=0), ((pad_q, plan.queries + pad_k), (0, 0), (0, 0)))
    mask, segments = visible.mask, zip(visible[2:4], (plan.query, plan.key), strict=True)
    if mask is not None:
        padding = [(0, pad if size > 1 else 0) for size, pad in zip(mask.shape[2:], (pad_q, pad_k), strict=True)]
        mask = jnp.pad(mask, [(0, 0), (0, 0), *padding])
        mask = rearrange(mask, "(p b) n t s -> p b n t s", p=plan.parts if mask.shape[0] > 1 else 1)
    queries = (cut_rows(plan, x, plan.query) for x in (content, position))
    keys = (cut_rows(plan, x, plan.key) for x in (key, value))
    segments = (None if x is None else cut_rows(plan, x[..., None], size)[..., 0, :] for x, size in segments)
    return Tiles(*queries, *keys, rearrange(band, "r n h -> n r h"), mask, *segments)


def cut_rows(plan: Plan, array, size: int):
    """[B, T, N, ...] -> [p, i, b, N, t, ...]; one sample for all is one part."""
    array = jnp.pad(array, [(0, 0), (0, -array.shape[1] % size)] + [(0, 0)] * (array.ndim - 2))
    return rearrange(array, "(p b) (i t) n ... -> p i b n t ...", p=min(plan.parts, len(array)), t=size)


def join_rows(array, length: int):
    """[p, i, b, N, t, ...] -> [B, T, N, ...]."""
    return rearrange(array, "p i b n t ... -> (p b) (i t) n ...")[:, :length]


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


def band_start(plan: Plan, i, j):
    return (plan.counts[0] - 1 - i) * plan.query + j * plan.key


def near(plan: Plan, band, i, j):
    """The part of the band that tile (i, j) meets, [N, t + s, H]."""
    return lax.dynamic_slice_in_dim(band, band_start(plan, i, j), plan.query + plan.key, axis=1)


def add_near(plan: Plan, band, change, i, j):
    """The band [N, H, R] with `change` [N, H, t + s] added where tile (i, j) meets it."""
    old = lax.dynamic_slice_in_dim(band, band_start(plan, i, j), plan.query + plan.key, axis=2)
    return lax.dynamic_update_slice_in_dim(band, old + change, band_start(plan, i, j), axis=2)


def put(tiles, tile, p, i):
    starts = [jnp.int32(at) for at in (p, i, *(0,) * tile.ndim)]
    return lax.dynamic_update_slice(tiles, tile[None, None], starts)


def dot(equation, a, b):
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))


def scores_of(plan: Plan, tiles: Tiles, p, i, j):
    """The scores of a step, [b, N, t, s]; -inf where the query may not see the key."""
    # The band comes first in a product: else XLA on a CPU gives [.., r, t], which every later step transposes.
    by_distance = dot("nrh,bnth->bntr", near(plan, tiles.band, i, j), tiles.position[p, i])
    scores = dot("bnth,bnsh->bnts", tiles.content[p, i], tiles.key[p, j]) + skew(by_distance, plan.key)
    at = plan.offset + i * plan.query + jnp.arange(plan.query)
    seen = j * plan.key + jnp.arange(plan.key) <= at[:, None]
    if tiles.mask is not None:
        full = tiles.mask.shape
        corner = (p, 0, 0, i * plan.query, j * plan.key)
        starts = [jnp.int32(start if size > 1 else 0) for start, size in zip(corner, full, strict=True)]
        shape = (1, *full[1:3], plan.query if full[3] > 1 else 1, plan.key if full[4] > 1 else 1)
        seen = seen & lax.dynamic_slice(tiles.mask, starts, shape)[0]
    if tiles.query_segments is not None:
        query, key = tiles.query_segments[p, i], tiles.key_segments[p, j]
        seen = seen & (query[:, None, :, None] == key[:, None, None, :])
    return jnp.where(seen, scores, -jnp.inf)


def sweep(plan: Plan, step, carry):
    """`carry` after `step(carry, p, i, j)` for every step of the plan."""
    steps = plan.steps()
    if steps.shape[1] == 1:  # no loop around a single step
        return step(carry, 0, 0, 0)
    return lax.scan(lambda carry, at: (step(carry, *at), None), carry, tuple(steps))[0]


@precision.full
def forward(_, content, position, key, value, relative_key, visible: Visible):
    plan = plan_of(content, key)
    tiles = cut(plan, content, position, key, value, relative_key, visible)

    def step(states, p, i, j):
        state = jax.tree.map(lambda x: x[p, i], states)
        weigh = lambda weights: dot("bnts,bnsv->bntv", weights.astype(value.dtype), tiles.value[p, j])
        state = online.update(state, scores_of(plan, tiles, p, i, j), weigh)
        return jax.tree.map(lambda x, tile: put(x, tile, p, i), states, state)

    precise = jnp.promote_types(content.dtype, jnp.float32)
    states = sweep(plan, step, online.start(tiles.content.shape[:-1], value.shape[-1], precise))
    out, *sums = (join_rows(x, plan.queries) for x in online.finish(states))
    out = out.astype(value.dtype)
    return out, (content, position, key, value, relative_key, visible, out, *sums)


@precision.full
def backward(_, saved, d_out):
    *arguments, out, maximum, log_normaliser = saved
    content, position, key, value, relative_key, visible = arguments
    plan = plan_of(content, key)
    no_lse, is_masked = jnp.zeros((), maximum.dtype), visible.mask is not None or visible.query_segment_ids is not None
    sums = maximum, log_normaliser
    *rows, content, position = online.residue(out, sums, d_out, no_lse, is_masked, content, position)
    tiles = cut(plan, content, position, *arguments[2:])
    maximum, log_normaliser, shift, d_out = (cut_rows(plan, x, plan.query) for x in (*rows, d_out))

    def step(carry, p, i, j):
        d_content, d_position, d_key, d_value, d_band, sheet = carry
        sums = (x[p, i][..., None] for x in (maximum, log_normaliser))
        weights = online.weights_of(scores_of(plan, tiles, p, i, j), *sums)
        d_weights = dot("bntv,bnsv->bnts", d_out[p, i], tiles.value[p, j])
        d_scores = (weights * (d_weights - shift[p, i][..., None])).astype(content.dtype)
        sheet, d_by_distance = unskew(sheet, d_scores)
        add = lambda x, change, at: put(x, x[p, at] + change, p, at)
        return (
            add(d_content, dot("bnts,bnsh->bnth", d_scores, tiles.key[p, j]), i),
            add(d_position, dot("nrh,bntr->bnth", near(plan, tiles.band, i, j), d_by_distance), i),
            add(d_key, dot("bnth,bnts->bnhs", tiles.content[p, i], d_scores), j),
            add(d_value, dot("bntv,bnts->bnvs", d_out[p, i], weights.astype(d_out.dtype)), j),
            add_near(plan, d_band, dot("bnth,bntr->nhr", tiles.position[p, i], d_by_distance), i, j),
            sheet,
        )

    # Gradients summed over queries have the features before the positions: a product that transposes a tile of weights takes
    # twice the time of one that transposes a tile of queries.
    like = *tiles[:2], *(x.swapaxes(-1, -2) for x in tiles[2:5])
    sheet = jnp.zeros((*tiles.content.shape[2:4], plan.query + 1, plan.query + plan.key - 1), content.dtype)
    start = *(jnp.zeros(x.shape, shift.dtype) for x in like), sheet
    d_content, d_position, d_key, d_value, d_band, _ = sweep(plan, step, start)
    gradients = d_content, d_position, d_key.swapaxes(-1, -2), d_value.swapaxes(-1, -2)
    gradients = [join_rows(x, y.shape[1]).astype(y.dtype) for x, y in zip(gradients, arguments[:4], strict=True)]
    first = plan.counts[0] * plan.query - plan.queries
    d_relative = jnp.flip(rearrange(d_band, "n h r -> r n h")[first : first + plan.keys], axis=0)
    return *gradients, d_relative.astype(relative_key.dtype), jax.tree.map(lambda _: None, visible)


attend = operation(
    forward,
    backward,
    arrays=("b t n h", "b t n h", "b s n h", "b s n v", "r n h", Visible(None, None, "b t", "b s", "b n t s")),
    outputs="b t n v",
    saved=("b t n", "b t n"),
    shared=[[7], [8], [9]],
    name=SAVED,
)
