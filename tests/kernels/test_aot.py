"""Every kernel that is shipped, compiled for real targets without a GPU."""

import ast
import dataclasses
import functools
import itertools
import pathlib
import zlib

import jax
import numpy as np
import pytest
from jax import export

from subquad.kernels import gpu, launch, machine_code, specs

SPECS = {name: spec for name, spec in specs.load().items() if "triton" in spec.implementations}
OPERATIONS = sorted({spec.operation: name for name, spec in SPECS.items()}.values())
FILES = sorted(pathlib.Path(launch.__file__).parent.glob("*/*.py"))
KERNELS = [path for path in FILES if "@triton.jit" in path.read_text()]


# In float32 one of each operation's specs, and all of strided's; scripts/aot_kernels.py compiles them all, for every target.
FLOAT32 = {*OPERATIONS, *(name for name in SPECS if name.startswith("strided."))}
# Those that take float16 another way than bfloat16, and one that does not; the grid has it everywhere.
FLOAT16 = {name for name in OPERATIONS if name.startswith(("linear.attention", "scan.", "softmax."))}

# Of the grid, some of the worst kernels and a chosen few of the others; `scripts/test -m full` compiles all of it.
WORST = {
    ("softmax.attention/everything-128", "bfloat16"),
    ("softmax.attention/everything-64", "float32"),
    ("linear.attention/mask-causal-128", "bfloat16"),
    ("linear.attention/mask-causal-96", "float32"),
    ("strided.fixed/mask-causal-128", "float32"),
    ("relative.attention/plain-40", "float32"),
    ("relative.attention/plain-96", "float32"),
    ("lsh.attention/ring-counted-96", "float32"),
    ("linear.random_feature_attention/softmax-causal-16", "float32"),
    ("ssm.selective_scan/segments-256", "bfloat16"),
}
GRID = specs.grid()


def chosen():
    for name, dtype in itertools.product(GRID, specs.DTYPES):
        if name.startswith("strided.") and name.endswith("-256") and dtype == "float32":
            continue  # declined, see below
        sampled = (name, dtype) in WORST or zlib.crc32(f"{name} {dtype}".encode()) % 200 == 0
        marks = [] if sampled else [pytest.mark.full]
        yield pytest.param(name, dtype, marks=marks)


@pytest.mark.aot
@pytest.mark.sample(2, of=[name for name in SPECS if name not in OPERATIONS])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, "bfloat16") for name in SPECS]
    + [(name, "float32") for name in sorted(FLOAT32)]
    + [(name, "float16") for name in sorted(FLOAT16)],
)
def test_machine_code(name, dtype):
    check(specs.launches(SPECS[name], dtype), dtype)


@pytest.mark.aot
@pytest.mark.parametrize(("name", "dtype"), list(chosen()))
def test_the_grid(name, dtype):
    """Every size of a head by every kind of call: what a layer of another width or with another mask launches."""
    check(specs.launches(GRID[name], dtype), dtype)


def check(launches, dtype):
    """On Hopper: no spills, tensor cores for every product, float32 digits for float32, no float64."""
    assert launches, "nothing was launched"
    for launched in launches:
        compiled = machine_code.compile(launched, "sm_90")
        said = f"{launched.name} {dict(launched.constants)}: {compiled}"
        assert compiled.spills == 0 and compiled.stack == 0, said
        assert compiled.shared <= machine_code.SHARED_LIMIT["sm_90"], said
        assert (compiled.tensor_core > 0) == (compiled.dots > 0), said
        assert compiled.missed == 0, said
        # With two warps Triton multiplies large tiles by mma.sync in place of wgmma.
        small = max(launched.config.blocks.values()) < 64
        assert small or compiled.dots == 0 or launched.config.num_warps % 4 == 0, said
        # A float16 has no more digits than a TF32 number, which has the range of float32.
        assert compiled.precisions <= {"tf32x3", "bf16x6", *(["tf32"] if dtype == "float16" else [])}, said
        assert compiled.transposes == 0, said
        # Beyond logits of 1e9; the interpreter rounds every product.
        assert not launched.name.startswith("flash_") or compiled.contracted == 0, said
        assert not compiled.float64, said


@pytest.mark.aot
def test_a_head_of_20_features_in_tiles_of_32():
    """Neither the grid nor the benchmarks have one of 17 to 32; this has values of 24, a state and a mask too."""
    spec = SPECS["linear.attention/causal"]
    check(specs.launches(spec, "bfloat16", length=100, bench=False), "bfloat16")


def test_the_grid_goes_as_far_as_the_kernels_do():
    """The largest head that the grid has is taken by each operation; where that is not the largest of all, that one is not."""
    largest, declined = {}, set()
    for name, spec in GRID.items():
        head = int(name.rsplit("-", 1)[1])
        largest[spec.operation] = max(head, largest.get(spec.operation, 0))
    for operation, head in largest.items():
        if head == specs.HEADS[-1]:
            continue
        name = next(name for name in GRID if name.startswith(f"{operation}/") and name.endswith(f"-{head}"))
        make = GRID[name].make
        wider = dataclasses.replace(GRID[name], make=functools.partial(make.func, specs.HEADS[-1]))
        with pytest.raises(launch.Declined, match=f"{head}|features"):
            specs.launches(wider, "bfloat16", 64)
        declined.add(operation)
    assert {"softmax.attention", "relative.attention", "lsh.attention"} <= declined and len(largest) >= 8


@pytest.mark.aot
@pytest.mark.parametrize("name", [name for name in OPERATIONS if not name.startswith("matrix.")])
def test_a_new_length_compiles_nothing(name):
    """Lengths are run-time words: those of one class launch the same kernels with the same constants."""
    found = [set(specs.launches(SPECS[name], "float32", length, bench=False)) for length in (1030, 1100, 1290)]
    kinds = [{(one.kernel, one.dtypes, one.constants, one.config) for one in launches} for launches in found]
    assert kinds[0] and kinds[0] == kinds[1] == kinds[2]


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
    pytest.importorskip("jax_cuda13_plugin", reason="needs pip install --no-deps jax-cuda13-plugin, as scripts/test does")
    spec = SPECS[name]
    arrays = spec.draw(63 if 63 in spec.lengths else spec.lengths[-1], "bfloat16")
    inexact, rest = specs.split(arrays)
    cotangents = specs.cotangents(spec, "xla", arrays)
    run = jax.jit(specs.forward_backward(spec, None, rest))
    targets = ("triton_kernel_call", "triton_kernel_call_ffi")  # jax-triton 0.3 and 0.4
    triton = [export.DisabledSafetyCheck.custom_call(target) for target in targets]
    with gpu.lowering_for(90):
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


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_sources(path):
    """Nothing is tuned while tracing, and no order of programs decides a sum."""
    for node in ast.walk(ast.parse(path.read_text())):
        named = node.attr if isinstance(node, ast.Attribute) else ""
        assert named != "autotune" and not named.startswith("atomic"), node.lineno
