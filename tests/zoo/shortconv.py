"""What the tests of lightweight and dynamic convolutions share: the definition, token by token, and where peers stop."""

import jax.numpy as jnp
import numpy as np
from flax import nnx


def numbers(variable) -> np.ndarray:
    return np.asarray(variable[...], np.float64)


def definition(layer, x, taps) -> np.ndarray:
    """W_O of the sums of u under `taps`, [T, K, H] or [K, H], in float64; of one sequence [T, D].

    Args:
        taps: normalised; the first weighs the furthest token ahead. A function of u.
    """
    both = x.astype(np.float64) @ numbers(layer.convolution.input.kernel) + numbers(layer.convolution.input.bias)
    value, gate = np.split(both, 2, axis=-1) if layer.convolution.use_glu else (both, np.inf)
    gated = value / (1 + np.exp(-gate))
    taps, (length, features) = taps(gated), gated.shape
    taps = np.broadcast_to(taps, (length, *taps.shape[-2:]))
    ahead = 0 if layer.is_causal else (taps.shape[1] - 1) // 2
    sums = np.zeros_like(gated)
    for t in range(length):
        for j in range(taps.shape[1]):
            for c in range(features):
                if 0 <= t + ahead - j < length:
                    sums[t, c] += taps[t, j, c * taps.shape[2] // features] * gated[t + ahead - j, c]
    return sums @ numbers(layer.out.kernel) + numbers(layer.out.bias)


def softmax(logits, axis=-2) -> np.ndarray:
    exponentials = np.exp(logits)
    return exponentials / exponentials.sum(axis, keepdims=True)


def bare(layer) -> nnx.Module:
    """A copy, made without GLU, whose maps do nothing: peers' modules are the convolution alone."""
    layer = nnx.clone(layer)
    for linear in (layer.convolution.input, layer.out):
        linear.kernel[...], linear.bias[...] = jnp.eye(layer.in_features), jnp.zeros(layer.in_features)
    return layer
