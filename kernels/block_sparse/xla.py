"""Tiled block-sparse attention: every step takes some query tiles and, side by side, the key tiles that they list.

Rows of similar lengths go together, so that most lists need one step and no online softmax; tiles are read from the
arguments and added to the gradients where they lie. The lists are NumPy arrays: the number of steps, and with it the
cost, is that of the lists, and heads may follow different ones.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from subquad.kernels import precision
from subquad.kernels.memory import bits, bits_dtype, numbers, zeros_after
from subquad.kernels.softmax import online
from subquad.kernels.softmax.xla import balance, pad, tile_bytes

# Keys side by side in one step: enough for fast products, and few enough that a long list wastes little in its last one.
SHORT, LONG = 512, 2048


@dataclasses.dataclass(frozen=True)
class Work:
    """Steps of one shape."""

    shape: tuple[int, int, int, int, int]  # steps, samples, heads, query tiles and key tiles; the latter per step
    steps: bytes  # int32 [P, 2]: the first head of each step; whether its rows start here
    rows: bytes  # int32 [P, N, g]: the query tiles of each step; one past the last = none
    lists: bytes  # int32 [P, N, g, w]: their key tiles, -1 = none
    holes: bool  # some entry of `lists` is -1
    single: bool  # every row has one step

    def arrays(self):
        count, _, heads, group, width = self.shape
        shapes = (count, 2), (count, heads, group), (count, heads, group, width)
        words = (self.steps, self.rows, self.lists)
        return tuple(np.frombuffer(word, np.int32).reshape(shape) for word, shape in zip(words, shapes, strict=True))


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static about a call."""

    block_size: int
    tile: int  # positions per tile; a large block is several tiles
    parts: int  # tiles per block
    works: tuple[Work, ...]
    is_causal: bool
    scale: float


class Step(NamedTuple):
    """One step of some work."""

    samples: jax.Array  # [b]
    heads: jax.Array  # [n]
    is_first: jax.Array
    rows: jax.Array  # [n, g]
    lists: jax.Array  # [n, g, w]


def plan_of(blocks, block_size: int, batch: int, heads: int, queries: int, keys: int, is_causal, scale) -> Plan:
    """Cuts blocks into tiles and orders the work."""
    on_cpu = jax.default_backend() == "cpu"
    area = tile_bytes() // (4 if on_cpu else 4 * batch * heads)
    tile = balance(block_size, max(32, min(256 if on_cpu else 1024, int(area**0.5))))
    parts = -(-block_size // tile)
    starts = np.arange(parts) * tile
    first = (np.arange(-(-keys // block_size))[:, None] * block_size + starts).ravel()  # position of each key tile
    last = (np.arange(blocks.shape[1])[:, None] * block_size + np.minimum(starts + tile, block_size) - 1).ravel()

    lists = np.where(blocks[..., None] < 0, -1, blocks[..., None] * parts + np.arange(parts))
    lists = lists.reshape(*blocks.shape[:2], -1).repeat(parts, 1)
    useless = first[lists] >= keys
    if is_causal:
        useless |= first[lists] > last[:, None]
    lists = np.where(useless, -1, lists)
    lists = np.take_along_axis(lists, np.argsort(lists < 0, axis=2, kind="stable"), 2)  # entries first, then the -1
    lists = np.broadcast_to(lists, (heads, *lists.shape[1:]))

    lengths, works = (lists >= 0).sum(2), []
    room, short, long = (max(1, size // tile) for size in (tile_bytes() // (4 * tile), SHORT, LONG))
    most = int(lengths.max())
    while most:
        least = short if most > short else most // 2
        works.append(work_of(lists, lengths, least, balance(most, long), room, batch))
        most = int(lengths[lengths <= least].max(initial=0))
        lengths = np.where(lengths > least, 0, lengths)
    return Plan(block_size, tile, parts, tuple(works), bool(is_causal), scale)


def work_of(lists, lengths, least: int, width: int, room: int, batch: int) -> Work:
    """The work of all rows longer than `least`: `room` pairs of tiles per step, `width` key tiles per query tile."""
    heads, tiles = lengths.shape
    order = np.argsort(-lengths, axis=1, kind="stable")[:, : (lengths > least).sum(1).max()]
    rows = np.where(np.take_along_axis(lengths, order, 1) > least, order, tiles)
    divisor = lambda count, most: max(size for size in range(1, count + 1) if count % size == 0 and size <= max(1, most))
    together = divisor(heads, room // width)
    group = balance(order.shape[1], max(1, min(room // (width * together), order.shape[1])))
    samples = divisor(batch, room // (width * group * together))
    rows = np.pad(rows, ((0, 0), (0, -rows.shape[1] % group)), constant_values=tiles)
    lists = np.pad(lists, ((0, 0), (0, 1), (0, -lists.shape[2] % width)), constant_values=-1)
    lists = np.take_along_axis(lists, rows[..., None], 1)
    rows = rearrange(rows, "(m n) (c g) -> m c n g", n=together, g=group)
    lists = rearrange(lists, "(m n) (c g) (l w) -> m c l n g w", n=together, g=group, w=width)
    at = np.nonzero((lists >= 0).any((3, 4, 5)))
    steps, rows, lists = np.stack([at[0] * together, at[2] == 0], 1), rows[at[:2]], lists[at]
    holes, single = bool((lists < 0).any()), not at[2].any()
    shape = (len(steps), samples, together, group, width)
    return Work(shape, *(x.astype(np.int32).tobytes() for x in (steps, rows, lists)), holes, single)


def cut(plan: Plan, array):
    """[B, T, ...] -> tiles [B, i, t, ...]."""
    array = pad(array, 1, -(-array.shape[1] // plan.block_size) * plan.block_size)
    array = rearrange(array, "b (i r) ... -> b i r ...", r=plan.block_size)
    return rearrange(pad(array, 2, plan.parts * plan.tile), "b i (p t) ... -> b (i p) t ...", t=plan.tile)


def join(plan: Plan, array, length: int):
    """[B, i, t, ...] -> [B, length, ...]: the inverse of `cut`."""
    array = rearrange(array, "b (i p) t ... -> b i (p t) ...", p=plan.parts)
    return rearrange(array[:, :, : plan.block_size], "b i r ... -> b (i r) ...")[:, :length]


def sweep(work: Work, batch: int, step, carry):
    """`carry` after `step(carry, Step)` for all the work."""
    _, samples, heads, _, _ = work.shape
    steps = tuple(map(jnp.asarray, work.arrays()))

    def sample(carry, start):
        def one(carry, words):
            (head, is_first), rows, lists = words
            at = Step(start + jnp.arange(samples), head + jnp.arange(heads), is_first, rows, lists)
            return step(carry, at), None

        return jax.lax.scan(one, carry, steps)

    return jax.lax.scan(sample, carry, jnp.arange(0, batch, samples))[0]


def corner(samples, tiles, heads):
    """The index of tiles [n, ...] of these heads in an array [B, i, t, N, ...]: what it finds is [b, n, ..., t, ...]."""
    ones = (1,) * (tiles.ndim - 1)
    return samples.reshape(-1, 1, *ones), tiles, slice(None), heads.reshape(-1, *ones)


def fetch(array, samples, tiles, heads):
    """The tiles at a `corner`."""
    return numbers(bits(array).at[corner(samples, tiles, heads)].get(mode="clip"), array.dtype)


def fetch_keys(array, at: Step, query_heads: int):
    """Key tiles side by side: [B, j, s, K, H] -> [b, n, g, w s, H]."""
    found = fetch(array, at.samples, at.lists, at.heads // (query_heads // array.shape[3]))
    return rearrange(found, "b n g w s h -> b n g (w s) h")


def add_keys(array, tiles, at: Step, query_heads: int):
    """Adds tiles [b, n, g, w s, H] to [B, j, s, K, H]."""
    tiles = rearrange(tiles, "b n g (w s) h -> b n g w s h", s=array.shape[2])
    where = corner(at.samples, jnp.maximum(at.lists, 0), at.heads // (query_heads // array.shape[3]))
    return array.at[where].add(tiles)


def tests_of(plan: Plan, mask, queries: int, keys: int):
    """A function (work, step) -> bool [b|1, n, g, t|1, w s] of what is visible, or None if all of it is."""
    position = cut(plan, jnp.arange(max(queries, keys))[None])[0]  # [i, t]
    ragged = keys % plan.block_size or plan.tile * plan.parts != plan.block_size
    real = cut(plan, jnp.ones((1, keys), bool) if mask is None else mask[:, 0, 0])  # [B|1, j, s]

    def visible(work: Work, at: Step):
        tests, tiles = [], jnp.maximum(at.lists, 0)
        if work.holes:
            tests.append((at.lists >= 0)[None, ..., None])
        if mask is not None or ragged:
            samples = at.samples if len(real) > 1 else at.samples[:1] * 0
            tests.append(real[samples[:, None, None, None], tiles])
        seen = functools.reduce(jnp.logical_and, tests)[..., None, :, :] if tests else None  # [b|1, n, g, 1, w, s|1]
        if plan.is_causal:
            past = position[tiles][:, :, None] <= position.at[at.rows].get(mode="clip")[..., None, None]
            seen = past if seen is None else seen & past
        if seen is None:
            return None
        return rearrange(jnp.broadcast_to(seen, (*seen.shape[:-1], plan.tile)), "... w s -> ... (w s)")

    return visible


def logits_of(plan: Plan, visible, query, key, work: Work, at: Step):
    """The logits of one step, [b, n, g, t, w s] in float32, -inf where not visible."""
    precise = jnp.promote_types(query.dtype, jnp.float32)
    logits = online.rounded(plan.scale * jnp.einsum("bngth,bngsh->bngts", query, key, preferred_element_type=precise))
    seen = visible(work, at)
    return logits if seen is None else jnp.where(seen, logits, -jnp.inf)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
@precision.full
def sparse(plan: Plan, query, key, value, mask):
    """Attention over the lists of `plan` -> (out [B, T, N, V], lse [B, T, N])."""
    return sparse_forward(plan, query, key, value, mask)[0]


@precision.full
def sparse_forward(plan, query, key, value, mask):
    batch, queries, heads, _ = query.shape
    precise = jnp.promote_types(query.dtype, jnp.float32)
    visible = tests_of(plan, mask, queries, key.shape[1])
    query_tiles, key_tiles, value_tiles = (cut(plan, x) for x in (query, key, value))

    def sweep_forward(work: Work, outs):
        rows = (*work.shape[1:4], plan.tile)
        fresh = online.start(rows, value.shape[-1], precise)

        def step(carry, at):
            (out, *sums), state = carry
            state = fresh if work.single else jax.tree.map(lambda x, y: jnp.where(at.is_first, x, y), fresh, state)

            def weigh(weights):
                values = fetch_keys(value_tiles, at, heads)
                return jnp.einsum("bngts,bngsv->bngtv", weights.astype(value.dtype), values, preferred_element_type=precise)

            own_query = fetch(query_tiles, at.samples, at.rows, at.heads)
            own_key = fetch_keys(key_tiles, at, heads)
            state = online.update(state, logits_of(plan, visible, own_query, own_key, work, at), weigh)
            own_out, *own_sums = online.finish(state)
            where = corner(at.samples, at.rows, at.heads)
            out = out.at[where].set(bits(own_out.astype(query.dtype)), mode="drop")
            sums = (x.at[where].set(own, mode="drop") for x, own in zip(sums, own_sums, strict=True))
            return (out, *sums), None if work.single else state

        return sweep(work, batch, step, (outs, None if work.single else fresh))[0]

    tiles = query_tiles.shape[:4]
    outs = jnp.zeros((*tiles, value.shape[-1]), bits_dtype(query.dtype)), *online.start(tiles, 0, precise)[:2]
    for work in plan.works:
        outs = sweep_forward(work, outs)
    out, maximum, log_normaliser = (join(plan, x, queries) for x in outs)
    out = numbers(out, query.dtype)
    return (out, maximum + log_normaliser), (query, key, value, mask, out, maximum, log_normaliser)


@precision.full
def sparse_backward(plan, residuals, gradients):
    query, key, value, mask, out, *sums = residuals
    (batch, queries, heads, _), keys, precise = query.shape, key.shape[1], sums[0].dtype
    visible = tests_of(plan, mask, queries, keys)
    dot = functools.partial(jnp.einsum, preferred_element_type=precise)
    *rows, query = online.residue(out, sums, *gradients, mask is not None, query)
    own = [cut(plan, x) for x in (query, gradients[0], *rows)]
    key_tiles, value_tiles = cut(plan, key), cut(plan, value)

    def step(work, grads, at):
        grad_query, grad_key, grad_value = grads
        own_query, own_grad, *own_sums, own_shift = (fetch(x, at.samples, at.rows, at.heads) for x in own)
        own_key, own_value = (fetch_keys(x, at, heads) for x in (key_tiles, value_tiles))
        # Keys before queries, and `change` with features before positions: a product that turns a tile of weights takes
        # up to twice the time of one that turns a tile of queries or keys.
        logits = online.rounded(plan.scale * dot("bngsh,bngth->bngst", own_key, own_query))
        seen = visible(work, at)
        logits = logits if seen is None else jnp.where(seen.swapaxes(-1, -2), logits, -jnp.inf)
        weights = online.weights_of(logits, *(x[..., None, :] for x in own_sums))
        grad_logits = weights * (dot("bngsv,bngtv->bngst", own_value, own_grad) - own_shift[..., None, :])
        grad_logits, weights = (grad_logits * plan.scale).astype(query.dtype), weights.astype(value.dtype)
        change = dot("bngsh,bngst->bnght", own_key, grad_logits).swapaxes(-1, -2)
        grad_query = grad_query.at[corner(at.samples, at.rows, at.heads)].add(change, mode="drop")
        grad_key = add_keys(grad_key, dot("bngst,bngth->bngsh", grad_logits, own_query), at, heads)
        grad_value = add_keys(grad_value, dot("bngst,bngtv->bngsv", weights, own_grad), at, heads)
        return grad_query, grad_key, grad_value

    grads = tuple(zeros_after(own[1], x.shape, precise) for x in (own[0], key_tiles, value_tiles))
    for work in plan.works:
        grads = sweep(work, batch, functools.partial(step, work), grads)
    lengths, likes = (queries, keys, keys), (query, key, value)
    return (*(join(plan, x.astype(y.dtype), n) for x, y, n in zip(grads, likes, lengths, strict=True)), None)


precision.define_passes(sparse, sparse_forward, sparse_backward)

compiled = jax.jit(sparse, static_argnums=0)


def attention(query, key, value, blocks, block_size: int, mask, is_causal: bool, scale: float):
    """Arguments as checked by `subquad.kernels.block_sparse.attention` -> (out [B, T, N, V], lse [B, T, N])."""
    batch, queries, heads, _ = query.shape
    keys = key.shape[1]
    block_size = min(block_size, max(queries, keys))
    return compiled(plan_of(blocks, block_size, batch, heads, queries, keys, is_causal, scale), query, key, value, mask)
