"""Checks that several operations make of their arguments."""

import functools
import numbers
import operator

import jax
import jax.numpy as jnp
import numpy as np

LARGE = 1e15  # of a query in padding: products of more may overflow


def floating(owner: str, **arrays) -> None:
    """Refuses what is not floating-point (TypeError): integer inputs would give truncated outputs. None passes."""
    _of_kind(owner, jnp.floating, "floating-point", "float32", arrays)


def inexact(owner: str, **arrays) -> None:
    """Refuses what is neither floating-point nor complex (TypeError). None passes."""
    _of_kind(owner, jnp.inexact, "floating or complex", "float32", arrays)


def integers(owner: str, **arrays) -> None:
    """Refuses what is not integer (TypeError). None passes."""
    _of_kind(owner, jnp.integer, "integers", "int32", arrays)


def _of_kind(owner, kind, word, cure, arrays):
    for name, array in arrays.items():
        dtype = getattr(array, "dtype", type(array))
        if array is not None and not jnp.issubdtype(dtype, kind):
            got = getattr(dtype, "__name__", dtype)
            raise TypeError(f"{owner}: {name} must be {word}, got {got}. Use {name}.astype(jnp.{cure}).")


def shape(owner: str, name: str, array, axes: str, instead: str, **sizes) -> None:
    """Refuses an array whose axes do not fit (ValueError). None passes.

    Args:
        axes: a letter for each axis, as "B T D"; those of one letter have one size, of at least 1.
        instead: what to do, a sentence.
        sizes: what the size of a letter is: a number, or a tuple of those that it may be.
    """
    if array is None:
        return
    letters, got = axes.split(), jnp.shape(array)
    allowed = {letter: size if isinstance(size, tuple) else (size,) for letter, size in sizes.items()}
    if len(got) == len(letters) and all(n in allowed.setdefault(x, (n,)) and n for x, n in zip(letters, got, strict=True)):
        return
    wanted = ", ".join(" or ".join(map(str, allowed[x])) if x in sizes else x for x in letters)
    known = f" = [{wanted}]" if sizes else ""
    raise ValueError(
        f"{owner}: {name} must have shape [{', '.join(letters)}]{known} with every axis at least 1, got {got}. {instead}"
    )


def lists(owner: str, name: str, array, axes: str, least: int, most: int, instead: str, **sizes) -> None:
    """Refuses lists along the last axis that are no NumPy integers (TypeError), do not fit as in `shape`, are out of
    `least` .. `most`, or name something twice (ValueError); -1 is nothing."""
    if not isinstance(array, np.ndarray) or not np.issubdtype(array.dtype, np.integer):
        raise TypeError(
            f"{owner}: {name} must be a NumPy array of integers, got {type(array).__name__} of "
            f"{getattr(array, 'dtype', None)}. Lists that depend on data are not supported: build them in NumPy."
        )
    shape(owner, name, array, axes, instead, **sizes)
    if array.min() < least or array.max() > most:
        raise ValueError(f"{owner}: {name} must lie in {least} .. {most}, got {array.min()} .. {array.max()}. {instead}")
    ordered = np.sort(array, axis=-1)
    if ((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any():
        raise ValueError(f"{owner}: {name} must list nothing twice, got something twice. Remove it.")


def hide(mask, *arrays):
    """Keys and values [B, S, ...] with 0 where the mask shows a key to no query, and gradients that are exactly 0 there.

    Where it tells N heads apart, of [B, S, K, H] what it shows to no query of the N / K heads that read a key head.

    A weight of 0 hides what is finite only: 0 times the NaN of a padding token is NaN, in a tile of outputs and in gradients.

    Args:
        mask: bool, True = attend; each axis full or 1, of [B, N, T, S]. None: the arrays as they are.
        arrays: None stays None.
    """
    if mask is None:
        return arrays
    seen = jnp.moveaxis(jnp.asarray(mask).any(2), 1, 2)  # [B, S, N|1]

    def rows(x):
        groups = x.shape[2] if x.ndim == 4 and seen.shape[2] > 1 else 1  # of query heads: each reads a key head of its own
        by_head = seen.reshape(*seen.shape[:2], groups, -1).any(3)
        return by_head[..., None] if x.ndim == 4 else by_head[..., 0].reshape(*seen.shape[:2], *(1,) * (x.ndim - 2))

    return tuple(None if x is None else jnp.where(rows(x), x, 0) for x in arrays)


def may_be_padding(queries, *gradients):
    """Which rows of queries [..., H] a backward pass has to hide, bool [..., 1]: their outputs have no gradient, of all those
    given as [..., X], and they hold NaN or what could overflow. The others keep their values, which second derivatives need.
    """
    # Behind a barrier: a gradient that is a constant would be compared while compiling, for seconds.
    gradients = jax.lax.optimization_barrier(gradients)
    unused = functools.reduce(operator.and_, [(x == 0).all(-1, keepdims=True) for x in gradients])
    is_finite = functools.reduce(operator.and_, [(jnp.abs(x) < LARGE).all(-1, keepdims=True) for x in queries])
    return unused & ~is_finite


def at_least(owner: str, name: str, value, least: int, instead: str) -> None:
    """Refuses what is no integer, or one below `least` (ValueError). `instead`: what to do, a sentence."""
    if not isinstance(value, numbers.Integral) or value < least:
        raise ValueError(f"{owner}: {name} must be an integer of at least {least}, got {value!r}. {instead}")


def pairwise(owner: str, name: str, array, full: tuple[int, int, int, int]) -> None:
    """Refuses a mask that is not boolean, a bias that is not floating-point (TypeError), and one that does not broadcast to
    [B, N, T, S]. None passes."""
    if array is None:
        return
    if name == "bias":
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{owner}: bias must be floating-point, got {array.dtype}. Pass booleans as mask.")
    elif array.dtype != bool:
        raise TypeError(f"{owner}: {name} must be boolean, True = attend, got {array.dtype}. Use {name}.astype(bool).")
    if array.ndim != 4 or any(size not in (1, want) for size, want in zip(array.shape, full, strict=True)):
        raise ValueError(
            f"{owner}: {name} must have four axes, each full or 1, of [B, N, T, S] = {full}, got {array.shape}. "
            "Insert axes of 1."
        )


def key_padding(owner: str, mask, batch: int, length: int, instead: str = "Use softmax.attention for pairwise masks.") -> None:
    """Refuses a mask that is not boolean (TypeError), and one that is not [B|1, 1, 1, S]. None passes."""
    if mask is None:
        return
    if mask.dtype != bool:
        raise TypeError(f"{owner}: mask must be boolean, True = attend, got {mask.dtype}. Use mask.astype(bool).")
    if mask.shape not in ((batch, 1, 1, length), (1, 1, 1, length)):
        raise ValueError(f"{owner}: mask must be key padding of shape {(batch, 1, 1, length)}, got {mask.shape}. {instead}")


def row(owner: str, name: str, array, batch: int, length: int):
    """Positions or segments as int32 [B|1, length]; NumPy arrays stay NumPy arrays, which marks them as known. None passes.

    Refuses other shapes and numbers that need more bits (ValueError) and kinds (TypeError).
    """
    if array is None:
        return None
    integers(owner, **{name: array})
    if array.shape not in ((batch, length), (1, length)):
        raise ValueError(
            f"{owner}: {name} must have shape {(batch, length)} or {(1, length)}, got {array.shape}. "
            "Give every sample a row, or all samples one."
        )
    if isinstance(array, np.ndarray) and (array != array.astype(np.int32)).any():
        raise ValueError(f"{owner}: {name} must fit int32, got {array.max()}. Number them with np.unique(return_inverse=True).")
    return array.astype(np.int32)


def segments(owner: str, query_ids, key_ids, batch: int, queries: int, keys: int):
    """Segments of queries and of keys, checked as by `row`: both, or neither (ValueError)."""
    if (query_ids is None) != (key_ids is None):
        raise ValueError(f"{owner}: query_segment_ids and key_segment_ids must be given together. Pass both.")
    query_ids = row(owner, "query_segment_ids", query_ids, batch, queries)
    return query_ids, row(owner, "key_segment_ids", key_ids, batch, keys)


def runs(owner: str, segment_ids, batch: int, length: int):
    """Segments [B|1, length] as runs of equal ids, numbered from 0, int32; checked as by `row`. None passes."""
    ids = row(owner, "segment_ids", segment_ids, batch, length)
    if ids is None:
        return None
    return jnp.pad(jnp.cumsum(ids[:, 1:] != ids[:, :-1], axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))


def causal_positions(owner: str, is_causal: bool, query_positions, key_positions, batch: int, queries: int, keys: int):
    """Positions of queries and keys as int32 [B|1, length], which count from 0 where they are None; None if not causal."""
    given = dict(query_positions=(query_positions, queries), key_positions=(key_positions, keys))
    for name, (array, _) in given.items():
        if array is not None and not is_causal:
            raise ValueError(f"{owner}: {name} must be None where is_causal is False, got some. Nothing would depend on them.")
    if not is_causal:
        return None
    rows = (row(owner, name, array, batch, length) for name, (array, length) in given.items())
    return tuple(jnp.arange(n, dtype=jnp.int32)[None] if x is None else x for x, n in zip(rows, (queries, keys), strict=True))
