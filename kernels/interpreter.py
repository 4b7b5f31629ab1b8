"""Triton's interpreter on NumPy arrays: started, mended where it is wrong or slow, and watched while it runs a kernel."""

import functools
import importlib.metadata
import os
import sys
import threading

import jax.numpy as jnp
import numpy as np

from subquad.kernels.guarded import Guarded

_one_at_a_time = threading.Lock()  # the interpreter is one global machine


def running() -> bool:
    """Whether Triton was, or will be, imported as an interpreter: it decides when it is imported."""
    if "triton" not in sys.modules:
        return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
    return sys.modules["triton"].jit(_probe).__class__.__name__ == "InterpretedFunction"


def _probe():
    pass


@functools.cache
def start() -> str | None:
    """Makes Triton interpret in this process. Returns the reason where that cannot be, else None."""
    if "triton" not in sys.modules:
        os.environ["TRITON_INTERPRET"] = "1"
    elif not running():
        return "Triton was imported for compilation; start Python with TRITON_INTERPRET=1 to interpret."
    version = tuple(map(int, importlib.metadata.version("triton").split(".")[:2]))
    if version < (3, 7) and tuple(map(int, np.__version__.split(".")[:2])) >= (2, 4):
        return "the interpreter of Triton 3.6 needs NumPy < 2.4; install triton>=3.7 or numpy<2.4."
    _mend_bfloat16()
    _mend_scan()
    return None


def _mend_bfloat16() -> None:
    """The interpreter multiplies the bit patterns of bfloat16 as integers, and cuts digits off where a GPU rounds."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl
    values_of = lambda handle: handle.data.view(jnp.bfloat16).astype(np.float32)

    def create_dot(self, a, b, *rest):
        widen = lambda x: TensorHandle(values_of(x), tl.float32) if x.dtype.scalar == tl.bfloat16 else x
        return dot(self, widen(a), widen(b), *rest)

    def cast_impl(self, source, target):
        types = source.dtype.scalar, target.scalar
        if types == (tl.float32, tl.bfloat16):
            return TensorHandle(source.data.astype(jnp.bfloat16).view(np.uint16), tl.bfloat16)
        if types == (tl.bfloat16, tl.float32):
            return TensorHandle(values_of(source), tl.float32)
        return cast(self, source, target)

    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = create_dot, cast_impl


def _mend_scan() -> None:
    """The interpreter scans and reduces element by element; this does the same row by row, a hundred times faster."""
    from triton.runtime.interpreter import ReduceOps, ScanOps

    def scanned(self, inputs):
        """The rows along the axis [steps, ...] of every input, each combined with those before."""
        columns = [np.moveaxis(x.handle.data, self.axis, 0) for x in inputs]
        rows = [[self.to_tensor(c[i], x.dtype) for c, x in zip(columns, inputs, strict=True)] for i in range(len(columns[0]))]
        for i in range(1, len(rows)):
            combined = self.combine_fn.fn(*rows[i - 1], *rows[i])
            rows[i] = list(combined) if isinstance(combined, tuple) else [combined]
        stack = lambda row: np.stack([x.handle.data.reshape(columns[0].shape[1:]) for x in row])
        return map(stack, zip(*rows, strict=True))

    def generic_scan(self, inputs):
        results = zip(inputs, scanned(self, inputs), strict=True)
        return [self.to_tensor(np.moveaxis(y, 0, self.axis), x.dtype) for x, y in results]

    reduce_all = ReduceOps.generic_reduce

    def generic_reduce(self, inputs):
        if self.axis is None:
            return reduce_all(self, inputs)
        results = zip(inputs, (y[-1] for y in scanned(self, inputs)), strict=True)
        shaped = lambda y: np.expand_dims(y, self.axis) if self.keep_dims else y
        return [self.to_tensor(shaped(y), x.dtype) for x, y in results]

    ScanOps.generic_scan, ReduceOps.generic_reduce = generic_scan, generic_reduce


def run(kernel, grid, constants, shapes, places, *arrays):
    """Runs a kernel on the host. It must not call JAX, which may be waiting for it.

    Args:
        kernel, grid, constants: as `launch.call` has them.
        shapes: of the outputs, which start as NaN.
        places: {input: output} by position: the output starts as the input's content.
    Returns: the outputs.
    Raises: RuntimeError: the kernel wrote outside of an array, or into an input.
    """
    arrays = [np.asarray(array) for array in arrays]
    inputs = [Guarded(array.shape, array.dtype, array) for array in arrays]
    sources = {target: arrays[source] for source, target in places.items()}
    outputs = [Guarded(shape.shape, shape.dtype, sources.get(place)) for place, shape in enumerate(shapes)]
    with _one_at_a_time, np.errstate(all="ignore"):
        kernel[(grid,)](*inputs, *outputs, **constants)
    for buffer, name in zip((*inputs, *outputs), kernel.arg_names, strict=False):
        if buffer.overrun():
            raise RuntimeError(f"launch.call: {kernel.__name__} wrote outside of {name}. Mask its stores.")
    for buffer, array, name in zip(inputs, arrays, kernel.arg_names, strict=False):
        if buffer.array.tobytes() != array.tobytes():
            raise RuntimeError(f"launch.call: {kernel.__name__} wrote into its input {name}. Declare it an output.")
    return tuple(buffer.array.copy() for buffer in outputs)
