"""Matrix iterations in Triton: a program owns the matrix of one head.

Pseudo-inverse. Float32 products of three passes need four copies of their operands on the chip, more than fits for M = 128.
So the iterates live in a scratch of the program's own, which stays in the cache, and a product goes through them in tiles.
An operand is thus always loaded, never the transpose of another product in registers, which Triton gets wrong on Hopper in
some versions. With X = A Z, U = 7 I - X, V = 15 I - X U, W = 13 I - X V and Z' = Z W / 4, and G the gradient of Z':

    dW = Z^T G / 4,   dV = -X^T dW,   dX = -dW V^T - dV U^T + X^T dV,   dA += dX Z^T,   G <- G W^T / 4 + A^T dX

Sinkhorn. The matrix stays in registers. An iterate is the logits less one number per row and one per column, and these
vectors are all that the forward pass writes for the backward pass.
"""

import dataclasses

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from subquad.kernels import launch, tuning
from subquad.kernels.flash.triton import padded
from subquad.kernels.matrix.reference import scale
from subquad.kernels.operation import operation

LARGEST = 128


# ------------------------------------------------------------------------------------------------------ pseudo-inverse


@triton.jit
def _copy(X, OUT, M: tl.constexpr, BLOCK: tl.constexpr):
    for i in range(0, M, BLOCK):
        for j in range(0, M, BLOCK):
            rows = i + tl.arange(0, BLOCK)[:, None]
            columns = j + tl.arange(0, BLOCK)[None, :]
            valid = (rows < M) & (columns < M)
            x = tl.load(X + rows * M + columns, mask=valid, other=0.0)
            tl.store(OUT + rows * M + columns, x.to(OUT.dtype.element_ty), mask=valid)


@triton.jit
def _product(
    X, Y, OUT, factor, diagonal,
    X_T: tl.constexpr, Y_T: tl.constexpr, AS_U: tl.constexpr, ADD: tl.constexpr,
    M: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """OUT = diagonal I + factor X Y (+ OUT), with X or Y transposed, or 7 I - Y in place of Y. OUT is neither X nor Y."""
    tl.debug_barrier()  # other threads wrote what is read here
    for i in range(0, M, BLOCK):
        for j in range(0, M, BLOCK):
            rows = i + tl.arange(0, BLOCK)[:, None]
            columns = j + tl.arange(0, BLOCK)[None, :]
            total = tl.zeros((BLOCK, BLOCK), tl.float32)
            for k in range(0, M, BLOCK_K):
                across = k + tl.arange(0, BLOCK_K)[None, :]
                down = k + tl.arange(0, BLOCK_K)[:, None]
                x_place = (across * M + rows) if X_T else (rows * M + across)
                y_place = (columns * M + down) if Y_T else (down * M + columns)
                x = tl.load(X + x_place, mask=(rows < M) & (across < M), other=0.0).to(tl.float32)
                y = tl.load(Y + y_place, mask=(down < M) & (columns < M), other=0.0).to(tl.float32)
                if AS_U:
                    y = tl.where(down == columns, 7.0, 0.0) - y
                total = tl.dot(x, y, total, input_precision=PRECISION)
            total = total * factor + tl.where(rows == columns, diagonal, 0.0)
            valid = (rows < M) & (columns < M)
            if ADD:
                total += tl.load(OUT + rows * M + columns, mask=valid, other=0.0)
            tl.store(OUT + rows * M + columns, total, mask=valid)


@triton.jit
def _polynomial(
    A, Z, X, V, W, M: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr
):
    _product(A, Z, X, 1.0, 0.0, False, False, False, False, M, PRECISION, BLOCK, BLOCK_K)
    _product(X, X, V, -1.0, 15.0, False, False, True, False, M, PRECISION, BLOCK, BLOCK_K)
    _product(X, V, W, -1.0, 13.0, False, False, False, False, M, PRECISION, BLOCK, BLOCK_K)


@triton.jit
def inverse_forward_kernel(
    A, START, OUT, SCRATCH,
    M: tl.constexpr, ITERATIONS: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """SCRATCH [B, N, 5, M, M]: X, V, W, and two places for Z in turn."""
    SIZE: tl.constexpr = M * M
    program = tl.program_id(0).to(tl.int64)
    A += program * SIZE
    X = SCRATCH + program * 5 * SIZE
    V = X + SIZE
    W = V + SIZE
    Z = W + SIZE
    _copy(START + program * SIZE, Z, M, BLOCK)
    for step in range(ITERATIONS):
        here = Z + (step % 2) * SIZE
        _polynomial(A, here, X, V, W, M, PRECISION, BLOCK, BLOCK_K)
        there = Z + ((step + 1) % 2) * SIZE
        _product(here, W, there, 0.25, 0.0, False, False, False, False, M, PRECISION, BLOCK, BLOCK_K)
    tl.debug_barrier()
    _copy(Z + (ITERATIONS % 2) * SIZE, OUT + program * SIZE, M, BLOCK)


@triton.jit
def inverse_backward_kernel(
    A, START, G, SCRATCH,
    M: tl.constexpr, ITERATIONS: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """SCRATCH [B, N, 9 + ITERATIONS, M, M]: dA, two places for G in turn, X, V, W, dW, dV, dX, all Z.

    The gradient of the start is left where G would be read next.
    """
    SIZE: tl.constexpr = M * M
    program = tl.program_id(0).to(tl.int64)
    A += program * SIZE
    DA = SCRATCH + program * (9 + ITERATIONS) * SIZE
    GS = DA + SIZE
    X = GS + 2 * SIZE
    V = X + SIZE
    W = V + SIZE
    DW = W + SIZE
    DV = DW + SIZE
    DX = DV + SIZE
    Z = DX + SIZE
    _copy(G + program * SIZE, GS, M, BLOCK)
    _copy(START + program * SIZE, Z, M, BLOCK)
    for step in range(ITERATIONS - 1):
        here = Z + step * SIZE
        _polynomial(A, here, X, V, W, M, PRECISION, BLOCK, BLOCK_K)
        _product(here, W, here + SIZE, 0.25, 0.0, False, False, False, False, M, PRECISION, BLOCK, BLOCK_K)
    for step in range(ITERATIONS):
        here = Z + (ITERATIONS - 1 - step) * SIZE
        g = GS + (step % 2) * SIZE
        next_g = GS + ((step + 1) % 2) * SIZE
        _polynomial(A, here, X, V, W, M, PRECISION, BLOCK, BLOCK_K)
        _product(here, g, DW, 0.25, 0.0, True, False, False, False, M, PRECISION, BLOCK, BLOCK_K)
        _product(g, W, next_g, 0.25, 0.0, False, True, False, False, M, PRECISION, BLOCK, BLOCK_K)
        _product(X, DW, DV, -1.0, 0.0, True, False, False, False, M, PRECISION, BLOCK, BLOCK_K)
        _product(DW, V, DX, -1.0, 0.0, False, True, False, False, M, PRECISION, BLOCK, BLOCK_K)
        _product(DV, X, DX, -1.0, 0.0, False, True, True, True, M, PRECISION, BLOCK, BLOCK_K)
        _product(X, DV, DX, 1.0, 0.0, True, False, False, True, M, PRECISION, BLOCK, BLOCK_K)
        if step == 0:
            _product(DX, here, DA, 1.0, 0.0, False, True, False, False, M, PRECISION, BLOCK, BLOCK_K)
        else:
            _product(DX, here, DA, 1.0, 0.0, False, True, False, True, M, PRECISION, BLOCK, BLOCK_K)
        _product(A, DX, next_g, 1.0, 0.0, True, False, False, True, M, PRECISION, BLOCK, BLOCK_K)


def pseudo_inverse(matrix, iterations, *, mode):
    """See `matrix.pseudo_inverse`."""
    _require(matrix)
    wide = matrix.astype(jnp.float32)
    return _iterate((iterations, mode), matrix, scale(wide) * wide.swapaxes(2, 3))


def _iterate_forward(static, matrix, start):
    iterations, mode = static
    inverse, _ = _launch(
        "matrix.inverse_forward", inverse_forward_kernel, dict(A=matrix, START=start),
        dict(OUT=_like(matrix), SCRATCH=_scratch(matrix, 5)), matrix.shape, iterations, mode,
        PRECISION=launch.dot_precision("float32"),
    )  # fmt: skip
    return inverse, (matrix, start)


def _iterate_backward(static, saved, gradient):
    iterations, mode = static
    matrix, start = saved
    (scratch,) = _launch(
        "matrix.inverse_backward", inverse_backward_kernel, dict(A=matrix, START=start, G=gradient),
        dict(SCRATCH=_scratch(matrix, 9 + iterations)), matrix.shape, iterations, mode,
        PRECISION=launch.dot_precision("float32"),
    )  # fmt: skip
    return scratch[:, :, 0].astype(matrix.dtype), scratch[:, :, 1 + iterations % 2]


_iterate = operation(_iterate_forward, _iterate_backward, arrays=("b n m m",) * 2, outputs="b n m m", shared=())


def _scratch(matrix, slots):
    batch, heads, size, _ = matrix.shape
    return jax.ShapeDtypeStruct((batch, heads, slots, size, size), jnp.float32)


# ------------------------------------------------------------------------------------------------------------ Sinkhorn


@triton.jit
def _logits(X, place, valid, rows, columns, CAUSAL: tl.constexpr):
    """float32, -1e30 where a pair is forbidden or does not exist."""
    x = tl.load(X + place, mask=valid, other=0.0).to(tl.float32)
    allowed = valid & (x > float("-inf"))
    if CAUSAL:
        allowed = allowed & (columns <= rows)
    return tl.where(allowed, x, -1e30)


@triton.jit
def _normaliser(x, AXIS: tl.constexpr):
    largest = tl.max(x, AXIS)
    some = largest > -5e29
    largest = tl.where(some, largest, 0.0)
    total = tl.sum(tl.exp(x - tl.expand_dims(largest, AXIS)), AXIS)
    return tl.where(some, largest + tl.log(tl.where(some, total, 1.0)), 0.0)


@triton.jit
def sinkhorn_forward_kernel(
    X, P, V,
    M: tl.constexpr, ITERATIONS: tl.constexpr, CAUSAL: tl.constexpr, KEEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """V [B, N, ITERATIONS, 2, M]: what is taken from rows and from columns, after each iteration."""
    program = tl.program_id(0).to(tl.int64)
    line = tl.arange(0, BLOCK)
    rows = line[:, None]
    columns = line[None, :]
    valid = (rows < M) & (columns < M)
    place = rows * M + columns
    x = _logits(X + program * M * M, place, valid, rows, columns, CAUSAL)
    u = tl.zeros((BLOCK,), tl.float32)
    v = tl.zeros((BLOCK,), tl.float32)
    V += program * ITERATIONS * 2 * M
    for k in range(ITERATIONS):
        u = _normaliser(x - v[None, :], 1)
        v = _normaliser(x - u[:, None], 0)
        if KEEP:
            tl.store(V + k * 2 * M + line, u, mask=line < M)
            tl.store(V + k * 2 * M + M + line, v, mask=line < M)
    p = tl.exp(x - u[:, None] - v[None, :])
    tl.store(P + program * M * M + place, p.to(P.dtype.element_ty), mask=valid)


@triton.jit
def sinkhorn_backward_kernel(
    X, V, G, DX,
    M: tl.constexpr, ITERATIONS: tl.constexpr, CAUSAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    line = tl.arange(0, BLOCK)
    rows = line[:, None]
    columns = line[None, :]
    valid = (rows < M) & (columns < M)
    place = rows * M + columns
    X += program * M * M
    x = _logits(X, place, valid, rows, columns, CAUSAL)
    V += program * ITERATIONS * 2 * M
    u = tl.load(V + (ITERATIONS - 1) * 2 * M + line, mask=line < M, other=0.0)
    v = tl.load(V + (ITERATIONS - 1) * 2 * M + M + line, mask=line < M, other=0.0)
    g = tl.load(G + program * M * M + place, mask=valid, other=0.0).to(tl.float32)
    dx = g * tl.exp(x - u[:, None] - v[None, :])
    du = -tl.sum(dx, 1)
    dv = -tl.sum(dx, 0)
    for step in range(ITERATIONS):
        k = ITERATIONS - 1 - step
        # v came from u, and this u from the v before. Loaded again, for registers: the logits are in the cache.
        x = _logits(X, place, valid, rows, columns, CAUSAL)
        share = tl.exp(x - u[:, None] - v[None, :]) * dv[None, :]
        dx += share
        du -= tl.sum(share, 1)
        # Before the first iteration both are 0, and nothing is loaded.
        v = tl.load(V + k * 2 * M - M + line, mask=(line < M) & (line >= M - k * M), other=0.0)
        x = _logits(X, place, valid, rows, columns, CAUSAL)
        share = tl.exp(x - u[:, None] - v[None, :]) * du[:, None]
        dx += share
        dv = -tl.sum(share, 0)
        du = tl.zeros((BLOCK,), tl.float32)
        u = tl.load(V + k * 2 * M - 2 * M + line, mask=(line < M) & (line >= M - k * M), other=0.0)
    tl.store(DX + program * M * M + place, dx.to(DX.dtype.element_ty), mask=valid)


def sinkhorn(logits, iterations, is_causal, *, mode):
    """See `matrix.sinkhorn`."""
    _require(logits)
    return _sinkhorn((iterations, is_causal, mode), logits)


def _sinkhorn_forward(static, logits):
    balanced, vectors = _balance(static, logits, True)
    return balanced, (logits, vectors)


def _balance(static, logits, keep):
    iterations, is_causal, mode = static
    batch, heads, size, _ = logits.shape
    shape = (batch, heads, iterations, 2, size) if keep else (batch, 1)
    outputs = dict(P=_like(logits), V=jax.ShapeDtypeStruct(shape, jnp.float32))
    return _launch(
        "matrix.sinkhorn_forward", sinkhorn_forward_kernel, dict(X=logits), outputs, logits.shape, iterations, mode,
        CAUSAL=is_causal, KEEP=keep,
    )  # fmt: skip


def _sinkhorn_backward(static, saved, gradient):
    iterations, is_causal, mode = static
    logits, vectors = saved
    return _launch(
        "matrix.sinkhorn_backward", sinkhorn_backward_kernel, dict(X=logits, V=vectors, G=gradient),
        dict(DX=_like(logits)), logits.shape, iterations, mode, CAUSAL=is_causal,
    )  # fmt: skip


_sinkhorn = operation(
    _sinkhorn_forward,
    _sinkhorn_backward,
    primal=lambda static, logits: _balance(static, logits, False)[0],
    arrays=("b n m m",),
    outputs="b n m m",
    saved=("b n i two m",),
    shared=(),
)


# ------------------------------------------------------------------------------------------------------------ launches


def _require(array) -> None:
    launch.require_floats(array.dtype)
    launch.require_at_most(LARGEST, array.shape[2], "rows in a matrix")


def _launch(name, kernel, inputs, outputs, shape, iterations, mode, **constants):
    batch, heads, size, _ = shape
    return launch.call(
        kernel,
        inputs,
        outputs,
        grid=batch * heads,
        constants=dict(constants, M=size, ITERATIONS=iterations),
        config=config(name, size, mode),
        mode=mode,
    )


def config(kernel: str, size: int, mode) -> tuning.Config:
    block = padded(size)
    if "sinkhorn" in kernel:  # its block is the whole matrix, no choice: what can be chosen are the warps
        heuristic = tuning.Config({}, num_warps={128: 16, 64: 8}.get(block, 4), num_stages=1)
        return dataclasses.replace(tuning.config(kernel, heuristic, M=size), blocks=dict(BLOCK=block))
    if mode == "interpret":  # which pays by the tile
        return tuning.Config(dict(BLOCK=block, BLOCK_K=block), num_stages=1)
    block = min(block, 64)
    heuristic = tuning.Config(dict(BLOCK=block, BLOCK_K=min(block, 32)), num_warps=8 if block == 64 else 4, num_stages=1)
    return tuning.config(kernel, heuristic, M=size)


def _like(array):
    return jax.ShapeDtypeStruct(array.shape, array.dtype)
