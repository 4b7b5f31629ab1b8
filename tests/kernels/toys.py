"""Small Triton kernels for the tests of `launch`; imported inside tests, after Triton was set up."""

from typing import Any, NamedTuple

import jax
import triton
import triton.language as tl

from subquad.kernels import launch, tuning
from subquad.kernels.operation import folding


@triton.jit
def matmul(
    x_ptr,
    y_ptr,
    bias_ptr,
    out_ptr,
    T: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    X_STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    batch = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = (at[:, None] < T) & (at[None, :] < T)
    place = at[:, None] * T + at[None, :]
    x = tl.load(x_ptr + batch * X_STRIDE + place, inside, 0.0)
    y = tl.load(y_ptr + batch * T * T + place, inside, 0.0)
    out = tl.dot(x, y, input_precision=PRECISION) * SCALE
    if HAS_BIAS:
        out += tl.load(bias_ptr)
    tl.store(out_ptr + batch * T * T + place, out.to(out_ptr.dtype.element_ty), inside)


@triton.jit
def transpose_of_product(x_ptr, y_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    place = at[:, None] * BLOCK + at[None, :]
    x, y = tl.load(x_ptr + place), tl.load(y_ptr + place)
    product = tl.dot(x, y).to(x.dtype)
    tl.store(out_ptr + place, tl.dot(tl.trans(product), y))


@triton.jit
def copy(x_ptr, out_ptr, T: tl.constexpr, SHIFT: tl.constexpr, WRITE_INPUT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    values = tl.load(x_ptr + at, at < T, 0)
    tl.store(out_ptr + at + SHIFT, values, at < T)
    if WRITE_INPUT:
        tl.store(x_ptr + at, values + 1, at < T)


@triton.jit
def twice(x, RULE: tl.constexpr):
    return x * 2 + RULE.numbers[1]


@triton.jit
def apply(x_ptr, out_ptr, RULE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + at, RULE.function(tl.load(x_ptr + at), RULE))


class Rule(NamedTuple):
    function: Any
    numbers: tuple


def follow(mode, x, numbers=(0, 5)):
    """x [16] -> 2 x + numbers[1], by a function that is a constant."""
    constants, config = dict(RULE=Rule(twice, numbers)), tuning.Config({"BLOCK": 16})
    return launch.call(apply, dict(x_ptr=x), dict(out_ptr=x), grid=1, constants=constants, config=config, mode=mode)[0]


def multiply(mode, scale=0.5, bias=None, block=64):
    """x, y [B|1, T, T] -> scale x y."""

    def run(x, y):
        batch, length = max(x.shape[0], y.shape[0]), x.shape[1]
        (out,) = launch.call(
            matmul,
            dict(x_ptr=x, y_ptr=y, bias_ptr=bias),
            dict(out_ptr=jax.ShapeDtypeStruct((batch, length, length), x.dtype)),
            grid=batch,
            constants=dict(
                T=length,
                SCALE=scale,
                HAS_BIAS=bias is not None,
                PRECISION=launch.dot_precision(x.dtype),
                X_STRIDE=0 if x.shape[0] == 1 else length**2,
            ),
            config=tuning.Config({"BLOCK": block}),
            mode=mode,
        )
        return out

    folded = folding(lambda *arrays: (run(*arrays),), (True, True), lambda: (True,), ({0}, {1}))
    return lambda x, y: folded(x, y)[0]


def shift(mode, x, by=0, write_input=False, out=None, aliases=None, **names):
    """x [T] -> the same values, written `by` places further on."""
    (moved,) = launch.call(
        copy,
        names or dict(x_ptr=x),
        dict(out_ptr=out or jax.ShapeDtypeStruct(x.shape, x.dtype)),
        grid=1,
        constants=dict(T=len(x), SHIFT=by, WRITE_INPUT=write_input),
        config=tuning.Config({"BLOCK": 64}),
        mode=mode,
        aliases=aliases,
    )
    return moved
