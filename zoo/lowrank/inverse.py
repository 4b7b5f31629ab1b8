"""Pseudo-inverses of small matrices by an iteration of matmuls, which accelerators do faster than a decomposition."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from subquad.kernels import precision


@precision.promoting
@precision.full
def newton_schulz(
    matrix: Float[Array, "*B M M"], start: Float[Array, "*B M M"], num_iterations: int
) -> Float[Array, "*B M M"]:
    """An approximate inverse Z of each matrix A, from a first guess that satisfies |A A^+ - A Z_0| < 1.

        Z_{j+1} = Z_j (13 I - A Z_j (15 I - A Z_j (7 I - A Z_j))) / 4

    Each iteration cubes the error. Rows and columns of zeros in both stay zeros: they are left out of the inverse.

    Args:
        matrix: A, in float32: the iteration takes digits where A is nearly singular.
        start: Z_0.
        num_iterations: six suffice for softmax matrices that are not nearly singular.
    Source: Razavi et al., A New Iterative Method for Finding Approximate Inverses of Complex Matrices, 2014, as in
        Xiong et al., Nystromformer, 2021, arXiv 2102.03902.
    """
    identity = jnp.eye(matrix.shape[-1], dtype=matrix.dtype)

    def step(inverse, _):
        product = matrix @ inverse
        return inverse @ (13 * identity - product @ (15 * identity - product @ (7 * identity - product))) / 4, None

    return jax.lax.scan(step, start, length=num_iterations)[0]


def transposed_start(matrix: Float[Array, "*B M M"]) -> Float[Array, "*B M M"]:
    """A^T / (|A|_1 |A|_inf) of each matrix by itself: a first guess that always converges, be it slowly."""
    size = jnp.abs(matrix)
    norms = (size.sum(axis, keepdims=True).max((-2, -1), keepdims=True) for axis in (-2, -1))
    scale = jnp.prod(jnp.stack(list(norms)), axis=0)
    return matrix.mT / jnp.where(scale > 0, scale, 1)
