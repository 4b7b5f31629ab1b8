"""What the implementations of softmax attention are asked for: sets of keys, and who sees what of each."""

from typing import NamedTuple

import jax
import numpy as np
from einops import rearrange

from subquad.kernels.patterns import Pattern
from subquad.kernels.softmax import online


class Visible(NamedTuple):
    """What decides, beside the pattern, which key a query sees; None where nothing is said.

    The pattern asks for the positions: NumPy arrays where they are known while tracing.
    """

    query_positions: jax.Array | np.ndarray | None  # [B|1, T]
    key_positions: jax.Array | np.ndarray | None  # [B|1, S]
    query_segment_ids: jax.Array | None  # [B|1, T]
    key_segment_ids: jax.Array | None  # [B|1, S]
    mask: jax.Array | None  # [B|1, N|1, T|1, S|1]


class KeySet(NamedTuple):
    """Keys that are attended to under a pattern. An operation has one set, or several that share no visible pair.

    With C columns, position t is row t // C of column t % C, and a query sees keys of its own column only. Then the positions
    of `visible` are those of rows, there is no more of it than a mask of keys [B|1, 1, 1, S], and C divides T and S.
    """

    pattern: Pattern | None
    visible: Visible
    columns: int = 1
    source: int = 0  # which keys and values, of those that the operation has


def one_by_one(attention):
    """An implementation for several sets, from one for a single set without columns: their results are merged.

    Args:
        attention: (query, key, value, bias, visible, pattern, scale, **options) -> (out, maximum, log(normaliser)).
    """

    def run(query, keys, values, bias, sets: tuple[KeySet, ...], scale: float, **options):
        results = []
        for one in sets:
            arrays, visible, columns = (query, keys[one.source], values[one.source]), one.visible, one.columns
            if columns > 1:
                arrays = [rearrange(x, "b (r c) n h -> (b c) r n h", c=columns) for x in arrays]
                visible = visible._replace(mask=in_columns(visible.mask, len(query), columns))
            result = attention(*arrays, bias, visible, one.pattern, scale, **options)
            if columns > 1:
                result = [rearrange(x, "(b c) r ... -> b (r c) ...", c=columns) for x in result]
            results.append(result)
        return results[0] if len(results) == 1 else online.merge(*zip(*results, strict=True))

    return run


def in_columns(mask, batch: int, columns: int):
    """A mask of keys [B|1, 1, 1, S] for the columns of each sample: [B C, 1, 1, S / C]."""
    if mask is None:
        return None
    mask = mask.repeat(batch // len(mask), 0)
    return rearrange(mask, "b 1 1 (r c) -> (b c) 1 1 r", c=columns)
