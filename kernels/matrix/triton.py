"""Matrix iterations in Triton: a program owns the matrix of one head, which stays on the chip while it is iterated.

Pseudo-inverse, backward. With X = A Z, U = 7 I - X, V = 15 I - X U, W = 13 I - X V and Z' = Z W / 4, every Z is A^T times a
polynomial of A A^T, so X, U, V and W are symmetric. Then Y = Z^T follows Y' = W Y / 4 with X = Y A^T, and no product of the
backward pass needs the transpose of another product, which Triton gets wrong on Hopper in some versions:

    dW = Y G / 4,   dV = -X dW,   dX = -dW V - dV U + X dV,   dA += dX Y,   G <- G W / 4 + A^T dX

Sinkhorn. An iterate is the logits less one number per row and one per column. These vectors are all that the forward pass
writes for the backward pass.
"""

import functools

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from subquad.kernels import launch
from subquad.kernels.matrix.reference import scale

LARGEST = 128


# ------------------------------------------------------------------------------------------------------ pseudo-inverse


@triton.jit
def _places(M: tl.constexpr, BLOCK: tl.constexpr):
    """(addresses of the entries, those of the transpose, which exist, the identity)."""
    rows = tl.arange(0, BLOCK)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    return rows * M + columns, columns * M + rows, (rows < M) & (columns < M), (rows == columns).to(tl.float32)


@triton.jit
def _scale(a):
    norms = tl.max(tl.sum(tl.abs(a), 0), 0) * tl.max(tl.sum(tl.abs(a), 1), 0)
    return tl.where(norms > 0, 1 / tl.where(norms > 0, norms, 1.0), 0.0)


@triton.jit
def _polynomial(x, identity, PRECISION: tl.constexpr):
    """U, V and W."""
    u = 7 * identity - x
    v = 15 * identity - tl.dot(x, u, input_precision=PRECISION)
    return u, v, 13 * identity - tl.dot(x, v, input_precision=PRECISION)


@triton.jit
def inverse_forward_kernel(
    A, Z,
    M: tl.constexpr, ITERATIONS: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * M * M
    place, transposed, valid, identity = _places(M, BLOCK)
    a = tl.load(A + start + place, mask=valid, other=0.0).to(tl.float32)
    z = tl.load(A + start + transposed, mask=valid, other=0.0).to(tl.float32) * _scale(a)
    for _ in range(ITERATIONS):
        x = tl.dot(a, z, input_precision=PRECISION)
        u, v, w = _polynomial(x, identity, PRECISION)
        z = tl.dot(z, w, input_precision=PRECISION) * 0.25
    tl.store(Z + start + place, z.to(Z.dtype.element_ty), mask=valid)


@triton.jit
def inverse_backward_kernel(
    A, G, DA, DS,
    M: tl.constexpr, ITERATIONS: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """G is the gradient of the result; DA that of A in the iterations, DS that of their start Z_0."""
    start = tl.program_id(0).to(tl.int64) * M * M
    place, transposed, valid, identity = _places(M, BLOCK)
    a = tl.load(A + start + place, mask=valid, other=0.0).to(tl.float32)
    at = tl.load(A + start + transposed, mask=valid, other=0.0).to(tl.float32)
    g = tl.load(G + start + place, mask=valid, other=0.0).to(tl.float32)
    y0 = a * _scale(a)
    da = tl.zeros((BLOCK, BLOCK), tl.float32)
    for step in range(ITERATIONS):
        y = y0
        for _ in range(ITERATIONS - 1 - step):
            u, v, w = _polynomial(tl.dot(y, at, input_precision=PRECISION), identity, PRECISION)
            y = tl.dot(w, y, input_precision=PRECISION) * 0.25
        x = tl.dot(y, at, input_precision=PRECISION)
        u, v, w = _polynomial(x, identity, PRECISION)
        dw = tl.dot(y, g, input_precision=PRECISION) * 0.25
        g = tl.dot(g, w, input_precision=PRECISION) * 0.25
        dv = -tl.dot(x, dw, input_precision=PRECISION)
        dx = tl.dot(x, dv, input_precision=PRECISION) - tl.dot(dv, u, input_precision=PRECISION)
        dx -= tl.dot(dw, v, input_precision=PRECISION)
        da += tl.dot(dx, y, input_precision=PRECISION)
        g += tl.dot(at, dx, input_precision=PRECISION)
    tl.store(DA + start + place, da, mask=valid)
    tl.store(DS + start + place, g, mask=valid)


def pseudo_inverse(matrix, iterations, *, mode):
    """See `matrix.pseudo_inverse`."""
    _require(matrix)
    return _inverse(matrix, iterations, mode)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _inverse(matrix, iterations, mode):
    def run(matrix):
        return _launch(
            "matrix.inverse_forward", inverse_forward_kernel, dict(A=matrix), dict(Z=_like(matrix)), matrix.shape,
            iterations, mode, PRECISION=launch.dot_precision("float32"),
        )[0]  # fmt: skip

    return launch.fold_vmap(run)(matrix)


def _inverse_forward(matrix, iterations, mode):
    return _inverse(matrix, iterations, mode), matrix


def _inverse_backward(iterations, mode, matrix, gradient):
    def run(matrix, gradient):
        matrix, gradient = _alike(matrix, gradient)
        outputs = dict(DA=_like(matrix, jnp.float32), DS=_like(matrix, jnp.float32))
        return _launch(
            "matrix.inverse_backward", inverse_backward_kernel, dict(A=matrix, G=gradient), outputs, matrix.shape,
            iterations, mode, PRECISION=launch.dot_precision("float32"),
        )  # fmt: skip

    d_matrix, d_start = launch.fold_vmap(run)(matrix, gradient)
    _, pull = jax.vjp(lambda a: scale(a) * a.swapaxes(2, 3), matrix.astype(jnp.float32))
    return ((d_matrix + pull(d_start)[0]).astype(matrix.dtype),)


_inverse.defvjp(_inverse_forward, _inverse_backward)


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
    x = _logits(X + program * M * M, place, valid, rows, columns, CAUSAL)
    V += program * ITERATIONS * 2 * M
    u = tl.load(V + (ITERATIONS - 1) * 2 * M + line, mask=line < M, other=0.0)
    v = tl.load(V + (ITERATIONS - 1) * 2 * M + M + line, mask=line < M, other=0.0)
    g = tl.load(G + program * M * M + place, mask=valid, other=0.0).to(tl.float32)
    dx = g * tl.exp(x - u[:, None] - v[None, :])
    du = -tl.sum(dx, 1)
    dv = -tl.sum(dx, 0)
    for step in range(ITERATIONS):
        k = ITERATIONS - 1 - step
        # v came from u, and this u from the v before.
        share = tl.exp(x - u[:, None] - v[None, :]) * dv[None, :]
        dx += share
        du -= tl.sum(share, 1)
        # Before the first iteration both are 0, and nothing is loaded.
        v = tl.load(V + k * 2 * M - M + line, mask=(line < M) & (line >= M - k * M), other=0.0)
        share = tl.exp(x - u[:, None] - v[None, :]) * du[:, None]
        dx += share
        dv = -tl.sum(share, 0)
        du = tl.zeros((BLOCK,), tl.float32)
        u = tl.load(V + k * 2 * M - 2 * M + line, mask=(line < M) & (line >= M - k * M), other=0.0)
    tl.store(DX + program * M * M + place, dx.to(DX.dtype.element_ty), mask=valid)


def sinkhorn(logits, iterations, is_causal, *, mode):
    """See `matrix.sinkhorn`."""
    _require(logits)
    return _sinkhorn(logits, iterations, is_causal, mode)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _sinkhorn(logits, iterations, is_causal, mode):
    return _balance(logits, iterations, is_causal, False, mode)[0]


def _sinkhorn_forward(logits, iterations, is_causal, mode):
    balanced, vectors = _balance(logits, iterations, is_causal, True, mode)
    return balanced, (logits, vectors)


def _balance(logits, iterations, is_causal, keep, mode):
    def run(logits):
        batch, heads, size, _ = logits.shape
        shape = (batch, heads, iterations, 2, size) if keep else (batch, 1)
        outputs = dict(P=_like(logits), V=jax.ShapeDtypeStruct(shape, jnp.float32))
        return _launch(
            "matrix.sinkhorn_forward", sinkhorn_forward_kernel, dict(X=logits), outputs, logits.shape, iterations, mode,
            CAUSAL=is_causal, KEEP=keep,
        )  # fmt: skip

    return launch.fold_vmap(run)(logits)


def _sinkhorn_backward(iterations, is_causal, mode, saved, gradient):
    def run(logits, vectors, gradient):
        logits, vectors, gradient = _alike(logits, vectors, gradient)
        return _launch(
            "matrix.sinkhorn_backward", sinkhorn_backward_kernel, dict(X=logits, V=vectors, G=gradient),
            dict(DX=_like(logits)), logits.shape, iterations, mode, CAUSAL=is_causal,
        )[0]  # fmt: skip

    return (launch.fold_vmap(run)(*saved, gradient),)


_sinkhorn.defvjp(_sinkhorn_forward, _sinkhorn_backward)


# ------------------------------------------------------------------------------------------------------------ launches


def _require(array) -> None:
    if array.dtype.name not in launch.FLOATS:
        raise launch.Declined(f"float32, bfloat16 and float16 only, not {array.dtype.name}.")
    if array.shape[2] > LARGEST:
        raise launch.Declined(f"a matrix must fit on the chip, M <= {LARGEST}, not {array.shape[2]}.")


def _launch(name, kernel, inputs, outputs, shape, iterations, mode, **constants):
    batch, heads, size, _ = shape
    return launch.call(
        kernel,
        inputs,
        outputs,
        grid=batch * heads,
        constants=dict(constants, M=size, ITERATIONS=iterations),
        config=config(name, size),
        mode=mode,
    )


def config(kernel: str, size: int) -> launch.Config:
    block = max(16, triton.next_power_of_2(size))  # the least that a product takes
    heuristic = launch.Config(dict(BLOCK=block), num_warps={128: 16, 64: 8}.get(block, 4), num_stages=1)
    return launch.config(kernel, heuristic, M=size)


def _like(array, dtype=None):
    return jax.ShapeDtypeStruct(array.shape, dtype or array.dtype)


def _alike(*arrays):
    """With one batch: vmap leaves what its axis does not reach with a batch of 1."""
    batch = max(array.shape[0] for array in arrays)
    return [jnp.broadcast_to(array, (batch, *array.shape[1:])) for array in arrays]
