"""alpha-entmax with gradients by hand; attention a row of tiles at a time: all keys by as many queries as fit."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from subquad.kernels import checks, precision
from subquad.kernels.entmax.threshold import ratios, scaled, search, slope_at_largest, steepness, weights
from subquad.kernels.operation import operation
from subquad.kernels.softmax import online

# Bytes of the logits of one step over all heads and samples: on a CPU what its cache holds, on an accelerator few steps.
CPU_BYTES, ACCELERATOR_BYTES = 1 << 20, 1 << 26


def entmax(logits, alpha, axis):
    """See `entmax.entmax`."""
    constant, alpha = _constant_or_array(logits.dtype, alpha)
    return compiled_map(axis, constant, logits, alpha)


def attention(query, key, value, alpha, mask, positions, scale):
    """See `entmax.attention`; positions (queries', keys') are those of a causal call."""
    constant, alpha = _constant_or_array(query.dtype, alpha)
    if alpha is not None:
        alpha = jnp.broadcast_to(alpha, query.shape[2:3])
    plan = Plan(constant, scale, CPU_BYTES if jax.default_backend() == "cpu" else ACCELERATOR_BYTES)
    return attend(plan, query, key, value, alpha, mask, positions)


def _constant_or_array(dtype, alpha):
    if isinstance(alpha, float):
        return alpha, None
    return None, alpha.astype(jnp.promote_types(dtype, jnp.float32))


# ------------------------------------------------------------------------------------------------------------- the map


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _entmax(axis, constant, logits, alpha):
    return _entmax_forward(axis, constant, logits, alpha)[0]


def _entmax_forward(axis, constant, logits, alpha):
    rows = _last(logits, axis).astype(jnp.promote_types(logits.dtype, jnp.float32))
    of_rows = constant if alpha is None else _last(alpha, axis)
    maximum, found = _searched(rows, of_rows)
    p = weights(scaled(_below(rows, maximum), found, of_rows), found, of_rows)
    return jnp.moveaxis(p, -1, axis).astype(logits.dtype), (logits, alpha, maximum, found)


def _entmax_backward(axis, constant, saved, cotangent):
    logits, alpha, maximum, found = saved
    rows, of_rows = _last(logits, axis).astype(maximum.dtype), constant if alpha is None else _last(alpha, axis)
    u = scaled(_below(rows, maximum), found, of_rows)
    grad_logits, change = _gradient(u, found, of_rows, _last(cotangent, axis).astype(rows.dtype))
    if alpha is None:
        return jnp.moveaxis(grad_logits, -1, axis).astype(logits.dtype), None
    shared = tuple(i for i, size in enumerate(of_rows.shape) if size == 1)
    grad_alpha = jnp.moveaxis(change.sum(shared, keepdims=True), -1, axis)
    return jnp.moveaxis(grad_logits, -1, axis).astype(logits.dtype), grad_alpha


precision.define_passes(_entmax, _entmax_forward, _entmax_backward)

# Compiled once per shape also for callers who compile nothing; inside their `jit` it is part of theirs.
compiled_map = jax.jit(_entmax, static_argnums=(0, 1))


def _last(array, axis):
    return jnp.moveaxis(array, axis, -1)


def _searched(logits, alpha):
    """(maximum, -log of the largest weight)."""
    maximum = logits.max(-1, keepdims=True)
    maximum = jnp.where(jnp.isneginf(maximum), 0.0, maximum)
    return maximum, search(logits - maximum, alpha)


def _below(logits, maximum):
    # Where logits come out of another product, a rounding may put them above their maximum.
    return jnp.minimum(logits - maximum, 0)


def _gradient(u, found, alpha, grad_p):
    """Of the logits, and by element of alpha (0 where it is a constant)."""
    slope = ratios(u, alpha)[1]
    total = slope.sum(-1, keepdims=True)
    centred = grad_p - (slope * grad_p).sum(-1, keepdims=True) / jnp.where(total > 0, total, 1)
    of_alpha = 0 if isinstance(alpha, float) else jnp.exp(-found) * slope_at_largest(u, found, alpha) * centred
    return steepness(found, alpha) * (slope * centred), of_alpha


# ----------------------------------------------------------------------------------------------------------- attention


class Plan(NamedTuple):
    """Everything static about a call."""

    alpha: float | None  # None: an array
    scale: float
    step_bytes: int

    def tile(self, query, key) -> tuple[int, int]:
        """Queries of a step, and how many steps."""
        batch, length, heads, _ = query.shape
        steps = math.ceil(length / max(1, self.step_bytes // (4 * batch * heads * key.shape[1])))
        return math.ceil(length / steps), steps


@precision.full
def _attention_forward(plan, query, key, value, alpha, mask, positions):
    arguments = query, key, value, alpha, mask, positions
    logits_of, of_heads = _tiles(plan, query, key, alpha, mask, positions)
    tile, steps = plan.tile(query, key)
    values = rearrange(value, "b s k v -> b k s v")

    def step(_, i):
        logits = logits_of(i, _cut(tile, key.shape[2], query, i))
        maximum, found = _searched(logits, of_heads)
        p = weights(scaled(_below(logits, maximum), found, of_heads), found, of_heads).astype(value.dtype)
        out = jnp.einsum("bkgts,bksv->bkgtv", p, values, preferred_element_type=found.dtype)
        return _, (out.astype(query.dtype), maximum, found)

    out, *of_rows = (_join(x, query.shape[1]) for x in jax.lax.scan(step, 0, jnp.arange(steps))[1])
    return out, (*arguments, *(x[..., 0] for x in of_rows))


@precision.full
def _attention_backward(plan, saved, cotangent):
    *arguments, maxima, logarithms = saved
    query, key, value, alpha, mask, positions = arguments
    logits_of, of_heads = _tiles(plan, query, key, alpha, mask, positions)
    tile, steps = plan.tile(query, key)
    keys, values = (rearrange(x, "b s k h -> b k h s") for x in (key, value))
    precise = maxima.dtype
    dot = functools.partial(jnp.einsum, preferred_element_type=precise)

    def step(grads, i):
        queries, grad_out, maximum, found = (
            _cut(tile, key.shape[2], x, i) for x in (query, cotangent, maxima[..., None], logarithms[..., None])
        )
        unused = checks.may_be_padding([queries], grad_out)
        queries = jnp.where(unused, 0, queries)
        maximum, found = jnp.where(unused, jnp.inf, maximum), jnp.where(unused, 0, found)
        u = scaled(_below(logits_of(i, queries), maximum), found, of_heads)
        p = weights(u, found, of_heads).astype(value.dtype)
        grad_logits, change = _gradient(u, found, of_heads, dot("bkgtv,bkvs->bkgts", grad_out, values))
        grad_products = (plan.scale * grad_logits).astype(query.dtype)
        grad_key = dot("bkgth,bkgts->bkhs", queries, grad_products)
        grad_value = dot("bkgtv,bkgts->bkvs", grad_out, p)
        grad_alpha = 0 if alpha is None else jnp.sum(change, (0, 3, 4))
        grads = jax.tree.map(jnp.add, grads, (grad_key, grad_value, grad_alpha))
        return grads, dot("bkgts,bkhs->bkgth", grad_products, keys).astype(query.dtype)

    heads = key.shape[2], query.shape[2] // key.shape[2]
    start = *(jnp.zeros(x.shape, precise) for x in (keys, values)), 0 if alpha is None else jnp.zeros(heads, precise)
    (*by_key, grad_alpha), grad_query = jax.lax.scan(step, start, jnp.arange(steps))
    grad_key, grad_value = (rearrange(x, "b k h s -> b s k h").astype(key.dtype) for x in by_key)
    grad_alpha = None if alpha is None else grad_alpha.ravel()
    return _join(grad_query, query.shape[1]), grad_key, grad_value, grad_alpha, None, None


attend = operation(
    _attention_forward,
    _attention_backward,
    arrays=("b t n h", "b s n h", "b s n v", "n", "b n t s", ("b t", "b s")),
    outputs="b t n v",
    saved=("b t n", "b t n"),
)


def _tiles(plan, query, key, alpha, mask, positions):
    """((step, its queries) -> logits [B, K, G, t, S] in float32, -inf where not visible; alpha of these heads)."""
    kv_heads, tile = key.shape[2], plan.tile(query, key)[0]
    keys, precise = rearrange(key, "b s k h -> b k h s"), jnp.promote_types(query.dtype, jnp.float32)

    def logits_of(i, queries):
        logits = jnp.einsum("bkgth,bkhs->bkgts", queries, keys, preferred_element_type=precise)
        logits = online.rounded(plan.scale * logits)
        if positions is not None:
            of_queries = _rows(positions[0], 1, i, tile)
            logits = jnp.where((positions[1][:, None] <= of_queries[:, :, None])[:, None, None], logits, -jnp.inf)
        if mask is not None:
            seen = mask if mask.shape[2] == 1 else _rows(mask, 2, i, tile)
            seen = rearrange(seen, "b (k g) t s -> b k g t s", k=1 if mask.shape[1] == 1 else kv_heads)
            logits = jnp.where(seen, logits, -jnp.inf)
        return logits

    if alpha is None:
        return logits_of, plan.alpha
    return logits_of, rearrange(alpha, "(k g) -> 1 k g 1 1", k=kv_heads)


def _cut(tile, kv_heads, array, i):
    """The queries of a step [B, K, G, t, ...] of [B, T, N, ...]."""
    return rearrange(_rows(array, 1, i, tile), "b t (k g) ... -> b k g t ...", k=kv_heads)


def _rows(array, axis, i, tile):
    """Those of a step, and 0 past the end."""
    return jnp.take(array, i * tile + jnp.arange(tile), axis, mode="fill", fill_value=0)


def _join(tiles, length):
    """[steps, B, K, G, t, ...] as [B, T, N, ...]."""
    return rearrange(tiles, "i b k g t ... -> b (i t) (k g) ...")[:, :length]
