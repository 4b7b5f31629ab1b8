"""First-order recurrences in Triton: a program owns a block of features of one sample and walks over tiles of time.

Inside a tile the steps are combined by an associative scan in registers; the state goes from tile to tile. Every number is
read once and written once. Where samples and features give too few programs to fill the GPU, time is cut into segments: one
kernel finds what each does to a state, a second one starts each from the segments before it.

A complex array is its real plane, then its imaginary plane, along the last axis. Kernels count the steps in the order in
which they are taken, so that a reversed recurrence differs in its addresses only, and so does the backward pass: it goes the
other way, with the decay of the step after, g_t = dh_t + a_{t+1} g_{t+1}.
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from subquad.kernels import launch
from subquad.kernels.operation import operation
from subquad.kernels.scan.reference import AXES

PROGRAMS = 512  # that fill a large GPU: with fewer, time is cut into segments
SEGMENT_TILES = 4  # that a segment has at least


# ------------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _combine(a1, b1, a2, b2):
    return a1 * a2, a2 * b1 + b2


@triton.jit
def _combine_complex(ar1, ai1, br1, bi1, ar2, ai2, br2, bi2):
    return (
        ar1 * ar2 - ai1 * ai2,
        ar1 * ai2 + ai1 * ar2,
        ar2 * br1 - ai2 * bi1 + br2,
        ar2 * bi1 + ai2 * br1 + bi2,
    )


@triton.jit
def _last_row(values, BLOCK_T: tl.constexpr):
    rows = tl.arange(0, BLOCK_T)[:, None]
    return tl.sum(tl.where(rows == BLOCK_T - 1, values, 0.0), 0)


@triton.jit
def _where(T: tl.constexpr, D: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    """(sample, segment, features, the segment's first step, the step after its last)."""
    blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    tiles: tl.constexpr = (T + BLOCK_T - 1) // BLOCK_T
    steps: tl.constexpr = (tiles + SEGMENTS - 1) // SEGMENTS * BLOCK_T
    pid = tl.program_id(0)
    segment = (pid // blocks) % SEGMENTS
    features = (pid % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    return (pid // (blocks * SEGMENTS)).to(tl.int64), segment, features, segment * steps, segment * steps + steps


@triton.jit
def _place(steps, T: tl.constexpr, FROM_END: tl.constexpr):
    """The position in the array of the steps of a walk, int64: it is multiplied by the width of a row."""
    return ((T - 1 - steps) if FROM_END else steps).to(tl.int64)


@triton.jit
def _load(X, rows, columns, valid, stride, COMPLEX: tl.constexpr, D: tl.constexpr):
    """float32 planes; the second is meaningless where the numbers are real."""
    place = rows * stride + columns
    real = tl.load(X + place, mask=valid, other=0.0).to(tl.float32)
    imaginary = real
    if COMPLEX:
        imaginary = tl.load(X + place + D, mask=valid, other=0.0).to(tl.float32)
    return real, imaginary


@triton.jit
def _store(X, real, imaginary, rows, columns, valid, stride, COMPLEX: tl.constexpr, D: tl.constexpr):
    place = rows * stride + columns
    tl.store(X + place, real.to(X.dtype.element_ty), mask=valid)
    if COMPLEX:
        tl.store(X + place + D, imaginary.to(X.dtype.element_ty), mask=valid)


@triton.jit
def _decay(
    A, steps, features, T: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    COMPLEX: tl.constexpr, CONSTANT: tl.constexpr, FROM_END: tl.constexpr, ADJOINT: tl.constexpr,
):  # fmt: skip
    """The tile of decays; 1 past the end, so that the state stays, and of the adjoint's first step, which has none."""
    before = (steps - 1) if ADJOINT else steps
    inside = ((before >= 0) & (steps < T))[:, None]
    valid = inside & (features < D)[None, :]
    rows = _place(before, T, FROM_END)[:, None]
    if CONSTANT:
        rows = rows * 0
    real, imaginary = _load(A, rows, features[None, :], valid, WIDTH, COMPLEX, D)
    return tl.where(inside, real, 1.0), imaginary


@triton.jit
def _tile(ar, ai, br, bi, hr, hi, COMPLEX: tl.constexpr):
    """(product of the decays so far, both planes; the states, both planes) for a tile that starts from a state."""
    if COMPLEX:
        ar, ai, br, bi = tl.associative_scan((ar, ai, br, bi), 0, _combine_complex)
        br, bi = br + ar * hr[None, :] - ai * hi[None, :], bi + ar * hi[None, :] + ai * hr[None, :]
    else:
        ar, br = tl.associative_scan((ar, br), 0, _combine)
        br = br + ar * hr[None, :]
    return ar, ai, br, bi


@triton.jit
def _start(
    H0, P, S, batch, segment, features,
    D: tl.constexpr, WIDTH: tl.constexpr, COMPLEX: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """The state before a segment: the given one, after all segments before."""
    valid = features < D
    hr, hi = _load(H0, batch, features, valid, WIDTH, COMPLEX, D)
    if SEGMENTS > 1:
        for j in range(0, segment):
            row = batch * SEGMENTS + j
            pr, pi = _load(P, row, features, valid, WIDTH, COMPLEX, D)
            sr, si = _load(S, row, features, valid, WIDTH, COMPLEX, D)
            if COMPLEX:
                hr, hi = pr * hr - pi * hi + sr, pr * hi + pi * hr + si
            else:
                hr = pr * hr + sr
    return hr, hi


@triton.jit
def segment_kernel(
    A, B, P, S,
    T: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, COMPLEX: tl.constexpr, CONSTANT: tl.constexpr,
    A_STRIDE: tl.constexpr, REVERSE: tl.constexpr, ADJOINT: tl.constexpr,
    SEGMENTS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What a segment does to the state before it: h -> P h + S."""
    batch, segment, features, first, end = _where(T, D, SEGMENTS, BLOCK_T, BLOCK_D)
    A += batch * A_STRIDE
    B += batch * T * WIDTH
    pr = tl.full((BLOCK_D,), 1.0, tl.float32)
    pi = tl.zeros((BLOCK_D,), tl.float32)
    sr = tl.zeros((BLOCK_D,), tl.float32)
    si = tl.zeros((BLOCK_D,), tl.float32)
    for tile in range(first, tl.minimum(end, T), BLOCK_T):
        steps = tile + tl.arange(0, BLOCK_T)
        valid = (steps < T)[:, None] & (features < D)[None, :]
        # The adjoint walks against the recurrence and looks up the decays of the steps that it has behind it.
        ar, ai = _decay(A, steps, features, T, D, WIDTH, COMPLEX, CONSTANT, REVERSE != ADJOINT, ADJOINT)
        rows = _place(steps, T, REVERSE != ADJOINT)[:, None]
        br, bi = _load(B, rows, features[None, :], valid, WIDTH, COMPLEX, D)
        ar, ai, br, bi = _tile(ar, ai, br, bi, sr, si, COMPLEX)
        ar = _last_row(ar, BLOCK_T)
        sr = _last_row(br, BLOCK_T)
        if COMPLEX:
            ai = _last_row(ai, BLOCK_T)
            si = _last_row(bi, BLOCK_T)
            pr, pi = pr * ar - pi * ai, pr * ai + pi * ar
        else:
            pr = pr * ar
    row = batch * SEGMENTS + segment
    _store(P, pr, pi, row, features, features < D, WIDTH, COMPLEX, D)
    _store(S, sr, si, row, features, features < D, WIDTH, COMPLEX, D)


@triton.jit
def forward_kernel(
    A, B, H0, P, S, H, F,
    T: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, COMPLEX: tl.constexpr, CONSTANT: tl.constexpr,
    A_STRIDE: tl.constexpr, REVERSE: tl.constexpr,
    SEGMENTS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    batch, segment, features, first, end = _where(T, D, SEGMENTS, BLOCK_T, BLOCK_D)
    A += batch * A_STRIDE
    B += batch * T * WIDTH
    H += batch * T * WIDTH
    hr, hi = _start(H0, P, S, batch, segment, features, D, WIDTH, COMPLEX, SEGMENTS)
    for tile in range(first, tl.minimum(end, T), BLOCK_T):
        steps = tile + tl.arange(0, BLOCK_T)
        valid = (steps < T)[:, None] & (features < D)[None, :]
        rows = _place(steps, T, REVERSE)[:, None]
        ar, ai = _decay(A, steps, features, T, D, WIDTH, COMPLEX, CONSTANT, REVERSE, False)
        br, bi = _load(B, rows, features[None, :], valid, WIDTH, COMPLEX, D)
        ar, ai, br, bi = _tile(ar, ai, br, bi, hr, hi, COMPLEX)
        _store(H, br, bi, rows, features[None, :], valid, WIDTH, COMPLEX, D)
        hr = _last_row(br, BLOCK_T)
        if COMPLEX:
            hi = _last_row(bi, BLOCK_T)
    if segment == SEGMENTS - 1:
        _store(F, hr, hi, batch, features, features < D, WIDTH, COMPLEX, D)


@triton.jit
def backward_kernel(
    A, H0, H, DH, DF, P, S, DA, DB, D0,
    T: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, COMPLEX: tl.constexpr, CONSTANT: tl.constexpr,
    A_STRIDE: tl.constexpr, REVERSE: tl.constexpr,
    SEGMENTS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """DA is [B, T, WIDTH], or [B, SEGMENTS, WIDTH] of sums over time where the decay is constant."""
    BACK: tl.constexpr = not REVERSE
    batch, segment, features, first, end = _where(T, D, SEGMENTS, BLOCK_T, BLOCK_D)
    A += batch * A_STRIDE
    H += batch * T * WIDTH
    DH += batch * T * WIDTH
    DB += batch * T * WIDTH
    if not CONSTANT:
        DA += batch * T * WIDTH
    gr, gi = _start(DF, P, S, batch, segment, features, D, WIDTH, COMPLEX, SEGMENTS)
    startr, starti = _load(H0, batch, features, features < D, WIDTH, COMPLEX, D)
    sumr = tl.zeros((BLOCK_D,), tl.float32)
    sumi = tl.zeros((BLOCK_D,), tl.float32)
    for tile in range(first, tl.minimum(end, T), BLOCK_T):
        steps = tile + tl.arange(0, BLOCK_T)
        valid = (steps < T)[:, None] & (features < D)[None, :]
        rows = _place(steps, T, BACK)[:, None]
        ar, ai = _decay(A, steps, features, T, D, WIDTH, COMPLEX, CONSTANT, BACK, True)
        br, bi = _load(DH, rows, features[None, :], valid, WIDTH, COMPLEX, D)
        ar, ai, br, bi = _tile(ar, ai, br, bi, gr, gi, COMPLEX)
        _store(DB, br, bi, rows, features[None, :], valid, WIDTH, COMPLEX, D)
        gr = _last_row(br, BLOCK_T)
        if COMPLEX:
            gi = _last_row(bi, BLOCK_T)
        # The state that the decay multiplied: that of the step taken before, which is the next one of this walk.
        is_last = (steps == T - 1)[:, None]
        rows_before = _place(steps + 1, T, BACK)[:, None]
        hr, hi = _load(H, rows_before, features[None, :], valid & ~is_last, WIDTH, COMPLEX, D)
        hr = tl.where(is_last, startr[None, :], hr)
        if COMPLEX:
            hi = tl.where(is_last, starti[None, :], hi)
            hr, hi = br * hr - bi * hi, br * hi + bi * hr
        else:
            hr = br * hr
        if CONSTANT:
            # Past the end the gradient is that of the last step, which counts once.
            sumr += tl.sum(tl.where(valid, hr, 0.0), 0)
            if COMPLEX:
                sumi += tl.sum(tl.where(valid, hi, 0.0), 0)
        else:
            _store(DA, hr, hi, rows, features[None, :], valid, WIDTH, COMPLEX, D)
    if CONSTANT:
        _store(DA, sumr, sumi, batch * SEGMENTS + segment, features, features < D, WIDTH, COMPLEX, D)
    if segment == SEGMENTS - 1:
        row = 0 if CONSTANT else (T - 1 if REVERSE else 0)
        ar, ai = _load(A, row, features, features < D, WIDTH, COMPLEX, D)
        if COMPLEX:
            gr, gi = ar * gr - ai * gi, ar * gi + ai * gr
        else:
            gr = ar * gr
        _store(D0, gr, gi, batch, features, features < D, WIDTH, COMPLEX, D)


# ------------------------------------------------------------------------------------------------------------ launches


def first_order(decay, inputs, start, reverse, *, mode):
    """See `scan.first_order`."""
    for array in (decay, inputs):
        if array.dtype.name not in (*launch.FLOATS, "complex64"):
            raise launch.Declined(f"float32, bfloat16, float16 and complex64 only, not {array.dtype.name}.")
    return _scan((reverse, mode), decay, inputs, start)


def _forward(static, decay, inputs, start):
    reverse, mode = static
    outputs = _launch_forward(decay, inputs, start, reverse=reverse, mode=mode)
    return outputs, (decay, start, outputs[0])


def _backward(static, saved, cotangents):
    reverse, mode = static
    decay = saved[0]
    d_decay, d_inputs, d_start = _launch_backward(*saved, *cotangents, reverse=reverse, mode=mode)
    if decay.shape[0] == 1:
        d_decay = d_decay.sum(0, keepdims=True)
    return d_decay.astype(decay.dtype), d_inputs, d_start


_scan = operation(_forward, _backward, **AXES, shared=[[0]])


def _pack(x):
    return jnp.concatenate([x.real, x.imag], -1) if jnp.iscomplexobj(x) else x


def _unpack(x, is_complex):
    return jax.lax.complex(*jnp.split(x, 2, -1)) if is_complex else x


def config(kernel: str, mode, batch: int, length: int, features: int, dtype) -> launch.Config:
    """Tiles of 128 bytes in a row; few and large ones for the interpreter."""
    if mode == "interpret":
        power = lambda n: triton.next_power_of_2(max(n, 2))
        return launch.Config(dict(SEGMENTS=1, BLOCK_T=min(256, power(length)), BLOCK_D=min(64, power(features))))
    columns = min(32, max(8, triton.next_power_of_2(features)))
    rows = min(64, max(16, triton.next_power_of_2(length)))
    programs = batch * triton.cdiv(features, columns)
    tiles = triton.cdiv(length, rows)
    segments = max(1, min(PROGRAMS // programs, tiles // SEGMENT_TILES, 32))
    heuristic = launch.Config(dict(SEGMENTS=segments, BLOCK_T=rows, BLOCK_D=columns), num_warps=4)
    # What decides: how long a program runs, and how many there are without segments.
    sizes = dict(
        length=launch.size_class(length, 1 << 16), columns=columns, programs=launch.size_class(programs, PROGRAMS),
        bits=jnp.dtype(dtype).itemsize * 8,
    )  # fmt: skip
    return launch.config(kernel, heuristic, **sizes)


def _sizes(decay, inputs, reverse):
    batch, length, features = inputs.shape
    width = features * (2 if jnp.iscomplexobj(inputs) else 1)
    return dict(
        T=length,
        D=features,
        WIDTH=width,
        COMPLEX=width != features,
        CONSTANT=decay.shape[1] == 1,
        A_STRIDE=0 if decay.shape[0] == 1 else decay.shape[1] * width,
        REVERSE=reverse,
    )


def _segments(kernel, decay, inputs, sizes, adjoint, mode):
    """(how the kernel is launched, and what every segment does to a state, or None)."""
    batch, length, features = inputs.shape
    chosen = config(kernel, mode, batch, length, features, inputs.real.dtype)
    blocks = chosen.blocks
    grid = batch * blocks["SEGMENTS"] * triton.cdiv(features, blocks["BLOCK_D"])
    if blocks["SEGMENTS"] == 1:
        return chosen, grid, dict(P=None, S=None)
    shape = jax.ShapeDtypeStruct((batch, blocks["SEGMENTS"], sizes["WIDTH"]), jnp.float32)
    products, sums = launch.call(
        segment_kernel,
        dict(A=_pack(decay), B=_pack(inputs)),
        dict(P=shape, S=shape),
        grid=grid,
        constants=dict(sizes, ADJOINT=adjoint),
        config=chosen,
        mode=mode,
    )
    return chosen, grid, dict(P=products, S=sums)


def _launch_forward(decay, inputs, start, *, reverse, mode):
    sizes = _sizes(decay, inputs, reverse)
    chosen, grid, segments = _segments("scan.forward", decay, inputs, sizes, False, mode)
    packed = _pack(inputs)
    states, final = launch.call(
        forward_kernel,
        dict(A=_pack(decay), B=packed, H0=_pack(start), **segments),
        dict(
            H=jax.ShapeDtypeStruct(packed.shape, packed.dtype),
            F=jax.ShapeDtypeStruct((packed.shape[0], packed.shape[2]), jnp.float32),
        ),
        grid=grid,
        constants=sizes,
        config=chosen,
        mode=mode,
    )
    return _unpack(states, sizes["COMPLEX"]), _unpack(final, sizes["COMPLEX"])


def _launch_backward(decay, start, states, d_states, d_final, *, reverse, mode):
    sizes = _sizes(decay, states, reverse)
    chosen, grid, segments = _segments("scan.backward", decay, d_states, sizes, True, mode)
    batch, length, _ = states.shape
    rows = chosen.blocks["SEGMENTS"] if sizes["CONSTANT"] else length
    # In the dtype of the decay, unless sums over time or the batch are still to come.
    narrow = decay.shape[:2] == states.shape[:2] and not sizes["CONSTANT"]
    dtype = decay.real.dtype if narrow else jnp.float32
    packed = _pack(states)
    d_decay, d_inputs, d_start = launch.call(
        backward_kernel,
        dict(
            A=_pack(decay), H0=_pack(start), H=packed, DH=_pack(d_states), DF=_pack(d_final), **segments,
        ),
        dict(
            DA=jax.ShapeDtypeStruct((batch, rows, sizes["WIDTH"]), dtype),
            DB=jax.ShapeDtypeStruct(packed.shape, packed.dtype),
            D0=jax.ShapeDtypeStruct((batch, sizes["WIDTH"]), jnp.float32),
        ),
        grid=grid,
        constants=sizes,
        config=chosen,
        mode=mode,
    )  # fmt: skip
    if sizes["CONSTANT"]:
        d_decay = d_decay.sum(1, keepdims=True)
    return tuple(_unpack(x, sizes["COMPLEX"]) for x in (d_decay, d_inputs, d_start))
