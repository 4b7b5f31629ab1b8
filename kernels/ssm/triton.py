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
def _times(a_re, a_im, b_re, b_im, COMPLEX: tl.constexpr):
    if COMPLEX:
        return a_re * b_re - a_im * b_im, a_re * b_im + a_im * b_re
    else:
        return a_re * b_re, a_re * b_re


@triton.jit
def _halve(e_re, e_im, d_re, d_im, FORWARD: tl.constexpr, COMPLEX: tl.constexpr):
    """Of every two neighbours of e [PP, N]: the one met first, and decay first + second [PP, N / 2]."""
    HALF: tl.constexpr = e_re.shape[1] // 2
    first_re, second_re = tl.split(tl.reshape(e_re, [e_re.shape[0], HALF, 2]))
    first_im, second_im = first_re, second_re
    if COMPLEX:
        first_im, second_im = tl.split(tl.reshape(e_im, [e_re.shape[0], HALF, 2]))
    if not FORWARD:
        first_re, second_re = second_re, first_re
        first_im, second_im = second_im, first_im
    moved_re, moved_im = _times(d_re[:, None], d_im[:, None], first_re, first_im, COMPLEX)
    return first_re, first_im, moved_re + second_re, moved_im + second_im


@triton.jit
def _double(s_re, s_im, e_re, e_im, d_re, d_im, FORWARD: tl.constexpr, COMPLEX: tl.constexpr):
    """The states before both of every two neighbours [PP, N], from those before the pairs and what the first adds."""
    next_re, next_im = _times(d_re[:, None], d_im[:, None], s_re, s_im, COMPLEX)
    next_re += e_re
    if COMPLEX:
        next_im += e_im
    if FORWARD:
        real, imag = tl.interleave(s_re, next_re), s_im
        if COMPLEX:
            imag = tl.interleave(s_im, next_im)
    else:
        real, imag = tl.interleave(next_re, s_re), s_im
        if COMPLEX:
            imag = tl.interleave(next_im, s_im)
    return real, imag


@triton.jit
def _jump(jumps, which, SIGN: tl.constexpr, PP: tl.constexpr, COMPLEX: tl.constexpr):
    source = jumps + which * PP + tl.arange(0, PP)
    real = tl.load(source)
    if COMPLEX:
        return real, SIGN * tl.load(source + 5 * PP)
    else:
        return real, real


@triton.jit
def _table(tables, which, PP: tl.constexpr, C: tl.constexpr):
    return tl.load(tables + (which * PP + tl.arange(0, PP)[:, None]) * C + tl.arange(0, C)[None, :])


@triton.jit
def _states(e_re, e_im, enter_re, enter_im, jumps, SIGN: tl.constexpr, PP: tl.constexpr, FORWARD: tl.constexpr,
            COMPLEX: tl.constexpr):  # fmt: skip
    """The states [PP, 16] before each column of e, x' = decay x + e from x = enter on, and the one after all of them.

    Columns are met from the left if FORWARD, else from the right. Neighbours are added in pairs, pairs of pairs and so on,
    and the way back hands each its state. The decay's powers 1, 2, .. 16 are exponentials, not squares of squares, whose
    rounding doubles each time; SIGN = -1 conjugates them.
    """
    d_re, d_im = _jump(jumps, 0, SIGN, PP, COMPLEX)
    d2_re, d2_im = _jump(jumps, 1, SIGN, PP, COMPLEX)
    d4_re, d4_im = _jump(jumps, 2, SIGN, PP, COMPLEX)
    d8_re, d8_im = _jump(jumps, 3, SIGN, PP, COMPLEX)
    d16_re, d16_im = _jump(jumps, 4, SIGN, PP, COMPLEX)
    a_re, a_im, e_re, e_im = _halve(e_re, e_im, d_re, d_im, FORWARD, COMPLEX)
    b_re, b_im, e_re, e_im = _halve(e_re, e_im, d2_re, d2_im, FORWARD, COMPLEX)
    c_re, c_im, e_re, e_im = _halve(e_re, e_im, d4_re, d4_im, FORWARD, COMPLEX)
    f_re, f_im, e_re, e_im = _halve(e_re, e_im, d8_re, d8_im, FORWARD, COMPLEX)
    s_re, s_im = enter_re[:, None], enter_im[:, None]
    after_re, after_im = _times(d16_re, d16_im, enter_re, enter_im, COMPLEX)
    after_re += tl.sum(e_re, axis=1)  # of one column
    if COMPLEX:
        after_im += tl.sum(e_im, axis=1)
    s_re, s_im = _double(s_re, s_im, f_re, f_im, d8_re, d8_im, FORWARD, COMPLEX)
    s_re, s_im = _double(s_re, s_im, c_re, c_im, d4_re, d4_im, FORWARD, COMPLEX)
    s_re, s_im = _double(s_re, s_im, b_re, b_im, d2_re, d2_im, FORWARD, COMPLEX)
    s_re, s_im = _double(s_re, s_im, a_re, a_im, d_re, d_im, FORWARD, COMPLEX)
    return s_re, s_im, after_re, after_im


# -------------------------------------------------------------------------------------------------- the diagonal scan
#
# A program has one feature of one sample. It cuts the sequence into tiles of N = 16 chunks of C tokens and lays a tile out as
# [C, N], a chunk in each column:
#
#     outputs = Toeplitz(taps) tokens + reads states,    states[:, n + 1] = decay^C states[:, n] + writes tokens[:, n]
#
# with reads [C, P] = C A^(1 .. C) and writes [P, C] = A^(C - 1 .. 0) B. `last` is the state before the chunk that holds the
# last token; that chunk may be a short one, and XLA goes on from there.


@triton.jit
def _start_of(states, program, P: tl.constexpr, PP: tl.constexpr, COMPLEX: tl.constexpr):
    """A state [PP] from an array of them."""
    place = tl.arange(0, PP)
    if COMPLEX:
        source = states + program * (2 * P) + place
        return tl.load(source, mask=place < P, other=0.0), tl.load(source + P, mask=place < P, other=0.0)
    else:
        real = tl.load(states + program * P + place, mask=place < P, other=0.0)
        return real, real


@triton.jit
def _store_state(target, real, imag, P: tl.constexpr, PP: tl.constexpr, COMPLEX: tl.constexpr):
    place = tl.arange(0, PP)
    tl.store(target + place, real, mask=place < P)
    if COMPLEX:
        tl.store(target + P + place, imag, mask=place < P)


@triton.jit
def scan_forward(
    tokens, taps, tables, jumps, start, outputs, last, entering,
    T: tl.constexpr, D: tl.constexpr, P: tl.constexpr, PP: tl.constexpr, TILES: tl.constexpr, SHARED: tl.constexpr,
    COMPLEX: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row = program % D if SHARED else program
    place, within, column = tl.arange(0, PP), tl.arange(0, C), tl.arange(0, N)
    LAST: tl.constexpr = (T - 1) // C
    SIZE: tl.constexpr = 2 * P if COMPLEX else P
    PLANES: tl.constexpr = 2 if COMPLEX else 1
    tokens += program * T
    outputs += program * T
    last += program * SIZE
    entering += program * TILES * SIZE
    tables += row * (2 * PLANES * PP * C)
    jumps += row * (5 * PLANES * PP)
    lag = within[:, None] - within[None, :]
    toeplitz = tl.load(taps + row * C + lag, mask=lag >= 0, other=0.0)
    enter_re, enter_im = _start_of(start, program, P, PP, COMPLEX)
    for tile in range(TILES):
        _store_state(entering + tile * SIZE, enter_re, enter_im, P, PP, COMPLEX)
        position = tile * (N * C) + column[None, :] * C + within[:, None]
        now = tl.load(tokens + position, mask=position < T, other=0.0).to(tl.float32)
        add_re = tl.dot(_table(tables, 0, PP, C), now, input_precision=PRECISION)
        add_im = add_re
        if COMPLEX:
            add_im = tl.dot(_table(tables, 2, PP, C), now, input_precision=PRECISION)
        s_re, s_im, enter_re, enter_im = _states(add_re, add_im, enter_re, enter_im, jumps, 1, PP, True, COMPLEX)
        result = tl.dot(toeplitz, now, input_precision=PRECISION)
        result = tl.dot(tl.trans(_table(tables, 1, PP, C)), s_re, result, input_precision=PRECISION)
        if COMPLEX:
            result = tl.dot(tl.trans(_table(tables, 3, PP, C)), s_im, result, input_precision=PRECISION)
        tl.store(outputs + position, result.to(outputs.dtype.element_ty), mask=position < T)
        if tile == TILES - 1:
            here = (column[None, :] == LAST - (TILES - 1) * N) & (place[:, None] < P)
            target = last + place[:, None] + tl.zeros((PP, N), tl.int32)
            tl.store(target, s_re, mask=here)
            if COMPLEX:
                tl.store(target + P, s_im, mask=here)


@triton.jit
def scan_backward(
    tokens, d_outputs, taps, tables, jumps, decay_re, decay_im, in_re, in_im, out_re, out_im, entering, d_last,
    d_tokens, d_taps, d_decay_re, d_decay_im, d_in_re, d_in_im, d_out_re, d_out_im, d_start,
    T: tl.constexpr, D: tl.constexpr, P: tl.constexpr, PP: tl.constexpr, TILES: tl.constexpr, SHARED: tl.constexpr,
    COMPLEX: tl.constexpr, PRECISION: tl.constexpr, TOKENS: tl.constexpr, TABLES: tl.constexpr, C: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    """Gradients in one pass from the last tile to the first; the states of a tile are made again from `entering`.

    Those of tokens and of the first state (TOKENS), those of taps and modes (TABLES), or all.
    """
    program = tl.program_id(0).to(tl.int64)
    row = program % D if SHARED else program
    place, within, column = tl.arange(0, PP), tl.arange(0, C), tl.arange(0, N)
    LAST: tl.constexpr = (T - 1) // C
    SIZE: tl.constexpr = 2 * P if COMPLEX else P
    PLANES: tl.constexpr = 2 if COMPLEX else 1
    tokens += program * T
    d_outputs += program * T
    d_tokens += program * T
    entering += program * TILES * SIZE
    tables += row * (2 * PLANES * PP * C)
    jumps += row * (5 * PLANES * PP)
    before_re, before_im = _start_of(d_last, program, P, PP, COMPLEX)
    lag = within[None, :] - within[:, None]
    toeplitz = tl.load(taps + row * C + lag, mask=lag >= 0, other=0.0)  # transposed
    dt = tl.zeros((C, C), tl.float32)
    dr_re, dw_re = tl.zeros((PP, C), tl.float32), tl.zeros((PP, C), tl.float32)
    dr_im, dw_im = tl.zeros((PP, C), tl.float32), tl.zeros((PP, C), tl.float32)
    dj_re, dj_im = tl.zeros((PP,), tl.float32), tl.zeros((PP,), tl.float32)
    enter_re, enter_im = tl.zeros((PP,), tl.float32), tl.zeros((PP,), tl.float32)
    for step in range(TILES):
        tile = TILES - 1 - step
        position = tile * (N * C) + column[None, :] * C + within[:, None]
        at_end = tile * N + column[None, :] == LAST
        now = tl.load(tokens + position, mask=position < T, other=0.0).to(tl.float32)
        dy = tl.load(d_outputs + position, mask=position < T, other=0.0).to(tl.float32)
        g_re = tl.dot(_table(tables, 1, PP, C), dy, input_precision=PRECISION)
        g_re += tl.where(at_end, before_re[:, None], 0.0)
        g_im = g_re
        if COMPLEX:
            g_im = tl.dot(_table(tables, 3, PP, C), dy, input_precision=PRECISION)
            g_im += tl.where(at_end, before_im[:, None], 0.0)
        # The gradients of the states after each chunk, from the outputs of the later chunks.
        g_re, g_im, enter_re, enter_im = _states(g_re, g_im, enter_re, enter_im, jumps, -1, PP, False, COMPLEX)
        if TOKENS:
            result = tl.dot(toeplitz, dy, input_precision=PRECISION)
            result = tl.dot(tl.trans(_table(tables, 0, PP, C)), g_re, result, input_precision=PRECISION)
            if COMPLEX:
                result = tl.dot(tl.trans(_table(tables, 2, PP, C)), g_im, result, input_precision=PRECISION)
            tl.store(d_tokens + position, result.to(d_tokens.dtype.element_ty), mask=position < T)
        if TABLES:
            add_re = tl.dot(_table(tables, 0, PP, C), now, input_precision=PRECISION)
            add_im = add_re
            if COMPLEX:
                add_im = tl.dot(_table(tables, 2, PP, C), now, input_precision=PRECISION)
            s_re, s_im = _start_of(entering, tile, P, PP, COMPLEX)
            s_re, s_im, _, _ = _states(add_re, add_im, s_re, s_im, jumps, 1, PP, True, COMPLEX)
            dt = tl.dot(dy, tl.trans(now), dt, input_precision=PRECISION)
            dr_re = tl.dot(s_re, tl.trans(dy), dr_re, input_precision=PRECISION)
            dw_re = tl.dot(g_re, tl.trans(now), dw_re, input_precision=PRECISION)
            if COMPLEX:
                dr_im = tl.dot(s_im, tl.trans(dy), dr_im, input_precision=PRECISION)
                dw_im = tl.dot(g_im, tl.trans(now), dw_im, input_precision=PRECISION)
                dj_re += tl.sum(g_re * s_re + g_im * s_im, axis=1)
                dj_im += tl.sum(g_im * s_re - g_re * s_im, axis=1)
            else:
                dj_re += tl.sum(g_re * s_re, axis=1)
    if TOKENS:
        _store_state(d_start + program * SIZE, enter_re, enter_im, P, PP, COMPLEX)
    if not TABLES:
        return

    # A tap's gradient is the sum of a diagonal: row i of the skewed matrix holds the i-th diagonal below the main one.
    below = within[:, None] + within[None, :]
    skewed = tl.where(below < C, tl.gather(dt, tl.where(below < C, below, 0), 0), 0.0)
    tl.store(d_taps + program * C + within, tl.sum(skewed, axis=1))

    # From the tables to the modes.
    d_re, d_im = _load_modes(decay_re, decay_im, row, P, PP, COMPLEX)
    b_re, b_im = _load_modes(in_re, in_im, row, P, PP, COMPLEX)
    c_re, c_im = _load_modes(out_re, out_im, row, P, PP, COMPLEX)
    ahead = (within[None, :] + 1).to(tl.float32)
    behind = (C - 1 - within[None, :]).to(tl.float32)
    p_re, p_im = _power(d_re[:, None], d_im[:, None], ahead, COMPLEX)
    q_re, q_im = _power(d_re[:, None], d_im[:, None], behind, COMPLEX)
    jump_re, jump_im = _power(d_re, d_im, 1.0 * C, COMPLEX)
    target = program * P + place
    inside = place < P
    if COMPLEX:
        # reads_re = c_re p_re + c_im p_im, reads_im = c_im p_re - c_re p_im, and the same sums give the gradient of a power
        # by the decay: exponent (g_re p_re + g_im p_im), exponent (g_im p_re - g_re p_im).
        x_re, x_im = dr_re * p_re - dr_im * p_im, dr_re * p_im + dr_im * p_re
        y_re, y_im = dw_re * q_re + dw_im * q_im, dw_im * q_re - dw_re * q_im
        tl.store(d_out_re + target, tl.sum(x_re, axis=1), mask=inside)
        tl.store(d_out_im + target, tl.sum(x_im, axis=1), mask=inside)
        tl.store(d_in_re + target, tl.sum(y_re, axis=1), mask=inside)
        tl.store(d_in_im + target, tl.sum(y_im, axis=1), mask=inside)
        x_re, x_im = tl.sum(ahead * x_re, axis=1), tl.sum(ahead * x_im, axis=1)
        y_re, y_im = tl.sum(behind * y_re, axis=1), tl.sum(behind * y_im, axis=1)
        da_re = C * (dj_re * jump_re + dj_im * jump_im) + c_re * x_re + c_im * x_im + b_re * y_re + b_im * y_im
        da_im = C * (dj_im * jump_re - dj_re * jump_im) + c_im * x_re - c_re * x_im + b_re * y_im - b_im * y_re
        tl.store(d_decay_re + target, da_re, mask=inside)
        tl.store(d_decay_im + target, da_im, mask=inside)
    else:
        x_re, y_re = dr_re * p_re, dw_re * q_re
        tl.store(d_out_re + target, tl.sum(x_re, axis=1), mask=inside)
        tl.store(d_in_re + target, tl.sum(y_re, axis=1), mask=inside)
        da_re = C * dj_re * jump_re + c_re * tl.sum(ahead * x_re, axis=1) + b_re * tl.sum(behind * y_re, axis=1)
        tl.store(d_decay_re + target, da_re, mask=inside)


COLUMNS = 16  # chunks of a tile, as `_states` has them


# Chunks of 16 tokens: twice that runs out of registers in the backward kernel where a state is 64.
SCAN_CONFIG = launch.Config(dict(C=16, N=COLUMNS), num_warps=4, num_stages=1)


MODES = ("decay_re", "decay_im", "in_re", "in_im", "out_re", "out_im")


def _scan_tables(modes, chunk, padded):
    """Writes and reads (transposed) [1, D, 2 or 4, PP, C], and decay^(C, 2 C, .. 16 C), [1, D, 5.., PP]."""
    fill = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, padded - x.shape[-1])))
    decay, drive, reads = (fill(re) if im is None else jax.lax.complex(fill(re), fill(im))
                           for re, im in (modes[:2], modes[2:4], modes[4:]))  # fmt: skip
    powers = jnp.exp(decay[..., None] * jnp.arange(chunk + 1))  # [1, D, PP, C + 1]
    jumps = jnp.exp(decay[:, :, None] * (chunk * 2 ** jnp.arange(5))[:, None])
    # The planes of reads are those that a state is multiplied by, 2 Re(C) and -2 Im(C): conj(2 C).
    tables = [drive[..., None] * jnp.flip(powers[..., :chunk], axis=-1), reads[..., None] * powers[..., 1:].conj()]
    if jnp.iscomplexobj(powers):
        tables = [table.real for table in tables] + [table.imag for table in tables]
        jumps = jnp.concatenate([jumps.real, jumps.imag], axis=2)
    return jnp.stack(tables, axis=2), jumps


def _scan_operands(config, mode, tokens, taps, *modes):
    """What both kernels take, and the options of both launches."""
    batch, features, length = tokens.shape
    taps, *modes = _common(batch, (taps, *modes))
    pairs, (chunk, columns) = modes[0].shape[-1], (config.blocks[name] for name in "CN")
    tables, jumps = _scan_tables(modes, chunk, _pad_size(pairs))
    constants = dict(
        T=length, D=features, P=pairs, PP=_pad_size(pairs), TILES=-(-length // (chunk * columns)),
        SHARED=taps.shape[0] == 1, COMPLEX=modes[1] is not None, PRECISION=launch.dot_precision(tokens.dtype),
    )  # fmt: skip
    options = dict(grid=batch * features, constants=constants, config=config, mode=mode)
    return dict(taps=taps, tables=tables, jumps=jumps), dict(zip(MODES, modes, strict=True)), options


def _scan_run(config, mode, tokens, taps, *rest):
    *modes, start = rest
    tables, modes, options = _scan_operands(config, mode, tokens, taps, *modes)
    batch, features, _ = tokens.shape
    start = jnp.broadcast_to(start, (batch, *start.shape[1:]))
    entering = (batch, features, options["constants"]["TILES"], start.shape[-1])
    outputs = dict(
        outputs=jax.ShapeDtypeStruct(tokens.shape, tokens.dtype), last=jax.ShapeDtypeStruct(start.shape, jnp.float32),
        entering=jax.ShapeDtypeStruct(entering, jnp.float32),
    )  # fmt: skip
    return launch.call(scan_forward, dict(tokens=tokens, **tables, start=start), outputs, **options)


def _scan_run_backward(config, mode, tokens, d_outputs, taps, *rest):
    *modes, entering, d_last = rest
    tables, modes, options = _scan_operands(config, mode, tokens, taps, *modes)
    full = lambda x: jnp.broadcast_to(x, (tokens.shape[0], *x.shape[1:]))
    float32 = lambda size: jax.ShapeDtypeStruct((*tokens.shape[:2], size), jnp.float32)
    pairs = modes["in_re"].shape[-1]
    outputs = dict(d_tokens=jax.ShapeDtypeStruct(tokens.shape, tokens.dtype), d_taps=float32(taps.shape[-1]))
    outputs |= {f"d_{name}": float32(pairs) for name in MODES} | dict(d_start=float32(entering.shape[-1]))
    operands = dict(tokens=tokens, d_outputs=full(d_outputs), **tables, **modes, entering=full(entering), d_last=full(d_last))
    def run(tokens, tables):
        constants = options["constants"] | dict(TOKENS=tokens, TABLES=tables)
        return launch.call(scan_backward, operands, outputs, **{**options, "constants": constants})

    if tokens.dtype != jnp.float32:
        results = run(True, True)
    else:  # the products of float32, each three of TF32, would not leave registers enough for all gradients at once
        d_tokens, *_, d_start = run(True, False)
        results = d_tokens, *run(False, True)[1:-1], d_start
    given = [True, True, *(plane is not None for plane in modes.values()), True]
    return tuple(result for result, there in zip(results, given, strict=True) if there)


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
    forward = launch.config("scan_forward", SCAN_CONFIG, **sizes)
    backward = launch.config("scan_backward", SCAN_CONFIG, **sizes)
    chunk = forward.blocks["C"]
    if backward.blocks != forward.blocks:  # the states that the forward saves are those that the backward starts from
        backward = launch.Config(forward.blocks, backward.num_warps, backward.num_stages)
    powers = jnp.exp(log_decay[:, None] * jnp.arange(chunk + 1)[:, None])  # [D, C + 1, P]
    taps = jnp.einsum("dp,dcp->dc", output_matrix * input_matrix, powers[:, :chunk], precision="highest")
    taps = 2 * taps.real if is_complex else taps
    readers = 2 * output_matrix.conj() if is_complex else output_matrix
    modes = [plane for modes in (log_decay, input_matrix, readers) for plane in _real_planes(modes)]
    shared = [None if x is None else x[None] for x in (taps, *modes)]
    outputs, before = _scan(forward, backward, mode, inputs.swapaxes(1, 2), *shared, state)
    rest = (length - 1) % chunk + 1
    tail = inputs[:, length - rest :].astype(jnp.float32)
    writes = xla.state_planes(input_matrix[:, None] * jnp.flip(powers[:, :rest], axis=1))
    added = jnp.einsum("bcd,dcp->bdp", tail, writes, precision="highest")
    return outputs.swapaxes(1, 2), xla.times(powers[None, :, rest], before) + added
