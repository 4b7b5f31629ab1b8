"""Array functions, one folder per operation: `softmax.attention`, `lsh.attention`, `convolution.convolve`, ...

Each operation's public functions state their formula, and take `implementation`: see `dispatch`. What would run here, and
why nothing else, `explain` prints:

    >>> from subquad.kernels import explain, softmax
    >>> explain(softmax.attention, *(jnp.ones((1, 8, 2, 4)),) * 3)
    softmax.attention runs ...
"""

from subquad.kernels import (
    block_sparse,
    convolution,
    dispatch,
    entmax,
    gather,
    linear,
    lsh,
    matrix,
    relative,
    scan,
    softmax,
    ssm,
    strided,
)
from subquad.kernels.dispatch import explain

__all__ = [
    "block_sparse",
    "convolution",
    "dispatch",
    "entmax",
    "explain",
    "gather",
    "linear",
    "lsh",
    "matrix",
    "relative",
    "scan",
    "softmax",
    "ssm",
    "strided",
]
