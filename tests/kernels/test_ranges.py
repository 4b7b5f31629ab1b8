"""Indices of arrays that 32 bits cannot count."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subquad.kernels import (
    block_sparse,
    launch,
    linear,
    lsh,
    machine_code,
    matrix,
    relative,
    scan,
    softmax,
    ssm,
    strided,
)
from tests.kernels import ranges


def array(*shape, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(shape, dtype)


float32, complex64, int32 = (functools.partial(array, dtype=dtype) for dtype in ("float32", "complex64", "int32"))


def run(function, **options):
    return functools.partial(function, implementation="triton", **options)


def biased(query, key, value, bias):
    return softmax.attention(query, key, value, bias=bias, implementation="triton")


def features(kernel, is_causal):
    return run(linear.random_feature_attention, kernel=kernel, is_causal=is_causal)


# 2^31 elements or more in every sample: a call, and the arrays by which it is differentiated.
HEADS, TOKENS, MODES = array(1, 2**14, 1024, 128), array(1, 2**20, 2048), complex64(2048, 16)
STARTS = float32(2, 2048)
BUCKETS, ROTATIONS = int32(1, 4, 2**14, 1024), float32(1, 128, 4, 64)
BLOCKS = np.arange(128)[None, :, None]
ENORMOUS = {
    "softmax": (run(softmax.attention, is_causal=True), 3 * [HEADS]),
    "softmax-bias": (biased, [*3 * [array(1, 2**16, 1, 16)], array(1, 1, 2**16, 2**16)]),
    "block_sparse": (run(block_sparse.attention, blocks=BLOCKS, block_size=128), 3 * [HEADS]),
    "strided": (run(strided.attention, stride=128, window_size=128, is_causal=True), 3 * [HEADS]),
    "fixed": (run(strided.fixed, block_size=128, columns=np.array([[127]]), is_causal=True), 3 * [HEADS]),
    "linear": (run(linear.attention, is_causal=True), 3 * [HEADS]),
    "linear-both": (run(linear.attention), 3 * [HEADS]),
    "random-features": (features("softmax", True), [*3 * [HEADS], float32(256, 128)]),
    "lsh": (run(lsh.attention, num_buckets=128, chunk_size=64), [HEADS, HEADS, BUCKETS]),
    "hash": (run(lsh.hash_buckets), [HEADS, ROTATIONS]),
    "extend": (run(lsh.extend, start=0), [HEADS, HEADS, HEADS, BUCKETS, BUCKETS]),
    "scan": (run(scan.first_order), 2 * [array(2, 2**20, 2048)] + [STARTS]),
    "scan-reversed": (run(scan.first_order, reverse=True), [array(1, 1, 2048), array(2, 2**20, 2048), STARTS]),
    "scan-complex": (run(scan.first_order), 2 * [complex64(2, 2**20, 2048)] + [complex64(2, 2048)]),
    "diagonal_scan": (run(ssm.diagonal_scan), [TOKENS, MODES, MODES, MODES]),
    "dplr_recurrence": (run(ssm.dplr_recurrence), [TOKENS, MODES, complex64(1, 2048, 16), MODES, MODES, float32(2048)]),
    "selective_scan": (run(ssm.selective_scan), [TOKENS, TOKENS, float32(2048, 16), *2 * [array(1, 2**20, 16)]]),
    "pseudo_inverse": (run(matrix.pseudo_inverse), [array(1, 2**17, 128, 128)]),
    "sinkhorn": (run(matrix.sinkhorn), [array(1, 2**17, 128, 128)]),
    "relative": (run(relative.attention), [*3 * [HEADS], array(2**14, 1024, 128), *2 * [array(1024, 128)]]),
}


def launches(call, arrays):
    inexact = [i for i, x in enumerate(arrays) if x is not None and jnp.issubdtype(x.dtype, jnp.inexact)]

    def total(*inputs):
        return sum(jnp.abs(x).sum() for x in jax.tree.leaves(call(*inputs)))

    with launch.recording() as recorded:
        outputs = jax.eval_shape(call, *arrays)
        if jnp.issubdtype(jax.tree.leaves(outputs)[0].dtype, jnp.inexact):
            jax.eval_shape(jax.grad(total, inexact), *arrays)
    return list(dict.fromkeys(recorded))


@pytest.mark.aot
@pytest.mark.parametrize("name", ENORMOUS)
def test_no_index_overflows(name):
    found = launches(*ENORMOUS[name])
    assert found, "nothing was launched"
    for launched in found:
        assert not ranges.overflows(machine_code.intermediate_code(launched), launched.grid), launched.name


KERNEL = """
%cst = arith.constant dense<4096> : tensor<64x1xi32> loc(#loc1)
%c64_i32 = arith.constant 64 : i32
%program = tt.get_program_id x : i32
%rows = tt.make_range {end = 64 : i32, start = 0 : i32} : tensor<64xi32>
%out:2 = scf.for %tile = %c64_i32 to %program step %c64_i32 iter_args(%a = %rows, %b = %cst) -> (tensor<64xi32>, f32)  : i32 {
  %0 = tt.splat %tile : i32 -> tensor<64xi32>
  %1 = arith.addi %0, %rows : tensor<64xi32> loc(#loc2)
  %2 = tt.expand_dims %1 {axis = 1 : i32} : tensor<64xi32> -> tensor<64x1xi32>
  %place = arith.muli %2, %cst : tensor<64x1xi32> loc(#loc3)
}
"""


def test_products_are_followed_through_a_kernel():
    """A place is (tile + row) 4096 for tiles below the number of programs."""
    fits = 2**31 // 4096 - 62  # the last tile starts at most 2 below it, and has 64 rows
    assert ranges.overflows(KERNEL, fits) == ()
    assert ranges.overflows(KERNEL, fits + 1) == ("%place = arith.muli %2, %cst : tensor<64x1xi32>",)
    wide = KERNEL.replace("%place = ", "%3 = arith.extsi %2 : tensor<64x1xi32> to tensor<64x1xi64>\n%place = ")
    assert ranges.overflows(wide.replace("%2, %cst : tensor<64x1xi32>", "%3, %4 : tensor<64x1xi64>"), 2**30) == ()


def test_what_was_added_to_a_start_is_known_when_the_start_is_taken_away():
    code = """
    %start = tt.load %words : !tt.ptr<i32>
    %rows = tt.make_range {end = 64 : i32, start = 0 : i32} : tensor<64xi32>
    %0 = tt.splat %start : i32 -> tensor<64xi32>
    %1 = arith.addi %0, %rows : tensor<64xi32>
    %2 = tt.expand_dims %1 {axis = 1 : i32} : tensor<64xi32> -> tensor<64x1xi32>
    %3 = tt.splat %start : i32 -> tensor<64x1xi32>
    %4 = arith.subi %2, %3 : tensor<64x1xi32>
    %5 = tt.splat %stride : i32 -> tensor<64x1xi32>
    %6 = arith.muli %4, %5 : tensor<64x1xi32>
    """
    assert ranges.overflows(code, 1) == ()
    other = code.replace("%3 = tt.splat %start", "%3 = tt.splat %stride")
    assert ranges.overflows(other, 1) == ("%6 = arith.muli %4, %5 : tensor<64x1xi32>",)


@pytest.mark.parametrize(
    ("operation", "most"), [("divsi", 31), ("remsi", 63), ("minsi", 64), ("maxsi", 1999), ("subi", 1935), ("addi", 2063)]
)
def test_operations(operation, most):
    """Of program ids below 2,000 and 64."""
    code = f"""
    %a = tt.get_program_id x : i32
    %b = arith.constant 64 : i32
    %c = arith.{operation} %a, %b : i32
    %d = arith.constant %s : i32
    %e = arith.addi %c, %d : i32
    """
    rest = 2**31 - 1 - most
    assert ranges.overflows(code.replace("%s", str(rest)), 2000) == ()
    assert len(ranges.overflows(code.replace("%s", str(rest + 1)), 2000)) == 1
