"""What a query may see, as one value.

A pattern is a frozen dataclass of numbers, so that equal patterns are one compilation. It is asked by the reference, the tiled
paths, the layers that extend a sequence, their plots and the tests of cost; it is never a T x T array. Patterns compose:

    Band(window, window) | Globals(0, 4)                        either shows the key
    InBlocks(64, Band(1, 1) | Globals(0, 1)) & CAUSAL           both show it
    ~Band(window, window)                                       what it does not show

As a picture, queries down and keys across, `x` where a query sees a key:

    CAUSAL      Band(1, 0)    Band(0, 1)    BlockPermutation(2, 2, (1,))    GlobalKeys(0, 1) | Band(0, 0)
    x . . .     x . . .       x x . .       . . x x                         x . . .
    x x . .     x x . .       . x x .       . . x x                         x x . .
    x x x .     . x x .       . . x x       x x . .                         x . x .
    x x x x     . . x x       . . . x       x x . .                         x . . x

Positions, and numbers of heads, are integers or integer arrays that broadcast, of NumPy or JAX.
"""

from subquad.kernels.patterns.base import (
    ALL,
    NONE,
    SOME,
    Both,
    Either,
    Interleaved,
    Neither,
    Pattern,
    grid,
    undecided,
)
from subquad.kernels.patterns.blocks import BlockPattern, BlockPermutation, Blocks, InBlocks, SameBlock
from subquad.kernels.patterns.tokens import (
    CAUSAL,
    Band,
    Columns,
    Dilated,
    GlobalKeys,
    GlobalQueries,
    Globals,
    Random,
    Strided,
)

__all__ = [
    "ALL", "CAUSAL", "NONE", "SOME", "Band", "BlockPattern", "BlockPermutation", "Blocks", "Both", "Columns", "Dilated",
    "Either", "GlobalKeys", "GlobalQueries", "Globals", "InBlocks", "Interleaved", "Neither", "Pattern", "Random",
    "SameBlock", "Strided", "grid", "undecided",
]  # fmt: skip
