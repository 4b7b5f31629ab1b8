"""The two sides of a race: one call forward and one with the backward pass, in JAX and in PyTorch."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Case:
    """The shape of a race."""

    length: int
    dtype: str = "float32"
    batch: int = 1
    heads: int = 4
    features: int = 64
    device: str = "cpu"

    @property
    def width(self) -> int:
        return self.heads * self.features

    def draw(self, count: int, shape: tuple[int, ...] | None = None) -> list[np.ndarray]:
        """The same normal numbers for both sides: `count` arrays [B, T, N, H], or of another shape."""
        rng = np.random.default_rng(self.length)
        shape = shape or (self.batch, self.length, self.heads, self.features)
        return [rng.standard_normal(shape, np.float32) for _ in range(count)]

    def tokens(self) -> np.ndarray:
        """Inputs of a layer [B, T, D]."""
        return self.draw(1, (self.batch, self.length, self.width))[0]


@dataclass
class Side:
    """One contestant: `forward` and `train` return their results when the work is done.

    `results` turns them into arrays that may be compared with the other side's. `facts` has the compiler's bytes and
    seconds, where there is a compiler.
    """

    forward: Callable[[], Any]
    train: Callable[[], Any]
    results: Callable[[Any], list[np.ndarray]]
    facts: Callable[[str], dict[str, float]] = lambda direction: {}


def cotangent(shape) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape, np.float32)


def jax_side(case: Case, function: Callable, arrays, constants=()) -> Side:
    """Ours: `function(*arrays, *constants)` compiled, with gradients of all floating-point arrays.

    Args:
        function: returns one array.
        arrays: pytrees of arrays; NumPy ones are cast to the dtype of the case.
        constants: pytrees of arrays that have no gradient.
    """
    import jax
    import jax.numpy as jnp

    cast = lambda array: jnp.asarray(array, case.dtype) if isinstance(array, np.ndarray) else array
    arrays = tuple(jax.tree.map(cast, array) for array in arrays)
    count = len(arrays)
    shape = jax.eval_shape(function, *arrays, *constants)
    weight = jnp.asarray(cotangent(shape.shape), shape.dtype)

    def train(*words):
        outputs, backward = jax.vjp(lambda *given: function(*given, *words[count:-1]), *words[:count])
        return outputs, backward(words[-1])

    bodies = {"forward": (function, (*arrays, *constants)), "train": (train, (*arrays, *constants, weight))}
    compiled: dict[str, tuple[Any, float]] = {}

    def program(direction):
        if direction not in compiled:
            body, words = bodies[direction]
            began = time.perf_counter()
            compiled[direction] = jax.jit(body).lower(*words).compile(), time.perf_counter() - began
        return compiled[direction]

    def call(direction):
        return jax.block_until_ready(program(direction)[0](*bodies[direction][1]))

    def facts(direction):
        built, seconds = program(direction)
        return {"temporary_bytes": built.memory_analysis().temp_size_in_bytes, "compile_seconds": seconds}

    results = lambda found: [np.asarray(leaf, np.float32) for leaf in jax.tree.leaves(found)]
    return Side(lambda: call("forward"), lambda: call("train"), results, facts)


def layer_side(case: Case, layer, call: Callable = lambda layer, tokens: layer(tokens)) -> Side:
    """Ours: a layer on its inputs, with gradients of its parameters and inputs."""
    import jax.numpy as jnp
    from flax import nnx

    graph, parameters, rest = nnx.split(layer, nnx.Param, ...)
    tokens = jnp.asarray(case.tokens(), case.dtype)
    return jax_side(
        case, lambda given, tokens, others: call(nnx.merge(graph, given, others), tokens), (parameters, tokens), (rest,)
    )


def mechanism_side(case: Case, layer, count: int = 3) -> Side:
    """Ours: what a layer does between its projections, with gradients of the `count` arrays [B, T, N, H] it is given.

    Two arrays are a shared query and key, and a value.
    """
    from flax import nnx

    graph, state = nnx.split(layer)
    words = lambda arrays: (arrays[0], *arrays) if count == 2 else arrays
    return jax_side(
        case, lambda *arrays: nnx.merge(graph, arrays[-1]).attend(*words(arrays[:-1]), None), case.draw(count), (state,)
    )


def make_layer(case: Case, name: str, **options):
    """A layer of the zoo for the width, heads and dtype of the case."""
    from flax import nnx

    from subquad import zoo

    if "num_heads" in zoo.registry.options(name):
        options["num_heads"] = case.heads
    return zoo.make(name, in_features=case.width, dtype=case.dtype, param_dtype=case.dtype, rngs=nnx.Rngs(0), **options)


def torch_side(case: Case, function: Callable, arrays, module=None, heads_first: bool = False) -> Side:
    """Theirs: `function(*tensors)` in PyTorch, with gradients of the tensors and of the module's parameters.

    Args:
        arrays: NumPy arrays.
        module: it holds the parameters; None: there are none.
        heads_first: the peer's arrays are [B, N, T, H]; ours are turned for it, once and beforehand.
    """
    import torch

    kind, place = getattr(torch, case.dtype), "cuda" if case.device == "gpu" else "cpu"
    turn = lambda array: np.ascontiguousarray(np.swapaxes(array, 1, 2)) if heads_first else array
    tensors = [torch.from_numpy(turn(array)).to(place, kind).requires_grad_() for array in arrays]
    if module is not None:
        module.to(place)
        if kind != torch.float32:  # else complex parameters would lose their imaginary part
            module.to(kind)
    leaves = [*tensors, *(() if module is None else module.parameters())]
    weight = None

    def finish(found):
        if place == "cuda":
            torch.cuda.synchronize()
        return found

    def forward():
        with torch.no_grad():
            return finish(function(*tensors))

    def train():
        nonlocal weight
        outputs = function(*tensors)
        if weight is None:
            weight = torch.from_numpy(turn(cotangent(turn(np.empty(outputs.shape)).shape))).to(place, kind)
        outputs.backward(weight)
        found = outputs.detach(), *(tensor.grad for tensor in tensors)
        for leaf in leaves:  # so that nothing is left of this call for the next
            leaf.grad = None
        return finish(found)

    def results(found):
        found = found if isinstance(found, tuple) else (found,)
        return [turn(tensor.float().cpu().numpy()) for tensor in found]

    return Side(forward, train, results)
