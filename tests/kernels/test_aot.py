"""Every kernel that is shipped, compiled for real targets without a GPU."""

import ast
import pathlib

import jax
import numpy as np
import pytest
from jax import export

from subquad.kernels import launch, machine_code, specs

SPECS = {name: spec for name, spec in specs.load().items() if "triton" in spec.implementations}
OPERATIONS = sorted({spec.operation: name for name, spec in SPECS.items()}.values())
KERNELS = sorted(pathlib.Path(launch.__file__).parent.glob("*/triton.py"))


# In float32 one of each operation's specs, and all of strided's; scripts/aot_kernels.py compiles them all, for every target.
FLOAT32 = {*OPERATIONS, *(name for name in SPECS if name.startswith("strided."))}


@pytest.mark.aot
@pytest.mark.parametrize(
    ("name", "dtype"), [(name, "bfloat16") for name in SPECS] + [(name, "float32") for name in sorted(FLOAT32)]
)
def test_machine_code(name, dtype):
    """On Hopper: no spills, tensor cores for every product, float32 digits for float32, no float64."""
    launches = specs.launches(SPECS[name], dtype)
    assert launches, "nothing was launched"
    for launched in launches:
        compiled = machine_code.compile(launched, "sm_90")
        said = f"{launched.name} {dict(launched.constants)}: {compiled}"
        assert compiled.spills == 0 and compiled.stack == 0, said
        assert compiled.shared <= machine_code.SHARED_LIMIT["sm_90"], said
        assert (compiled.tensor_core > 0) == (compiled.dots > 0), said
        # With two warps Triton multiplies large tiles by mma.sync in place of wgmma.
        small = max(launched.config.blocks.values()) < 64
        assert small or compiled.dots == 0 or launched.config.num_warps % 4 == 0, said
        assert compiled.precisions <= {"tf32x3", "bf16x6"}, said
        assert compiled.transposes == 0, said
        assert not compiled.float64, said


@pytest.mark.aot
@pytest.mark.parametrize("name", OPERATIONS)
def test_short_sequences_compile(name):
    """tl.dot needs sides of 16 at least; the interpreter does not care."""
    spec = SPECS[name]
    launches = specs.launches(spec, "bfloat16", length=spec.lengths[min(1, len(spec.lengths) - 1)], bench=False)
    assert launches, "nothing was launched"
    for launched in launches:
        assert machine_code.compile(launched, "sm_90").registers > 0


@pytest.mark.aot
@pytest.mark.parametrize("name", OPERATIONS)
def test_exports_for_each_platform(name):
    """One jitted function, no GPU: Triton's kernels for CUDA, XLA's own operations for a CPU and a TPU."""
    pytest.importorskip("jax_cuda13_plugin", reason="jax-triton lowers only where JAX's CUDA plugin is installed")
    spec = SPECS[name]
    arrays = spec.draw(63 if 63 in spec.lengths else spec.lengths[-1], "bfloat16")
    inexact, rest = specs.split(arrays)
    cotangents = specs.cotangents(spec, "xla", arrays)
    run = jax.jit(specs.forward_backward(spec, None, rest))
    targets = ("triton_kernel_call", "triton_kernel_call_ffi")  # jax-triton 0.3 and 0.4
    triton = [export.DisabledSafetyCheck.custom_call(target) for target in targets]
    with launch.lowering_for(90):
        exported = export.export(run, platforms=["cuda"], disabled_checks=triton)(inexact, cotangents)
    assert exported.platforms == ("cuda",) and "triton_kernel_call" in exported.mlir_module()
    for platform in ("cpu", "tpu"):
        exported = export.export(run, platforms=[platform])(inexact, cotangents)
        assert exported.platforms == (platform,) and "triton_kernel_call" not in exported.mlir_module()


def test_what_was_exported_runs():
    spec = specs.find("softmax.attention/window")
    inexact, rest = specs.split(spec.draw(63))
    run = jax.jit(specs.forward(spec, None, rest))
    for got, want in zip(export.export(run, platforms=["cpu"])(inexact).call(inexact), run(inexact), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.parent.name)
def test_sources(path):
    """Nothing is tuned while tracing, and no order of programs decides a sum."""
    for node in ast.walk(ast.parse(path.read_text())):
        named = node.attr if isinstance(node, ast.Attribute) else ""
        assert named != "autotune" and not named.startswith("atomic"), node.lineno
