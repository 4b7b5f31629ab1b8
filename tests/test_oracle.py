"""How the suite compares with oracles, and what it writes down."""

import csv
import pathlib
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import oracle

X, W = np.linspace(-1, 1, 6).reshape(2, 3), np.linspace(1, 2, 12).reshape(4, 3)
PEER = SimpleNamespace(
    name="linear", meta={"peer": "numpy", "version": "2"}, inputs={"x": X}, weights={"map.weight": W},
    cotangents={"y": np.ones((2, 4))}, outputs={"y": X @ W.T}, grad_inputs={"x": np.ones((2, 4)) @ W},
    grad_weights={"map.weight": np.ones((4, 2)) @ X},
)  # fmt: skip


class Layer(nnx.Module):
    def __init__(self):
        self.out = nnx.Linear(3, 4, use_bias=False, rngs=nnx.Rngs(0))


def recorded():
    """What the test has recorded, which is not to reach the table."""
    rows = list(oracle.comparisons)
    oracle.comparisons.clear()
    return rows


def call(inputs, weights):
    return oracle.holding(Layer(), weights, {"map": "out"}).out(inputs["x"])


def test_outputs_and_all_gradients_are_compared():
    oracle.compare("local", PEER, call)
    (row,) = recorded()
    assert row.keys() == set(oracle.COLUMNS) and row["peer"] == "numpy" and row["of"] == "layer"
    assert row["output_error"] < 1e-6 and row["gradient_error"] < 1e-6
    for group in ("outputs", "grad_inputs", "grad_weights"):
        wrong = {name: 1.001 * x for name, x in getattr(PEER, group).items()}
        with pytest.raises(AssertionError, match="linear, outputs" if group == "outputs" else "linear, gradients"):
            oracle.compare("local", SimpleNamespace(**{**vars(PEER), group: wrong}), call)
    with pytest.raises(AttributeError, match="other"):  # no weight is left out
        oracle.holding(Layer(), {"other.weight": W})
    assert not recorded()


def test_the_committed_table_is_of_the_oracles_that_are_here():
    with (pathlib.Path(__file__).parents[1] / "zoo" / "results" / "oracles.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows and tuple(rows[0]) == oracle.COLUMNS
    for row in rows:
        if row["peer"] != "flax":  # which is installed
            meta = oracle.load(row["oracle"]).meta
            assert (row["peer"], row["version"]) == (meta["peer"], meta["version"])


def test_small_leaves_may_be_asked_for_more():
    pair = ({"a": jnp.ones(1), "b": jnp.full(1, 1.001e-3)}, {"a": np.ones(1), "b": np.full(1, 1e-3)})
    oracle.check("local", PEER, pair, tolerance=1e-4)
    assert [row["output_error"] for row in recorded()] == [pytest.approx(1e-5, rel=1e-2)]
    with pytest.raises(AssertionError):
        oracle.check("local", PEER, pair, tolerance=1e-4, part=1e-3)


def test_the_table_has_the_largest_errors_and_keeps_other_rows(tmp_path):
    def session(*reports):
        table = oracle.Table(tmp_path / "new" / "oracles.csv")
        for name, output, gradient, passed in reports:
            row = dict(zip(oracle.COLUMNS, ("local", name, "layer", "peer, the first", "1", output, gradient), strict=True))
            report = SimpleNamespace(user_properties=[("oracle", row), ("else", 1)], when="call", passed=passed)
            table.pytest_runtest_logreport(report)
        table.pytest_sessionfinish()
        return table.path.read_text().splitlines()[1:]

    rows = session(("b", 1.26e-7, None, True), ("b", 2.6e-8, 3e-6, True), ("a", 1e-7, None, True), ("c", 1.0, 1.0, False))
    assert rows == ['local,a,layer,"peer, the first",1,1e-07,', 'local,b,layer,"peer, the first",1,1e-07,3e-06']
    assert session(("b", 4e-7, None, True)) == [rows[0], 'local,b,layer,"peer, the first",1,4e-07,']
