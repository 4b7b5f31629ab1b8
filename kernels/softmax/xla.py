"""Tiled softmax attention: memory O(T), a fixed number of steps, a backward pass that recomputes the weights.

Samples and heads are taken part by part, so that what is kept in tiles and in float32 is that of one part. In a part one
loop runs over steps: a tile of queries, and the few tiles of keys that it meets side by side. The steps are those in which
the pattern allows something. They are listed in NumPy where the positions are known while tracing, so that a causal, a
windowed or a block-sparse call visits only its own tiles and its number of steps is a constant of the program.

Arrays are viewed as [B, T, C, N, ...]: C columns are independent sequences whose rows lie C positions apart, 1 for most calls.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from subquad.kernels import precision
from subquad.kernels.operation import operation
from subquad.kernels.padding import pad_to
from subquad.kernels.softmax import few, online, parts
from subquad.kernels.softmax.plan import Plan, plan_of
from subquad.kernels.softmax.reference import SAVED
from subquad.kernels.softmax.sets import KeySet, Visible, independent_axes, known_of


def attention(query, keys, values, bias, sets: tuple[KeySet, ...], scale: float):
    """Arguments as checked by `subquad.kernels.softmax` -> (out [B, T, N, V], maximum, log(normaliser) [B, T, N])."""
    static, visibles = zip(*map(known_of, sets), strict=True)
    independent = independent_axes(*(one.pattern for one in sets))
    return flash(independent, len(keys), len(sets))((static, scale), query, keys, values, bias, visibles)


def forward(static, query, *others):
    """Attention to some sets; the maximum has no gradient, and the log(normaliser) that of the log-sum-exp."""
    results = outputs_of(static, query, *others)
    return results, (query, *others, *results)


def outputs_of(static, query, keys, values, bias, visibles, *, gradients_follow: bool = True):
    """Few queries take a product of their own only where no gradients follow: theirs would differ from it by its rounding."""
    sets, scale = static
    results, dtype = [], dtype_of(query, sets)
    for known, visible in zip(sets, visibles, strict=True):
        one = known.set_of(visible)
        key, value, visible = keys[one.source], values[one.source], here(one, visible)
        if not gradients_follow and one.columns == 1 and few.are_few(*query.shape[1:3], key.shape[1]):
            results.append(few.attend(one._replace(visible=visible), scale, query, key, value, bias, dtype))
        else:
            results.append(attend(plan_of(query, key, value, one), scale, query, key, value, bias, visible, dtype=dtype))
    out, *sums = results[0] if len(results) == 1 else online.merge(*zip(*results, strict=True))
    return out.astype(query.dtype), *sums


def backward(static, residuals, gradients):
    sets, scale = static
    query, keys, values, bias, visibles, out, *sums = residuals
    grad_out, _, grad_lse = gradients
    is_masked = any(visible.is_masked for visible in visibles)
    *rows, query = online.backward_rows(out, sums, grad_out, grad_lse, is_masked, query)
    grad_query, grad_keys, grad_values, grad_bias = None, [None] * len(keys), [None] * len(values), None
    dtype = dtype_of(query, sets)
    for known, visible in zip(sets, visibles, strict=True):
        one = known.set_of(visible)
        n, key, value = one.source, keys[one.source], values[one.source]
        before = grad_query, grad_keys[n], grad_values[n], grad_bias
        grad_query, grad_keys[n], grad_values[n], grad_bias = add_gradients(
            plan_of(query, key, value, one), scale, before, query, key, value, bias, here(one, visible), rows, grad_out, dtype
        )
    grads = grad_query, tuple(grad_keys), tuple(grad_values), grad_bias
    grads = jax.tree.map(lambda x, like: x.astype(like.dtype), grads, (query, keys, values, bias))
    return *grads, jax.tree.map(lambda _: None, visibles)


def dtype_of(query, sets):
    """Of what is added over several sets of keys: it is rounded once, at the end."""
    return query.dtype if len(sets) == 1 else jnp.promote_types(query.dtype, jnp.float32)


def here(one: KeySet, visible: Visible) -> Visible:
    """What is visible in the samples at hand, which `jax.vmap` or a mesh may have made more or fewer than are known."""
    return Visible(*(known if given is None else given for known, given in zip(one.visible, visible, strict=True)))


@functools.cache
def flash(independent: str, sources: int, sets: int):
    """The operation for some numbers of key arrays and of sets; `independent`: the axes that a mesh may cut."""
    visible = Visible("b t", "b s", "b t", "b s", "b n t s")
    arrays = "b t n h", ("b s n h",) * sources, ("b s n v",) * sources, "b n t s", (visible,) * sets
    shared = [[place] for place in range(1 + 2 * sources, 2 + 2 * sources + 5 * sets)]  # all but query, keys and values
    return operation(
        precision.full(forward), precision.full(backward), arrays=arrays, outputs=("b t n v", "b t n", "b t n"),
        independent=independent, shared=shared, name=SAVED,
        primal=precision.full(functools.partial(outputs_of, gradients_follow=False)),
    )  # fmt: skip


def attend(plan: Plan, scale: float, query, key, value, bias, visible: Visible, scores_of=None, dtype=None):
    """Attention to one set of keys: out, maximum and log(normaliser).

    `scores_of`: of a part, the function of a step (i, js) that gives what is added to its logits; None: nothing is.
    `dtype`: of out; None: the query's.
    """
    dtype, precise = query.dtype if dtype is None else dtype, jnp.promote_types(query.dtype, jnp.float32)

    def attend_part(part):
        tiles = cut(plan, part, query, key, bias, visible)
        value_tiles = cut_keys(plan, part, value, "s h")
        scores = (lambda *_: None) if scores_of is None else scores_of(part)

        def step(states, i, js):
            def weigh(weights):
                values = beside(value_tiles, js, -2)
                return jnp.einsum("bkgts,bksv->bkgtv", weights.astype(value.dtype), values, preferred_element_type=precise)

            logits = logits_of(plan, scale, tiles, i, js, scores(i, js))
            state = online.update(jax.tree.map(lambda x: x[i], states), logits, weigh)
            return jax.tree.map(lambda x, tile: put(x, tile, i), states, state)

        states = sweep(plan, part, step, online.start(tiles.query.shape[:-1], value.shape[-1], precise))
        out, *sums = online.finish(states)
        return tuple(join_queries(plan, x) for x in (out.astype(dtype), *sums))

    rows = query.shape[:3]
    sums = jax.ShapeDtypeStruct(rows, precise)
    shapes = jax.ShapeDtypeStruct((*rows, value.shape[-1]), dtype), sums, sums
    results = parts.part_by_part(plan.parts, attend_part, [columns_of(plan, x) for x in shapes], (3, 3, 3), (query, key))
    return [in_order(x, like) for x, like in zip(results, shapes, strict=True)]


def add_gradients(plan: Plan, scale: float, before, query, key, value, bias, visible: Visible, rows, grad_out, dtype):
    """Gradients of query, key and value, in a dtype, and of bias by one set of keys, added to those `before`; None for none.

    Args:
        rows: maximum, log(normaliser) and delta of each query over all sets, as `online.backward_rows` has them.
    """
    groups, precise = query.shape[2] // key.shape[2], rows[0].dtype
    dot = functools.partial(jnp.einsum, preferred_element_type=precise)

    def gradients_of(part):
        tiles = cut(plan, part, query, key, bias, visible)
        value_tiles = cut_keys(plan, part, value, "h s")
        *sum_tiles, delta_tiles, grad_out_tiles = (cut_queries(plan, part, x, groups) for x in (*rows, grad_out))

        def step(grads, i, js):
            grad_query, grad_key, grad_value, grad_bias = grads
            weights = online.weights_of(logits_of(plan, scale, tiles, i, js), *(x[i][..., None] for x in sum_tiles))
            grad_weights = dot("bkgtv,bkvs->bkgts", grad_out_tiles[i], beside(value_tiles, js, -1))
            grad_logits = weights * (grad_weights - delta_tiles[i][..., None])
            scaled, weights = (grad_logits * scale).astype(query.dtype), weights.astype(value.dtype)
            grad_query = add_at(grad_query, dot("bkgts,bkhs->bkgth", scaled, beside(tiles.key, js, -1)), i)
            grad_key = add_beside(grad_key, dot("bkgth,bkgts->bkhs", tiles.query[i], scaled), js)
            grad_value = add_beside(grad_value, dot("bkgtv,bkgts->bkvs", grad_out_tiles[i], weights), js)
            grad_bias = None if bias is None else add_to_bias(plan, grad_bias, grad_logits, i, js)
            return grad_query, grad_key, grad_value, grad_bias

        # Gradients of keys and values with the features before the positions: a product that transposes a tile of weights
        # takes twice the time of one that transposes a tile of queries.
        like = tiles.query, tiles.key, value_tiles, tiles.bias
        grads = sweep(plan, part, step, jax.tree.map(lambda x: jnp.zeros(x.shape, precise), like))
        grad_query, grad_key, grad_value = join_queries(plan, grads[0]), join_keys(plan, grads[1]), join_keys(plan, grads[2])
        if bias is None:
            return grad_query, grad_key, grad_value
        grad_bias = rearrange(grads[3], "b k g t s -> b (k g) t s")[:, :, : bias.shape[2], : bias.shape[3]]
        return grad_query, grad_key, grad_value, grad_bias

    arrays, before = (query, key, value, bias), [None if x is None else in_columns(plan, x) for x in before[:3]] + [before[3]]
    likes = [jax.ShapeDtypeStruct(x.shape, dtype) for x in arrays[:3]]
    shapes = [columns_of(plan, x) for x in likes]
    if bias is not None:  # the gradient of a bias that parts share is a sum, in float32
        shapes.append(jax.ShapeDtypeStruct(bias.shape, precise))
    grads = parts.part_by_part(plan.parts, gradients_of, shapes, (3, 3, 3, 1)[: len(shapes)], rows, before)
    return *(in_order(x, like) for x, like in zip(grads[:3], likes, strict=True)), *(grads[3:] or [None])


def logits_of(plan: Plan, scale: float, tiles: "Tiles", i, js, scores=None):
    """The logits of one step and some `scores`, [b, K, G, t, s] in float32, -inf where not visible."""
    precise = jnp.promote_types(tiles.query.dtype, jnp.float32)
    products = jnp.einsum("bkgth,bkhs->bkgts", tiles.query[i], beside(tiles.key, js, -1), preferred_element_type=precise)
    logits = online.rounded(scale * products)
    logits = logits if scores is None else logits + scores
    if tiles.bias is not None:
        logits += pair_tiles(plan, tiles.bias, i, js)
    visible, tests = tiles.visible, []
    rows = lambda array: array[i][:, None, None, :, None]
    columns = lambda array: beside(array, js, -1)[:, None, None, None, :]
    if plan.pattern is not None:
        tests.append(plan.pattern.allowed(rows(visible.query_positions), columns(visible.key_positions), tiles.head))
    if visible.query_segment_ids is not None:
        tests.append(rows(visible.query_segment_ids) == columns(visible.key_segment_ids))
    if tiles.real is not None:
        tests.append(columns(tiles.real))
    if (plan.listed < 0).any():
        tests.append(jnp.repeat(js >= 0, plan.tiles[1]))
    if visible.mask is not None:
        tests.append(pair_tiles(plan, visible.mask, i, js))
    return jnp.where(functools.reduce(jnp.logical_and, tests), logits, -jnp.inf) if tests else logits


def sweep(plan: Plan, part, step, carry):
    """`carry` after `step(carry, i, js)` for every step of a part."""
    steps = plan.listed
    if steps.shape[:2] == (1, 1):  # no loop around a single step
        return step(carry, steps[0, 0, 0], steps[0, 0, 1:])
    steps = steps[0] if len(steps) == 1 else jnp.asarray(steps)[part % plan.parts[2]]
    return jax.lax.scan(lambda carry, words: (step(carry, words[0], words[1:]), None), carry, steps)[0]


# ---------------------------------------------------------------------------------------------------------- tiles


class Tiles(NamedTuple):
    """What makes the logits of one part, cut into tiles: i and j count query tiles and key tiles of t and s rows.

    The axis b counts samples and their columns; 1 stands for all.
    """

    query: jax.Array  # [i, b, K, G, t, H]
    key: jax.Array  # [j, b, K, H, s], see `cut_keys`
    bias: jax.Array | None  # [b|1, K|1, G|1, T|1, S|1]
    visible: Visible  # [i, b|1, t] and [j, b|1, s]; the mask as the bias
    real: jax.Array | None  # [j, b|1, s]: False past the end of the keys, and where the mask of a column hides a key
    head: jax.Array | int  # [K, G, 1, 1]: the number of each query head, where the pattern asks for it


def cut(plan: Plan, part, query, key, bias, visible: Visible) -> Tiles:
    """The arguments of a part in tiles: transposed once, contiguous, batch axes first."""
    kv_heads, groups = key.shape[2], query.shape[2] // key.shape[2]
    (query_tile, key_tile), (query_count, key_count) = plan.tiles, plan.counts

    def rows(array, side: int):
        """[B|1, R] of rows, or [B|1, R C] of positions, as [i, b, t]."""
        if array is None:
            return None
        by_column = array.shape[1] != plan.rows[side]
        array = in_columns(plan, jnp.broadcast_to(array, (len(query), *array.shape[1:]))) if by_column else array[:, :, None]
        array = pad_to(parts.share(plan.parts, array, part, None), 1, plan.tiles[side] * plan.counts[side])
        return rearrange(array, "b (i t) c -> i (b c) t", i=plan.counts[side])

    def pad_pairs(array):
        if array is None:
            return None
        array = parts.share(plan.parts, array[:, :, None], part, 1)[:, :, 0]
        for axis, tile, count in ((2, query_tile, query_count), (3, key_tile, key_count)):
            array = array if array.shape[axis] == 1 else pad_to(array, axis, tile * count)
        return rearrange(array, "b (k g) t s -> b k g t s", g=1 if array.shape[1] == 1 else groups)

    real, mask = None, visible.mask
    if plan.columns > 1 and mask is not None:
        real, mask = rows(mask[:, 0, 0], 1), None
    elif key_tile * key_count > plan.rows[1]:
        real = jnp.asarray(np.arange(key_tile * key_count).reshape(key_count, 1, key_tile) < plan.rows[1])
    positions = [None if plan.pattern is None else jnp.asarray(x) for x in visible[:2]]
    in_tiles = Visible(
        rows(positions[0], 0),
        rows(positions[1], 1),
        rows(visible.query_segment_ids, 0),
        rows(visible.key_segment_ids, 1),
        pad_pairs(mask),
    )
    head = 0
    if plan.pattern is not None and plan.pattern.heads > 1:
        own = kv_heads // plan.parts[2]
        head = (part % plan.parts[2] * own * groups + jnp.arange(own * groups)).reshape(own, groups, 1, 1)
    query, key = cut_queries(plan, part, query, groups), cut_keys(plan, part, key, "h s")
    return Tiles(query, key, pad_pairs(bias), in_tiles, real, head)


def cut_queries(plan: Plan, part, array, groups: int):
    """What a part has of [B, T, N, ...] -> [i, b, K, G, t, ...]."""
    tile, count = plan.tiles[0], plan.counts[0]
    array = pad_to(parts.share(plan.parts, in_columns(plan, array), part), 1, tile * count)
    return rearrange(array, "b (i t) c (k g) ... -> i (b c) k g t ...", i=count, g=groups)


def cut_keys(plan: Plan, part, array, order: str):
    """What a part has of [B, S, K, H] -> [j, b, K, s, H] for the order "s h", [j, b, K, H, s] for "h s".

    A product on a CPU wants the positions last in one of its operands: transposed here, once, they cost a sixth of what they
    cost transposed in each step.
    """
    tile, count = plan.tiles[1], plan.counts[1]
    array = pad_to(parts.share(plan.parts, in_columns(plan, array), part), 1, tile * count)
    return rearrange(array, "b (j s) c k h -> j (b c) k " + order, j=count)


def join_queries(plan: Plan, array):
    """[i, b, K, G, t, ...] -> what a part has of [B, T, C, N, ...]."""
    array = rearrange(array, "i (b c) k g t ... -> b (i t) c (k g) ...", c=plan.columns // plan.parts[1])
    return array[:, : plan.rows[0]]


def join_keys(plan: Plan, array):
    """[j, b, K, H, s] -> what a part has of [B, S, C, K, H]."""
    array = rearrange(array, "j (b c) k h s -> b (j s) c k h", c=plan.columns // plan.parts[1])
    return array[:, : plan.rows[1]]


def in_columns(plan: Plan, array):
    """[B, T, ...] -> [B, T / C, C, ...]."""
    return array.reshape(len(array), -1, plan.columns, *array.shape[2:])


def columns_of(plan: Plan, like):
    return jax.eval_shape(functools.partial(in_columns, plan), like)


def in_order(array, like):
    """The inverse of `in_columns`, in the dtype of an array."""
    return array.reshape(len(array), -1, *array.shape[3:]).astype(like.dtype)


def beside(tiles, js, axis: int):
    """Tiles js of [j, ...] side by side along an axis; a tile for -1 is some tile."""
    return tiles[js[0]] if len(js) == 1 else jnp.concatenate([tiles[jnp.maximum(j, 0)] for j in js], axis)


def put(tiles, tile, index):
    return jax.lax.dynamic_update_index_in_dim(tiles, tile, index, 0)


def add_at(tiles, change, index):
    return put(tiles, tiles[index] + change, index)


def add_beside(tiles, changes, js):
    """[j, ..., s] with changes [..., w s] added to tiles js."""
    if len(js) == 1:
        return add_at(tiles, changes, js[0])
    changes = jnp.stack(jnp.split(changes, len(js), -1))
    return tiles.at[jnp.where(js < 0, len(tiles), js)].add(changes, mode="drop", unique_indices=True)


def pair_tiles(plan: Plan, array, i, js):
    """The tiles (i, js) of a mask or bias [b|1, K|1, G|1, T|1, S|1], side by side."""
    js = js if array.shape[4] > 1 else js[:1]
    return jnp.concatenate([jax.lax.dynamic_slice(array, *place_of_tile(plan, array, i, j)) for j in js], -1)


def add_to_bias(plan: Plan, array, changes, i, js):
    """`array` with the changes of tiles (i, js) added, summed over the axes that `array` broadcasts."""
    for j, change in zip(js, jnp.split(changes, len(js), -1), strict=True):
        starts, shape = place_of_tile(plan, array, i, j)
        change = change.sum([axis for axis, size in enumerate(shape) if size != change.shape[axis]], keepdims=True)
        array = jax.lax.dynamic_update_slice(array, jax.lax.dynamic_slice(array, starts, shape) + change, starts)
    return array


def place_of_tile(plan: Plan, array, i, j):
    """Where the tile of a mask or bias [b|1, K|1, G|1, T|1, S|1] starts, and its shape."""
    starts, shape = [0, 0, 0], [*array.shape[:3]]
    for size, index, tile in zip(array.shape[3:], (i, jnp.maximum(j, 0)), plan.tiles, strict=True):
        starts.append(0 if size == 1 else index * tile)
        shape.append(1 if size == 1 else tile)
    return list(map(jnp.int32, starts)), shape
