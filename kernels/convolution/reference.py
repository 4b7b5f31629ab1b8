"""Long convolution as the direct sum: O(T^2) time and memory."""

import jax.numpy as jnp


def convolve(inputs, kernel, anticausal):
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
    outputs = jnp.einsum("dts,bsd->btd", weights, inputs.astype(dtype), precision="highest")
    return outputs.astype(inputs.dtype)
