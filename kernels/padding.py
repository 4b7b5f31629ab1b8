"""One axis of an array, made longer."""

import jax.numpy as jnp


def pad_to(array, axis: int, length: int, **options):
    """The array with zeros (or False) at the end of an axis, up to `length`; `options`: of `jax.numpy.pad`."""
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, length - array.shape[axis])
    return jnp.pad(array, widths, **options) if array.shape[axis] < length else array
