"""The variable types of what no gradient moves: random features, and centroids; what features are made of."""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from subquad.kernels import precision

RowNorm = Literal["chi", "sqrt"]


class RandomFeature(nnx.Variable):
    """Fixed random numbers that a layer was built with: projections, hash rotations, random blocks.

    Not an `nnx.Param`, so `nnx.Optimizer(model, tx, wrt=nnx.Param)` leaves it alone; part of `nnx.state(model)`, so a
    checkpoint brings it back.
    """


class Centroids(nnx.BatchStat):
    """Centres of clusters that a layer moves where the caller says so, and no gradient does.

    Not an `nnx.Param`, so `nnx.Optimizer(model, tx, wrt=nnx.Param)` leaves them alone; part of `nnx.state(model)`, so a
    checkpoint brings them back. What handles the statistics of batch norms handles them, too.
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
    rows = jax.random.normal(norms, (num_features, head_features), jnp.float32)
    if orthogonal:
        blocks = math.ceil(num_features / head_features)
        gaussian = jax.random.normal(directions, (blocks, head_features, head_features), jnp.float32)
        # The signs make the factor uniform (Haar) over the orthogonal matrices: QR fixes them by convention.
        basis, triangle = jnp.linalg.qr(gaussian)
        basis *= jnp.sign(jnp.diagonal(triangle, axis1=-2, axis2=-1))[:, None, :]
        unit = basis.swapaxes(-2, -1).reshape(-1, head_features)[:num_features]
    else:
        unit = rows / jnp.linalg.norm(rows, axis=-1, keepdims=True)
    norm = jnp.linalg.norm(rows, axis=-1, keepdims=True) if row_norm == "chi" else math.sqrt(head_features)
    return unit * norm


@precision.promoting
def unit(x: Float[Array, "*B H"], epsilon: float = 0.0, offset: float = 0.0) -> Float[Array, "*B H"]:
    """x / (sqrt(|x|^2 + epsilon) + offset), wide; 0 with a zero gradient where it were 0 / 0."""
    x = precision.wide(x)
    squares = jnp.sum(x**2, axis=-1, keepdims=True) + epsilon
    norm = jnp.sqrt(jnp.where(squares > 0, squares, 1)) + offset
    return jnp.where(squares > 0, x / norm, 0)


def elu_plus_one(x: Float[Array, "*B H"]) -> Float[Array, "*B H"]:
    """elu(x) + 1, which keeps its digits where x is far below 0."""
    return jnp.where(x > 0, x + 1, jnp.exp(jnp.where(x > 0, 0, x)))
