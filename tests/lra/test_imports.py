"""Records are at the bottom of the harness."""

from tests.test_imports import ROOT, imports


def modules_of_lra(path):
    return [module for _, module in imports(path) if module.startswith("subquad.lra.")]


def test_the_record_of_a_run_imports_nothing_modules_of_lra():
    assert modules_of_lra(ROOT / "lra" / "run.py") == []


def test_pages_of_recipes_import_one_another_alone():
    for path in (ROOT / "lra" / "recipes").glob("*.py"):
        assert all(module.startswith("subquad.lra.recipes.") for module in modules_of_lra(path)), path
