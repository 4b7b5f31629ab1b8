"""Peers that need a GPU. Guarded: where one does not import, its row says so."""

import numpy as np

from peers import Contest, dense, patterns
from peers.sides import Case, jax_side, torch_side


def flex(case: Case, visible):
    """FlexAttention, compiled, with a block mask from visible(query position, key position)."""
    import torch
    from torch.nn.attention import flex_attention

    mask = flex_attention.create_block_mask(
        lambda b, h, q, k: visible(q, k), None, None, case.length, case.length, device="cuda"
    )
    compiled = torch.compile(flex_attention.flex_attention)
    return torch_side(case, lambda q, k, v: compiled(q, k, v, block_mask=mask), case.draw(3), heads_first=True)


def window(query, key):
    distance = query - key
    return (distance <= patterns.WINDOW) & (distance >= -patterns.WINDOW)


def strides(query, key):
    distance = query - key
    return (distance >= 0) & ((distance <= patterns.STRIDE) | (distance % patterns.STRIDE == 0))


def fla(case: Case):
    """Chunked linear attention of flash-linear-attention, with the identity for features on both sides."""
    from fla.ops.linear_attn import chunk_linear_attn

    q, k, v = case.draw(3)
    return torch_side(
        case, lambda q, k, v: chunk_linear_attn(q, k, v, scale=1.0, normalize=True)[0], [np.abs(q), np.abs(k), v]
    )


def ours_linear(case: Case):
    from subquad.kernels import linear

    q, k, v = case.draw(3)
    return jax_side(case, lambda q, k, v: linear.attention(q, k, v, is_causal=True), [np.abs(q), np.abs(k), v])


def kvax(case: Case):
    """Flash attention of kvax, causal."""
    import jax.numpy as jnp
    from kvax.ops import create_attention_mask, flash_attention
    from kvax.utils import attention_specs

    at = jnp.broadcast_to(jnp.arange(case.length, dtype=jnp.int32), (case.batch, case.length))
    one = jnp.zeros_like(at)
    with attention_specs(query_specs=("data", None, None, None), kv_specs=("data", None, None, None)):
        mask = create_attention_mask(at, one, at, one)
    attend = lambda q, k, v: flash_attention(q, k, v, at, one, at, one, mask, scale=case.features**-0.5)
    return jax_side(case, attend, case.draw(3))


def accelerated_scan(case: Case):
    """The Triton form of accelerated-scan: h_t = a_t h_{t-1} + x_t on [B, D, T]."""
    from accelerated_scan.triton import scan

    gates, tokens = _scan_arrays(case)
    return torch_side(case, lambda a, x: scan(a, x), [np.ascontiguousarray(x.swapaxes(1, 2)) for x in (gates, tokens)])


def ours_scan(case: Case):
    from subquad.kernels import scan

    return jax_side(case, lambda a, x: scan.first_order(a, x)[0], _scan_arrays(case))


def _scan_arrays(case: Case):
    tokens = case.tokens()
    return [(1 / (1 + np.exp(-case.draw(1, tokens.shape)[0]))).astype(np.float32), tokens]


CONTESTS = [
    Contest(
        "local", "FlexAttention, full", "torch", lambda case: patterns.ours_local(case, False),
        lambda case: flex(case, window), same=True, devices=("gpu",), note=f"window {patterns.WINDOW} on each side",
    ),
    Contest(
        "strided", "FlexAttention", "torch", patterns.ours_strided, lambda case: flex(case, strides), same=True,
        devices=("gpu",), note=f"stride {patterns.STRIDE}",
    ),
    Contest("linear", "fla, causal", "flash-linear-attention", ours_linear, fla, same=True, devices=("gpu",)),
    Contest("dense", "kvax, causal", "kvax", lambda case: dense.ours(case, True), kvax, same=True, devices=("gpu",)),
    Contest("scan", "accelerated-scan", "accelerated-scan", ours_scan, accelerated_scan, devices=("gpu",)),
]  # fmt: skip
