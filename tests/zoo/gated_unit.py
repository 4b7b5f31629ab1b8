"""What the tests of GAU and FLASH share: rotations, biases, and the weights of FLASH-pytorch as ours."""

import math

import jax.numpy as jnp
import numpy as np


def silu(x):
    return x / (1 + np.exp(-x))


def rotate(x, at, base=10_000.0):
    """Pairs (i, i + Z/2) of the last axis turned by at / base^(2i/Z)."""
    half = x.shape[-1] // 2
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * np.outer(at, base ** (-np.arange(half) / half)))
    return np.concatenate([turned.real, turned.imag], axis=-1)


def tokens(layer, x):
    """u, v and the heads, rotated, of inputs, in float64."""
    apply = lambda linear: silu(x @ np.float64(linear.kernel[...]) + np.float64(linear.bias[...]))
    z, at = apply(layer.shared), np.arange(x.shape[1])
    scale, shift = np.float64(layer.query_key_scale[...]), np.float64(layer.query_key_shift[...])
    heads = [z * kappa + mu for kappa, mu in zip(scale, shift, strict=True)]
    return apply(layer.gate), apply(layer.value), [rotate(head, at, layer.rotary_base) for head in heads]


def bias(layer, t, s):
    """b of a query and a key."""
    if hasattr(layer, "distances"):
        table = np.float64(layer.distances[...])
        return table[s - t + (len(table) - 1) // 2]
    left, right = np.float64(layer.rotated[...])
    return float(rotate(left, [t])[0] @ rotate(right, [s])[0])


def out(layer, gated):
    return gated @ np.float64(layer.out.kernel[...]) + np.float64(layer.out.bias[...])


def load(layer, weights) -> None:
    """FLASH-pytorch's maps, whose values come before the gate; its distances are in buckets: see `distances`."""
    value, gate = (jnp.split(weights[f"to_hidden.0.{leaf}"], 2) for leaf in ("weight", "bias"))
    last = "to_out.0" if "to_out.0.weight" in weights else "to_out"
    for module, kernel, shift in (
        (layer.value, value[0], gate[0]), (layer.gate, value[1], gate[1]),
        (layer.shared, weights["to_qk.0.weight"], weights["to_qk.0.bias"]),
        (layer.out, weights[f"{last}.weight"], weights[f"{last}.bias"]),
    ):
        module.kernel[...], module.bias[...] = kernel.T, shift


def norm(x, weights):
    """Its layer norm, which stands within."""
    x = x - x.mean(-1, keepdims=True)
    return x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-5) * weights["norm.weight"] + weights["norm.bias"]


def distances(table, longest: int, scale: float, is_causal: bool):
    """The numbers of its buckets of distances (T5's, up to 128) for distances -longest + 1 .. longest - 1 of key from query."""
    count, before = len(table), -np.arange(-longest + 1, longest)
    buckets = np.zeros_like(before)
    if is_causal:
        before = np.maximum(before, 0)
    else:
        count //= 2
        buckets, before = (before < 0) * count, np.abs(before)
    exact = count // 2
    far = exact + (np.log(np.maximum(before, 1) / exact) / math.log(128 / exact) * (count - exact)).astype(int)
    return table[buckets + np.where(before < exact, before, np.minimum(far, count - 1)), 0] * scale
