"""Every kernel that is shipped, compiled for real targets without a GPU."""

import ast
import pathlib

import jax
import pytest

from subquad.kernels import launch, machine_code, specs

SPECS = {name: spec for name, spec in specs.load().items() if "triton" in spec.implementations}
KERNELS = sorted(pathlib.Path(launch.__file__).parent.glob("*/triton.py"))


@pytest.mark.aot
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", SPECS)
def test_machine_code(name, dtype):
    """On Hopper: no spills, tensor cores for every product, 64-bit indices, no float64."""
    launches = specs.launches(SPECS[name], dtype)
    assert launches, "nothing was launched"
    for launched in launches:
        compiled = machine_code.compile(launched, "sm_90")
        said = f"{launched.name} {dict(launched.constants)}: {compiled}"
        assert compiled.spills == 0 and compiled.stack == 0, said
        assert compiled.shared <= machine_code.SHARED_LIMIT["sm_90"], said
        assert (compiled.tensor_core > 0) == (compiled.dots > 0), said
        assert compiled.transposes == 0, said
        assert not compiled.float64 and compiled.wide, said


@pytest.mark.aot
@pytest.mark.parametrize("name", SPECS)
def test_short_sequences_compile(name):
    """tl.dot needs sides of 16 at least; the interpreter does not care."""
    spec = SPECS[name]
    for launched in specs.launches(spec, "bfloat16", length=spec.lengths[min(1, len(spec.lengths) - 1)], bench=False):
        machine_code.compile(launched, "sm_90")


@pytest.mark.aot
@pytest.mark.parametrize("name", sorted({spec.operation: name for name, spec in SPECS.items()}.values()))
def test_lowers_for_cuda_without_a_gpu(name):
    pytest.importorskip("jax_cuda13_plugin", reason="jax-triton lowers only where JAX's CUDA plugin is installed")
    spec = SPECS[name]
    arrays = spec.draw(129 if 129 in spec.lengths else spec.lengths[-1], "bfloat16")
    inexact, rest = specs.split(arrays)
    cotangents = specs.cotangents(spec, "xla", arrays)
    with launch.lowering_for(90):
        run = jax.jit(specs.forward_backward(spec, "triton", rest))
        lowered = run.trace(inexact, cotangents).lower(lowering_platforms=("cuda",))
    assert "triton_kernel_call" in lowered.as_text()


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.parent.name)
def test_sources(path):
    """Nothing is tuned while tracing, and no order of programs decides a sum."""
    for node in ast.walk(ast.parse(path.read_text())):
        assert not (isinstance(node, ast.Attribute) and node.attr in ("autotune", "atomic_add")), node.lineno
