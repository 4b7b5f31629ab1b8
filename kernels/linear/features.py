"""Feature maps whose products estimate or replace a kernel: the sums of linear attention are over their features."""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from subquad.kernels import precision

FeatureMap = Literal["softmax", "relu"]

# Softmax features are floored at exp(-30) = 1e-13 of the token's largest, so that the product of the features of any
# query and any key is a normal float32.
LOG_FLOOR = -30.0
# What the paper's own implementation adds to ReLU features, so that no denominator is 0.
RELU_OFFSET = 1e-3


@precision.promoting
def softmax_features(
    inputs: Float[Array, "*B H"], projection: Float[Array, "M H"]
) -> tuple[Float[Array, "*B M"], Float[Array, "*B"]]:
    """Positive random features of the softmax kernel, split into features of at most 1 and a log scale per token.

        phi(x)_i = M^-1/2 exp(w_i . x' - |x'|^2 / 2),   x' = x / H^1/4                                (eq. 5, Lemma 1)
        phi(x) = exp(log_scale) features,   E[phi(q) . phi(k)] = exp(q . k / sqrt(H))

    No maximum is taken over other tokens: the log scale is the token's own, and whoever sums the features weighs them
    with it.

    Args:
        inputs: queries or keys.
        projection: rows w_i, drawn from the standard normal distribution.
    Returns: features in [exp(-30), 1] and log_scale, both float32. The derivative takes log_scale for a constant,
        which is exact for everything made of their product.
    """
    num_features, head_features = projection.shape
    scaled = precision.wide(inputs) * head_features**-0.25
    # Exponents: the short mantissas of an accelerator's default precision would be errors of per cents here.
    logits = jnp.einsum("...h,mh->...m", scaled, projection, precision=jax.lax.Precision.HIGHEST)
    half_norm, largest = 0.5 * jnp.sum(scaled**2, axis=-1), jax.lax.stop_gradient(logits.max(-1))
    constant = jax.lax.stop_gradient(half_norm)
    # The norm cancels in the features; its derivative stays, since the log scale counts as a constant.
    features = _floored_exp(logits - (largest + (half_norm - constant))[..., None])
    return features, largest - constant - 0.5 * math.log(num_features)


@precision.promoting
def relu_features(inputs: Float[Array, "*B H"], projection: Float[Array, "M H"]) -> Float[Array, "*B M"]:
    """Random features of the generalised kernel with f = ReLU: phi(x)_i = M^-1/2 (max(w_i . x, 0) + 0.001).

    Args:
        inputs: queries or keys.
        projection: rows w_i, drawn from the standard normal distribution.
    Returns: [*B, M], float32.
    Source: Choromanski et al., 2020, arXiv 2009.14794, section 2.2 (generalised attention).
    """
    inputs = precision.wide(inputs)
    projected = jnp.einsum("...h,mh->...m", inputs, projection, precision=jax.lax.Precision.HIGHEST)
    return (jax.nn.relu(projected) + RELU_OFFSET) * projection.shape[0] ** -0.5


@jax.custom_jvp
def _floored_exp(x):
    """exp(max(x, LOG_FLOOR)); its derivative needs only itself."""
    return jnp.exp(jnp.maximum(x, LOG_FLOOR))


@_floored_exp.defjvp
def _floored_exp_derivative(primals, tangents):
    value = _floored_exp(*primals)
    return value, jnp.where(value > 1.01 * math.exp(LOG_FLOOR), value, 0) * tangents[0]
