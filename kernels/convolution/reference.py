"""Long convolution as the direct sum: O(T^2) time and memory."""

import jax.numpy as jnp


def convolve(inputs, kernel, anticausal, runs):
    length = inputs.shape[1]
    position = jnp.arange(length)
    lag = position[:, None] - position[None, :]  # of the query behind the key

    def toeplitz(taps, index):
        inside = (index >= 0) & (index < taps.shape[1])
        return jnp.where(inside, taps[:, jnp.clip(index, 0, taps.shape[1] - 1)], 0)

    dtype = jnp.promote_types(jnp.result_type(inputs, kernel), jnp.float32)
    weights = toeplitz(kernel.astype(dtype), lag)
    if anticausal is not None:
        weights = weights + toeplitz(anticausal.astype(dtype), -lag - 1)
    if runs is not None:
        weights = jnp.where(runs[:, None, :, None] == runs[:, None, None, :], weights, 0)
    outputs = jnp.einsum("...dts,...sd->...td", weights, inputs.astype(dtype), precision="highest")
    return outputs.astype(inputs.dtype)
