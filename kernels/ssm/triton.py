"""State space models on a GPU: the diagonal scan, kernel generation, and the diagonal-plus-low-rank recurrence.

Sequences are transposed to [B, D, T], where a program reads its feature's tokens side by side. Complex numbers are planes of
real and imaginary parts; a flag leaves the imaginary planes out where the modes are real.
"""

import functools

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from subquad.kernels import launch, precision
from subquad.kernels.ssm import cauchy, xla

FLOATS = launch.FLOATS
LONGEST_CLASS = 1 << 14  # of lengths that share a tuned configuration: from here on all do
MOST_MODES = 256  # of a feature: a program holds them all, and for twice as many the scan asks for more than Hopper has


def _check_modes(count):
    if count > MOST_MODES:
        raise launch.Declined(f"a feature has {count} modes, and the kernel holds at most {MOST_MODES}.")


def _check_dtypes(inputs, *modes):
    """Declines what the kernels cannot hold: they compute in float32."""
    single = all(x.dtype in (jnp.float32, jnp.complex64) for x in modes)
    if inputs.dtype.name not in FLOATS or not single:
        raise launch.Declined("the kernels take float32, bfloat16 and float16 inputs and modes in float32 or complex64.")


def _real_planes(modes):
    """[..., D, P] -> real and imaginary parts, or None for the imaginary parts of real modes."""
    return (modes.real, modes.imag) if jnp.iscomplexobj(modes) else (modes, None)


def _pad_size(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


# ------------------------------------------------------------------------------------------------------ device helpers


@triton.jit
def _turn(angle):
    """(cos, sin) of angles up to 1e5, by reduction to an eighth of a turn. Triton's own need a stack for larger angles."""
    quarters = tl.floor(angle * 0.6366197723675814 + 0.5)
    rest = angle - quarters * 1.5703125  # pi / 2 in three parts, of which the first two have few bits
    rest = rest - quarters * 4.837512969970703125e-4
    rest = rest - quarters * 7.549789948768648e-8
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

    Those of tokens and of the first state (TOKENS), or those of taps and modes (TABLES).
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
    pairs, (chunk, columns) = modes[0].shape[-1], (config.blocks[name] for name in "CN")
    tables, jumps = _scan_tables(modes, chunk, _pad_size(pairs))
    constants = dict(
        T=length, D=features, P=pairs, PP=_pad_size(pairs), TILES=-(-length // (chunk * columns)),
        SHARED=taps.shape[0] == 1, COMPLEX=modes[1] is not None, PRECISION=launch.dot_precision(jnp.float32),
    )  # fmt: skip
    options = dict(grid=batch * features, constants=constants, config=config, mode=mode)
    return dict(taps=taps, tables=tables, jumps=jumps), dict(zip(MODES, modes, strict=True)), options


def _scan_run(config, mode, tokens, taps, *rest):
    *modes, start = rest
    tables, modes, options = _scan_operands(config, mode, tokens, taps, *modes)
    batch, features, _ = tokens.shape
    entering = (batch, features, options["constants"]["TILES"], start.shape[-1])
    outputs = dict(
        outputs=jax.ShapeDtypeStruct(tokens.shape, tokens.dtype), last=jax.ShapeDtypeStruct(start.shape, jnp.float32),
        entering=jax.ShapeDtypeStruct(entering, jnp.float32),
    )  # fmt: skip
    return launch.call(scan_forward, dict(tokens=tokens, **tables, start=start), outputs, **options)


def _scan_run_backward(config, mode, tokens, d_outputs, taps, *rest):
    *modes, entering, d_last = rest
    tables, modes, options = _scan_operands(config, mode, tokens, taps, *modes)
    float32 = lambda size: jax.ShapeDtypeStruct((*tokens.shape[:2], size), jnp.float32)
    pairs = modes["in_re"].shape[-1]
    outputs = dict(d_tokens=jax.ShapeDtypeStruct(tokens.shape, tokens.dtype), d_taps=float32(taps.shape[-1]))
    outputs |= {f"d_{name}": float32(pairs) for name in MODES} | dict(d_start=float32(entering.shape[-1]))
    operands = dict(tokens=tokens, d_outputs=d_outputs, **tables, **modes, entering=entering, d_last=d_last)

    def run(tokens, tables):
        constants = options["constants"] | dict(TOKENS=tokens, TABLES=tables)
        return launch.call(scan_backward, operands, outputs, **{**options, "constants": constants})

    # The products of float32, each three of TF32, would not leave registers enough for all gradients at once.
    d_tokens, *_, d_start = run(True, False)
    results = d_tokens, *run(False, True)[1:-1], d_start
    given = [True, True, *(plane is not None for plane in modes.values()), True]
    return tuple(result for result, there in zip(results, given, strict=True) if there)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _scan(forward_config, backward_config, mode, tokens, *rest):
    return _scan_forward(forward_config, backward_config, mode, tokens, *rest)[0]


def _scan_forward(forward_config, backward_config, mode, tokens, *rest):
    run = launch.fold_vmap(functools.partial(_scan_run, forward_config, mode), shared=[range(1, 8)])
    outputs, last, entering = run(tokens, *rest)
    return (outputs, last), (tokens, *rest[:-1], entering)


def _scan_backward(forward_config, backward_config, mode, saved, cotangents):
    tokens, *shared, entering = saved
    d_outputs, d_last = cotangents
    run = launch.fold_vmap(functools.partial(_scan_run_backward, backward_config, mode), shared=[range(2, 9)])
    d_tokens, *gradients, d_start = run(tokens, d_outputs, *shared, entering, d_last)
    gradients = iter(gradients)
    summed = (None if x is None else next(gradients).sum(0, keepdims=True) for x in shared)
    return d_tokens, *summed, d_start


precision.define_passes(_scan, _scan_forward, _scan_backward)


def diagonal_scan(inputs, log_decay, input_matrix, output_matrix, state, *, mode):
    """See `ssm.diagonal_scan`."""
    _check_dtypes(inputs, log_decay, input_matrix, output_matrix, state)
    length, pairs = inputs.shape[1], log_decay.shape[1]
    _check_modes(pairs)
    is_complex = jnp.iscomplexobj(log_decay)
    sizes = dict(length=launch.size_class(length, LONGEST_CLASS), pairs=_pad_size(pairs), dtype=inputs.dtype.name)
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


# ----------------------------------------------------------------------------------------- kernels of diagonal systems
#
# taps[l] = Re(sum_p coefficients_p exp(l decay_p)), a product with a Vandermonde matrix. A tile of N x C taps is one matrix
# product, l = base + n C + i: coarse powers times coefficients [N, P], fine powers [P, C].


@triton.jit
def kernel_forward(
    decay_re, decay_im, in_re, in_im, taps,
    D: tl.constexpr, P: tl.constexpr, PP: tl.constexpr, L: tl.constexpr, SHARED: tl.constexpr, PRECISION: tl.constexpr,
    C: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    TILES: tl.constexpr = (L + C * N - 1) // (C * N)
    program = tl.program_id(0).to(tl.int64)
    tile = (program % TILES).to(tl.int32)
    row = program // TILES
    d_re, d_im = _load_modes(decay_re, decay_im, row % D if SHARED else row, P, PP, True)
    c_re, c_im = _load_modes(in_re, in_im, row, P, PP, True)
    within, column = tl.arange(0, C), tl.arange(0, N)
    fine_re, fine_im = _power(d_re[:, None], d_im[:, None], within[None, :].to(tl.float32), True)
    start = (tile * (C * N) + column * C).to(tl.float32)[:, None]
    p_re, p_im = _power(d_re[None, :], d_im[None, :], start, True)
    p_re, p_im = _times(c_re[None, :], c_im[None, :], p_re, p_im, True)
    result = tl.dot(p_re, fine_re, input_precision=PRECISION)
    result = tl.dot(-p_im, fine_im, result, input_precision=PRECISION)
    place = tile * (C * N) + column[:, None] * C + within[None, :]
    tl.store(taps + row * L + place, result, mask=place < L)


@triton.jit
def kernel_backward(
    decay_re, decay_im, in_re, in_im, d_taps, d_decay_re, d_decay_im, d_in_re, d_in_im,
    D: tl.constexpr, P: tl.constexpr, PP: tl.constexpr, L: tl.constexpr, SHARED: tl.constexpr, PRECISION: tl.constexpr,
    C: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """From the sums over l of d_taps_l exp(l decay) and of the same times l."""
    TILES: tl.constexpr = (L + C * N - 1) // (C * N)
    row = tl.program_id(0).to(tl.int64)
    d_re, d_im = _load_modes(decay_re, decay_im, row % D if SHARED else row, P, PP, True)
    within, column = tl.arange(0, C), tl.arange(0, N)
    fine = within[:, None].to(tl.float32)
    fine_re, fine_im = _power(d_re[None, :], d_im[None, :], fine, True)  # [C, PP]
    x_re, x_im = tl.zeros((PP,), tl.float32), tl.zeros((PP,), tl.float32)
    y_re, y_im = tl.zeros((PP,), tl.float32), tl.zeros((PP,), tl.float32)
    for tile in range(TILES):
        place = tile * (C * N) + column[:, None] * C + within[None, :]
        given = tl.load(d_taps + row * L + place, mask=place < L, other=0.0)
        start = (tile * (C * N) + column * C).to(tl.float32)[:, None]
        p_re, p_im = _power(d_re[None, :], d_im[None, :], start, True)
        m_re = tl.dot(given, fine_re, input_precision=PRECISION)
        m_im = tl.dot(given, fine_im, input_precision=PRECISION)
        f_re, f_im = _times(p_re, p_im, m_re, m_im, True)
        x_re, x_im = x_re + tl.sum(f_re, axis=0), x_im + tl.sum(f_im, axis=0)
        y_re, y_im = y_re + tl.sum(start * f_re, axis=0), y_im + tl.sum(start * f_im, axis=0)
        m_re = tl.dot(given, fine * fine_re, input_precision=PRECISION)
        m_im = tl.dot(given, fine * fine_im, input_precision=PRECISION)
        f_re, f_im = _times(p_re, p_im, m_re, m_im, True)
        y_re, y_im = y_re + tl.sum(f_re, axis=0), y_im + tl.sum(f_im, axis=0)
    c_re, c_im = _load_modes(in_re, in_im, row, P, PP, True)
    place = tl.arange(0, PP)
    target, inside = row * P + place, place < P
    tl.store(d_in_re + target, x_re, mask=inside)
    tl.store(d_in_im + target, -x_im, mask=inside)
    tl.store(d_decay_re + target, c_re * y_re - c_im * y_im, mask=inside)
    tl.store(d_decay_im + target, -c_re * y_im - c_im * y_re, mask=inside)


def _kernel_config(kernel, pairs):
    """Tiles of 512 taps, and of less in the backward kernel where its sums over many modes need the registers."""
    if kernel is kernel_forward:
        blocks = dict(C=16, N=32)
    else:
        blocks = dict(C=32 if pairs <= 32 else 16, N=16)
    return launch.Config(blocks, num_warps=4, num_stages=1)


def _kernel_launch(kernel, planes, length, extra, outputs, tiles, mode):
    features, pairs = planes[2].shape[-2:]
    constants = dict(D=features, P=pairs, PP=_pad_size(pairs), L=length, SHARED=planes[0].shape[0] == 1,
                     PRECISION=launch.dot_precision(jnp.float32))  # fmt: skip
    sizes = dict(length=launch.size_class(length, LONGEST_CLASS), pairs=_pad_size(pairs))
    config = launch.config(kernel.__name__, _kernel_config(kernel, pairs), **sizes)
    tiles = -(-length // (config.blocks["C"] * config.blocks["N"])) if tiles else 1
    inputs = dict(zip(MODES[:4], planes, strict=True)) | extra
    return launch.call(kernel, inputs, outputs, grid=planes[2].shape[0] * features * tiles, constants=constants,
                       config=config, mode=mode)  # fmt: skip


def _kernel_run(length, mode, *planes):
    taps = jax.ShapeDtypeStruct((*planes[2].shape[:2], length), jnp.float32)
    return _kernel_launch(kernel_forward, planes, length, {}, dict(taps=taps), True, mode)[0]


def _kernel_run_backward(mode, d_taps, *planes):
    modes = jax.ShapeDtypeStruct(planes[2].shape, jnp.float32)
    outputs = {f"d_{name}": modes for name in MODES[:4]}
    return _kernel_launch(kernel_backward, planes, d_taps.shape[-1], dict(d_taps=d_taps), outputs, False, mode)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _kernel(length, mode, *planes):
    return launch.fold_vmap(functools.partial(_kernel_run, length, mode), shared=[[0, 1]])(*planes)


def _kernel_forward(length, mode, *planes):
    return _kernel(length, mode, *planes), planes


def _kernel_backward(length, mode, planes, cotangent):
    gradients = launch.fold_vmap(functools.partial(_kernel_run_backward, mode), shared=[[1, 2]])(cotangent, *planes)
    return tuple(g if x.shape[0] > 1 else g.sum(0, keepdims=True) for g, x in zip(gradients, planes, strict=True))


precision.define_passes(_kernel, _kernel_forward, _kernel_backward)


def diagonal_kernel(log_decay, coefficients, length, *, mode):
    """See `ssm.diagonal_kernel`."""
    if log_decay.dtype != jnp.complex64 or coefficients.dtype != jnp.complex64:
        raise launch.Declined("the kernel takes complex64 modes only.")
    _check_modes(log_decay.shape[1])
    flat = 2 * coefficients.reshape(-1, *log_decay.shape)
    taps = _kernel(length, mode, log_decay.real[None], log_decay.imag[None], flat.real, flat.imag)
    return taps.reshape(*coefficients.shape[:-1], length)


# ------------------------------------------------------------------------- kernels of diagonal-plus-low-rank systems


@triton.jit
def _cauchy(decay, turn, real, imag):
    """1 / ((z - a) (z - conj(a))) for z = real + i imag and a = decay + i turn, and the parts its gradient needs."""
    distance = real - decay
    top, bottom = distance * distance + (turn - imag) * (turn + imag), 2.0 * imag * distance
    inverse = 1.0 / (top * top + bottom * bottom)
    return top * inverse, -bottom * inverse, distance


@triton.jit
def cauchy_forward(
    numerators, decay, turn, nodes, sums,
    D: tl.constexpr, V: tl.constexpr, VV: tl.constexpr, P: tl.constexpr, PP: tl.constexpr, L: tl.constexpr,
    SHARED: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """sums [D, V, 2, L] of numerators [D, V, P] over (z - a) (z - conj(a)) at the nodes z [2, L]."""
    TILES: tl.constexpr = (L + C - 1) // C
    program = tl.program_id(0).to(tl.int64)
    tile = (program % TILES).to(tl.int32)
    row = program // TILES
    nodes += 0 if SHARED else row // D * (2 * L)
    place, line, node = tl.arange(0, PP), tl.arange(0, VV), tile * C + tl.arange(0, C)
    a = tl.load(decay + row * P + place, mask=place < P, other=-1.0)
    b = tl.load(turn + row * P + place, mask=place < P, other=0.0)
    inside = (line[:, None] < V) & (place[None, :] < P)
    weights = tl.load(numerators + row * (V * P) + line[:, None] * P + place[None, :], mask=inside, other=0.0)
    # Nodes and modes that are not there get a distance of their own: no division by 0.
    real = tl.load(nodes + node, mask=node < L, other=1.0)
    imag = tl.load(nodes + L + node, mask=node < L, other=0.0)
    c_re, c_im, _ = _cauchy(a[:, None], b[:, None], real[None, :], imag[None, :])
    target = sums + row * (V * 2 * L) + line[:, None] * (2 * L) + node[None, :]
    mask = (line[:, None] < V) & (node[None, :] < L)
    tl.store(target, tl.dot(weights, c_re, input_precision=PRECISION), mask=mask)
    tl.store(target + L, tl.dot(weights, c_im, input_precision=PRECISION), mask=mask)


@triton.jit
def cauchy_backward(
    numerators, decay, turn, nodes, d_sums, d_numerators, d_decay, d_turn,
    D: tl.constexpr, V: tl.constexpr, VV: tl.constexpr, P: tl.constexpr, PP: tl.constexpr, L: tl.constexpr,
    SHARED: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    nodes += 0 if SHARED else row // D * (2 * L)
    place, line = tl.arange(0, PP), tl.arange(0, VV)
    a = tl.load(decay + row * P + place, mask=place < P, other=-1.0)
    b = tl.load(turn + row * P + place, mask=place < P, other=0.0)
    inside = (line[None, :] < V) & (place[:, None] < P)
    offset = row * (V * P) + line[None, :] * P + place[:, None]
    weights = tl.load(numerators + offset, mask=inside, other=0.0)  # transposed, [PP, VV]
    dw = tl.zeros((PP, VV), tl.float32)
    da, db = tl.zeros((PP,), tl.float32), tl.zeros((PP,), tl.float32)
    for tile in range((L + C - 1) // C):
        node = tile * C + tl.arange(0, C)
        real = tl.load(nodes + node, mask=node < L, other=1.0)[None, :]
        imag = tl.load(nodes + L + node, mask=node < L, other=0.0)[None, :]
        c_re, c_im, distance = _cauchy(a[:, None], b[:, None], real, imag)
        source = d_sums + row * (V * 2 * L) + line[:, None] * (2 * L) + node[None, :]
        mask = (line[:, None] < V) & (node[None, :] < L)
        s_re = tl.load(source, mask=mask, other=0.0)
        s_im = tl.load(source + L, mask=mask, other=0.0)
        dw = tl.dot(c_re, tl.trans(s_re), dw, input_precision=PRECISION)
        dw = tl.dot(c_im, tl.trans(s_im), dw, input_precision=PRECISION)
        g_re = tl.dot(weights, s_re, input_precision=PRECISION)
        g_im = tl.dot(weights, s_im, input_precision=PRECISION)
        # c = 1 / w: the gradient of w = top + i bottom is that of c, conjugated, times -c^2.
        q_re, q_im = c_re * c_re - c_im * c_im, 2.0 * c_re * c_im
        top, bottom = -(g_re * q_re + g_im * q_im), g_re * q_im - g_im * q_re
        da -= tl.sum(2.0 * (distance * top + imag * bottom), axis=1)
        db += tl.sum(2.0 * b[:, None] * top, axis=1)
    tl.store(d_numerators + offset, dw, mask=inside)
    tl.store(d_decay + row * P + place, da, mask=place < P)
    tl.store(d_turn + row * P + place, db, mask=place < P)


SYSTEMS = ("numerators", "decay", "turn")


def _cauchy_config(kernel, mode):
    """The backward kernel has two sums over nodes and two over lines in registers; the interpreter has any number."""
    few = kernel is cauchy_backward and mode == "triton"
    return launch.Config(dict(C=16 if few else 64), num_warps=4, num_stages=1)


def _cauchy_launch(kernel, arrays, extra, outputs, tiles, mode):
    numerators, decay, turn, nodes = arrays
    (batch, features, lines, pairs), length = numerators.shape, nodes.shape[-1]
    constants = dict(D=features, V=lines, VV=_pad_size(lines), P=pairs, PP=_pad_size(pairs), L=length,
                     SHARED=nodes.shape[0] == 1, PRECISION=launch.dot_precision(jnp.float32))  # fmt: skip
    sizes = dict(lines=_pad_size(lines), pairs=_pad_size(pairs))
    config = launch.config(kernel.__name__, _cauchy_config(kernel, mode), **sizes)
    inputs = dict(numerators=numerators, decay=decay, turn=turn, nodes=nodes) | extra
    grid = batch * features * (-(-length // config.blocks["C"]) if tiles else 1)
    return launch.call(kernel, inputs, outputs, grid=grid, constants=constants, config=config, mode=mode)


def _cauchy_run(mode, *arrays):
    numerators, *_, nodes = arrays
    sums = jax.ShapeDtypeStruct((*numerators.shape[:3], 2, nodes.shape[-1]), jnp.float32)
    return _cauchy_launch(cauchy_forward, arrays, {}, dict(sums=sums), True, mode)[0]


def _cauchy_run_backward(mode, d_sums, *arrays):
    outputs = {f"d_{name}": jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in zip(SYSTEMS, arrays, strict=False)}
    return _cauchy_launch(cauchy_backward, arrays, dict(d_sums=d_sums), outputs, False, mode)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cauchy_sums(mode, *arrays):
    return launch.fold_vmap(functools.partial(_cauchy_run, mode), shared=[[3]])(*arrays)


def _cauchy_sums_forward(mode, *arrays):
    return _cauchy_sums(mode, *arrays), arrays


def _cauchy_sums_backward(mode, arrays, cotangent):
    gradients = launch.fold_vmap(functools.partial(_cauchy_run_backward, mode), shared=[[4]])(cotangent, *arrays)
    return *gradients, jnp.zeros_like(arrays[-1])  # nobody moves the nodes


precision.define_passes(_cauchy_sums, _cauchy_sums_forward, _cauchy_sums_backward)


def dplr_kernel(diagonal, low_rank, input_matrix, output_matrix, step, length, *, mode):
    """See `ssm.dplr_kernel`: the Cauchy sums here, the power of A_bar, Woodbury's identity and the FFT in XLA."""
    arrays = diagonal, low_rank, input_matrix, output_matrix
    if step.dtype != jnp.float32 or any(x.dtype != jnp.complex64 for x in arrays):
        raise launch.Declined("the kernel takes complex64 modes and float32 steps only.")
    _check_modes(diagonal.shape[1])

    def sums(numerators, decay, turn, real, imag):
        return _cauchy_sums(mode, numerators[None], decay[None], turn[None], jnp.stack([real, imag])[None])[0]

    return cauchy.dplr_kernel(*arrays, step, length, sums)


# ------------------------------------------------------------------------------------------- the DPLR recurrence


@triton.jit
def recurrence_forward(
    inputs, excess, left, right, drive, reads, start, outputs, last,
    T: tl.constexpr, D: tl.constexpr, P: tl.constexpr, PP: tl.constexpr, R: tl.constexpr, RR: tl.constexpr,
    SHARED: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """T steps x' = x + 2 (excess y + drive u - sum_r left_r <right_r, y>), y = x + drive u, of BLOCK_D features of a sample.

    Planes side by side: inputs [B, T, D], excess, drive, reads and states [.., D, 2, P], left and right [.., R, D, 2, P].
    """
    BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    program = tl.program_id(0).to(tl.int64)
    sample = program // BLOCKS
    feature = (program % BLOCKS).to(tl.int32) * BLOCK_D + tl.arange(0, BLOCK_D)
    system = 0 if SHARED else sample
    place, rank = tl.arange(0, PP), tl.arange(0, RR)
    inside = (feature[:, None] < D) & (place[None, :] < P)
    flat = feature[:, None] * (2 * P) + place[None, :]
    deep = rank[:, None, None] * (D * 2 * P) + flat[None, :, :]
    within = (rank[:, None, None] < R) & inside[None, :, :]
    excess += system * (D * 2 * P)
    drive += system * (D * 2 * P)
    reads += system * (D * 2 * P)
    left += system * (R * D * 2 * P)
    right += system * (R * D * 2 * P)
    e_re, e_im = tl.load(excess + flat, mask=inside, other=0.0), tl.load(excess + P + flat, mask=inside, other=0.0)
    b_re, b_im = tl.load(drive + flat, mask=inside, other=0.0), tl.load(drive + P + flat, mask=inside, other=0.0)
    c_re, c_im = tl.load(reads + flat, mask=inside, other=0.0), tl.load(reads + P + flat, mask=inside, other=0.0)
    l_re, l_im = tl.load(left + deep, mask=within, other=0.0), tl.load(left + P + deep, mask=within, other=0.0)
    r_re, r_im = tl.load(right + deep, mask=within, other=0.0), tl.load(right + P + deep, mask=within, other=0.0)
    state = sample * (D * 2 * P) + flat
    x_re, x_im = tl.load(start + state, mask=inside, other=0.0), tl.load(start + P + state, mask=inside, other=0.0)
    for t in range(T):
        token = tl.load(inputs + (sample * T + t) * D + feature, mask=feature < D, other=0.0).to(tl.float32)
        u_re, u_im = b_re * token[:, None], b_im * token[:, None]
        y_re, y_im = x_re + u_re, x_im + u_im
        inner = tl.sum(r_re * y_re[None, :, :] + r_im * y_im[None, :, :], axis=2)[:, :, None]
        x_re += 2.0 * (e_re * y_re - e_im * y_im + u_re - tl.sum(l_re * inner, axis=0))
        x_im += 2.0 * (e_re * y_im + e_im * y_re + u_im - tl.sum(l_im * inner, axis=0))
        result = tl.sum(c_re * x_re + c_im * x_im, axis=1)
        target = outputs + (sample * T + t) * D + feature
        tl.store(target, result.to(outputs.dtype.element_ty), mask=feature < D)
    tl.store(last + state, x_re, mask=inside)
    tl.store(last + P + state, x_im, mask=inside)


def _recurrence_run(mode, inputs, *arrays):
    *systems, start = arrays
    batch, length, features = inputs.shape
    rank, pairs = systems[1].shape[1], start.shape[-1] // 2
    # A program per feature on a GPU, where there are many; all of a sample in the interpreter, where a program is slow.
    block = 1 if mode == "triton" else min(64, _pad_size(features))
    heuristic = launch.Config(dict(BLOCK_D=block), num_warps=1, num_stages=1)
    config = launch.config("recurrence_forward", heuristic, pairs=_pad_size(pairs), rank=rank)
    constants = dict(T=length, D=features, P=pairs, PP=_pad_size(pairs), R=rank, RR=1 << (rank - 1).bit_length(),
                     SHARED=systems[0].shape[0] == 1)  # fmt: skip
    names = ("excess", "left", "right", "drive", "reads")
    state = jax.ShapeDtypeStruct(start.shape, jnp.float32)
    outputs = dict(outputs=jax.ShapeDtypeStruct(inputs.shape, inputs.dtype), last=state)
    grid = batch * -(-features // config.blocks["BLOCK_D"])
    operands = dict(inputs=inputs, **dict(zip(names, systems, strict=True)), start=start)
    return launch.call(recurrence_forward, operands, outputs, grid=grid, constants=constants, config=config, mode=mode)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recurrence(mode, inputs, diagonal, low_rank, input_matrix, output_matrix, step, state):
    excess, left, right = xla.resolvent(diagonal, low_rank, step)
    systems = excess, left, right, step[:, None] / 2 * input_matrix, 2 * output_matrix.conj()
    systems = [xla.state_planes(x)[None] for x in systems]
    return launch.fold_vmap(functools.partial(_recurrence_run, mode), shared=[range(1, 6)])(inputs, *systems, state)


def _recurrence_forward(mode, *arrays):
    return _recurrence(mode, *arrays), arrays


def _recurrence_backward(mode, arrays, cotangents):
    return jax.vjp(xla.dplr_recurrence, *arrays)[1](cotangents)


precision.define_passes(_recurrence, _recurrence_forward, _recurrence_backward)


def dplr_recurrence(inputs, diagonal, low_rank, input_matrix, output_matrix, step, state, *, mode):
    """See `ssm.dplr_recurrence`. The gradient is XLA's: training convolves, and the recurrence extends."""
    _check_dtypes(inputs, diagonal, low_rank, input_matrix, output_matrix, step, state)
    return _recurrence(mode, inputs, diagonal, low_rank, input_matrix, output_matrix, step, state)
