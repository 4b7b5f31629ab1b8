"""Which GPU kernels are traced for: the one that JAX sees, or one that is elsewhere."""

import contextlib
import contextvars
import itertools
from collections.abc import Iterator

import jax
from jax.experimental.xla_metadata import set_xla_metadata

CAPABILITIES = (80, 90, 100)  # whose machine code is checked ahead of time; some of the others have half the shared memory

# By `lowering_for`; None: that of the GPU here.
_assumed_capability: contextvars.ContextVar[int | None] = contextvars.ContextVar("assumed_capability", default=None)
_traces = itertools.count()


def capability() -> int | None:
    """The compute capability that kernels are traced for, as 90 for 9.0; None: there is no GPU to trace for."""
    if (assumed := _assumed_capability.get()) is not None:
        return assumed
    return capability_of(device())


def device() -> jax.Device:
    """Where what is traced now will run: `jax.default_device` may say other than the first GPU, or a CPU beside it."""
    chosen = jax.config.jax_default_device
    return jax.devices(chosen)[0] if chosen is None or isinstance(chosen, str) else chosen


def capability_of(device: jax.Device) -> int | None:
    if device.platform != "gpu":
        return None
    version = getattr(device, "compute_capability", None)  # "9.0"; an AMD GPU says "gfx942"
    return int(version.replace(".", "")) if version and version.replace(".", "").isdigit() else None


def device_kind() -> str:
    """The name under which this device's tuned table is kept: "nvidia-h200", or "sm_90" where the device is elsewhere."""
    if _assumed_capability.get() is not None or capability() is None:
        return f"sm_{capability()}"
    return device().device_kind.lower().replace(" ", "-")


@contextlib.contextmanager
def lowering_for(compute_capability: int) -> Iterator[None]:
    """Traces and lowers for an NVIDIA GPU that need not be in this machine.

    Example:
        with gpu.lowering_for(90):
            jax.jit(f).trace(x).lower(lowering_platforms=("cuda",))
    """
    token = _assumed_capability.set(compute_capability)
    try:
        with separate_trace_cache(f"sm_{compute_capability}"):
            yield
    finally:
        _assumed_capability.reset(token)


def separate_trace_cache(traced_for: str | None = None):
    """Keeps what is traced inside apart from what is traced elsewhere, which JAX would find in its cache and use.

    `traced_for`: what all such traces may share; None: nothing, not even with the same one again.
    """
    return set_xla_metadata(subquad_traced_for=traced_for or f"once {next(_traces)}")
