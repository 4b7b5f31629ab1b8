"""Imports run one way, and importing the layers costs nothing that they do not need."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
# What each part may import of the project, and of the libraries that are not everybody's.
ALLOWED = {
    "subquad": set(),
    "kernels": {"subquad.kernels"},
    "zoo": {"subquad.kernels", "subquad.zoo", "flax", "einops"},
    "lra": {"subquad.kernels", "subquad.zoo", "subquad.lra", "flax", "einops", "optax", "orbax", "grain",
            "tensorflow_datasets", "array_record", "PIL", "rich", "matplotlib", "tensorboardX", "absl", "etils", "pandas",
            "filelock", "scipy"},
}
MAY_IMPORT_TRITON = ("triton.py", "rules.py", "chunk_kernels.py", "through_jax_triton.py", "interpreter.py",
                     "machine_code.py")  # fmt: skip
ANYWHERE = {"jax", "jaxtyping", "numpy", "einops"} | set(sys.stdlib_module_names)


def imports(path: pathlib.Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


@pytest.mark.parametrize("part", ALLOWED)
def test_imports_run_one_way(part):
    for path in sorted((ROOT / part).rglob("*.py")):
        for line, module in imports(path):
            root = module.split(".")[0]
            if path.name in MAY_IMPORT_TRITON and root in ("triton", "jax_triton"):
                continue
            allowed = root in ANYWHERE or any(f"{module}.".startswith(f"{name}.") for name in ALLOWED[part])
            assert allowed, f"{path.relative_to(ROOT)}:{line} imports {module}"


def test_no_module_of_the_harness_imports_itself_by_way_of_others():
    """Imports inside functions and for type checkers count, too."""
    name = lambda path: ".".join(("subquad", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
    modules = {name(path): path for path in (ROOT / "lra").rglob("*.py")}
    imported = {}
    for module, path in modules.items():
        # `from a import b` names a.b, which is a module or what the module a holds.
        names = {name if name in modules else name.rpartition(".")[0] for _, name in imports(path)}
        imported[module] = names & set(modules) - {module}

    def reached(module, seen=frozenset()):
        for other in imported[module] - seen:
            seen = reached(other, seen | {other})
        return seen

    assert [module for module in modules if module in reached(module)] == []


@pytest.mark.parametrize(
    "module,foreign",
    [
        ("subquad.kernels", {"flax", "optax", "triton", "jax_triton", "torch", "tensorflow"}),
        ("subquad.zoo", {"triton", "jax_triton", "torch", "tensorflow", "tensorflow_datasets", "grain", "subquad.lra"}),
        ("subquad.lra.bench.measure", {"triton", "torch", "tensorflow", "tensorflow_datasets", "grain", "matplotlib"}),
    ],
)
def test_importing_loads_nothing_foreign(module, foreign):
    program = f"import sys, {module}; print(*(set({sorted(foreign)!r}) & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []
