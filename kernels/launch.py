"""The one door to Triton: a kernel is launched on a GPU, run by Triton's interpreter, or compiled ahead of time.

    triton      through jax-triton, on the NVIDIA GPU that JAX sees, or lowered for one (`lowering_for`)
    interpret   Triton's interpreter on NumPy arrays behind `jax.pure_callback`, on any machine: for tests
    ahead of time: `recording` collects what a traced program launches, and `machine_code.compile` compiles it for a named
                target; no GPU is needed

Kernels take array pointers and compile-time constants, nothing else: shapes are static in JAX, and a Python number as a
run-time argument would be a float64 in one version of jax-triton and a float32 in the next.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import json
import os
import pathlib
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental.xla_metadata import set_xla_metadata
from jax.interpreters import partial_eval

from subquad.kernels import interpreter

Mode = Literal["triton", "interpret"]

CAPABILITIES = (80, 90, 100)  # whose machine code is checked ahead of time; some of the others have half the shared memory
PTX_VERSION = 87  # the newest that CUDA 12.8 drivers know; newer Triton would emit what an older driver refuses
FLOATS = ("float32", "bfloat16", "float16")
TUNED = pathlib.Path(__file__).parent / "tuned"


class Declined(NotImplementedError):
    """An implementation that cannot serve this call; the message is the reason, one sentence."""


class Unordered(ValueError):
    """A configuration with which a kernel would read memory before it is written."""


@dataclasses.dataclass(frozen=True)
class Config:
    """How a kernel's work is cut: block sizes by the names of the kernel's constants, and what Triton needs to know."""

    blocks: Mapping[str, int]
    num_warps: int = 4
    num_stages: int = 2

    def __hash__(self):
        return hash((tuple(sorted(self.blocks.items())), self.num_warps, self.num_stages))


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch as `recording` notes it."""

    kernel: Any
    dtypes: tuple[tuple[str, str], ...]  # (parameter, dtype) of every pointer, in order
    constants: tuple[tuple[str, Any], ...]
    config: Config
    grid: int

    @property
    def name(self) -> str:
        return self.kernel.__name__


@dataclasses.dataclass(frozen=True)
class Request:
    """What a configuration is asked for."""

    kernel: str
    sizes: tuple[tuple[str, int | str | bool], ...]


# What `trying` says, and what was asked of `config`.
_trials: dict[Request, Config] = {}
_requested: dict[Request, Config] = {}
# What `lowering_for` and `recording` say; None: nothing.
_assumed_capability: int | None = None
_recorded: list[Launch] | None = None
_traces = itertools.count()


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
    if capability() is None:
        raise Declined("JAX sees no NVIDIA GPU here; launch.lowering_for(90) traces for one that is elsewhere.")
    if capability() not in CAPABILITIES:
        *known, last = (f"{number / 10}" for number in CAPABILITIES)
        raise Declined(
            f"the GPU has compute capability {capability() / 10}, and the kernels are made for {', '.join(known)} and {last}."
        )
    if _recorded is None and importlib.util.find_spec("jax_triton") is None:
        raise Declined("jax-triton is not installed; install subquad[gpu].")


def capability() -> int | None:
    """The compute capability that kernels are traced for, as 90 for 9.0; None: there is no GPU to trace for."""
    if _assumed_capability is not None:
        return _assumed_capability
    return _capability_of(_device())


def _device() -> jax.Device:
    """Where what is traced now will run: `jax.default_device` may say other than the first GPU, or a CPU beside it."""
    chosen = jax.config.jax_default_device
    return jax.devices(chosen)[0] if chosen is None or isinstance(chosen, str) else chosen


def _capability_of(device: jax.Device) -> int | None:
    if device.platform != "gpu":
        return None
    version = getattr(device, "compute_capability", None)  # "9.0"; an AMD GPU says "gfx942"
    return int(version.replace(".", "")) if version and version.replace(".", "").isdigit() else None


def device_kind() -> str:
    """The name under which this device's tuned table is kept: "nvidia-h200", or "sm_90" where the device is elsewhere."""
    if _assumed_capability is not None or capability() is None:
        return f"sm_{capability()}"
    return _device().device_kind.lower().replace(" ", "-")


@contextlib.contextmanager
def lowering_for(compute_capability: int) -> Iterator[None]:
    """Traces and lowers for an NVIDIA GPU that need not be in this machine.

    Example:
        with launch.lowering_for(90):
            jax.jit(f).trace(x).lower(lowering_platforms=("cuda",))
    """
    global _assumed_capability
    before, _assumed_capability = _assumed_capability, compute_capability
    try:
        with apart(f"sm_{compute_capability}"):
            yield
    finally:
        _assumed_capability = before


def apart(traced_for: str | None = None):
    """Keeps what is traced inside apart from what is traced elsewhere, which JAX would find in its cache and use.

    `traced_for`: what all such traces may share; None: nothing, not even with the same one again.
    """
    return set_xla_metadata(subquad_traced_for=traced_for or f"once {next(_traces)}")


@contextlib.contextmanager
def recording(compute_capability: int = 90) -> Iterator[list[Launch]]:
    """Collects the launches of everything traced inside instead of launching them; the traced outputs are zeros.

    Example:
        with launch.recording() as launches:
            jax.eval_shape(lambda x: softmax.attention(x, x, x, implementation="triton"), x)
    """
    global _recorded
    before, _recorded = _recorded, []
    try:
        with lowering_for(compute_capability), apart():
            yield _recorded
    finally:
        _recorded = before


def dot_precision(dtype) -> str:
    """The `input_precision` of a tl.dot: three TF32 products make up float32; one would lose half of its digits."""
    return "tf32x3" if jnp.dtype(dtype) == jnp.float32 else "tf32"


def config(kernel: str, heuristic: Config, **sizes) -> Config:
    """The tuned configuration of a kernel for these sizes on this device, or the heuristic where nothing was measured."""
    request = Request(kernel, tuple(sorted(sizes.items())))
    _requested[request] = heuristic
    return _trials.get(request) or tuned(device_kind()).get(request, heuristic)


def size_class(size: int, most: int) -> int:
    """The power of two that holds a size, `most` at most: sizes of one class share what was tuned for one of them."""
    return min(1 << (size - 1).bit_length(), most)


@contextlib.contextmanager
def trying(trials: Mapping[Request, Config]) -> Iterator[dict[Request, Config]]:
    """Uses these configurations for what is traced inside, and collects the heuristics of all that is asked for."""
    before = dict(_trials), dict(_requested)
    _trials.update(trials)
    _requested.clear()
    try:
        with apart():
            yield _requested
    finally:
        for now, then in zip((_trials, _requested), before, strict=True):
            now.clear()
            now.update(then)


@functools.cache
def tuned(kind: str) -> dict[Request, Config]:
    """The committed table of a device; empty where it was never tuned."""
    path = TUNED / f"{kind}.json"
    if not path.exists():
        return {}
    return {
        Request(row["kernel"], tuple(sorted(row["sizes"].items()))): Config(row["blocks"], row["num_warps"], row["num_stages"])
        for row in json.loads(path.read_text())["rows"]
    }


# ----------------------------------------------------------------------------------------------------------- launching


def call(
    kernel: Any,
    inputs: Mapping[str, jax.Array | None],
    outputs: Mapping[str, jax.ShapeDtypeStruct],
    *,
    grid: int,
    constants: Mapping[str, Any],
    config: Config,
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
    _check_stages(kernel, config)
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
    if _recorded is not None:
        dtypes = zip((*inputs, *outputs), (x.dtype.name for x in (*arrays, *outputs.values())), strict=True)
        _recorded.append(Launch(kernel, tuple(dtypes), tuple(constants.items()), config, grid))
        return tuple(jnp.zeros(out.shape, out.dtype) for out in outputs.values())
    order = {name: place for place, name in enumerate(inputs)}
    places = {order[source]: list(outputs).index(target) for source, target in (aliases or {}).items()}
    shapes = tuple(outputs.values())
    if mode == "interpret":
        require(mode)
        host = functools.partial(interpreter.run, kernel, grid, constants, shapes, places)
        return tuple(jax.pure_callback(host, shapes, *arrays, vmap_method="sequential"))
    return tuple(_on_gpu(kernel, grid, constants, config, shapes, places, arrays))


def _is_constant(value) -> bool:
    """Whether a kernel can be compiled for this value: a number, a string, a `triton.jit` function, or a tuple."""
    if isinstance(value, tuple):
        return all(map(_is_constant, value))
    return type(value) in (bool, int, float, str, type(None)) or type(value).__name__ in ("JITFunction", "InterpretedFunction")


def _check_names(kernel, inputs, outputs, constants):
    given, wanted = [*inputs, *outputs], [name for name in kernel.arg_names if name not in constants]
    unknown = sorted(set(constants) - set(kernel.arg_names))
    if unknown or given != wanted:
        raise TypeError(
            f"launch.call: inputs, outputs and constants must name the parameters of {kernel.__name__}, the pointers in its "
            f"order {wanted}, got pointers {given}" + (f" and unknown constants {unknown}" if unknown else "") + ". "
            "Compare the spelling with the kernel's signature."
        )


def _check_stages(kernel, config: Config) -> None:
    if config.num_stages > 1 and guards_memory(kernel):
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


def _on_gpu(kernel, grid, constants, config, shapes, places, arrays):
    jax_triton = _jax_triton()
    options = dict(
        kernel=kernel,
        grid=(grid,),
        name=kernel.__name__,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        compute_capability=capability(),
        input_output_aliases=places or None,
    )
    if hasattr(jax_triton, "CUSTOM_CALL_TARGET_NAME"):  # 0.4
        # An aliased output is an operand itself: its input is given a second time, in its place.
        pointers = [name for name in kernel.arg_names if name not in constants]
        options |= {pointers[len(arrays) + target]: arrays[source] for source, target in places.items()}
        operands = sorted(places.values())
        options["input_output_aliases"] = {len(arrays) + operands.index(target): target for target in operands} or None
        options |= dict(out_type=list(shapes), backend_options=dict(ptx_version=PTX_VERSION, enable_fp_fusion=True))
    else:
        options |= dict(out_shape=list(shapes), enable_fp_fusion=True)
    return jax_triton.triton_call(*arrays, **options, **constants)


@functools.cache
def _jax_triton():
    """jax-triton, mended where its versions and those of Triton do not fit."""
    import triton.backends.nvidia.driver as driver

    if not hasattr(driver, "TMA_TF32"):  # jax-triton 0.4 looks for it in Triton 3.6 and gives up all of NVIDIA without it
        driver.TMA_TF32 = 11
    cache = os.environ.get("TRITON_CACHE_DIR")
    import jax_triton

    # Both versions change the variable while they are imported; it is the user's.
    os.environ.pop("TRITON_CACHE_DIR", None)
    if cache is not None:
        os.environ["TRITON_CACHE_DIR"] = cache
    if hasattr(jax_triton, "CUSTOM_CALL_TARGET_NAME"):
        # Its rule for dropping what is not used lacks an argument of JAX 0.12's; JAX's own serves where nothing is a Ref.
        partial_eval.dce_rules.pop(jax_triton.triton_lib.triton_kernel_call_p, None)
    else:
        _pin_ptx()
    return jax_triton


def _pin_ptx() -> None:
    """jax-triton 0.3 has no option for the PTX version; its own copy of the backend gets one."""
    from jax_triton import triton_lib

    class Backend(triton_lib.cb.CUDABackend):
        def parse_options(self, options):
            return super().parse_options({**options, "ptx_version": PTX_VERSION})

    triton_lib.cb = types.SimpleNamespace(**{**vars(triton_lib.cb), "CUDABackend": Backend})


def fold_vmap(function: Callable, shared: Iterable[Iterable[int]] | None = None) -> Callable:
    """`function` with a rule for `jax.vmap`: the mapped axis becomes part of the batch, and there is still one launch.

    Args:
        function: takes arrays [B, ...] or None, and returns arrays [B, ...].
        shared: the operands, by place, that may be [1, ...] for all samples; the operands of one group are so together or
            not at all. None: each may, as long as another one has the batch.
    """

    def folded(*arrays):
        places = [place for place, array in enumerate(arrays) if array is not None]
        groups = [{place} for place in places] if shared is None else [{*group} & {*places} for group in shared]

        @jax.custom_batching.custom_vmap
        def run(*some):
            given = dict(zip(places, some, strict=True))
            return function(*map(given.get, range(len(arrays))))

        @run.def_vmap
        def rule(size, mapped, *some):
            shapes = [x.shape[1:] if is_mapped else x.shape for x, is_mapped in zip(some, mapped, strict=True)]
            batch = max(shape[0] for shape in shapes)
            single = {
                place for place, is_mapped, shape in zip(places, mapped, shapes, strict=True) if not is_mapped and shape[0] == 1
            }
            kept = {place for group in groups if group <= single for place in group}

            def flatten(place, x, is_mapped, shape):
                if place in kept:
                    return x
                x = x if is_mapped else jnp.broadcast_to(x, (size, *shape))
                x = x if shape[0] == batch else jnp.broadcast_to(x, (size, batch, *shape[1:]))
                return x.reshape(size * batch, *shape[1:])

            outputs = run(*map(flatten, places, some, mapped, shapes))
            outputs = jax.tree.map(lambda x: x.reshape(size, x.shape[0] // size, *x.shape[1:]), outputs)
            return outputs, jax.tree.map(lambda _: True, outputs)

        return run(*(array for array in arrays if array is not None))

    return folded
