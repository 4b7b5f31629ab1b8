"""How the suite compares numbers: relative to how large they are, for one array or a whole tree of gradients; and what it
reads from a traced program."""

import jax
import numpy as np


def errors(actual, expected, part: float = 0.1) -> dict[str, float]:
    """max |actual - expected| of every leaf, in float64, relative to the leaf's largest or to a part of the largest of all.

    A gradient that the mathematics makes zero, like that of a key's bias under a softmax, holds rounding alone: its error is
    relative to its neighbours, since relative to itself it is 1 and an absolute bound holds on one processor only.
    """
    paths, tree = jax.tree.flatten_with_path(expected)
    leaves, other = jax.tree.flatten(actual)
    assert tree == other, f"trees differ: {other} is not {tree}"
    wanted = [np.asarray(leaf, np.float64) for _, leaf in paths]
    leaves = [np.asarray(leaf, np.float64) for leaf in leaves]
    for (path, _), a, e in zip(paths, leaves, wanted, strict=True):
        assert a.shape == e.shape, f"{jax.tree_util.keystr(path)} has shape {a.shape}, not {e.shape}"
    sizes = [np.abs(leaf).max(initial=0.0) for leaf in wanted]
    largest = max(sizes, default=0.0)
    return {
        jax.tree_util.keystr(path): float(np.abs(a - e).max(initial=0.0) / (max(size, part * largest) or 1.0))
        for (path, _), a, e, size in zip(paths, leaves, wanted, sizes, strict=True)
    }


def assert_close(actual, expected, tolerance: float, hint: str = "", part: float = 0.1) -> None:
    """Every leaf's error (see `errors`) is below `tolerance`; NaN never is."""
    bad = {path: f"{error:.1e}" for path, error in errors(actual, expected, part).items() if not error < tolerance}
    assert not bad, f"{hint}{': ' if hint else ''}errors of {tolerance:.0e} or more: {bad}"


def products(jaxpr):
    """The precision of every product of float32 matrices in a jaxpr, and in those inside it."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general" and {x.aval.dtype.name for x in equation.invars} == {"float32"}:
            yield equation.params["precision"]
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from products(inner)
