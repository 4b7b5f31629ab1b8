"""Which key a query sees: the two patterns of the Sparse Transformer, each a near and a far set of keys."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Pattern:
    """Query t sees key s if s is near or far (and s <= t if causal).

    Strided, `columns` is None: near is |t - s| <= window, far is (t - s) mod stride = 0.
    Fixed: near is s // stride = t // stride, far is s mod stride in the columns of the head.
    """

    stride: int
    near: bool  # False: only the far set
    is_causal: bool
    window: int = 0
    columns: tuple[tuple[int, ...], ...] | None = None  # [N|1][c], in rising order

    @property
    def gap(self) -> int:
        """How many strides away the far set of "strided" begins, so that no key is counted twice."""
        return self.window // self.stride + 1 if self.near else 0

    def rows(self, length: int) -> int:
        """Rows of `stride` positions that hold `length`."""
        return -(-length // self.stride)

    def summaries(self, length: int) -> int:
        """Keys in the columns of all blocks that some query sees; the last block may be shorter."""
        if self.columns is None:
            return 0
        blocks = self.rows(length)
        if self.near and (self.is_causal or blocks == 1):
            blocks -= 1  # the last block comes before no block
        return blocks * len(self.columns[0])


def visible(pattern: Pattern, length: int) -> np.ndarray:
    """bool [N|1, T, T]: the pattern spelled out."""
    at, of = np.arange(length)[:, None], np.arange(length)
    if pattern.columns is None:
        near = (abs(at - of) <= pattern.window)[None]
        far = ((at - of) % pattern.stride == 0)[None]
    else:
        near = (at // pattern.stride == of // pattern.stride)[None]
        far = (np.array(pattern.columns)[:, None, :, None] == of % pattern.stride).any(2)
    seen = near | far if pattern.near else far
    seen = np.broadcast_to(seen, (len(seen), length, length))
    return np.tril(seen) if pattern.is_causal else seen
