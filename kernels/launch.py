"""The one door to Triton: a kernel is launched on a GPU, run by Triton's interpreter, or compiled ahead of time.

    triton      through jax-triton, on the NVIDIA GPU that JAX sees, or lowered for one (`lowering_for`)
    interpret   Triton's interpreter on NumPy arrays behind `jax.pure_callback`, on any machine: for tests
    ahead of time: `recording` collects what a traced program launches, and `machine_code.compile` compiles it for a named
                target; no GPU is needed

Kernels take array pointers and compile-time constants, nothing else: shapes are static in JAX, and a Python number as a
run-time argument would be a float64 in one version of jax-triton and a float32 in the next.
"""

import contextlib
import contextvars
import dataclasses
import functools
import importlib.util
import types
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from subquad.kernels import gpu, interpreter, through_jax_triton, tuning

Mode = Literal["triton", "interpret"]

FLOATS = ("float32", "bfloat16", "float16")


class Declined(NotImplementedError):
    """An implementation that cannot serve this call; the message is the reason, one sentence."""


class Unordered(ValueError):
    """A configuration with which a kernel would read memory before it is written."""


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch as `recording` notes it."""

    kernel: Any
    dtypes: tuple[tuple[str, str], ...]  # (parameter, dtype) of every pointer, in order
    constants: tuple[tuple[str, Any], ...]
    config: tuning.Config
    grid: int

    @property
    def name(self) -> str:
        return self.kernel.__name__


# By `recording`; None: kernels are launched.
_recorded: contextvars.ContextVar[list[Launch] | None] = contextvars.ContextVar("recorded", default=None)


# ------------------------------------------------------------------------------------------------------- what can run


def require(mode: Mode) -> None:
    """Raises `Declined` where kernels cannot run in this mode, and prepares the interpreter where they can."""
    if importlib.util.find_spec("triton") is None:
        raise Declined("Triton is not installed; install subquad[gpu].")
    if mode == "interpret":
        if reason := interpreter.start():
            raise Declined(reason)
        return
    if interpreter.running():
        raise Declined("this process runs Triton's interpreter (TRITON_INTERPRET is set or was needed).")
    capability = gpu.capability()
    if capability is None:
        raise Declined("JAX sees no NVIDIA GPU here; gpu.lowering_for(90) traces for one that is elsewhere.")
    if capability not in gpu.CAPABILITIES:
        *known, last = (f"{number / 10}" for number in gpu.CAPABILITIES)
        raise Declined(
            f"the GPU has compute capability {capability / 10}, and the kernels are made for {', '.join(known)} and {last}."
        )
    if _recorded.get() is None and importlib.util.find_spec("jax_triton") is None:
        raise Declined("jax-triton is not installed; install subquad[gpu].")


@contextlib.contextmanager
def recording(compute_capability: int = 90) -> Iterator[list[Launch]]:
    """Collects the launches of everything traced inside instead of launching them; the traced outputs are zeros.

    Example:
        with launch.recording() as launches:
            jax.eval_shape(lambda x: softmax.attention(x, x, x, implementation="triton"), x)
    """
    launches: list[Launch] = []
    token = _recorded.set(launches)
    try:
        with gpu.lowering_for(compute_capability), gpu.separate_trace_cache():
            yield launches
    finally:
        _recorded.reset(token)


def require_floats(*dtypes, also: tuple[str, ...] = ()) -> None:
    """Raises `Declined` for an array whose dtype no kernel takes."""
    known = *FLOATS, *also
    for dtype in dtypes:
        if dtype.name not in known:
            raise Declined(f"an array is {dtype.name}, and the kernels take {', '.join(known)} only.")


def require_at_most(most: int, size: int, what: str) -> None:
    """Raises `Declined` for more of something, in the plural, than a kernel holds at once."""
    if size > most:
        raise Declined(f"there are {size} {what}, and the kernels hold at most {most}.")


def dot_precision(dtype) -> str:
    """The `input_precision` of a tl.dot: three TF32 products make up float32; one would lose half of its digits."""
    return "tf32x3" if jnp.dtype(dtype) == jnp.float32 else "tf32"


# ----------------------------------------------------------------------------------------------------------- launching


def words(*numbers) -> jax.Array:
    """The run-time numbers of a launch, int32, as an array for its kernel.

    Put together from scalars: a device's part of an operation may hold no constant array.
    """
    return jnp.stack([jnp.asarray(number, jnp.int32) for number in numbers])


def call(
    kernel: Any,
    inputs: Mapping[str, jax.Array | None],
    outputs: Mapping[str, jax.ShapeDtypeStruct],
    *,
    grid: int,
    constants: Mapping[str, Any],
    config: tuning.Config,
    mode: Mode,
    aliases: Mapping[str, str] | None = None,
) -> tuple[jax.Array, ...]:
    """Launches a Triton kernel.

    Args:
        kernel: a `triton.jit` function whose parameters are its inputs, its outputs and its constants, in this order.
        inputs: by parameter name. None becomes a pointer that the kernel must not follow, so give it a flag as well;
            booleans arrive as int8.
        outputs: by parameter name. Their memory is not initialised.
        grid: number of programs, all along the first axis: the others end at 65,535.
        constants: all other compile-time constants by parameter name.
        config: block sizes and what Triton needs to know.
        mode: "triton" or "interpret".
        aliases: {input: output}: the output starts as the input's content, in its memory where XLA can arrange that.
    Returns: the outputs, in order.
    Raises:
        TypeError: a name that is no parameter of the kernel, a parameter without a value, an order that differs.
        Unordered: more than one stage for a kernel that reads back what it wrote.
    """
    constants = {**constants, **config.blocks}
    _check_names(kernel, inputs, outputs, constants)
    _check_stages(kernel, config, constants)
    if not 0 < grid < 2**31:
        raise ValueError(f"launch.call: grid must lie in 1 .. 2^31 - 1, got {grid}. Give every program more work.")
    for name, value in constants.items():
        if not _is_constant(value):  # np.float64 is a float too
            raise TypeError(
                f"launch.call: constants[{name!r}] must be a number, string, bool, None, jitted function or tuple of these, "
                f"got {type(value).__name__}. "
                "Pass arrays as inputs, and NumPy scalars through int() or float()."
            )
    some = next(array for array in inputs.values() if array is not None)
    arrays = [some if array is None else array for array in inputs.values()]
    arrays = [array.astype(jnp.int8) if array.dtype == bool else array for array in arrays]
    if (recorded := _recorded.get()) is not None:
        dtypes = zip((*inputs, *outputs), (x.dtype.name for x in (*arrays, *outputs.values())), strict=True)
        recorded.append(Launch(kernel, tuple(dtypes), tuple(constants.items()), config, grid))
        return tuple(jnp.zeros(out.shape, out.dtype) for out in outputs.values())
    order = {name: place for place, name in enumerate(inputs)}
    places = {order[source]: list(outputs).index(target) for source, target in (aliases or {}).items()}
    shapes = tuple(outputs.values())
    if mode == "interpret":
        require(mode)
        host = functools.partial(interpreter.run, kernel, grid, constants, shapes, places)
        return tuple(jax.pure_callback(host, shapes, *arrays, vmap_method="sequential"))
    return tuple(through_jax_triton.call(kernel, grid, constants, config, shapes, places, arrays))


def functions_in(*constants) -> list:
    """The `triton.jit` functions among constants, and inside of those that are tuples."""
    nested = (functions_in(*value) if isinstance(value, tuple) else [value] * _is_function(value) for value in constants)
    return [function for functions in nested for function in functions]


def _is_function(value) -> bool:
    return type(value).__name__ in ("JITFunction", "InterpretedFunction")


def _is_constant(value) -> bool:
    """Whether a kernel can be compiled for this value: a number, a string, a `triton.jit` function, or a tuple."""
    if isinstance(value, tuple):
        return all(map(_is_constant, value))
    return type(value) in (bool, int, float, str, type(None)) or _is_function(value)


def _check_names(kernel, inputs, outputs, constants):
    given, wanted = [*inputs, *outputs], [name for name in kernel.arg_names if name not in constants]
    unknown = sorted(set(constants) - set(kernel.arg_names))
    if unknown or given != wanted:
        raise TypeError(
            f"launch.call: inputs, outputs and constants must name the parameters of {kernel.__name__}, the pointers in its "
            f"order {wanted}, got pointers {given}" + (f" and unknown constants {unknown}" if unknown else "") + ". "
            "Compare the spelling with the kernel's signature."
        )


def _check_stages(kernel, config: tuning.Config, constants) -> None:
    if config.num_stages > 1 and any(map(guards_memory, (kernel, *functions_in(*constants.values())))):
        raise Unordered(
            f"launch.call: config.num_stages must be 1 for {kernel.__name__}, got {config.num_stages}. It reads back what it "
            "wrote, and the loads of a stage ahead would pass the barrier in between: prefetch nothing there."
        )


@functools.cache
def guards_memory(kernel) -> bool:
    """Whether a kernel, or a function it calls, has a barrier: between threads that write memory and threads that read it."""
    seen, waiting = set(), [getattr(kernel, "fn", kernel)]
    while waiting:
        function = waiting.pop()
        names = set(function.__code__.co_names)
        if "debug_barrier" in names:
            return True
        seen.add(function)
        called = (getattr(function.__globals__.get(name), "fn", None) for name in names)
        waiting += [other for other in called if isinstance(other, types.FunctionType) and other not in seen]
    return False


