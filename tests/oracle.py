"""Peers' implementations as data: inputs, weights, outputs and gradients of one seeded run each; and who agrees how well."""

import csv
import functools
import json
import pathlib
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.assertions import assert_close, errors

HERE = pathlib.Path(__file__).parent / "oracles"
GROUPS = {
    "in": "inputs",
    "w": "weights",
    "const": "constants",
    "ct": "cotangents",
    "out": "outputs",
    "grad/in": "grad_inputs",
    "grad/w": "grad_weights",
}
COLUMNS = ("layer", "oracle", "of", "peer", "version", "output_error", "gradient_error")
comparisons: list[dict] = []  # of the test that runs: rows of the table, which its report takes along


def load(name: str) -> SimpleNamespace:
    """The oracle `name`: `.name`, `.meta` (dict) and one dict of arrays per group."""
    oracle = SimpleNamespace(name=name, **{group: {} for group in GROUPS.values()})
    with np.load(HERE / f"{name}.npz") as arrays:
        oracle.meta = json.loads(str(arrays["meta"]))
        for key in arrays.files:
            for prefix, group in GROUPS.items():
                if key.startswith(prefix + "/"):
                    getattr(oracle, group)[key[len(prefix) + 1 :]] = arrays[key]
    return oracle


def check(layer: str | None, peer, outputs, gradients=({}, {}), *, tolerance=1e-5, part=0.1, of="layer") -> None:
    """A layer agrees with a peer in every leaf, by `tests.assertions.errors`. The table gets a row of it.

    Args:
        layer: its name; None: an operation is compared, which has no row.
        peer: of `load`, or anything with `.name` and `.meta` that has "peer" and "version".
        outputs, gradients: (ours, theirs), two trees each.
        tolerance, part: see `tests.assertions`.
        of: "layer", or "mechanism" where queries, keys and values are given or a formula stands for the layer.
    """
    assert_close(*outputs, tolerance, f"{peer.name}, outputs", part)
    assert_close(*gradients, tolerance, f"{peer.name}, gradients", part)
    if layer is None:
        return
    row = {"layer": layer, "oracle": peer.name, "of": of, "peer": peer.meta["peer"], "version": peer.meta["version"]}
    largest = (max(errors(*pair).values(), default=None) for pair in (outputs, gradients))
    comparisons.append(row | dict(zip(COLUMNS[-2:], largest, strict=True)))


def outputs_and_gradients(peer: SimpleNamespace, function) -> tuple[dict, dict]:
    """Of `function(inputs, weights)` at the peer's: outputs, and gradients of all that the peer has a gradient of.

    The function takes inputs and weights by the peer's names, real numbers in float32, and returns the outputs by name (or `y`
    alone), all as the peer lays them out: one map from its weights into a layer serves values and gradients.
    """
    single = lambda x: jnp.asarray(x, jnp.float32) if np.issubdtype(x.dtype, np.floating) else jnp.asarray(x)
    wanted = (peer.grad_inputs, peer.grad_weights)
    given = [{name: single(x) for name, x in arrays.items()} for arrays in (peer.inputs, peer.weights)]
    moving = [{name: arrays[name] for name in names} for arrays, names in zip(given, wanted, strict=True)]

    def loss(moving):
        outputs = function(*(fixed | arrays for fixed, arrays in zip(given, moving, strict=True)))
        outputs = outputs if isinstance(outputs, dict) else {"y": outputs}
        return sum(jnp.sum(outputs[name] * cotangent) for name, cotangent in peer.cotangents.items()), outputs

    gradients, outputs = jax.jit(jax.grad(loss, has_aux=True))(moving)
    return outputs, dict(zip(("inputs", "weights"), gradients, strict=True))


def compare(layer: str | None, peer: SimpleNamespace, function, **options) -> None:
    """Checks the `outputs_and_gradients` of a function against the peer's; the options are those of `check`."""
    outputs, gradients = outputs_and_gradients(peer, function)
    theirs = {name: peer.outputs[name] for name in outputs}
    check(layer, peer, (outputs, theirs), (gradients, {"inputs": peer.grad_inputs, "weights": peer.grad_weights}), **options)


def compare_mechanism(name: str, layer, peer, mask=None, heads_first: bool = False) -> None:
    """`compare` of `layer.attend` and a peer that takes q, k and v, [B, T, N, H], or [B, N, T, H] with `heads_first`."""
    swap = (lambda a: a.swapaxes(1, 2)) if heads_first else (lambda a: a)
    attend = lambda inputs, _: swap(layer.attend(*(swap(inputs[x]) for x in "qkv"), mask))
    compare(name, peer, attend, of="mechanism")


def holding(layer: nnx.Module, weights: dict, names: dict[str, str] | None = None) -> nnx.Module:
    """A copy of a layer with all weights of a peer, which may be traced.

    Args:
        weights: by the peer's names: "to_q.weight". A `weight` is of PyTorch: our `kernel` transposed, or a norm's `scale`.
        names: of its modules and variables where they are not ours: {"to_q": "query"}.
    """
    layer, names = nnx.clone(layer), names or {}
    for name, value in weights.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight":
            leaf, value = ("scale" if value.ndim == 1 else "kernel"), value.T
        path = names.get(name) or f"{names.get(module, module)}.{leaf}"
        variable = functools.reduce(getattr, path.removeprefix(".").split("."), layer)
        variable[...] = jnp.reshape(value, variable.shape)
    return layer


class Table:
    """A pytest plugin that writes a session's comparisons into a CSV file, from whatever processes they come.

    A row is of a layer and an oracle, with the largest errors of the session. Rows of others stay, so that one test file can
    be run. Errors have one digit, so that another processor changes few.
    """

    def __init__(self, path):
        self.path, self.rows = pathlib.Path(path), {}

    def pytest_runtest_logreport(self, report):
        for key, row in report.user_properties:
            if key == "oracle" and report.when == "call" and report.passed:
                known = self.rows.setdefault((row["layer"], row["oracle"]), row)
                for name in COLUMNS[-2:]:
                    known[name] = max((x[name] for x in (known, row) if x[name] is not None), default=None)

    def pytest_sessionfinish(self):
        rows = {}
        if self.path.exists():
            with self.path.open(newline="") as file:
                rows = {(row["layer"], row["oracle"]): row for row in csv.DictReader(file)}
        for key, row in self.rows.items():
            rows[key] = row | {name: "" if row[name] is None else f"{row[name]:.0e}" for name in COLUMNS[-2:]}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("w", newline="") as file:
            table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            table.writeheader()
            table.writerows(rows[key] for key in sorted(rows))


def relative_error(actual, expected, least: float = 0.0) -> float:
    """max |actual - expected| / max |expected|, in float64; of trees, the largest of all leaves over that of all leaves.

    What is 0 by mathematics has no relative error of its own: compare it within its tree, or say the `least` to be relative to.
    """
    actual, expected = ([np.asarray(x, np.float64) for x in jax.tree.leaves(tree)] for tree in (actual, expected))
    differences = [np.abs(x - y).max(initial=0.0) for x, y in zip(actual, expected, strict=True)]
    largest = max(np.abs(x).max(initial=0.0) for x in expected)
    return float(max(differences) / max(largest, least, np.finfo(np.float64).tiny))
