"""Triton kernels compiled ahead of time, on a machine without a GPU, and what their machine code takes."""

import dataclasses
import hashlib
import pathlib
import re
import subprocess
import tempfile

from subquad.kernels import interpreter, launch, through_jax_triton
from subquad.kernels.guarded import DTYPE_NAMES


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What a kernel became on a target. Counts are of instructions in the machine code, not of executions.

    Args:
        registers: per thread.
        stack: bytes per thread: what did not fit into registers, and arrays indexed at run time.
        spills: instructions that store to or load from the stack (NVIDIA), spilled registers (AMD).
        shared: bytes of shared memory per program.
        tensor_core: matrix instructions: wgmma, mma and tcgen05 (NVIDIA), mfma (AMD).
        missed: products of 16-bit tiles of 64 rows or more that are not made by Hopper's warp groups (wgmma), where its
            full speed lies.
        fma: scalar float32 multiply-adds.
        contracted: exponentials of x y - z without a rounding of x y, which is not that of a maximum among z.
        transposes: of results of matrix products, which Triton 3.4 to 3.6 get wrong on Hopper when multiplied again.
        dots: matrix products in the source, before anything was unrolled.
        precisions: how those of float32 operands are computed, as "tf32x3".
        float64: whether anything is computed in float64.
    """

    target: str
    registers: int
    stack: int
    spills: int
    shared: int
    tensor_core: int
    missed: int
    fma: int
    contracted: int
    transposes: int
    dots: int
    precisions: frozenset[str]
    float64: bool

    @property
    def fits(self) -> bool:
        """Nothing spilled, and the shared memory is there."""
        return self.spills == 0 and self.shared <= SHARED_LIMIT[self.target]


class Refused(RuntimeError):
    """Triton cannot compile a kernel for a target."""


TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
SHARED_LIMIT = dict(sm_80=163 << 10, sm_90=227 << 10, sm_100=227 << 10, gfx942=64 << 10)


def compile(launched: launch.Launch, target: str) -> Compiled:
    """Compiles a recorded launch for one of `TARGETS`, without a GPU, and reads the machine code.

    Raises:
        RuntimeError: this process runs the interpreter.
        Refused: Triton cannot compile the kernel for the target.
    """
    source, gpu, options = _prepared(launched, target)
    from triton.compiler import compile as triton_compile

    try:
        compiled = triton_compile(source, target=gpu, options=options)
    except Exception as error:  # Triton raises what each of its stages happens to raise
        raise Refused(f"{launched.name} for {target}: {_reason(error)}") from error
    code = compiled.asm["ttir"]
    source = dict(
        dots=len(re.findall(r"\btt\.dot\b", code)),
        precisions=frozenset(re.findall(r"\btt\.dot .*inputPrecision = (\w+) : tensor<[^>]*xf32> \*", code)),
        float64="f64" in code,
    )
    return (_read_sass if target.startswith("sm_") else _read_gcn)(target, compiled, compiled.metadata.shared, source)


def intermediate_code(launched: launch.Launch, target: str = "sm_90") -> str:
    """The source of a recorded launch as Triton has it (TTIR).

    Raises: RuntimeError: this process runs the interpreter.
    """
    source, gpu, options = _prepared(launched, target)
    from triton._C.libtriton import ir
    from triton.compiler import make_backend

    backend, context, stages = make_backend(gpu), ir.context(), {}
    options = backend.parse_options({**options, **source.parse_options()})
    ir.load_dialects(context)
    backend.load_dialects(context)
    made = source.make_ir(gpu, options, backend.get_codegen_implementation(options), backend.get_module_map(), context)
    backend.add_stages(stages, options, source.language)
    return str(stages["ttir"](made, {}))


def _prepared(launched: launch.Launch, target: str):
    """(source, GPU, options) for Triton's compiler."""
    if interpreter.running():
        raise RuntimeError("machine_code: this process runs the interpreter. Unset TRITON_INTERPRET.")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    nvidia = target.startswith("sm_")
    gpu = GPUTarget("cuda", int(target[3:]), 32) if nvidia else GPUTarget("hip", target, 64)
    kernel, config = launched.kernel, launched.config
    pointers = {name: "*" + DTYPE_NAMES[dtype] for name, dtype in launched.dtypes}
    signature = {name: pointers.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {(place,): [["tt.divisibility", 16]] for place, name in enumerate(kernel.arg_names) if name in pointers}
    options = dict(num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True)
    if nvidia:
        options["ptx_version"] = through_jax_triton.PTX_VERSION
    constants = dict(launched.constants)
    if not nvidia:  # its matrix cores take float32 as it is, and know no TF32
        constants = {name: _replaced(value, "tf32x3", "ieee") for name, value in constants.items()}

    class Source(ASTSource):
        def hash(self):
            """Triton's key of its cache on disk has only the names of functions inside of tuples."""
            functions = sorted({function.cache_key for function in launch.functions_in(*constants.values())})
            return hashlib.sha256("-".join([super().hash(), *functions]).encode()).hexdigest()

    return Source(kernel, signature, constants, aligned), gpu, options


def _replaced(constant, old, new):
    """A constant with every `old` in it replaced, also inside of tuples."""
    if not isinstance(constant, tuple):
        return new if constant == old else constant
    items = [_replaced(item, old, new) for item in constant]
    return type(constant)(*items) if hasattr(constant, "_fields") else tuple(items)


def _read_sass(target, compiled, shared, source) -> Compiled:
    import triton

    tools = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        run = lambda *command: subprocess.run(command, capture_output=True, text=True, check=True).stdout
        usage = run(str(tools / "cuobjdump"), "-res-usage", file.name)
        code = run(str(tools / "nvdisasm"), "-c", file.name)
    count = lambda pattern: len(re.findall(pattern, code))
    number = lambda name: int(re.search(rf"\b{name}:(\d+)", usage).group(1))
    return Compiled(
        target=target,
        registers=number("REG"),
        stack=number("STACK"),
        spills=count(r"\b(?:STL|LDL)\b"),
        shared=shared,
        tensor_core=count(r"\b(?:HGMMA|HMMA|UTCHMMA|UTC[A-Z]*MMA)\b"),
        missed=_missed_products(compiled.asm["ttgir"]) if target == "sm_90" else 0,
        fma=count(r"\bFFMA\b"),
        contracted=_contracted_exponents(compiled.asm["ptx"]),
        transposes=_transposed_products(compiled.asm["ttgir"]),
        **source,
    )


def _transposed_products(code: str) -> int:
    """Values in the layout of a matrix product (#mma) that are transposed, in registers or through shared memory."""
    in_registers = re.findall(r"tt\.trans %[\w#]+ \{[^}]*\} : tensor<[^>]*#mma", code)
    stored = re.findall(r"(%[\w#]+) = ttg\.local_alloc %[\w#]+ : \(tensor<[^>]*#mma", code)
    return len(in_registers) + sum(f"ttg.memdesc_trans {name} " in code for name in stored)


def _contracted_exponents(code: str) -> int:
    """Exponentials of a multiply-add, or of a product less something, which becomes one."""
    found = {name: (op, rest.split(", ")) for op, name, rest in re.findall(r"\t([\w.]+) \t?(%\w+), (.*);", code)}
    named = lambda name, *ops: name in found and found[name][0].startswith(ops)

    def contracted(name):
        if named(name, "min.", "max."):
            return any(map(contracted, found[name][1]))
        return named(name, "fma.") or named(name, "sub.") and any(named(x, "mul.") for x in found[name][1])

    return sum(contracted(operands[0]) for op, operands in found.values() if op.startswith("ex2."))


def _missed_products(code: str) -> int:
    """Products that Triton left to mma.sync, [m, k] by [k, n] in 16 bits with m >= 64: what wgmma takes."""
    rows = re.findall(r"\btt\.dot .* : tensor<\d+x\d+xb?f16, .* -> tensor<(\d+)x\d+xf32", code)
    return sum(int(m) >= 64 for m in rows)


def _read_gcn(target, compiled, shared, source) -> Compiled:
    code = compiled.asm["amdgcn"]
    number = lambda name: int(re.search(rf"\.{name}:\s*(\d+)", code).group(1))
    return Compiled(
        target=target,
        registers=number("vgpr_count"),
        stack=number("private_segment_fixed_size"),
        spills=number("vgpr_spill_count"),
        shared=shared,
        tensor_core=len(re.findall(r"\bv_mfma", code)),
        missed=0,
        fma=len(re.findall(r"\bv_(?:fma|fmac|pk_fma)_f32", code)),
        contracted=0,
        transposes=0,
        **source,
    )


def _reason(error: BaseException) -> str:
    """The last line of the innermost error: Triton wraps them with the source."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error) or type(error).__name__).strip().splitlines()[-1]
