"""Peers' implementations as data: inputs, weights, outputs and gradients of one seeded run each."""

import json
import pathlib
from types import SimpleNamespace

import jax
import jax.numpy as jnp
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


def relative_error(actual, expected, least: float = 0.0) -> float:
    """max |actual - expected| / max |expected|, in float64; of trees, the largest of all leaves over that of all leaves.

    What is 0 by mathematics has no relative error of its own: compare it within its tree, or say the `least` to be relative to.
    """
    actual, expected = ([np.asarray(x, np.float64) for x in jax.tree.leaves(tree)] for tree in (actual, expected))
    differences = [np.abs(x - y).max(initial=0.0) for x, y in zip(actual, expected, strict=True)]
    largest = max(np.abs(x).max(initial=0.0) for x in expected)
    return float(max(differences) / max(largest, least, np.finfo(np.float64).tiny))


def compare(peer, run):
    """Values and gradients of `run(inputs, weights) -> dict` in float32, to 1e-4."""
    cast = lambda group: {name: jnp.asarray(value, jnp.float32) for name, value in group.items()}

    def loss(inputs, weights):
        results = run(inputs, weights)
        return sum(jnp.sum(cotangent * results[name]) for name, cotangent in peer.cotangents.items()), results

    arguments = cast(peer.inputs), cast(peer.weights)
    (_, results), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(*arguments)
    errors = {name: relative_error(results[name], value) for name, value in peer.outputs.items() if name in results}
    assert errors, "something was compared"
    for ours, expected in zip(gradients, (peer.grad_inputs, peer.grad_weights), strict=True):
        errors |= {f"gradient of {name}": relative_error(ours[name], value) for name, value in expected.items()}
    assert max(errors.values()) < 1e-4, errors
