"""Records are at the bottom of the harness, and what takes long to load is loaded where it is used."""

import subprocess
import sys

import pytest

from tests.test_imports import ROOT, imports


def modules_of_lra(path):
    return [module for _, module in imports(path) if module.startswith("subquad.lra.")]


def test_the_record_of_a_run_imports_nothing_modules_of_lra():
    assert modules_of_lra(ROOT / "lra" / "run.py") == []


def test_pages_of_recipes_import_one_another_alone():
    for path in (ROOT / "lra" / "recipes").glob("*.py"):
        assert all(module.startswith("subquad.lra.recipes.") for module in modules_of_lra(path)), path


SLOW = ("matplotlib", "tensorflow", "tensorflow_datasets", "grain", "orbax", "tensorboardX", "pandas", "scipy", "PIL")


@pytest.mark.parametrize(
    ("modules", "without"),
    [
        # Names alone: no second is spent on what nobody has asked for yet.
        (("subquad.lra", "subquad.lra.recipes", "subquad.lra.cli.__main__"), ("jax", "flax", "optax", "rich", *SLOW)),
        (("subquad.lra.train", "subquad.lra.plan", "subquad.lra.cli.train", "subquad.lra.cli.quickstart"), SLOW),
        (("subquad.lra.report.page", "subquad.lra.report.overview", "subquad.lra.cli.report", "subquad.lra.cli.table"), SLOW),
    ],
)
def test_nothing_slow_is_imported_before_it_is_used(modules, without):
    code = f"import sys, importlib; [importlib.import_module(name) for name in {modules}]; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {name.partition(".")[0] for name in done.stdout.split()} & set(without)
