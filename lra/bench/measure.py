"""What a function costs: FLOPs counted from its jaxpr, bytes read from its compiled program.

Both are exact and repeatable on any machine, so tests may assert them. XLA's own `cost_analysis` counts the body of a
loop once however often it runs; the jaxpr still knows the trip counts, so FLOPs are counted there.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core

# One FLOP per real output element; complex arithmetic costs more (COMPLEX_COST).
ELEMENTWISE = frozenset(
    "abs acos acosh add add_any asin asinh atan atan2 atanh cbrt ceil clamp cos cosh cummax cummin cumsum cumprod "
    "cumlogsumexp digamma div erf erf_inv erfc exp exp2 expm1 floor integer_pow lgamma log log1p logistic max min mul "
    "neg nextafter pow rem round rsqrt sign sin sinh sqrt square sub tan tanh".split()
)
# One FLOP per input element, and one per update element.
REDUCTIONS = frozenset("reduce_sum reduce_prod reduce_max reduce_min argmax argmin reduce reduce_precision".split())
SCATTERS = frozenset("scatter-add scatter_add scatter-mul scatter_mul scatter-min scatter-max".split())
COMPLEX_COST = {"mul": 6, "div": 11, "integer_pow": 6, "square": 6, "exp": 6, "abs": 4}
# Kernels that a jaxpr calls without showing what is inside.
OPAQUE = ("ffi_call", "custom_call", "triton", "pallas", "dot_product_attention", "callback")


class Memory(NamedTuple):
    """Bytes of a compiled program.

    Attributes:
        arguments: bytes of the inputs.
        outputs: bytes of the results.
        temporary: bytes that the program needs between its inputs and its results.
        peak: all of them, aliased (donated) buffers counted once: what must be free for the program to run.
    """

    arguments: int
    outputs: int
    temporary: int
    peak: int


def memory(function: Callable, *args, **kwargs) -> Memory:
    """Compiles `function` for these arguments and reads how many bytes the program asks for; nothing runs.

    Args:
        function: any function that `jax.jit` takes, or one already jitted (its donation and statics then count).
        args, kwargs: arrays, `jax.ShapeDtypeStruct`s or pytrees of them.
    Returns: a `Memory`, in bytes, per device.
    Example:
        >>> memory(lambda x: x @ x, jax.ShapeDtypeStruct((64, 64), "float32")).arguments
        16384
    """
    lowered = function if hasattr(function, "lower") else jax.jit(function)
    return memory_of(lowered.lower(*args, **kwargs).compile())


def memory_of(compiled) -> Memory:
    """The `Memory` of a program that is compiled already (`jitted.lower(...).compile()`)."""
    found = compiled.memory_analysis()
    arguments, outputs = found.argument_size_in_bytes, found.output_size_in_bytes
    # Not XLA's own peak_memory_in_bytes: on a CPU it leaves the temporary buffers out.
    peak = arguments + outputs + found.temp_size_in_bytes - found.alias_size_in_bytes
    return Memory(arguments, outputs, found.temp_size_in_bytes, peak)


def made_bytes(make: Callable[[], Any]) -> int:
    """Bytes of the arrays that a function returns, by their shapes; nothing is allocated.

    Example:
        >>> made_bytes(lambda: jax.numpy.zeros((2, 3)))
        24
    """
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(make)))


def flops(function: Callable, *args, while_trips: int | None = None, **kwargs) -> int:
    """Counts the floating-point operations of one call from the function's jaxpr; nothing compiles or runs.

    Counted: `dot_general`, `ragged_dot` and convolutions as 2 per multiply-add, an FFT of n points as 5 n log2 n (half of
    that for real data), elementwise arithmetic as 1 per output element, reductions and scatter-adds as 1 per input element,
    small factorisations by their leading term. Integer and boolean work, comparisons, sorting and data movement are
    free. A `scan` (and a `fori_loop` or `map` with static bounds) costs its length times its body, a `cond` its dearest
    branch. Work whose result nobody uses is left out, as the compiler leaves it out. What `jax.checkpoint` computes
    again is counted again. Under `shard_map` the count is that of one device.

    Args:
        function: the function; args and kwargs are arrays, `jax.ShapeDtypeStruct`s or pytrees of them.
        while_trips: how often the body of a `while_loop` runs; such a loop does not say.
    Returns: the number of FLOPs, an int.
    Raises:
        ValueError: the function has a `while_loop` and while_trips is None, or calls a kernel that a jaxpr cannot see
            into (Triton, Pallas, cuDNN, FFI, host callbacks).
    Example:
        >>> flops(lambda x: x @ x, jax.ShapeDtypeStruct((64, 64), "float32")) == 2 * 64**3
        True
    """
    closed = jax.make_jaxpr(lambda args, kwargs: function(*args, **kwargs))(args, kwargs)
    return _count(closed.jaxpr, [True] * len(closed.jaxpr.outvars), while_trips)


def _count(jaxpr, wanted: list[bool], while_trips: int | None) -> int:
    """FLOPs of a jaxpr of whose outputs only the `wanted` ones are used."""
    live = {id(v) for v, want in zip(jaxpr.outvars, wanted, strict=True) if want}
    total = 0
    for equation in reversed(jaxpr.eqns):
        used = [id(v) in live for v in equation.outvars]
        if any(used) or equation.effects:
            total += _equation(equation, used, while_trips)
            live.update(id(v) for v in equation.invars)
    return total


def _equation(equation, used: list[bool], while_trips: int | None) -> int:
    name, params = equation.primitive.name, equation.params
    inputs, outputs = [v.aval for v in equation.invars], [v.aval for v in equation.outvars]
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        depth = math.prod(inputs[0].shape[axis] for axis in contracted)
        return 2 * _complex(outputs[0], 4) * _size(outputs[0]) * depth * _floating(outputs[0])
    if name == "ragged_dot_general":
        # Each row times the matrix of its group; of the gradient of these, each row in the product of its group.
        numbers = params["ragged_dot_dimension_numbers"]
        (contracted, _), _ = numbers.dot_dimension_numbers
        depth = math.prod(inputs[0].shape[axis] for axis in contracted)
        groups = inputs[2].shape[-1] if numbers.lhs_ragged_dimensions[0] in contracted else 1
        return 2 * _size(outputs[0]) * depth // groups * _floating(outputs[0])
    if name == "conv_general_dilated":
        features = inputs[1].shape[params["dimension_numbers"].rhs_spec[0]]
        return 2 * _complex(outputs[0], 4) * _size(outputs[0]) * _size(inputs[1]) // features
    if name == "fft":
        points = math.prod(params["fft_lengths"])
        real = "R" in getattr(params["fft_type"], "name", str(params["fft_type"])).removesuffix("FFT").removeprefix("I")
        batch = math.prod(inputs[0].shape[: inputs[0].ndim - len(params["fft_lengths"])])
        return int(batch * 5 * points * math.log2(max(points, 2))) // (2 if real else 1)
    if name in ELEMENTWISE:
        cost = _complex(outputs[0], COMPLEX_COST.get(name, 2))
        if name == "abs":
            cost = _complex(inputs[0], COMPLEX_COST["abs"])
        return cost * _size(outputs[0]) * _floating(outputs[0])
    if name in REDUCTIONS:
        return _complex(inputs[0], 2) * _size(inputs[0]) * _floating(inputs[0])
    if name in SCATTERS:
        return _complex(inputs[2], 2) * _size(inputs[2]) * _floating(inputs[2])
    if name in _FACTORISATIONS:
        return int(_complex(inputs[0], 4) * _FACTORISATIONS[name](inputs))
    if name == "scan":
        # A carry that nobody reads afterwards may still feed the next turn, so all of the body's outputs count as used.
        body = _open(params["jaxpr"])
        return params["length"] * _count(body, [True] * len(body.outvars), while_trips)
    if name == "while":
        if while_trips is None:
            raise ValueError(
                "flops: while_trips must be given, got None, because the function has a while_loop, whose trip count "
                "is unknown. Use lax.scan or static fori_loop bounds, or pass while_trips."
            )
        parts = (_open(params["cond_jaxpr"]), _open(params["body_jaxpr"]))
        return while_trips * sum(_count(part, [True] * len(part.outvars), while_trips) for part in parts)
    if name == "cond":
        return max(_count(_open(branch), used, while_trips) for branch in params["branches"])
    if any(word in name for word in OPAQUE):
        raise ValueError(
            f"flops: function must be made of operations that a jaxpr shows, got a call of {name!r}. "
            'Count it with implementation="xla" or "reference".'
        )
    total = 0
    for body in _bodies(params):
        wanted = used if len(body.outvars) == len(used) else [True] * len(body.outvars)
        total += _count(body, wanted, while_trips)
    return total


def _bodies(params: dict):
    """The jaxprs among an equation's parameters: jit, checkpoint, custom_vjp, custom_jvp, shard_map."""
    for value in params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if isinstance(part, core.ClosedJaxpr | core.Jaxpr):
                yield _open(part)


def _open(jaxpr):
    """A jaxpr without its constants; the newest jax hands out only that kind."""
    return getattr(jaxpr, "jaxpr", jaxpr)


# Leading terms, over the last two axes.
_FACTORISATIONS = {
    "cholesky": lambda a: _batch(a[0]) * a[0].shape[-1] ** 3 / 3,
    "lu": lambda a: _batch(a[0]) * 2 * a[0].shape[-1] ** 3 / 3,
    "qr": lambda a: _batch(a[0]) * 2 * a[0].shape[-2] * a[0].shape[-1] ** 2,
    "geqrf": lambda a: _batch(a[0]) * 2 * a[0].shape[-2] * a[0].shape[-1] ** 2,
    "householder_product": lambda a: _batch(a[0]) * 2 * a[0].shape[-2] * a[0].shape[-1] ** 2,
    "triangular_solve": lambda a: _size(a[1]) * a[0].shape[-1],
    "eigh": lambda a: _batch(a[0]) * 9 * a[0].shape[-1] ** 3,
    "svd": lambda a: _batch(a[0]) * 20 * a[0].shape[-2] * a[0].shape[-1] * min(a[0].shape[-2:]),
}


def _size(aval) -> int:
    return math.prod(aval.shape)


def _batch(aval) -> int:
    return math.prod(aval.shape[:-2])


def _floating(aval) -> int:
    return int(jax.numpy.issubdtype(aval.dtype, np.inexact))


def _complex(aval, cost: int) -> int:
    return cost if jax.numpy.issubdtype(aval.dtype, np.complexfloating) else 1
