"""Peers' implementations as data: inputs, weights, outputs and gradients of one seeded run each."""

import json
import pathlib
from types import SimpleNamespace

import numpy as np

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


def load(name: str) -> SimpleNamespace:
    """The oracle `name`: `.meta` (dict) and one dict of arrays per group."""
    oracle = SimpleNamespace(**{group: {} for group in GROUPS.values()})
    with np.load(HERE / f"{name}.npz") as arrays:
        oracle.meta = json.loads(str(arrays["meta"]))
        for key in arrays.files:
            for prefix, group in GROUPS.items():
                if key.startswith(prefix + "/"):
                    getattr(oracle, group)[key[len(prefix) + 1 :]] = arrays[key]
    return oracle


def relative_error(actual, expected) -> float:
    """max |actual - expected| / max(1, max |expected|), in float64."""
    expected = np.asarray(expected, np.float64)
    difference = np.abs(np.asarray(actual, np.float64) - expected)
    return float(difference.max(initial=0.0) / max(1.0, np.abs(expected).max(initial=0.0)))
