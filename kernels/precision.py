"""Float32 stays float32 on every device, and operations promote as they say, whatever JAX's settings are elsewhere."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np


def full(function, dtype=None):
    """`function`, with matmuls at `Precision.HIGHEST` where it computes in float32 and the caller has chosen no precision.

    `dtype` decides; None: that of the first floating-point array, which is the query of most: a bias may be shorter.

    By default a GPU rounds their operands to TF32, and a TPU to bfloat16: errors of 1e-3 and 1e-2 where an operation says
    1e-5. `jax.default_matmul_precision` chooses others. Arrays of 16 bits have no more digits than that, and keep the fast
    products. A CPU knows one kind only.
    """

    @functools.wraps(function)
    def run(*args, **kwargs):
        dtypes = (x.dtype for x in jax.tree.leaves((args, kwargs)) if hasattr(x, "dtype"))
        first = next((x for x in dtypes if jnp.issubdtype(x, jnp.inexact)), None) if dtype is None else dtype
        short = first in (jnp.bfloat16, jnp.float16)
        chosen = jax.config.jax_default_matmul_precision is not None
        with contextlib.nullcontext() if short or chosen else jax.default_matmul_precision("highest"):
            return function(*args, **kwargs)

    return run


def promoting(function):
    """`function`, also where JAX is set to raise when ranks or dtypes are promoted.

    `jax_numpy_rank_promotion` and `jax_numpy_dtype_promotion` guard a caller's own arithmetic: what an operation's arguments
    do together is its formula, and tested against float64.
    """

    @functools.wraps(function)
    def run(*args, **kwargs):
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            return function(*args, **kwargs)

    return run


@promoting
def wide(x):
    """The array in float32, or in float64 where it has that."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def matched(tree):
    """The tree, with all its floating and complex arrays in 64 bits where any is: what is mixed is computed in the most.

    NumPy's arrays have the dtype that JAX makes of them: 64 bits only under `jax_enable_x64`.
    """
    is_inexact = lambda x: isinstance(x, jax.Array | np.ndarray) and jnp.issubdtype(x.dtype, jnp.inexact)
    is_wide = any(jnp.result_type(x) in (jnp.float64, jnp.complex128) for x in jax.tree.leaves(tree) if is_inexact(x))

    def one(x):
        if not is_inexact(x):
            return x
        dtype = jnp.promote_types(jnp.result_type(x), jnp.float64) if is_wide else jnp.result_type(x)
        return x if x.dtype == dtype else x.astype(dtype)

    return jax.tree.map(one, tree)


def define_passes(function, forward, backward) -> None:
    """`function.defvjp(forward, backward)`, both promoting: JAX traces them when it likes, not inside of the operation."""
    function.defvjp(promoting(forward), promoting(backward))
