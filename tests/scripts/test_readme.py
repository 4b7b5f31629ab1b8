"""The tables that are written into the READMEs, of rows that are made up."""

import importlib.util
import pathlib

import pytest

from subquad import zoo
from subquad.lra.report import results
from tests.lra.report.test_results import bits, row


@pytest.fixture(scope="module")
def readme():
    path = pathlib.Path(__file__).parents[2] / "scripts" / "readme.py"
    spec = importlib.util.spec_from_file_location("readme", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_column_is_of_the_configuration_that_it_names(readme, monkeypatch, tmp_path):
    for config, accuracy in (("small", 0.9), ("overwritten", 0.3)):
        configuration = f'{{"task": "recall", "config": "{config}"}}'
        results.append(row("s4", accuracy, task="recall", configuration=configuration), tmp_path / "rows.csv")
    monkeypatch.setattr(readme, "ABILITIES", tmp_path / "rows.csv")
    lines = readme.claims_table().splitlines()
    assert lines[0].endswith("| recall | selective copy |")
    assert next(line for line in lines if line.startswith("| `s4` |")).endswith("| 90.0 % |  |")


def test_the_table_of_abilities_is_told_with_all_its_steps_machines_and_commits(readme):
    rows = [
        row("s4", task="recall", commit="a", configuration='{"task": "recall", "layer": "s4"}'),
        row("local", task="recall", steps=7, commit="b", configuration='{"task": "recall", "layer": "local"}'),
        row("softmax", task="recall", hardware="another", configuration='{"task": "recall", "layer": "softmax"}'),
    ]
    told = readme.task_table(rows, []).splitlines()[-1]
    assert "recall: 7 steps of 32 or 300 steps of 32, seed 0, 500 test examples, standard error of up to 2.2 points." in told
    assert all(word in told for word in ("none; jax 1; commits a, b.", "another; jax 1; commit 0123456789ab."))


def test_the_table_of_language_names_the_causal_layers_without_a_row(readme):
    told = readme.language_table([bits("s4", 2.2), bits("local", None, status="failed: x")])
    (said,) = [sentence for sentence in told.split(". ") if sentence.startswith("Not run: ")]
    causal = {name for name, layer in zoo.LAYERS.items() if layer.supports.causal}
    assert set(said.removeprefix("Not run: ").split(", ")) == causal - {"s4"}
