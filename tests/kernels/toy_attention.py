"""A small attention made by `operation`: grouped heads, a shared bias, queries that are independent."""

import jax
import jax.numpy as jnp

from subquad.kernels.operation import operation


def scores_of(query, key, bias, positions):
    """Weights [b, k, g, t, s] of causal attention."""
    query = query.reshape(*query.shape[:2], key.shape[2], -1, query.shape[3])
    logits = jnp.einsum("btkgh,bskh->bkgts", query, key)
    if bias is not None:
        logits += bias[:, :, None]
    return jnp.where(jnp.arange(key.shape[1]) <= positions[:, None], logits, -1e9)


def forward(scale, query, key, value, bias, positions):
    logits = scale * scores_of(query, key, bias, positions)
    log_total = jax.nn.logsumexp(logits, axis=-1)
    out = jnp.einsum("bkgts,bskv->btkgv", jnp.exp(logits - log_total[..., None]), value)
    out = out.reshape(*query.shape[:3], -1)
    log_total = log_total.transpose(0, 3, 1, 2).reshape(query.shape[:3])
    return (out, log_total), (query, key, value, bias, positions, out, log_total)


def backward(scale, residuals, grads):
    *arrays, positions, out, log_total = residuals
    sums, pull = jax.vjp(lambda *arrays: forward(scale, *arrays, positions)[0], *arrays)
    return *pull(grads), None


attention = operation(
    forward,
    backward,
    arrays=("b t n h", "b s n h", "b s n v", "b n t s", "t"),
    outputs=("b t n v", "b t n"),
    independent="b n t",
)
