"""State space models on a GPU: the diagonal scan, kernel generation, and the diagonal-plus-low-rank recurrence.

Sequences are transposed, features first, where a program reads its feature's tokens side by side. Complex numbers are planes of
real and imaginary parts; a flag leaves the imaginary planes out where the modes are real.
"""

import functools

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from einops import rearrange

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
def _power(decay_re, decay_im, exponent):
    """exp(exponent (decay_re + i decay_im))."""
    size = tl.exp(decay_re * exponent)
    cosine, sine = _turn(decay_im * exponent)
    return size * cosine, size * sine


@triton.jit
def _load_modes(real, imag, row, P: tl.constexpr, PP: tl.constexpr):
    place = tl.arange(0, PP)
    re = tl.load(real + row * P + place, mask=place < P, other=0.0)
    return re, tl.load(imag + row * P + place, mask=place < P, other=0.0)


@triton.jit
def _times(a_re, a_im, b_re, b_im, COMPLEX: tl.constexpr):
    if COMPLEX:
        return a_re * b_re - a_im * b_im, a_re * b_im + a_im * b_re
    else:
        return a_re * b_re, a_re * b_re


# -------------------------------------------------------------------------------------------------- the diagonal scan
#
# A program has one feature of BB samples and walks over chunks of C tokens, U [BB, C], with their states S [BB, P]:
#
#     Y = U toeplitz + Re(S) reads_re + Im(S) reads_im,    S' = jump S + U (writes_re + i writes_im)
#
# The tables of the feature (`xla.chunk_tables`) are loaded once. Real modes have no imaginary planes.


@triton.jit
def _planes(array, offset, mask, other, STEP: tl.constexpr, COMPLEX: tl.constexpr):
    """The real and the imaginary plane, STEP behind it; the real one in place of one that is not there."""
    real = tl.load(array + offset, mask=mask, other=other)
    if COMPLEX:
        return real, tl.load(array + offset + STEP, mask=mask, other=other)
    else:
        return real, real


@triton.jit
def _store_planes(array, offset, mask, real, imag, STEP: tl.constexpr, COMPLEX: tl.constexpr):
    tl.store(array + offset, real, mask=mask)
    if COMPLEX:
        tl.store(array + offset + STEP, imag, mask=mask)


@triton.jit
def _dot_planes(re, im, table_re, table_im, start, PRECISION: tl.constexpr, COMPLEX: tl.constexpr):
    """One product over the planes of a state and those of a table."""
    result = tl.dot(re, table_re, start, input_precision=PRECISION)
    if COMPLEX:
        result = tl.dot(im, table_im, result, input_precision=PRECISION)
    return result


@triton.jit
def _add_planes(re, im, values, table_re, table_im, PRECISION: tl.constexpr, COMPLEX: tl.constexpr):
    """A state, and the values times each plane of a table."""
    re = tl.dot(values, table_re, re, input_precision=PRECISION)
    if COMPLEX:
        im = tl.dot(values, table_im, im, input_precision=PRECISION)
    return re, im


@triton.jit
def scan_forward(
    tokens, toeplitz, writes, reads, jump, start, outputs, entering,
    B: tl.constexpr, T: tl.constexpr, P: tl.constexpr, SLOTS: tl.constexpr, COMPLEX: tl.constexpr,
    PRECISION: tl.constexpr, C: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """`entering`: the states before the last SLOTS chunks."""
    CHUNKS: tl.constexpr = (T + C - 1) // C
    BLOCKS: tl.constexpr = (B + BB - 1) // BB
    SIZE: tl.constexpr = 2 * P if COMPLEX else P
    program = tl.program_id(0)
    feature = (program // BLOCKS).to(tl.int64)
    sample = program % BLOCKS * BB + tl.arange(0, BB)[:, None]
    within, mode = tl.arange(0, C), tl.arange(0, P)
    row = feature * B + sample
    here = sample < B
    taps = tl.load(toeplitz + feature * (C * C) + within[:, None] * C + within[None, :])
    w_re, w_im = _planes(writes + feature * (C * SIZE), within[:, None] * P + mode[None, :], None, None, C * P, COMPLEX)
    r_re, r_im = _planes(reads + feature * (C * SIZE), mode[:, None] * C + within[None, :], None, None, C * P, COMPLEX)
    a_re, a_im = _planes(jump + feature * SIZE, mode[None, :], None, None, P, COMPLEX)
    s_re, s_im = _planes(start, row * SIZE + mode[None, :], here, 0.0, P, COMPLEX)
    for n in range(CHUNKS):
        slot = n - (CHUNKS - SLOTS) + tl.zeros((1, 1), tl.int32)
        place = (row * SLOTS + slot) * SIZE + mode[None, :]
        _store_planes(entering, place, here & (slot >= 0), s_re, s_im, P, COMPLEX)
        position = n * C + within[None, :]
        inside = here & (position < T)
        u = tl.load(tokens + row * T + position, mask=inside, other=0.0).to(tl.float32)
        y = tl.dot(u, taps, input_precision=PRECISION)
        y = _dot_planes(s_re, s_im, r_re, r_im, y, PRECISION, COMPLEX)
        tl.store(outputs + row * T + position, y.to(outputs.dtype.element_ty), mask=inside)
        s_re, s_im = _times(a_re, a_im, s_re, s_im, COMPLEX)
        s_re, s_im = _add_planes(s_re, s_im, u, w_re, w_im, PRECISION, COMPLEX)


@triton.jit
def scan_backward(
    tokens, grad_outputs, toeplitz, writes, reads, jump, entering, grad_last,
    grad_tokens, grad_toeplitz, grad_writes, grad_reads, grad_jump, grad_start,
    B: tl.constexpr, T: tl.constexpr, P: tl.constexpr, COMPLEX: tl.constexpr, TABLES: tl.constexpr,
    PRECISION: tl.constexpr, C: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """From the last chunk to the first: the state is the gradient g of that after a chunk, and the tables are transposed.

    Gradients of the tables, for each block of samples (TABLES), or of tokens and of the first state.
    """
    CHUNKS: tl.constexpr = (T + C - 1) // C
    BLOCKS: tl.constexpr = (B + BB - 1) // BB
    SIZE: tl.constexpr = 2 * P if COMPLEX else P
    program = tl.program_id(0)
    feature = (program // BLOCKS).to(tl.int64)
    sample = program % BLOCKS * BB + tl.arange(0, BB)[:, None]
    within, mode = tl.arange(0, C), tl.arange(0, P)
    row = feature * B + sample
    here = sample < B
    r_re, r_im = _planes(reads + feature * (C * SIZE), mode[None, :] * C + within[:, None], None, None, C * P, COMPLEX)
    a_re, a_im = _planes(jump + feature * SIZE, mode[None, :], None, None, P, COMPLEX)
    g_re, g_im = tl.zeros((BB, P), tl.float32), tl.zeros((BB, P), tl.float32)
    if not TABLES:
        taps = tl.load(toeplitz + feature * (C * C) + within[None, :] * C + within[:, None])
        w_re, w_im = _planes(writes + feature * (C * SIZE), within[None, :] * P + mode[:, None], None, None, C * P, COMPLEX)
    if TABLES:
        dt = tl.zeros((C, C), tl.float32)
        dw_re, dw_im = tl.zeros((C, P), tl.float32), tl.zeros((C, P), tl.float32)
        dr_re, dr_im = tl.zeros((P, C), tl.float32), tl.zeros((P, C), tl.float32)
        da_re, da_im = tl.zeros((BB, P), tl.float32), tl.zeros((BB, P), tl.float32)
    for step in range(CHUNKS):
        n = CHUNKS - 1 - step
        position = n * C + within[None, :]
        inside = here & (position < T)
        dy = tl.load(grad_outputs + row * T + position, mask=inside, other=0.0).to(tl.float32)
        if not TABLES:
            du = tl.dot(dy, taps, input_precision=PRECISION)
            du = _dot_planes(g_re, g_im, w_re, w_im, du, PRECISION, COMPLEX)
            tl.store(grad_tokens + row * T + position, du.to(grad_tokens.dtype.element_ty), mask=inside)
        if TABLES:
            u = tl.trans(tl.load(tokens + row * T + position, mask=inside, other=0.0).to(tl.float32))
            s_re, s_im = _planes(entering, (row * CHUNKS + n) * SIZE + mode[None, :], here, 0.0, P, COMPLEX)
            dt = tl.dot(u, dy, dt, input_precision=PRECISION)
            dw_re, dw_im = _add_planes(dw_re, dw_im, u, g_re, g_im, PRECISION, COMPLEX)
            dr_re = tl.dot(tl.trans(s_re), dy, dr_re, input_precision=PRECISION)
            da_re += g_re * s_re
            if COMPLEX:
                dr_im = tl.dot(tl.trans(s_im), dy, dr_im, input_precision=PRECISION)
                da_re += g_im * s_im
                da_im += g_im * s_re - g_re * s_im
        g_re, g_im = _times(a_re, -a_im, g_re, g_im, COMPLEX)
        g_re, g_im = _add_planes(g_re, g_im, dy, r_re, r_im, PRECISION, COMPLEX)
        # The state before the last chunk is itself an output.
        is_last = here & (step + tl.zeros((1, 1), tl.int32) == 0)
        last_re, last_im = _planes(grad_last, row * SIZE + mode[None, :], is_last, 0.0, P, COMPLEX)
        g_re += last_re
        g_im += last_im
    if not TABLES:
        _store_planes(grad_start, row * SIZE + mode[None, :], here, g_re, g_im, P, COMPLEX)
    if TABLES:
        block = program.to(tl.int64)
        tl.store(grad_toeplitz + block * (C * C) + within[:, None] * C + within[None, :], dt)
        place = within[:, None] * P + mode[None, :]
        _store_planes(grad_writes + block * (C * SIZE), place, None, dw_re, dw_im, C * P, COMPLEX)
        place = mode[:, None] * C + within[None, :]
        _store_planes(grad_reads + block * (C * SIZE), place, None, dr_re, dr_im, C * P, COMPLEX)
        da_re, da_im = tl.sum(da_re, axis=0), tl.sum(da_im, axis=0)
        _store_planes(grad_jump + block * SIZE, mode, None, da_re, da_im, P, COMPLEX)


TABLES = ("toeplitz", "writes", "reads", "jump")


def _scan_configs(mode, batch, length, size, dtype):
    """Of the forward kernel, of the backward one for tokens, and of that for tables, which has more sums in registers.

    64 samples are what a warp group multiplies; with `size` > 64 numbers in a state they find no registers.
    """
    small = size <= 64
    blocks = dict(C=32 if size <= 128 else 16, BB=16)
    forward, tables = (launch.Config(blocks, warps if small else 8, 1) for warps in (2, 4))
    tokens = tables
    if batch > 32 and small:
        forward = tokens = launch.Config(dict(C=32, BB=64), 4, 1)
    if mode == "interpret":
        forward = tokens = tables = launch.Config(dict(C=min(64, _pad_size(length)), BB=min(64, _pad_size(batch))))
    sizes = dict(size=size, batch=launch.size_class(batch, 64), length=launch.size_class(length, LONGEST_CLASS))
    sizes |= dict(dtype=dtype.name)
    forward = launch.config("scan_forward", forward, **sizes)
    backward = (launch.config("scan_backward", x, **sizes, tables=flag) for x, flag in ((tokens, False), (tables, True)))
    # The states that the forward pass saves are those that the backward pass starts from.
    chunk = dict(C=forward.blocks["C"])
    return forward, *(launch.Config({**x.blocks, **chunk}, x.num_warps, x.num_stages) for x in backward)


def _scan_launch(kernel, config, mode, inputs, outputs, **constants):
    features, batch, length = inputs["tokens"].shape
    *_, planes, pairs = inputs["jump"].shape
    constants |= dict(B=batch, T=length, P=pairs, COMPLEX=planes == 2, PRECISION=launch.dot_precision(jnp.float32))
    outputs = {name: jax.ShapeDtypeStruct(*like) for name, like in outputs.items()}
    grid = features * -(-batch // config.blocks["BB"])
    return launch.call(kernel, inputs, outputs, grid=grid, constants=constants, config=config, mode=mode)


def _scan_run(config, mode, is_saving, tokens, *rest):
    """(outputs [D, B, T], the states before every chunk, or before the last one, [D, B, chunks, planes, P])."""
    inputs = dict(zip(("tokens", *TABLES, "start"), (tokens, *rest), strict=True))
    features, batch, *state = inputs["start"].shape
    slots = -(-tokens.shape[2] // config.blocks["C"]) if is_saving else 1
    outputs = dict(outputs=(tokens.shape, tokens.dtype), entering=((features, batch, slots, *state), jnp.float32))
    return tuple(_scan_launch(scan_forward, config, mode, inputs, outputs, SLOTS=slots))


def _scan_run_backward(config_tokens, config_tables, mode, tokens, *rest):
    """The gradients of tokens, tables and first state."""
    inputs = dict(zip(("tokens", "grad_outputs", *TABLES, "entering", "grad_last"), (tokens, *rest), strict=True))
    last, some = inputs["grad_last"], ((1,), jnp.float32)

    def run(config, is_tables):
        blocks = -(-tokens.shape[1] // config.blocks["BB"])
        tables = {name: ((len(tokens), blocks, *inputs[name].shape[1:]), jnp.float32) for name in TABLES}
        others = dict(tokens=(tokens.shape, tokens.dtype), start=(last.shape, last.dtype))
        likes = dict(tokens=others["tokens"], **tables, start=others["start"])
        outputs = {f"grad_{name}": like if (name in tables) == is_tables else some for name, like in likes.items()}
        return _scan_launch(scan_backward, config, mode, inputs, outputs, TABLES=is_tables)

    # The products of float32, each three of TF32, would not leave registers enough for all gradients at once.
    grad_tokens, *_, grad_start = run(config_tokens, False)
    _, *tables, _ = run(config_tables, True)
    return grad_tokens, *(table.sum(1) for table in tables), grad_start


# Every operand has the features first, so that `jax.vmap` makes more features: with tables of their own.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scan(configs, mode, *arrays):
    outputs, entering = launch.fold_vmap(functools.partial(_scan_run, configs[0], mode, False), shared=[])(*arrays)
    return outputs, entering[:, :, -1]


def _scan_forward(configs, mode, *arrays):
    outputs, entering = launch.fold_vmap(functools.partial(_scan_run, configs[0], mode, True), shared=[])(*arrays)
    return (outputs, entering[:, :, -1]), (*arrays[:-1], entering)


def _scan_backward(configs, mode, saved, gradients):
    tokens, *tables, entering = saved
    grad_outputs, grad_last = gradients
    run = launch.fold_vmap(functools.partial(_scan_run_backward, *configs[1:], mode), shared=[])
    return run(tokens, grad_outputs, *tables, entering, grad_last)


precision.define_passes(_scan, _scan_forward, _scan_backward)


def diagonal_scan(inputs, log_decay, input_matrix, output_matrix, state, *, mode):
    """See `ssm.diagonal_scan`. XLA makes the tables, and so their gradients, and the last state."""
    _check_dtypes(inputs, log_decay, input_matrix, output_matrix, state)
    (batch, length, _), pairs = inputs.shape, log_decay.shape[1]
    _check_modes(pairs)
    padded = _pad_size(pairs)
    configs = _scan_configs(mode, batch, length, padded * (2 if jnp.iscomplexobj(log_decay) else 1), inputs.dtype)
    chunk = configs[0].blocks["C"]
    toeplitz, writes, reads, powers = xla.chunk_tables(chunk, log_decay, input_matrix, output_matrix)
    separate = lambda x: jnp.pad(rearrange(x, "... (z p) -> ... z p", p=pairs), [(0, 0)] * x.ndim + [(0, padded - pairs)])
    planes = map(separate, (writes, reads, xla.state_planes(powers[:, -1]), state.swapaxes(0, 1)))
    tables = toeplitz.swapaxes(1, 2), next(planes).swapaxes(1, 2), rearrange(next(planes), "d c z p -> d z p c")
    outputs, before = _scan(configs, mode, rearrange(inputs, "b t d -> d b t"), *tables, *planes)
    before = rearrange(before[..., :pairs], "d b z p -> b d (z p)")
    last = inputs[:, (length - 1) // chunk * chunk :].astype(jnp.float32)
    return rearrange(outputs, "d b t -> b t d"), xla.state_after(before, last, log_decay, writes)


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
    d_re, d_im = _load_modes(decay_re, decay_im, row % D if SHARED else row, P, PP)
    c_re, c_im = _load_modes(in_re, in_im, row, P, PP)
    within, column = tl.arange(0, C), tl.arange(0, N)
    fine_re, fine_im = _power(d_re[:, None], d_im[:, None], within[None, :].to(tl.float32))
    start = (tile * (C * N) + column * C).to(tl.float32)[:, None]
    p_re, p_im = _power(d_re[None, :], d_im[None, :], start)
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
    d_re, d_im = _load_modes(decay_re, decay_im, row % D if SHARED else row, P, PP)
    within, column = tl.arange(0, C), tl.arange(0, N)
    fine = within[:, None].to(tl.float32)
    fine_re, fine_im = _power(d_re[None, :], d_im[None, :], fine)  # [C, PP]
    x_re, x_im = tl.zeros((PP,), tl.float32), tl.zeros((PP,), tl.float32)
    y_re, y_im = tl.zeros((PP,), tl.float32), tl.zeros((PP,), tl.float32)
    for tile in range(TILES):
        place = tile * (C * N) + column[:, None] * C + within[None, :]
        given = tl.load(d_taps + row * L + place, mask=place < L, other=0.0)
        start = (tile * (C * N) + column * C).to(tl.float32)[:, None]
        p_re, p_im = _power(d_re[None, :], d_im[None, :], start)
        m_re = tl.dot(given, fine_re, input_precision=PRECISION)
        m_im = tl.dot(given, fine_im, input_precision=PRECISION)
        f_re, f_im = _times(p_re, p_im, m_re, m_im, True)
        x_re, x_im = x_re + tl.sum(f_re, axis=0), x_im + tl.sum(f_im, axis=0)
        y_re, y_im = y_re + tl.sum(start * f_re, axis=0), y_im + tl.sum(start * f_im, axis=0)
        m_re = tl.dot(given, fine * fine_re, input_precision=PRECISION)
        m_im = tl.dot(given, fine * fine_im, input_precision=PRECISION)
        f_re, f_im = _times(p_re, p_im, m_re, m_im, True)
        y_re, y_im = y_re + tl.sum(f_re, axis=0), y_im + tl.sum(f_im, axis=0)
    c_re, c_im = _load_modes(in_re, in_im, row, P, PP)
    place = tl.arange(0, PP)
    target, inside = row * P + place, place < P
    tl.store(d_in_re + target, x_re, mask=inside)
    tl.store(d_in_im + target, -x_im, mask=inside)
    tl.store(d_decay_re + target, c_re * y_re - c_im * y_im, mask=inside)
    tl.store(d_decay_im + target, -c_re * y_im - c_im * y_re, mask=inside)


MODES = ("decay_re", "decay_im", "in_re", "in_im")


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
    inputs = dict(zip(MODES, planes, strict=True)) | extra
    return launch.call(kernel, inputs, outputs, grid=planes[2].shape[0] * features * tiles, constants=constants,
                       config=config, mode=mode)  # fmt: skip


def _kernel_run(length, mode, *planes):
    taps = jax.ShapeDtypeStruct((*planes[2].shape[:2], length), jnp.float32)
    return _kernel_launch(kernel_forward, planes, length, {}, dict(taps=taps), True, mode)[0]


def _kernel_run_backward(mode, d_taps, *planes):
    modes = jax.ShapeDtypeStruct(planes[2].shape, jnp.float32)
    outputs = {f"d_{name}": modes for name in MODES}
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
