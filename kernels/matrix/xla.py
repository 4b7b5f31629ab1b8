"""Matrix iterations as scans: the backward pass keeps one iterate of each step, and of Sinkhorn's only two vectors."""

import functools

import jax
import jax.numpy as jnp

from subquad.kernels import precision
from subquad.kernels.matrix.reference import allow, improve, normaliser, scale


@functools.partial(jax.jit, static_argnames="iterations")
def pseudo_inverse(matrix, iterations):
    """See `matrix.pseudo_inverse`."""
    a = precision.wide(matrix)
    step = jax.checkpoint(lambda z, _: (improve(a, z), None), prevent_cse=False)
    z, _ = jax.lax.scan(step, scale(a) * a.swapaxes(2, 3), None, iterations)
    return z.astype(matrix.dtype)


@functools.partial(jax.jit, static_argnames=("iterations", "is_causal"))
def sinkhorn(logits, iterations, is_causal):
    """See `matrix.sinkhorn`: L = logits - rows - columns."""
    _, x = allow(logits, is_causal)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(columns, _):
        rows = normaliser(x - columns, 3)
        return normaliser(x - rows, 2), rows

    columns, rows = jax.lax.scan(step, jnp.zeros_like(x[:, :, :1]), None, iterations)
    return jnp.exp(x - rows[-1] - columns).astype(logits.dtype)
