"""State space models on a GPU: the diagonal scan, kernel generation, and the diagonal-plus-low-rank recurrence.

Sequences are transposed to [B, D, T], where a program reads its feature's tokens side by side. Complex numbers are planes of
real and imaginary parts; a flag leaves the imaginary planes out where the modes are real.
"""

import functools

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from subquad.kernels import launch
from subquad.kernels.ssm import xla

FLOATS = launch.FLOATS


def _check_dtypes(inputs, *modes):
    """Declines what the kernels cannot hold: they compute in float32."""
    single = all(x.dtype in (jnp.float32, jnp.complex64) for x in modes)
    if inputs.dtype.name not in FLOATS or not single:
        raise launch.Declined("the kernels take float32, bfloat16 and float16 inputs and modes in float32 or complex64.")


def _real_planes(modes):
    """[..., D, P] -> real and imaginary parts, or None for the imaginary parts of real modes."""
    return (modes.real, modes.imag) if jnp.iscomplexobj(modes) else (modes, None)


def _common(batch, arrays):
    """Operands that all samples share stay [1, ...] if they all do, else they are repeated for the whole batch."""
    if all(x is None or x.shape[0] == 1 for x in arrays):
        return arrays
    return [None if x is None else jnp.broadcast_to(x, (batch, *x.shape[1:])) for x in arrays]


def _pad_size(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


# ------------------------------------------------------------------------------------------------------ device helpers


@triton.jit
def _turn(angle):
    """(cos, sin) of angles up to 1e5, by reduction to an eighth of a turn. Triton's own need a stack for larger angles."""
    quarters = tl.floor(angle * 0.6366197723675814 + 0.5)
    rest = angle - quarters * 1.5707855224609375  # pi / 2 in three parts, of which the first two have few bits
    rest = rest - quarters * 1.0804273188114166e-05
    rest = rest - quarters * 6.077094383e-11
    square = rest * rest
    sine = ((-1.9515295891e-4 * square + 8.3321608736e-3) * square - 1.6666654611e-1) * square * rest + rest
    cosine = ((2.443315711809948e-5 * square - 1.388731625493765e-3) * square + 4.166664568298827e-2) * square * square
    cosine = cosine - 0.5 * square + 1.0
    quadrant = quarters.to(tl.int32) & 3
    swapped = (quadrant & 1) == 1
    first, second = tl.where(swapped, sine, cosine), tl.where(swapped, cosine, sine)
    first = tl.where((quadrant == 1) | (quadrant == 2), -first, first)
    second = tl.where(quadrant >= 2, -second, second)
    return first, second


@triton.jit
def _power(decay_re, decay_im, exponent, COMPLEX: tl.constexpr):
    """exp(exponent (decay_re + i decay_im)); the imaginary part is not used where the modes are real."""
    size = tl.exp(decay_re * exponent)
    if COMPLEX:
        cosine, sine = _turn(decay_im * exponent)
        return size * cosine, size * sine
    else:
        return size, size


@triton.jit
def _load_modes(real, imag, row, P: tl.constexpr, PP: tl.constexpr, COMPLEX: tl.constexpr):
    place = tl.arange(0, PP)
    re = tl.load(real + row * P + place, mask=place < P, other=0.0)
    if COMPLEX:
        return re, tl.load(imag + row * P + place, mask=place < P, other=0.0)
    else:
        return re, re


@triton.jit
def _advance(real, imag, decay_re, decay_im, N: tl.constexpr, STEPS: tl.constexpr, FORWARD: tl.constexpr,
             COMPLEX: tl.constexpr):  # fmt: skip
    """x_n = decay x_{n - 1} + e_n along the columns of e [PP, N], in log2(N) steps; from the right where not FORWARD."""
    column = tl.arange(0, N)[None, :]
    for step in tl.static_range(STEPS):
        if FORWARD:
            source = column - (1 << step)
        else:
            source = column + (1 << step)
        inside = (source >= 0) & (source < N)
        index = tl.broadcast_to(tl.where(inside, source, 0), real.shape)
        shifted_re = tl.where(inside, tl.gather(real, index, 1), 0.0)
        if COMPLEX:
            shifted_im = tl.where(inside, tl.gather(imag, index, 1), 0.0)
            real += decay_re[:, None] * shifted_re - decay_im[:, None] * shifted_im
            imag += decay_re[:, None] * shifted_im + decay_im[:, None] * shifted_re
            decay_re, decay_im = decay_re * decay_re - decay_im * decay_im, 2.0 * decay_re * decay_im
        else:
            real += decay_re[:, None] * shifted_re
            decay_re = decay_re * decay_re
    return real, imag


# -------------------------------------------------------------------------------------------------- the diagonal scan
#
# A program has one feature of one sample. It cuts the sequence into tiles of N chunks of C tokens and lays a tile out as
# [C, N], a chunk in each column:
#
#     outputs = Toeplitz(taps) tokens + reads states,    states[:, n] = decay^C states[:, n - 1] + writes tokens[:, n - 1]
#
# with reads [C, P] = C A^(1 .. C) and writes [P, C] = A^(C - 1 .. 0) B. `entering` is what comes to a tile's first state from
# the states before it; the tokens of the last chunk before the tile are added to it by the tile itself.


@triton.jit
def _chunk_states(tokens, base, enter_re, enter_im, writes_re, writes_im, jump_re, jump_im, T: tl.constexpr,
                  C: tl.constexpr, N: tl.constexpr, STEPS: tl.constexpr, COMPLEX: tl.constexpr,
                  PRECISION: tl.constexpr):  # fmt: skip
    """The states before each chunk of the tile that begins at token `base`, [PP, N]."""
    column = tl.arange(0, N)[None, :]
    place = base + (column - 1) * C + tl.arange(0, C)[:, None]
    before = tl.load(tokens + place, mask=(place >= 0) & (place < T), other=0.0).to(tl.float32)
    real = tl.dot(writes_re, before, input_precision=PRECISION) + tl.where(column == 0, enter_re[:, None], 0.0)
    imag = real
    if COMPLEX:
        imag = tl.dot(writes_im, before, input_precision=PRECISION) + tl.where(column == 0, enter_im[:, None], 0.0)
    return _advance(real, imag, jump_re, jump_im, N, STEPS, True, COMPLEX)


@triton.jit
def _column(matrix, which, N: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, N)[None, :] == which, matrix, 0.0), axis=1)


@triton.jit
def _times(a_re, a_im, b_re, b_im, COMPLEX: tl.constexpr):
    if COMPLEX:
        return a_re * b_re - a_im * b_im, a_re * b_im + a_im * b_re
    else:
        return a_re * b_re, a_re * b_re


@triton.jit
def scan_forward(
    tokens, taps, decay_re, decay_im, in_re, in_im, out_re, out_im, start, outputs, last, entering,
    T: tl.constexpr, D: tl.constexpr, P: tl.constexpr, PP: tl.constexpr, TILES: tl.constexpr, STEPS: tl.constexpr,
    SHARED: tl.constexpr, COMPLEX: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row = program % D if SHARED else program
    place, row_in_chunk, column = tl.arange(0, PP), tl.arange(0, C), tl.arange(0, N)
    lag = row_in_chunk[:, None] - row_in_chunk[None, :]
    toeplitz = tl.load(taps + row * C + lag, mask=lag >= 0, other=0.0)
    d_re, d_im = _load_modes(decay_re, decay_im, row, P, PP, COMPLEX)
    b_re, b_im = _load_modes(in_re, in_im, row, P, PP, COMPLEX)
    c_re, c_im = _load_modes(out_re, out_im, row, P, PP, COMPLEX)
    p_re, p_im = _power(d_re[None, :], d_im[None, :], (row_in_chunk[:, None] + 1).to(tl.float32), COMPLEX)
    q_re, q_im = _power(d_re[:, None], d_im[:, None], (C - 1 - row_in_chunk[None, :]).to(tl.float32), COMPLEX)
    writes_re, writes_im = _times(b_re[:, None], b_im[:, None], q_re, q_im, COMPLEX)
    reads_re, reads_im = c_re[None, :] * p_re, p_re
    if COMPLEX:
        reads_re, reads_im = reads_re + c_im[None, :] * p_im, c_im[None, :] * p_re - c_re[None, :] * p_im
    jump_re, jump_im = _power(d_re, d_im, tl.full((PP,), C, tl.float32), COMPLEX)

    SIZE: tl.constexpr = 2 * P if COMPLEX else P
    LAST: tl.constexpr = (T - 1) // C
    enter_re = tl.load(start + program * SIZE + place, mask=place < P, other=0.0)
    enter_im = enter_re
    if COMPLEX:
        enter_im = tl.load(start + program * SIZE + P + place, mask=place < P, other=0.0)
    final_re, final_im = enter_re, enter_im
    for tile in range(TILES):
        if TILES > 1:
            target = entering + (program * TILES + tile) * SIZE + place
            tl.store(target, enter_re, mask=place < P)
            if COMPLEX:
                tl.store(target + P, enter_im, mask=place < P)
        base = tile * (N * C)
        state_re, state_im = _chunk_states(tokens + program * T, base, enter_re, enter_im, writes_re, writes_im, jump_re,
                                           jump_im, T, C, N, STEPS, COMPLEX, PRECISION)  # fmt: skip
        position = base + column[None, :] * C + row_in_chunk[:, None]
        now = tl.load(tokens + program * T + position, mask=position < T, other=0.0).to(tl.float32)
        result = tl.dot(toeplitz, now, input_precision=PRECISION)
        result = tl.dot(reads_re, state_re, result, input_precision=PRECISION)
        if COMPLEX:
            result = tl.dot(reads_im, state_im, result, input_precision=PRECISION)
        tl.store(outputs + program * T + position, result.to(outputs.dtype.element_ty), mask=position < T)
        which = tl.minimum(N - 1, LAST - tile * N)
        final_re = _column(state_re, which, N)
        if COMPLEX:
            final_im = _column(state_im, which, N)
        enter_re, enter_im = _times(jump_re, jump_im, final_re, final_im, COMPLEX)

    # The state before the last chunk goes through the REST tokens that this has.
    REST: tl.constexpr = T - LAST * C
    exponent = REST - 1 - row_in_chunk[None, :]
    p_re, p_im = _power(d_re[:, None], d_im[:, None], tl.maximum(exponent, 0).to(tl.float32), COMPLEX)
    w_re, w_im = _times(b_re[:, None], b_im[:, None], p_re, p_im, COMPLEX)
    rest = tl.load(tokens + program * T + LAST * C + row_in_chunk, mask=row_in_chunk < REST, other=0.0).to(tl.float32)
    r_re, r_im = _power(d_re, d_im, tl.full((PP,), REST, tl.float32), COMPLEX)
    final_re, final_im = _times(r_re, r_im, final_re, final_im, COMPLEX)
    target = last + program * SIZE + place
    tl.store(target, final_re + tl.sum(w_re * rest[None, :], axis=1), mask=place < P)
    if COMPLEX:
        tl.store(target + P, final_im + tl.sum(w_im * rest[None, :], axis=1), mask=place < P)


@triton.jit
def _power_gradient(g_re, g_im, p_re, p_im, exponent, COMPLEX: tl.constexpr):
    """Of the exponent's base log_decay, elementwise, for the power p and its gradient g."""
    if COMPLEX:
        return exponent * (g_re * p_re + g_im * p_im), exponent * (g_im * p_re - g_re * p_im)
    else:
        return exponent * g_re * p_re, g_re


@triton.jit
def _write_gradient(g_re, g_im, b_re, b_im, p_re, p_im, exponent, COMPLEX: tl.constexpr):
    """Of B and of log_decay [PP] each, for writes = B p [PP, C] and their gradient g."""
    if COMPLEX:
        db_re = tl.sum(g_re * p_re + g_im * p_im, axis=1)
        db_im = tl.sum(g_im * p_re - g_re * p_im, axis=1)
        a_re, a_im = _power_gradient(g_re * b_re[:, None] + g_im * b_im[:, None],
                                     g_im * b_re[:, None] - g_re * b_im[:, None], p_re, p_im, exponent, True)  # fmt: skip
        return db_re, db_im, tl.sum(a_re, axis=1), tl.sum(a_im, axis=1)
    else:
        da = tl.sum(exponent * g_re * b_re[:, None] * p_re, axis=1)
        db = tl.sum(g_re * p_re, axis=1)
        return db, db, da, da


@triton.jit
def scan_backward(
    tokens, d_outputs, taps, decay_re, decay_im, in_re, in_im, out_re, out_im, entering, d_last,
    d_tokens, d_taps, d_decay_re, d_decay_im, d_in_re, d_in_im, d_out_re, d_out_im, d_start,
    T: tl.constexpr, D: tl.constexpr, P: tl.constexpr, PP: tl.constexpr, TILES: tl.constexpr, STEPS: tl.constexpr,
    SHARED: tl.constexpr, COMPLEX: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """All gradients in one pass from the last tile to the first; the states of a tile are made again from `entering`."""
    program = tl.program_id(0).to(tl.int64)
    row = program % D if SHARED else program
    place, row_in_chunk, column = tl.arange(0, PP), tl.arange(0, C), tl.arange(0, N)
    lag = row_in_chunk[None, :] - row_in_chunk[:, None]
    transposed = tl.load(taps + row * C + lag, mask=lag >= 0, other=0.0)  # the Toeplitz matrix, transposed
    d_re, d_im = _load_modes(decay_re, decay_im, row, P, PP, COMPLEX)
    b_re, b_im = _load_modes(in_re, in_im, row, P, PP, COMPLEX)
    c_re, c_im = _load_modes(out_re, out_im, row, P, PP, COMPLEX)
    ahead = (row_in_chunk[None, :] + 1).to(tl.float32)
    behind = (C - 1 - row_in_chunk[None, :]).to(tl.float32)
    p_re, p_im = _power(d_re[:, None], d_im[:, None], ahead, COMPLEX)
    q_re, q_im = _power(d_re[:, None], d_im[:, None], behind, COMPLEX)
    writes_re, writes_im = _times(b_re[:, None], b_im[:, None], q_re, q_im, COMPLEX)
    reads_re, reads_im = c_re[:, None] * p_re, p_re  # transposed, [PP, C]
    if COMPLEX:
        reads_re, reads_im = reads_re + c_im[:, None] * p_im, c_im[:, None] * p_re - c_re[:, None] * p_im
    jump_re, jump_im = _power(d_re, d_im, tl.full((PP,), C, tl.float32), COMPLEX)
    given_re, given_im = tl.trans(writes_re), tl.trans(writes_im)  # [C, PP]

    SIZE: tl.constexpr = 2 * P if COMPLEX else P
    LAST: tl.constexpr = (T - 1) // C
    REST: tl.constexpr = T - LAST * C
    # What the last state says: to the tokens of the last chunk, and to the state before it.
    l_re = tl.load(d_last + program * SIZE + place, mask=place < P, other=0.0)
    l_im = l_re
    if COMPLEX:
        l_im = tl.load(d_last + program * SIZE + P + place, mask=place < P, other=0.0)
    exponent = tl.maximum(REST - 1 - row_in_chunk, 0).to(tl.float32)[None, :]
    w_re, w_im = _power(d_re[:, None], d_im[:, None], exponent, COMPLEX)
    rest = tl.load(tokens + program * T + LAST * C + row_in_chunk, mask=row_in_chunk < REST, other=0.0).to(tl.float32)
    db_re, db_im, da_re, da_im = _write_gradient(l_re[:, None] * rest[None, :], l_im[:, None] * rest[None, :], b_re, b_im,
                                                 w_re, w_im, exponent, COMPLEX)  # fmt: skip
    v_re, v_im = _times(b_re[:, None], b_im[:, None], w_re, w_im, COMPLEX)
    direct = v_re * l_re[:, None]
    r_re, r_im = _power(d_re, d_im, tl.full((PP,), REST, tl.float32), COMPLEX)
    before_re, before_im = r_re * l_re, l_re
    if COMPLEX:
        direct += v_im * l_im[:, None]
        before_re, before_im = before_re + r_im * l_im, r_re * l_im - r_im * l_re
    direct = tl.where(row_in_chunk < REST, tl.sum(direct, axis=0), 0.0)

    dt = tl.zeros((C, C), tl.float32)
    dr_re, dw_re = tl.zeros((PP, C), tl.float32), tl.zeros((PP, C), tl.float32)
    dr_im, dw_im = tl.zeros((PP, C), tl.float32), tl.zeros((PP, C), tl.float32)
    dj_re, dj_im = tl.zeros((PP,), tl.float32), tl.zeros((PP,), tl.float32)
    enter_re, enter_im = tl.zeros((PP,), tl.float32), tl.zeros((PP,), tl.float32)
    back_re, back_im = tl.zeros((PP,), tl.float32), tl.zeros((PP,), tl.float32)
    for step in range(TILES):
        tile = TILES - 1 - step
        base = tile * (N * C)
        source = entering + (program * TILES + tile) * SIZE + place
        s_re = tl.load(source, mask=place < P, other=0.0)
        s_im = s_re
        if COMPLEX:
            s_im = tl.load(source + P, mask=place < P, other=0.0)
        s_re, s_im = _chunk_states(tokens + program * T, base, s_re, s_im, writes_re, writes_im, jump_re, jump_im, T, C, N,
                                   STEPS, COMPLEX, PRECISION)  # fmt: skip
        # The gradients of the states after each chunk, from the outputs of the later chunks.
        chunk = tile * N + column[None, :]
        position = base + column[None, :] * C + row_in_chunk[:, None]
        later = tl.load(d_outputs + program * T + position + C, mask=position + C < T, other=0.0).to(tl.float32)
        edge, end = column[None, :] == N - 1, chunk + 1 == LAST
        g_re = tl.dot(reads_re, later, input_precision=PRECISION)
        g_re += tl.where(edge, enter_re[:, None], 0.0) + tl.where(end, before_re[:, None], 0.0)
        g_im = g_re
        if COMPLEX:
            g_im = tl.dot(reads_im, later, input_precision=PRECISION)
            g_im += tl.where(edge, enter_im[:, None], 0.0) + tl.where(end, before_im[:, None], 0.0)
        g_re, g_im = _advance(g_re, g_im, jump_re, -jump_im, N, STEPS, False, COMPLEX)

        now = tl.load(d_outputs + program * T + position, mask=position < T, other=0.0).to(tl.float32)
        result = tl.dot(transposed, now, input_precision=PRECISION)
        result = tl.dot(given_re, g_re, result, input_precision=PRECISION)
        if COMPLEX:
            result = tl.dot(given_im, g_im, result, input_precision=PRECISION)
        result += tl.where(chunk == LAST, direct[:, None], 0.0)
        tl.store(d_tokens + program * T + position, result.to(d_tokens.dtype.element_ty), mask=position < T)

        flipped = base + column[:, None] * C + row_in_chunk[None, :]
        inputs = tl.load(tokens + program * T + flipped, mask=flipped < T, other=0.0).to(tl.float32)
        dy = tl.load(d_outputs + program * T + flipped, mask=flipped < T, other=0.0).to(tl.float32)
        dt = tl.dot(now, inputs, dt, input_precision=PRECISION)
        dr_re = tl.dot(s_re, dy, dr_re, input_precision=PRECISION)
        dw_re = tl.dot(g_re, inputs, dw_re, input_precision=PRECISION)
        back_re = _column(g_re, 0, N)
        if COMPLEX:
            dr_im = tl.dot(s_im, dy, dr_im, input_precision=PRECISION)
            dw_im = tl.dot(g_im, inputs, dw_im, input_precision=PRECISION)
            dj_re += tl.sum(g_re * s_re + g_im * s_im, axis=1)
            dj_im += tl.sum(g_im * s_re - g_re * s_im, axis=1)
            back_im = _column(g_im, 0, N)
            enter_re, enter_im = jump_re * back_re + jump_im * back_im, jump_re * back_im - jump_im * back_re
        else:
            dj_re += tl.sum(g_re * s_re, axis=1)
            enter_re = jump_re * back_re
        # The power of the decay that carried the state before the last chunk to the end.
        if step == 0:
            f_re = _column(s_re, LAST - tile * N, N)
            if COMPLEX:
                f_im = _column(s_im, LAST - tile * N, N)
                x_re, x_im = _power_gradient(l_re * f_re + l_im * f_im, l_im * f_re - l_re * f_im, r_re, r_im, REST, True)
                da_re += x_re
                da_im += x_im
            else:
                da_re += REST * l_re * f_re * r_re

    first = tl.load(d_outputs + program * T + row_in_chunk, mask=row_in_chunk < T, other=0.0).to(tl.float32)
    source = d_start + program * SIZE + place
    total = enter_re + tl.sum(reads_re * first[None, :], axis=1)
    if LAST == 0:
        total += before_re
    tl.store(source, total, mask=place < P)
    if COMPLEX:
        total = enter_im + tl.sum(reads_im * first[None, :], axis=1)
        if LAST == 0:
            total += before_im
        tl.store(source + P, total, mask=place < P)

    # A tap's gradient is the sum of a diagonal: row i of the skewed matrix holds the i-th diagonal below the main one.
    below = row_in_chunk[:, None] + row_in_chunk[None, :]
    skewed = tl.where(below < C, tl.gather(dt, tl.where(below < C, below, 0), 0), 0.0)
    tl.store(d_taps + program * C + row_in_chunk, tl.sum(skewed, axis=1))

    x_re, x_im, y_re, y_im = _write_gradient(dw_re, dw_im, b_re, b_im, q_re, q_im, behind, COMPLEX)
    db_re, db_im, da_re, da_im = db_re + x_re, db_im + x_im, da_re + y_re, da_im + y_im
    target = program * P + place
    if COMPLEX:
        # reads_re = c_re p_re + c_im p_im, reads_im = c_im p_re - c_re p_im.
        tl.store(d_out_re + target, tl.sum(dr_re * p_re - dr_im * p_im, axis=1), mask=place < P)
        tl.store(d_out_im + target, tl.sum(dr_re * p_im + dr_im * p_re, axis=1), mask=place < P)
        x_re, x_im = _power_gradient(dr_re * c_re[:, None] + dr_im * c_im[:, None],
                                     dr_re * c_im[:, None] - dr_im * c_re[:, None], p_re, p_im, ahead, True)  # fmt: skip
        y_re, y_im = _power_gradient(dj_re, dj_im, jump_re, jump_im, C, True)
        tl.store(d_decay_re + target, da_re + y_re + tl.sum(x_re, axis=1), mask=place < P)
        tl.store(d_decay_im + target, da_im + y_im + tl.sum(x_im, axis=1), mask=place < P)
        tl.store(d_in_im + target, db_im, mask=place < P)
    else:
        tl.store(d_out_re + target, tl.sum(dr_re * p_re, axis=1), mask=place < P)
        da_re += C * dj_re * jump_re + tl.sum(ahead * dr_re * c_re[:, None] * p_re, axis=1)
        tl.store(d_decay_re + target, da_re, mask=place < P)
    tl.store(d_in_re + target, db_re, mask=place < P)


def scan_config(backward: bool, dtype, length: int, pairs: int) -> launch.Config:
    """Chunks of 64 tokens, of 32 in float32, whose products take three times the registers; longer tiles for longer rows."""
    chunk = 32 if jnp.dtype(dtype) == jnp.float32 or _pad_size(pairs) > 32 or length <= 512 else 64
    columns = 16 if length <= 16 * chunk or backward else 32
    return launch.Config(dict(C=chunk, N=columns), num_warps=8 if backward else 4, num_stages=1)


def _scan_shapes(tokens, decay, config):
    length, pairs = tokens.shape[-1], decay.shape[-1]
    chunk, columns = config.blocks["C"], config.blocks["N"]
    tiles = -(-length // (chunk * columns))
    constants = dict(T=length, D=tokens.shape[1], P=pairs, PP=_pad_size(pairs), TILES=tiles, STEPS=columns.bit_length() - 1,
                     PRECISION=launch.dot_precision(tokens.dtype))  # fmt: skip
    return tiles, constants


SCAN_OPERANDS = ("taps", "decay_re", "decay_im", "in_re", "in_im", "out_re", "out_im")


def _scan_run(config, mode, tokens, *rest):
    *shared, start = rest
    batch, features, length = tokens.shape
    shared = _common(batch, shared)
    is_complex = shared[2] is not None
    tiles, constants = _scan_shapes(tokens, shared[1], config)
    constants |= dict(SHARED=shared[0].shape[0] == 1, COMPLEX=is_complex)
    start = jnp.broadcast_to(start, (batch, *start.shape[1:]))
    state = jax.ShapeDtypeStruct(start.shape, jnp.float32)
    outputs, last, entering = launch.call(
        scan_forward,
        dict(tokens=tokens, **dict(zip(SCAN_OPERANDS, shared, strict=True)), start=start),
        dict(
            outputs=jax.ShapeDtypeStruct(tokens.shape, tokens.dtype), last=state,
            entering=jax.ShapeDtypeStruct((batch, features, tiles, start.shape[-1]), jnp.float32),
        ),
        grid=batch * features, constants=constants, config=config, mode=mode,
    )  # fmt: skip
    return outputs, last, start[:, :, None] if tiles == 1 else entering


def _scan_run_backward(config, mode, tokens, d_outputs, *rest):
    *shared, entering, d_last = rest
    batch, features, length = tokens.shape
    shared = _common(batch, shared)
    is_complex = shared[2] is not None
    tiles, constants = _scan_shapes(tokens, shared[1], config)
    constants |= dict(SHARED=shared[0].shape[0] == 1, COMPLEX=is_complex)
    full = lambda x: jnp.broadcast_to(x, (batch, *x.shape[1:]))
    float32 = lambda *shape: jax.ShapeDtypeStruct((batch, features, *shape), jnp.float32)
    modes = float32(shared[1].shape[-1])
    results = launch.call(
        scan_backward,
        dict(tokens=tokens, d_outputs=full(d_outputs), **dict(zip(SCAN_OPERANDS, shared, strict=True)),
             entering=full(entering), d_last=full(d_last)),
        dict(
            d_tokens=jax.ShapeDtypeStruct(tokens.shape, tokens.dtype), d_taps=float32(config.blocks["C"]), d_decay_re=modes,
            d_decay_im=modes, d_in_re=modes, d_in_im=modes, d_out_re=modes, d_out_im=modes,
            d_start=float32(entering.shape[-1]),
        ),
        grid=batch * features, constants=constants, config=config, mode=mode,
    )  # fmt: skip
    if is_complex:
        return results
    d_tokens, d_taps, decay, _, reads, _, writes, _, d_start = results
    return d_tokens, d_taps, decay, reads, writes, d_start


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _scan(forward_config, backward_config, mode, tokens, *rest):
    return _scan_forward(forward_config, backward_config, mode, tokens, *rest)[0]


def _scan_forward(forward_config, backward_config, mode, tokens, *rest):
    run = launch.fold_vmap(functools.partial(_scan_run, forward_config, mode))
    outputs, last, entering = run(tokens, *rest)
    return (outputs, last), (tokens, *rest[:-1], entering)


def _scan_backward(forward_config, backward_config, mode, saved, cotangents):
    tokens, *shared, entering = saved
    d_outputs, d_last = cotangents
    run = launch.fold_vmap(functools.partial(_scan_run_backward, backward_config, mode))
    d_tokens, *gradients, d_start = run(tokens, d_outputs, *shared, entering, d_last)
    gradients = iter(gradients)
    summed = (None if x is None else next(gradients).sum(0, keepdims=True) for x in shared)
    return d_tokens, *summed, d_start


_scan.defvjp(_scan_forward, _scan_backward)


def diagonal_scan(inputs, log_decay, input_matrix, output_matrix, state, *, mode):
    """See `ssm.diagonal_scan`."""
    _check_dtypes(inputs, log_decay, input_matrix, output_matrix, state)
    length, pairs = inputs.shape[1], log_decay.shape[1]
    is_complex = jnp.iscomplexobj(log_decay)
    sizes = dict(length=length, pairs=pairs, dtype=inputs.dtype.name)
    forward = launch.config("scan_forward", scan_config(False, inputs.dtype, length, pairs), **sizes)
    backward = launch.config("scan_backward", scan_config(True, inputs.dtype, length, pairs), **sizes)
    chunk = forward.blocks["C"]
    if backward.blocks != forward.blocks:  # the states that the forward saves are those that the backward starts from
        backward = launch.Config(forward.blocks, backward.num_warps, backward.num_stages)
    powers = jnp.exp(log_decay[:, None] * jnp.arange(chunk)[:, None])
    taps = jnp.einsum("dp,dcp->dc", output_matrix * input_matrix, powers, precision="highest")
    taps = 2 * taps.real if is_complex else taps
    readers = 2 * output_matrix.conj() if is_complex else output_matrix
    modes = [plane for modes in (log_decay, input_matrix, readers) for plane in _real_planes(modes)]
    shared = [None if x is None else x[None] for x in (taps, *modes)]
    outputs, last = _scan(forward, backward, mode, inputs.swapaxes(1, 2), *shared, state)
    return outputs.swapaxes(1, 2), last
