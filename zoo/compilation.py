"""Layers called eagerly, as in a notebook, compile once per shape; exported for any batch size, they run sample by sample."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx


def compile_once(method: Callable) -> Any:
    """A method of a module, compiled once per configuration of the module and shape of the arguments.

    Loops, sorts and convolutions called outside of `jax.jit` are compiled anew in every call. Inside a caller's
    `jax.jit` the method becomes a part of the caller's program.

    Args:
        method: of a module that it does not change; its arguments and results are pytrees of arrays, the results with a
            batch axis in front.
    """

    @functools.wraps(method)
    def run(module, *arguments):
        graph, state = nnx.split(module)
        return _program(method, graph)(state, arguments)

    return run


@functools.lru_cache(maxsize=64)  # programs take memory, and memory maps, of which Linux gives a process 65,530
def _program(method, graph):
    return jax.jit(functools.partial(_run, method, graph))


def _run(method, graph, state, arguments):
    return by_sample(lambda arguments: method(nnx.merge(graph, state), *arguments), arguments)


def by_sample(call: Callable[[Any], Any], arguments: Any) -> Any:
    """call(arguments); where `jax.export` leaves the batch size open, of a sample after the other.

    Args:
        call: of a tree of arrays, of which some have a batch axis in front; so have all of its results.
    Raises: ValueError: a key among arrays of an open batch.
    """
    leaves, tree = jax.tree.flatten(arguments)
    is_batched = [leaf.ndim > 0 and not isinstance(leaf.shape[0], int) for leaf in leaves]
    if not any(is_batched):
        return call(arguments)
    if any(jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in leaves):
        raise ValueError(
            "deterministic: must be True where jax.export leaves the batch size open, got a call that draws. "
            "Export model.eval()."
        )

    # Kernels cut their work by the batch size, which jax.export may leave open: each sample is then a batch of its own.
    def one(rows):
        rows = iter(rows)
        sample = [next(rows)[None] if batched else leaf for leaf, batched in zip(leaves, is_batched, strict=True)]
        return jax.tree.map(lambda result: result[0], call(tree.unflatten(sample)))

    return jax.lax.map(one, [leaf for leaf, batched in zip(leaves, is_batched, strict=True) if batched])
