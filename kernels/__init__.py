"""Array functions, one folder per operation: `softmax.attention`, `lsh.attention`, `convolution.convolve`, ...

Each operation's public functions state their formula, and take `implementation`: see `dispatch`.
"""

from subquad.kernels import (
    block_sparse,
    convolution,
    dispatch,
    linear,
    lsh,
    matrix,
    relative,
    scan,
    softmax,
    ssm,
    strided,
)

__all__ = [
    "block_sparse",
    "convolution",
    "dispatch",
    "linear",
    "lsh",
    "matrix",
    "relative",
    "scan",
    "softmax",
    "ssm",
    "strided",
]
