"""Layers called eagerly, as in a notebook, compile once per shape."""

import functools
from collections.abc import Callable

import jax
from flax import nnx


def compile_once(method: Callable) -> Callable:
    """A method of a module, compiled once per configuration of the module and shape of the arguments.

    Loops, sorts and convolutions called outside of `jax.jit` are compiled anew in every call. Inside a caller's
    `jax.jit` the method becomes a part of the caller's program.

    Args:
        method: of a module that it does not change; its arguments and results are pytrees of arrays.
    """

    @functools.wraps(method)
    def run(module, *arguments):
        return _run(method, *nnx.split(module), arguments)

    return run


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(method, graph, state, arguments):
    return method(nnx.merge(graph, state), *arguments)
