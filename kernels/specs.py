"""Named calls of every operation, shared by the tests, the ahead-of-time table, the tuner and the benchmarks.

Each operation's `specs.py` holds a list `SPECS` of its own calls; `load` collects them.
"""

import dataclasses
import functools
import importlib
import math
import pathlib
import time
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from subquad.kernels import dispatch, launch

Arrays = dict[str, Any]
Make = Callable[[int, Any, np.random.Generator], Arrays]

LENGTHS = (1, 7, 63, 100, 129, 500)
BENCH_LENGTHS = (1024, 4096, 16384)
# What the ahead-of-time grid is made of: sizes of a head, and a length that no tile divides.
HEADS, DTYPES, GRID_LENGTH = (16, 40, 64, 96, 128, 256), ("bfloat16", "float16", "float32"), 1000


@dataclasses.dataclass(frozen=True)
class Spec:
    """One way to call an operation, at any length.

    Args:
        operation: the public name, as "linear.attention".
        variant: what is special about this call, as "causal" or "causal-plain": a shell takes it without quotes.
        make: (length, dtype, generator) -> the arrays by name, of test size. Floating and complex arrays are differentiated.
        call: (arrays, implementation) -> the outputs, a pytree of floating or complex arrays.
        make_bench: as `make`, of the size that the benchmarks use; None: `make`.
        lengths: what the tests run.
        bench_lengths: what the benchmarks run.
        slack: multiplies the tolerance of the tests, with a comment that says why.
        implementations: other than "xla" and "reference" that serve this call.
    """

    operation: str
    variant: str
    make: Make
    call: Callable[[Arrays, str | None], Any]
    make_bench: Make | None = None
    lengths: tuple[int, ...] = LENGTHS
    bench_lengths: tuple[int, ...] = BENCH_LENGTHS
    slack: float = 1.0
    implementations: tuple[str, ...] = ("triton", "interpret")

    @property
    def name(self) -> str:
        return f"{self.operation}/{self.variant}"

    def draw(self, length: int, dtype="float32", bench: bool = False) -> Arrays:
        """The arrays at a length: the same ones every time."""
        make = self.make_bench or self.make if bench else self.make
        return make(length, jnp.dtype(dtype), np.random.default_rng(zlib.crc32(self.name.encode()) + length))


def load() -> dict[str, Spec]:
    """All specs by name."""
    return _collect("SPECS")


def grid() -> dict[str, Spec]:
    """By name, the calls that the kernels are compiled for ahead of time: every size of a head by every kind of call.

    They are too many to be run; `GRID_LENGTH` is their only length.
    """
    return _collect("GRID")


def targets() -> dict[str, Spec]:
    """By name, calls of the shapes that others publish times of: for the benchmarks and the tuner alone."""
    return {spec.name: spec for spec in importlib.import_module("subquad.kernels.targets").TARGETS}


def over_heads(operation: str, kind: str, make, call, most: int = HEADS[-1]) -> list[Spec]:
    """A kind of call at every size of a head that the operation takes; `make` is as in `Spec`, with the size first."""
    return [
        Spec(operation, f"{kind}-{head}", functools.partial(make, head), call, lengths=(GRID_LENGTH,), bench_lengths=())
        for head in HEADS
        if head <= most
    ]


def _collect(name: str) -> dict[str, Spec]:
    found = {}
    for path in sorted(pathlib.Path(__file__).parent.glob("*/specs.py")):
        module = importlib.import_module(f"subquad.kernels.{path.parent.name}.specs")
        found |= {spec.name: spec for spec in getattr(module, name, ())}
    return found


def find(name: str) -> Spec:
    """The spec of this name, also of the grid and the targets. Raises ValueError with the nearest match where there is none."""
    known = load() | grid() | targets()
    if name not in known:
        raise ValueError(f"specs.find: name must be that of a spec, got {name!r}. {dispatch.nearest(name, known)}")
    return known[name]


def split(arrays: Arrays) -> tuple[Arrays, Arrays]:
    """(what is differentiated, the rest)."""
    inexact = lambda x: hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.inexact)
    return {k: v for k, v in arrays.items() if inexact(v)}, {k: v for k, v in arrays.items() if not inexact(v)}


def forward(spec: Spec, implementation: str | None, rest: Arrays) -> Callable[[Arrays], Any]:
    """What `spec` computes, as a function of the arrays that are differentiated."""
    return lambda inexact: spec.call({**rest, **inexact}, implementation)


def forward_backward(spec: Spec, implementation: str | None, rest: Arrays) -> Callable[[Arrays, Any], tuple[Any, Arrays]]:
    """(the arrays that are differentiated, cotangents of the outputs) -> (outputs, gradients)."""

    def run(inexact, cotangents):
        outputs, pull = jax.vjp(forward(spec, implementation, rest), inexact)
        return outputs, pull(cotangents)[0]

    return run


def cotangents(spec: Spec, implementation: str | None, arrays: Arrays, seed: int = 0) -> Any:
    """Normal numbers in the shapes and dtypes of the outputs."""
    inexact, rest = split(arrays)
    shapes = jax.eval_shape(forward(spec, implementation, rest), inexact)
    rng = np.random.default_rng(seed)

    def draw(shape):
        values = rng.normal(size=shape.shape)
        if jnp.issubdtype(shape.dtype, jnp.complexfloating):
            values = values + 1j * rng.normal(size=shape.shape)
        return jnp.asarray(values, shape.dtype)

    return jax.tree.map(draw, shapes)


def repeated(function: Callable, count: int) -> Callable:
    """`function` as one program that calls it `count` times, and returns the results of the last time.

    A clock around one call also times what starts a program, tens of microseconds: more than a fast kernel takes.
    """

    def run(*arguments):
        def call(_, carry):
            # What goes in waits for what came out: nothing can be computed once for all calls, or not at all.
            arguments, _ = jax.lax.optimization_barrier(carry)
            return arguments, function(*arguments)

        outputs = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, *arguments))
        return jax.lax.fori_loop(0, count, call, (arguments, outputs))[1]

    return run


def repeats_for(call: Callable[[], Any], seconds: float = 0.02, most: int = 100) -> int:
    """How many calls make a program that takes so long, of a call that returns when its work is done: 1 to `most`."""
    call()
    began = time.perf_counter()
    call()
    return max(1, min(most, math.ceil(seconds / (time.perf_counter() - began))))


def launches(
    spec: Spec, dtype="bfloat16", length: int | None = None, bench: bool = True, target: str = "sm_90"
) -> list[launch.Launch]:
    """The Triton kernels that a forward and backward pass launches on a GPU, each one once.

    `length`: None is the middle one of those that the benchmarks run, or the tests where these run none.
    `target`: of `machine_code.TARGETS`; what is not NVIDIA's launches what Hopper does.
    """
    number = target.removeprefix("sm_")
    lengths = spec.bench_lengths or spec.lengths
    length = length or lengths[len(lengths) // 2]
    inexact, rest = split(spec.draw(length, dtype, bench))
    with launch.recording(int(number) if number.isdigit() else 90) as recorded:
        outputs = jax.eval_shape(forward(spec, "triton", rest), inexact)
        jax.eval_shape(forward_backward(spec, "triton", rest), inexact, outputs)
    return list(dict.fromkeys(recorded))


def widen(tree):
    """float64 and complex128 in place of smaller ones: call it with x64 enabled."""

    def widen_one(x):
        if not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.inexact):
            return x
        wide = np.complex128 if jnp.issubdtype(x.dtype, jnp.complexfloating) else np.float64
        return jnp.asarray(np.asarray(x).astype(wide))

    return jax.tree.map(widen_one, tree)


def expected(spec: Spec, arrays: Arrays, cotangents: Any) -> tuple[Any, Arrays]:
    """(outputs, gradients) of the reference in float64, as NumPy arrays."""
    with jax.enable_x64(True):
        inexact, rest = split(arrays)
        run = jax.jit(forward_backward(spec, "reference", rest))
        return jax.tree.map(np.asarray, run(widen(inexact), widen(cotangents)))


def error(got, want, least: float = 1e-30) -> float:
    """The largest difference, relative to the largest number that was wanted; infinite if anything is not a number.

    Infinities must agree, and count for nothing else. `least`: what to be relative to where only less was wanted.
    """
    got, want = (np.asarray(x) for x in (got, want))
    wide = np.complex128 if np.iscomplexobj(want) else np.float64
    got, want = got.astype(wide), want.astype(wide)
    same = np.isinf(want) & (got == want)
    got, want = np.where(same, 0, got), np.where(same, 0, want)
    if not np.isfinite(got).all():
        return np.inf
    return float(np.abs(got - want).max(initial=0) / max(np.abs(want).max(initial=0), least))


def names_of(tree) -> list[str]:
    """A name for every leaf of (outputs, gradients)."""
    return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
