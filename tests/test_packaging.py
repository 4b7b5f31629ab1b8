"""What is installed: one import root, by wheel and by editable install, in clean virtual environments."""

import pathlib
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TRY = """
import importlib.metadata, importlib.resources, importlib.util, sys
import jax.numpy as jnp
from flax import nnx
import subquad
from subquad import zoo
import subquad.kernels.softmax
layer = zoo.SoftmaxAttention(2, 8, rngs=nnx.Rngs(0))
assert layer(jnp.ones((1, 5, 8))).shape == (1, 5, 8)
assert "tensorflow" not in sys.modules
assert subquad.__version__ == importlib.metadata.version("subquad")
assert importlib.resources.files("subquad").joinpath("py.typed").is_file()
for name in ("kernels", "zoo", "lra", "tests"):
    assert importlib.util.find_spec(name) is None, name
print(zoo.__file__)
"""


def test_every_package_is_listed():
    found = {
        "subquad." + ".".join(path.parent.relative_to(ROOT).parts)
        for part in ("kernels", "zoo", "lra")
        for path in (ROOT / part).rglob("__init__.py")
    }
    found.add("subquad")  # the import root, which holds the version and py.typed only
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found


def test_dependencies_have_ranges():
    extras = PROJECT["project"]["optional-dependencies"]
    for requirement in PROJECT["project"]["dependencies"] + sum(extras.values(), []):
        assert requirement.startswith("subquad[") or ">=" in requirement, requirement
    core = {requirement.split(">")[0] for requirement in PROJECT["project"]["dependencies"]}
    assert core == {"jax", "flax", "einops", "jaxtyping"}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> pathlib.Path:
    """The tracked tree, copied: a build leaves its folders there."""
    target = tmp_path_factory.mktemp("source")
    for part in ("kernels", "lra", "subquad", "zoo"):
        shutil.copytree(ROOT / part, target / part, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, target)
    return target


def pip(python: pathlib.Path, *arguments: str):
    command = [python, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def installed(source, tmp_path_factory) -> tuple[pathlib.Path, pathlib.Path]:
    """The wheel, and the Python of a clean environment that has it and what it asks for."""
    folder = tmp_path_factory.mktemp("wheel")
    pip(pathlib.Path(sys.executable), "wheel", "--no-deps", "--wheel-dir", str(folder), str(source))
    (wheel,) = folder.glob("subquad-*.whl")
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / "bin" / "python"
    pip(python, "install", str(wheel))
    return wheel, python


def try_out(python: pathlib.Path, folder: pathlib.Path) -> str:
    done = subprocess.run([python, "-c", TRY], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_wheel(source, installed, tmp_path):
    wheel, python = installed
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
        assert tops == {"subquad", wheel.name.split("-py3")[0] + ".dist-info"}
        ours = [path for part in ("kernels", "zoo", "lra") for path in (source / part).rglob("*.py")]
        assert {f"subquad/{path.relative_to(source)}" for path in ours} <= set(archive.namelist())
        assert {"subquad/__init__.py", "subquad/py.typed"} <= set(archive.namelist())
    assert str(wheel.parent / "venv") in try_out(python, tmp_path)


def test_editable_install(source, installed, tmp_path):
    """In place of the wheel: what it asks for is there."""
    _, python = installed
    pip(python, "install", "--no-deps", "--editable", str(source))
    assert try_out(python, tmp_path) == str(source / "zoo" / "__init__.py")
