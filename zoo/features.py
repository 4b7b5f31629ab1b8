"""Random features: the variable type that holds them, the projections they are made of, and the feature maps."""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

# Softmax features are floored at exp(-30) = 1e-13 of the token's largest, so that the product of the features of any
# query and any key is a normal float32.
LOG_FLOOR = -30.0
# What the paper's own implementation adds to ReLU features, so that no denominator is 0.
RELU_OFFSET = 1e-3

RowNorm = Literal["chi", "sqrt"]


class RandomFeature(nnx.Variable):
    """Fixed random numbers that a layer was built with: projections, hash rotations, random blocks.

    Not an `nnx.Param`, so `nnx.Optimizer(model, tx, wrt=nnx.Param)` leaves it alone; part of `nnx.state(model)`, so a
    checkpoint brings it back.
    """


def random_projection(
    key: Key[Array, ""], num_features: int, head_features: int, *, orthogonal: bool = True, row_norm: RowNorm = "chi"
) -> Float[Array, "M H"]:
    """M random directions in H dimensions, orthogonal to each other in blocks of H.

    Each row alone is a standard Gaussian vector (with `row_norm="chi"`), so features made of them are unbiased
    whether or not the rows are orthogonal; orthogonal rows have the smaller variance.

    Args:
        key: a PRNG key.
        num_features: rows M, any number: the last block is cut.
        head_features: columns H.
        orthogonal: rows of one block of H are exactly orthogonal; else independent.
        row_norm: "chi" draws the norms as those of Gaussian vectors; "sqrt" sets all to sqrt(H), which
            has less variance still and a small bias.
    Returns: [M, H], float32.
    Raises: ValueError: row_norm is another word.
    Source: Choromanski et al., Rethinking Attention with Performers, 2020, arXiv 2009.14794, section 2.4.
    """
    if row_norm not in ("chi", "sqrt"):
        raise ValueError(f"random_projection: row_norm must be 'chi' or 'sqrt', got {row_norm!r}. Use 'chi'.")
    directions, norms = jax.random.split(key)
    rows = jax.random.normal(norms, (num_features, head_features))
    if orthogonal:
        blocks = math.ceil(num_features / head_features)
        gaussian = jax.random.normal(directions, (blocks, head_features, head_features))
        # The signs make the factor uniform (Haar) over the orthogonal matrices: QR fixes them by convention.
        basis, triangle = jnp.linalg.qr(gaussian)
        basis *= jnp.sign(jnp.diagonal(triangle, axis1=-2, axis2=-1))[:, None, :]
        unit = basis.swapaxes(-2, -1).reshape(-1, head_features)[:num_features]
    else:
        unit = rows / jnp.linalg.norm(rows, axis=-1, keepdims=True)
    norm = jnp.linalg.norm(rows, axis=-1, keepdims=True) if row_norm == "chi" else math.sqrt(head_features)
    return unit * norm


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
        projection: rows w_i, of `random_projection`.
    Returns: features in [exp(-30), 1] and log_scale, both float32. The derivative takes log_scale for a constant,
        which is exact for everything made of their product.
    """
    num_features, head_features = projection.shape
    scaled = inputs.astype(jnp.float32) * head_features**-0.25
    # Exponents: the short mantissas of an accelerator's default precision would be errors of per cents here.
    logits = jnp.einsum("...h,mh->...m", scaled, projection, precision=jax.lax.Precision.HIGHEST)
    logits -= 0.5 * jnp.sum(scaled**2, axis=-1, keepdims=True)
    largest = jax.lax.stop_gradient(logits.max(-1))
    features = jnp.exp(jnp.maximum(logits - largest[..., None], LOG_FLOOR))
    return features, largest - 0.5 * math.log(num_features)


def relu_features(
    inputs: Float[Array, "*B H"], projection: Float[Array, "M H"], *, offset: float = RELU_OFFSET
) -> Float[Array, "*B M"]:
    """Random features of the generalised kernel with f = ReLU: phi(x)_i = M^-1/2 (max(w_i . x, 0) + offset).

    Args:
        inputs: queries or keys.
        projection: rows w_i, of `random_projection`.
        offset: keeps every feature positive.
    Returns: [*B, M], float32.
    Source: Choromanski et al., 2020, arXiv 2009.14794, section 2.2 (generalised attention).
    """
    projected = jnp.einsum("...h,mh->...m", inputs.astype(jnp.float32), projection)
    return (jax.nn.relu(projected) + offset) * projection.shape[0] ** -0.5
