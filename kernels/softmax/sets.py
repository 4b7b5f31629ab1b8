"""What the implementations of softmax attention are asked for: sets of keys, and who sees what of each."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
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

    @property
    def is_masked(self) -> bool:
        """Whether queries and keys may be padding."""
        return self.mask is not None or self.query_segment_ids is not None

    def pairs(self, pattern: Pattern | None, heads: int) -> jax.Array:
        """bool, of the axes of [B, N, T, S]: all that is said here and by a pattern, as one mask."""
        seen = jnp.ones((1, 1, 1, 1), bool) if self.mask is None else self.mask
        if pattern is not None:
            positions = self.query_positions[:, None, :, None], self.key_positions[:, None, None, :]
            seen = seen & pattern.allowed(*positions, np.arange(heads)[:, None, None])
        if self.query_segment_ids is not None:
            seen = seen & (self.query_segment_ids[:, None, :, None] == self.key_segment_ids[:, None, None, :])
        return seen


def independent_axes(*patterns: Pattern | None) -> str:
    """The axes that a mesh may cut: of queries where no known positions tell them apart, of heads where no pattern does."""
    heads = [one.heads for one in patterns if one is not None]
    return "b n t" if not heads else "b" if max(heads) > 1 else "b n"


class KeySet(NamedTuple):
    """Keys that are attended to under a pattern. An operation has one set, or several that share no visible pair.

    With C columns, position t is row t // C of column t % C, and a query sees keys of its own column only. Then the positions
    of `visible` are those of rows, a mask is one of keys [B|1, 1, 1, S], and C divides T and S.
    """

    pattern: Pattern | None
    visible: Visible
    columns: int = 1
    source: int = 0  # which keys and values, of those that the operation has


@dataclasses.dataclass(frozen=True)
class Known:
    """What is known of a set while tracing, as a value that can be hashed."""

    pattern: Pattern | None
    columns: int
    source: int
    positions: tuple[tuple[tuple[int, ...], bytes] | None, ...]  # shape and bytes of those of queries and of keys

    def set_of(self, visible: Visible) -> KeySet:
        """The set again, with the arrays that are not known, and the positions that are, of all samples."""
        arrays = (None if x is None else np.frombuffer(x[1], np.int32).reshape(x[0]) for x in self.positions)
        positions = (x if known is None else known for x, known in zip(visible[:2], arrays, strict=True))
        return KeySet(self.pattern, Visible(*positions, *visible[2:]), self.columns, self.source)


def known_of(one: KeySet) -> tuple[Known, Visible]:
    """What is known of a set, and its arrays: also the positions that are known, where each sample has its own."""
    known = all(isinstance(x, np.ndarray) for x in one.visible[:2])  # both or none: a pattern compares them
    positions = tuple((x.shape, x.astype(np.int32).tobytes()) if known else None for x in one.visible[:2])
    rest = (None if x is None or known and len(x) == 1 else jnp.asarray(x) for x in one.visible[:2])
    return Known(one.pattern, one.columns, one.source, positions), Visible(*rest, *one.visible[2:])


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
                visible = visible_in_columns(visible, len(query), columns)
            result = attention(*arrays, bias, visible, one.pattern, scale, **options)
            if columns > 1:
                result = [rearrange(x, "(b c) r ... -> b (r c) ...", c=columns) for x in result]
            results.append(result)
        return results[0] if len(results) == 1 else online.merge(*zip(*results, strict=True))

    return run


def visible_in_columns(visible: Visible, batch: int, columns: int) -> Visible:
    """Segments and the mask of keys for the columns of each sample, [B C, ...]; positions are those of rows already."""

    def split(array):
        if array is None:
            return None
        return rearrange(array.repeat(batch // len(array), 0), "b ... (r c) -> (b c) ... r", c=columns)

    return Visible(*visible[:2], *map(split, visible[2:]))
