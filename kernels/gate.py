"""Is an implementation right, at the size and on the machine where it is timed? The rule of the tests, at any length.

An implementation may be wrong by twice what the XLA path is wrong in the same dtype, plus a few units in the last place.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from subquad.kernels import specs

# The largest relative error of the XLA path itself, which has no other to lean on.
TOLERANCES = {"float32": 1e-4, "bfloat16": 4e-2, "float16": 6e-3}
ULPS = 8
REFERENCE_BYTES = 2**30  # the reference stores whole [T, S] matrices: beyond this the XLA path takes its place


class Verdict(NamedTuple):
    """What `check` found.

    Attributes:
        error: the largest relative error of any output or gradient.
        allowed: the largest that would have passed, of that output or gradient.
        against: what it was compared with.
    """

    error: float
    allowed: float
    against: str

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed


def check(spec: specs.Spec, implementation: str, length: int, dtype: str) -> Verdict:
    """Compares outputs and all gradients of an implementation with the float64 reference, on the arrays of the benchmarks.

    Where the reference would take more than 1 GiB, with the XLA path in float32 at that length; the XLA path itself with
    the reference at the longest length, by halves, at which that fits.
    """
    longest = _longest(spec, length, dtype)
    if implementation == "xla" or longest == length:
        return _against_reference(spec, implementation, longest, dtype)
    return _against_xla(spec, implementation, length, dtype)


def _against_reference(spec, implementation, length, dtype) -> Verdict:
    got, want = _run(spec, implementation, length, dtype), _expected(spec.name, length, dtype)
    plain = None if implementation == "xla" else _run(spec, "xla", length, dtype)
    return _worst(spec, got, want, plain, dtype, f"reference, T = {length}")


def _against_xla(spec, implementation, length, dtype) -> Verdict:
    got, plain = (_run(spec, name, length, dtype) for name in (implementation, "xla"))
    want = plain if dtype == "float32" else _run(spec, "xla", length, dtype, jnp.float32)
    return _worst(spec, got, want, plain, dtype, f"xla in float32, T = {length}")


def _worst(spec, got, want, plain, dtype, against) -> Verdict:
    floor = ULPS * float(jnp.finfo(dtype).eps) * spec.slack
    found = []
    for index, (one, wanted) in enumerate(zip(*map(jax.tree.leaves, (got, want)), strict=True)):
        allowed = TOLERANCES[dtype] * spec.slack
        if plain is not None:
            allowed = 2 * specs.error(jax.tree.leaves(plain)[index], wanted) + floor
        found.append((specs.error(one, wanted), allowed))
    return Verdict(*max(found, key=lambda pair: pair[0] / pair[1]), against)


def problem(spec: specs.Spec, length: int, dtype: str) -> tuple[Any, Any, Any]:
    """(arrays that are differentiated, cotangents, the other arrays), of the size of the benchmarks."""
    arrays = spec.draw(length, dtype, bench=True)
    inexact, rest = specs.split(arrays)
    return inexact, specs.cotangents(spec, "xla", arrays), rest


def _run(spec, implementation, length, dtype, cast=None):
    inexact, cotangents, rest = problem(spec, length, dtype)
    if cast is not None:
        narrow = lambda x: x.astype(cast) if jnp.issubdtype(x.dtype, jnp.floating) else x
        inexact, cotangents = jax.tree.map(narrow, (inexact, cotangents))
    return jax.jit(specs.forward_backward(spec, implementation, rest))(inexact, cotangents)


@functools.lru_cache(maxsize=2)
def _expected(name, length, dtype):
    spec = specs.find(name)
    inexact, cotangents, rest = problem(spec, length, dtype)
    return specs.expected(spec, {**inexact, **rest}, cotangents)


@functools.cache
def _bytes(name, length, dtype) -> int:
    """What the reference would take in float64."""
    spec = specs.find(name)
    inexact, cotangents, rest = problem(spec, length, dtype)
    with jax.enable_x64(True):
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), specs.widen((inexact, cotangents)))
        compiled = jax.jit(specs.forward_backward(spec, "reference", rest)).lower(*shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def _longest(spec, length, dtype) -> int:
    while length > 1 and _bytes(spec.name, length, dtype) > REFERENCE_BYTES:
        length //= 2
    return length
