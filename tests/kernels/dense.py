"""Softmax attention and its gradients in float64 NumPy, for the tests of every tiled form of it."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.oracle import relative_error

# Largest relative error of outputs and of gradients.
TOLERANCES = {"float32": (2e-6, 5e-6), "bfloat16": (1e-2, 2e-2), "float16": (2e-3, 4e-3)}


def draw(queries, keys=None, *, batch=2, heads=4, kv_heads=None, features=8, values=8, seed=0, dtype=np.float32):
    """query, key, value, and cotangents of out and lse."""
    rng = np.random.default_rng(seed)
    keys, kv_heads = keys or queries, kv_heads or heads
    shapes = [
        (queries, heads, features),
        (keys, kv_heads, features),
        (keys, kv_heads, values),
        (queries, heads, values),
    ]
    *arrays, grad_out = (rng.normal(size=(batch, *shape)).astype(np.float32) for shape in shapes)
    grad_lse = rng.normal(size=(batch, queries, heads)).astype(np.float32)
    return [jnp.asarray(x, dtype) for x in arrays], (jnp.asarray(grad_out, dtype), jnp.asarray(grad_lse))


def run(attend, arrays, cotangents):
    """(out, lse) of attend(*arrays) and the gradients of all arrays, as one compiled function."""

    @jax.jit
    def outputs_and_gradients(arrays, cotangents):
        outputs, pull = jax.vjp(attend, *arrays)
        return outputs, pull(cotangents)

    return outputs_and_gradients(arrays, cotangents)


def see(
    batch,
    queries,
    keys,
    *,
    is_causal=False,
    window_size=None,
    mask=None,
    query_positions=None,
    key_positions=None,
    query_segment_ids=None,
    key_segment_ids=None,
    scale=None,
):
    """bool [B, 1|N, T, S]: which key a query sees."""
    left, right = window_size if isinstance(window_size, tuple) else (window_size, window_size)
    at = np.arange(queries)[None] if query_positions is None else np.asarray(query_positions)
    of = np.arange(keys)[None] if key_positions is None else np.asarray(key_positions)
    distance = np.broadcast_to(of[:, None, None, :] - at[:, None, :, None], (batch, 1, queries, keys))
    seen = np.ones_like(distance, bool)
    seen = seen if left is None else seen & (distance >= -left)
    seen = seen if right is None else seen & (distance <= right)
    seen = seen & (distance <= 0) if is_causal else seen
    seen = seen if mask is None else seen & np.asarray(mask)
    if query_segment_ids is None:
        return seen
    return seen & (np.asarray(query_segment_ids)[:, None, :, None] == np.asarray(key_segment_ids)[:, None, None, :])


def formula(arrays, cotangents, bias=None, **options):
    """`run` in float64 NumPy, with the gradients written out."""
    query, key, value, grad_out, grad_lse = (np.asarray(x).astype(np.float64) for x in (*arrays, *cotangents))
    groups = query.shape[2] // key.shape[2]
    wide_key, wide_value = (x.repeat(groups, 2) for x in (key, value))
    scale = options.get("scale") or query.shape[-1] ** -0.5
    logits = scale * np.einsum("btnh,bsnh->bnts", query, wide_key)
    logits = logits if bias is None else logits + np.asarray(bias, np.float64)
    seen = see(len(query), query.shape[1], key.shape[1], **options) & ~np.isneginf(logits)
    with np.errstate(divide="ignore", invalid="ignore"):
        top = np.where(seen, logits, -np.inf).max(-1, keepdims=True)
        weights = np.where(seen, np.exp(logits - top), 0)
        total = weights.sum(-1, keepdims=True)
        weights = np.where(total > 0, weights / total, 0)
        lse = np.where(total > 0, top + np.log(total), -np.inf)
    out = np.einsum("bnts,bsnv->btnv", weights, wide_value)
    grad_weights = np.einsum("btnv,bsnv->bnts", grad_out, wide_value)
    mean = (weights * grad_weights).sum(-1, keepdims=True)
    grad_logits = weights * (grad_weights - mean + np.moveaxis(grad_lse, 1, 2)[..., None])
    grads = [
        scale * np.einsum("bnts,bsnh->btnh", grad_logits, wide_key),
        scale * np.einsum("bnts,btnh->bsnh", grad_logits, query),
        np.einsum("bnts,btnv->bsnv", weights, grad_out),
    ]
    grads[1:] = (g.reshape(*g.shape[:2], -1, groups, g.shape[-1]).sum(3) for g in grads[1:])
    if bias is not None:
        axes = tuple(axis for axis, size in enumerate(bias.shape) if size == 1)
        grads.append(grad_logits.sum(axes, keepdims=True))
    return (out, np.moveaxis(lse[..., 0], 1, 2)), grads


def compare(result, expected, dtype="float32", slack=1):
    """Checks ((out, lse), gradients) against those of `formula`."""
    ((out, lse), grads), ((want_out, want_lse), want_grads) = result, expected
    value_error, grad_error = (slack * error for error in TOLERANCES[dtype])
    assert out.dtype == jnp.dtype(dtype) and lse.dtype == jnp.float32
    assert relative_error(out, want_out) < value_error
    empty = np.isneginf(want_lse)
    np.testing.assert_array_equal(np.isneginf(lse), empty)
    assert (np.asarray(out, np.float32)[empty] == 0).all()
    assert relative_error(np.where(empty, 0, lse), np.where(empty, 0, want_lse)) < value_error
    assert len(grads) == len(want_grads) >= 3
    # A query with one key has a gradient of 0, up to the rounding of its terms.
    least = 0.1 * max(np.abs(want).max(initial=0) for want in want_grads)
    for grad, want in zip(grads, want_grads, strict=True):
        assert np.isfinite(np.asarray(grad, np.float32)).all()
        assert relative_error(grad, want, least) < grad_error
