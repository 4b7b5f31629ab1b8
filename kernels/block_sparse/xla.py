"""Tiled block-sparse attention: every step takes some query tiles of all heads and one listed key tile for each.

Key tiles are fetched and their gradients added by whole tiles, so heads may follow different lists. The lists are NumPy
arrays: the number of steps, and with it the cost, is that of the lists, and rows of unequal lengths cost their own.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from subquad.kernels.softmax import online
from subquad.kernels.softmax.xla import balance, pad, tile_bytes


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static about a call."""

    block_size: int
    tile: int  # positions per tile; a large block is several tiles
    parts: int  # tiles per block
    group: int  # query tiles per step and head
    groups: int
    steps: bytes  # int32 [P]: the group of query tiles of each step
    lists: bytes  # int32 [P, N, group]: the key tile of each, -1 = none
    holes: bool  # some entry of `lists` is -1
    is_causal: bool
    scale: float


def plan_of(blocks, block_size: int, rows: int, heads: int, queries: int, keys: int, is_causal, scale) -> Plan:
    """Cuts blocks into tiles and orders the work.

    Args:
        rows: batch times heads.
    """
    area = tile_bytes() // (4 * rows)
    tile = balance(block_size, max(32, min(256 if jax.default_backend() == "cpu" else 1024, int(area**0.5))))
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

    tiles = lists.shape[1]
    group = balance(tiles, max(1, area // tile**2))
    groups = -(-tiles // group)
    lists = np.pad(lists, ((0, 0), (0, groups * group - tiles), (0, 0)), constant_values=-1)
    lists = rearrange(lists, "n (c g) l -> c l n g", g=group)
    used = (lists >= 0).any((2, 3))  # [c, l]
    work = np.broadcast_to(lists[used], (used.sum(), heads, group)).astype(np.int32)
    steps = np.nonzero(used)[0].astype(np.int32)
    holes = bool((work < 0).any())
    return Plan(block_size, tile, parts, group, groups, steps.tobytes(), work.tobytes(), holes, bool(is_causal), scale)


def cut(plan: Plan, array, groups: int | None = None):
    """[B, T, N, ...] -> tiles [N, j, B, t, ...], or [c, N, g, B, t, ...] in `groups` of query tiles."""
    size = plan.block_size
    array = rearrange(pad(array, 1, -(-array.shape[1] // size) * size), "b (i r) n ... -> b i r n ...", r=size)
    array = rearrange(pad(array, 2, plan.parts * plan.tile), "b i (p t) n ... -> n (i p) b t ...", t=plan.tile)
    if groups is None:
        return array
    return rearrange(pad(array, 1, groups * plan.group), "n (c g) ... -> c n g ...", c=groups)


def join(plan: Plan, array, length: int):
    """[N, j, B, t, ...] -> [B, length, N, ...]: the inverse of `cut`."""
    blocks = -(-length // plan.block_size)
    array = rearrange(array[:, : blocks * plan.parts], "n (i p) b t ... -> b i (p t) n ...", p=plan.parts)
    return rearrange(array[:, :, : plan.block_size], "b i r n ... -> b (i r) n ...")[:, :length]


def join_groups(plan: Plan, array, length: int):
    """[c, N, g, B, t, ...] -> [B, length, N, ...]."""
    return join(plan, rearrange(array, "c n g ... -> n (c g) ..."), length)


def work_of(plan: Plan, heads: int):
    """(int32 [P], int32 [P, N, group]): the group and the key tiles of each step."""
    steps = np.frombuffer(plan.steps, np.int32)
    return steps, np.frombuffer(plan.lists, np.int32).reshape(len(steps), heads, plan.group)


def sweep(plan: Plan, heads: int, step, carry):
    """`carry` after `step(carry, group, key_tiles)` for all the work."""
    steps, lists = work_of(plan, heads)
    if len(steps) == 1:
        return step(carry, steps[0], jnp.asarray(lists[0]))
    return jax.lax.scan(lambda carry, work: (step(carry, *work), None), carry, (steps, lists))[0]


def tests_of(plan: Plan, mask, queries: int, keys: int):
    """A function (group, key tiles [N, g]) -> bool [N, g, B|1, t|1, s] of what is visible, or None if all of it is."""
    at = jnp.arange(max(queries, keys))[None, :, None]
    query_positions = cut(plan, at[:, :queries], plan.groups)[:, 0, :, 0]  # [c, g, t]
    key_positions = cut(plan, at[:, :keys])[0, :, 0]  # [j, s]
    ragged = keys % plan.block_size or plan.tile * plan.parts != plan.block_size
    real = jnp.ones((1, keys), bool) if mask is None else mask[:, 0, 0]
    real = cut(plan, real[..., None])[0]  # [j, B|1, s]

    def visible(group, tiles):
        tests = []
        if plan.holes:
            tests.append((tiles >= 0)[:, :, None, None, None])
        if mask is not None or ragged:
            tests.append(real[tiles][:, :, :, None])
        if plan.is_causal:
            tests.append((key_positions[tiles][:, :, None] <= query_positions[group][:, :, None])[:, :, None])
        return functools.reduce(jnp.logical_and, tests) if tests else None

    return visible


def logits_of(plan: Plan, visible, query, key, group, tiles):
    """The logits of one step, [N, g, B, t, s] in float32, -inf where not visible."""
    precise = jnp.promote_types(query.dtype, jnp.float32)
    logits = plan.scale * jnp.einsum("ngbth,ngbsh->ngbts", query, key, preferred_element_type=precise)
    seen = visible(group, tiles)
    return logits if seen is None else jnp.where(seen, logits, -jnp.inf)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def sparse(plan: Plan, query, key, value, mask):
    """Attention over the lists of `plan` -> (out [B, T, N, V], lse [B, T, N])."""
    (_, queries, heads, _), (_, keys, kv_heads, _) = query.shape, key.shape
    query_tiles, key_tiles, value_tiles = cut(plan, query, plan.groups), cut(plan, key), cut(plan, value)
    visible = tests_of(plan, mask, queries, keys)
    head = np.arange(heads)[:, None] // (heads // kv_heads)

    def step(states, group, tiles):
        at = (head, jnp.maximum(tiles, 0))
        logits = logits_of(plan, visible, query_tiles[group], key_tiles[at], group, tiles)

        def weigh(weights):
            weights = weights.astype(value.dtype)
            return jnp.einsum("ngbts,ngbsv->ngbtv", weights, value_tiles[at], preferred_element_type=logits.dtype)

        state = online.update(jax.tree.map(lambda groups: groups[group], states), logits, weigh)
        return jax.tree.map(lambda groups, one: jax.lax.dynamic_update_index_in_dim(groups, one, group, 0), states, state)

    precise = jnp.promote_types(query.dtype, jnp.float32)
    states = sweep(plan, heads, step, online.start(query_tiles.shape[:-1], value.shape[-1], precise))
    out, lse = online.finish(states)
    return join_groups(plan, out.astype(query.dtype), queries), join_groups(plan, lse, queries)


def sparse_forward(plan, query, key, value, mask):
    out, lse = sparse(plan, query, key, value, mask)
    return (out, lse), (query, key, value, mask, out, lse)


def sparse_backward(plan, residuals, gradients):
    query, key, value, mask, out, lse = residuals
    (_, queries, heads, _), (_, keys, kv_heads, _) = query.shape, key.shape
    precise = lse.dtype
    lse, shift, grad_out, query_tiles = (
        cut(plan, x, plan.groups) for x in (*online.residue(out, lse, *gradients), gradients[0], query)
    )
    key_tiles, value_tiles = cut(plan, key), cut(plan, value)
    visible = tests_of(plan, mask, queries, keys)
    head = np.arange(heads)[:, None] // (heads // kv_heads)
    dot = functools.partial(jnp.einsum, preferred_element_type=precise)

    def step(grads, group, tiles):
        grad_query, grad_key, grad_value = grads
        at = (head, jnp.maximum(tiles, 0))
        own_query, own_key, own_grad = query_tiles[group], key_tiles[at], grad_out[group]
        weights = jnp.exp(logits_of(plan, visible, own_query, own_key, group, tiles) - lse[group][..., None])
        grad_logits = weights * (dot("ngbtv,ngbsv->ngbts", own_grad, value_tiles[at]) - shift[group][..., None])
        grad_logits = (grad_logits * plan.scale).astype(query.dtype)
        grad_query = grad_query.at[group].add(dot("ngbts,ngbsh->ngbth", grad_logits, own_key))
        grad_key = grad_key.at[at].add(dot("ngbts,ngbth->ngbsh", grad_logits, own_query))
        weights = weights.astype(value.dtype)
        grad_value = grad_value.at[at].add(dot("ngbts,ngbtv->ngbsv", weights, own_grad))
        return grad_query, grad_key, grad_value

    start = jax.tree.map(lambda x: jnp.zeros(x.shape, precise), (query_tiles, key_tiles, value_tiles))
    grad_query, grad_key, grad_value = sweep(plan, heads, step, start)
    return (
        join_groups(plan, grad_query.astype(query.dtype), queries),
        join(plan, grad_key.astype(key.dtype), keys),
        join(plan, grad_value.astype(value.dtype), keys),
        None,
    )


sparse.defvjp(sparse_forward, sparse_backward)

compiled = jax.jit(sparse, static_argnums=0)


def attention(query, key, value, blocks, block_size: int, mask, is_causal: bool, scale: float):
    """Arguments as checked by `subquad.kernels.block_sparse.attention` -> (out [B, T, N, V], lse [B, T, N])."""
    batch, queries, heads, _ = query.shape
    plan = plan_of(blocks, block_size, batch * heads, heads, queries, key.shape[1], is_causal, scale)
    return compiled(plan, query, key, value, mask)
