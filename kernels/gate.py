"""Is an implementation right, at the size and on the machine where it is timed? The rule of the tests, at any length.

An implementation may be wrong by twice what the XLA path is wrong in the same dtype, plus a few units in the last place.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from subquad.kernels import specs

# The largest relative error of the XLA path itself, which has no other to lean on.
TOLERANCES = {"float32": 1e-4, "bfloat16": 4e-2, "float16": 6e-3}
ULPS = 8
REFERENCE_BYTES = 2**30  # the reference stores whole [T, S] matrices: beyond this it gives a sample of rows, or is shorter
SHORT = 512  # tokens with which the reference compiles fast
SAMPLE = 32  # queries
SAMPLED = ("softmax.attention",)  # operations that take the positions of their queries, so that some can go alone


class Verdict(NamedTuple):
    """What `check` found.

    Attributes:
        error: the largest relative error of any output or gradient.
        allowed: the largest that would have passed, of that output or gradient.
        against: what it was compared with, and at what length.
    """

    error: float
    allowed: float
    against: str

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed


def check(spec: specs.Spec, implementation: str, length: int, dtype: str) -> Verdict:
    """Compares outputs and all gradients of an implementation with the float64 reference, on the arrays of the benchmarks.

    Where the reference would take more than 1 GiB, for dense attention with its rows for a sample of queries, and with the
    gradients of these rows. Where that cannot be, other implementations are compared with the XLA path in float32 at that
    length, and the XLA path with the reference at the longest length, by halves, at which it fits. `against` says which.
    """
    longest, against = _longest(spec, length, dtype), ""
    if implementation == "xla" and longest < length and not _can_sample(spec, length, dtype):
        against, length = f" in place of {length}", longest
    target = _target(spec.name, length, dtype)
    if implementation == "xla":
        found = [(error, TOLERANCES[dtype] * spec.slack) for error in target.xla_errors]
    else:
        floor = ULPS * float(jnp.finfo(dtype).eps) * spec.slack
        errors = _errors(target.run(implementation), target.want)
        found = [(error, 2 * other + floor) for error, other in zip(errors, target.xla_errors, strict=True)]
    return Verdict(*max(found, key=lambda pair: pair[0] / pair[1]), target.against + against)


def problem(spec: specs.Spec, length: int, dtype: str) -> tuple[Any, Any, Any]:
    """(arrays that are differentiated, cotangents, the other arrays), of the size of the benchmarks."""
    arrays = spec.draw(length, dtype, bench=True)
    inexact, rest = specs.split(arrays)
    return inexact, specs.cotangents(spec, "xla", arrays), rest


class _Target(NamedTuple):
    """What is right: `run(implementation)` should give `want`, and that of the XLA path is wrong by `xla_errors`."""

    run: Callable[[str], Any]
    want: Any
    xla_errors: list[float]
    against: str


@functools.lru_cache(maxsize=2)
def _target(name, length, dtype) -> _Target:
    spec = specs.find(name)
    longest = _longest(spec, length, dtype)
    inexact, cotangents, rest = problem(spec, length, dtype)

    def run(implementation, inexact=inexact, cotangents=cotangents):
        return jax.jit(specs.forward_backward(spec, implementation, rest))(inexact, cotangents)

    if longest == length:
        want, against = specs.expected(spec, {**inexact, **rest}, cotangents), f"reference, T = {length}"
    elif _can_sample(spec, length, dtype):
        run, want = _sampled(spec, length, inexact, cotangents)
        against = f"reference, {SAMPLE} queries of T = {length}"
    else:
        widen = lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x
        want = jax.tree.map(np.asarray, run("xla", *jax.tree.map(widen, (inexact, cotangents))))
        against = f"xla in float32, T = {length}"
        if dtype == "float32":  # which has no error against itself
            return _Target(run, want, _target(name, longest, dtype).xla_errors, against)
    return _Target(run, want, _errors(run("xla"), want), against)


def _sampled(spec, length, inexact, cotangents):
    """`run` and `want` for a sample of queries: only these have cotangents, so the reference needs no others."""
    rows = np.sort(np.random.default_rng(length).permutation(length)[:SAMPLE]).astype(np.int32)
    chosen = np.isin(np.arange(length), rows)
    pick = lambda outputs: jax.tree.map(lambda x: x[:, rows], outputs)
    hidden = jax.tree.map(lambda x: jnp.where(chosen.reshape(-1, *[1] * (x.ndim - 2)), x, 0), cotangents)

    def run(implementation):
        outputs, gradients = jax.jit(specs.forward_backward(spec, implementation, {}))(inexact, hidden)
        return pick(outputs), gradients

    def call(arrays, implementation):
        return spec.call({**arrays, "query": arrays["query"][:, rows], "query_positions": rows[None]}, implementation)

    return run, specs.expected(dataclasses.replace(spec, call=call), inexact, pick(cotangents))


def _can_sample(spec, length, dtype) -> bool:
    return spec.operation in SAMPLED and set(spec.draw(length, dtype, bench=True)) == {"query", "key", "value"}


def _errors(got, want) -> list[float]:
    return [specs.error(one, wanted) for one, wanted in zip(*map(jax.tree.leaves, (got, want)), strict=True)]


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
    """The longest of length, length / 2, ... at which the reference fits, from a short one up: long ones compile slowly."""
    sizes = [length >> halvings for halvings in range(length.bit_length())]
    fits = lambda size: _bytes(spec.name, size, dtype) <= REFERENCE_BYTES
    short = [size for size in sizes if size <= SHORT]
    found = next(size for size in short if size == 1 or fits(size))
    if found < short[0]:
        return found
    return [found, *itertools.takewhile(fits, reversed(sizes[: -len(short)]))][-1]
