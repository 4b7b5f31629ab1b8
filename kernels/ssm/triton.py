"""State space models on a GPU: the diagonal scan, and the diagonal-plus-low-rank recurrence.

Sequences are transposed, features first, where a program reads its feature's tokens side by side. Complex numbers are planes of
real and imaginary parts; a flag leaves the imaginary planes out where the modes are real.
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from einops import rearrange

from subquad.kernels import launch, tuning
from subquad.kernels.operation import operation
from subquad.kernels.scan.triton import load_planes, store_planes
from subquad.kernels.ssm import xla

LONGEST_CLASS = 1 << 14  # of lengths that share a tuned configuration: from here on all do
MOST_MODES = 128  # of a feature: a program holds them all, and with twice as many it spills


def _check_dtypes(inputs, *modes):
    """Declines what the kernels cannot hold: they compute in float32."""
    launch.require_floats(inputs.dtype)
    if any(x.dtype not in (jnp.float32, jnp.complex64) for x in modes):
        raise launch.Declined("the kernels take modes in float32 or complex64 only.")


def _pad_size(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


# -------------------------------------------------------------------------------------------------- the diagonal scan
#
# A program has one feature of BB samples and walks over chunks of C tokens, U [BB, C], with their states S [BB, P]:
#
#     Y = U toeplitz + Re(S) reads_re + Im(S) reads_im,    S' = jump S + U (writes_re + i writes_im)
#
# The tables of the feature (`xla.chunk_tables`) are loaded once. Real modes have no imaginary planes. The gradient of the
# tokens is the same walk from the last chunk to the first, with all tables transposed; those of the tables are products of
# what both walks saw, which XLA makes.


@triton.jit
def scan_chunks(
    tokens, toeplitz, writes, reads, jump, start, words, outputs, entering, last,
    P: tl.constexpr, COMPLEX: tl.constexpr, FROM_END: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """`entering`: the states before the last SLOTS chunks; `last`: after all. `words`: B, T and SLOTS.

    FROM_END: the walk begins at the last chunk with a state of 0, and `start` is added after that chunk.
    """
    B, T, SLOTS = tl.load(words), tl.load(words + 1), tl.load(words + 2)
    SIZE: tl.constexpr = 2 * P if COMPLEX else P
    chunks, blocks = tl.cdiv(T, C), tl.cdiv(B, BB)
    program = tl.program_id(0)
    feature = (program // blocks).to(tl.int64)
    sample = program % blocks * BB + tl.arange(0, BB)[:, None]
    within, mode = tl.arange(0, C), tl.arange(0, P)
    row = feature * B + sample
    here = sample < B
    taps = tl.load(toeplitz + feature * (C * C) + within[:, None] * C + within[None, :])
    w_re, w_im = load_planes(writes + feature * (C * SIZE), within[:, None] * P + mode[None, :], None, COMPLEX, C * P)
    r_re, r_im = load_planes(reads + feature * (C * SIZE), mode[:, None] * C + within[None, :], None, COMPLEX, C * P)
    a_re, a_im = load_planes(jump, feature * SIZE + mode[None, :], None, COMPLEX, P)
    s_re, s_im = load_planes(start, row * SIZE + mode[None, :], here & (not FROM_END), COMPLEX, P)
    for step in range(chunks):
        n = chunks - 1 - step if FROM_END else step
        slot = n - (chunks - SLOTS) + tl.zeros((1, 1), tl.int32)
        place = (row * SLOTS + slot) * SIZE + mode[None, :]
        store_planes(entering, place, s_re, s_im, here & (slot >= 0), COMPLEX, P)
        position = n * C + within[None, :]
        inside = here & (position < T)
        u = tl.load(tokens + row * T + position, mask=inside, other=0.0).to(tl.float32)
        y = tl.dot(u, taps, input_precision=PRECISION)
        y = tl.dot(s_re, r_re, y, input_precision=PRECISION)
        if COMPLEX:
            y = tl.dot(s_im, r_im, y, input_precision=PRECISION)
            s_re, s_im = a_re * s_re - a_im * s_im, a_re * s_im + a_im * s_re
            s_im = tl.dot(u, w_im, s_im, input_precision=PRECISION)
        else:
            s_re = a_re * s_re
        s_re = tl.dot(u, w_re, s_re, input_precision=PRECISION)
        tl.store(outputs + row * T + position, y.to(outputs.dtype.element_ty), mask=inside)
        if FROM_END:
            is_first = here & (step + tl.zeros((1, 1), tl.int32) == 0)
            added_re, added_im = load_planes(start, row * SIZE + mode[None, :], is_first, COMPLEX, P)
            s_re += added_re
            s_im += added_im
    store_planes(last, row * SIZE + mode[None, :], s_re, s_im, here, COMPLEX, P)


def scan_config(mode, batch, length, size, dtype) -> tuning.Config:
    """64 samples are what a warp group multiplies; with `size` > 32 numbers in a state they find no registers."""
    warps = 2 if size <= 16 else 4 if size <= 64 else 8
    heuristic = tuning.Config(dict(C=32 if size <= 128 else 16, BB=16), warps, 1)
    if batch > 32 and size <= 64:
        heuristic = tuning.Config(dict(C=32, BB=64 if size <= 32 else 32), 8, 1)
    if mode == "interpret":
        return tuning.Config(dict(C=min(64, _pad_size(length)), BB=min(64, _pad_size(batch))))
    sizes = dict(size=size, batch=tuning.size_class(batch, 64), length=tuning.size_class(length, LONGEST_CLASS))
    return tuning.config("scan_chunks", heuristic, **sizes, dtype=dtype.name)


def _walk(mode, tokens, toeplitz, writes, reads, jump, start, *, saves: bool, from_end: bool = False):
    """(outputs [D, B, T], the states before every chunk, or before the last one, [D, B, chunks, planes, P], the last)."""
    features, batch, length = tokens.shape
    planes, pairs, chunk = *jump.shape[1:], toeplitz.shape[-1]
    config = scan_config(mode, batch, length, planes * pairs, tokens.dtype)
    config = tuning.Config({**config.blocks, "C": chunk}, config.num_warps, config.num_stages)
    slots = -(-length // chunk) if saves else 1
    like = lambda *shape: jax.ShapeDtypeStruct((features, batch, *shape), jnp.float32)
    return launch.call(
        scan_chunks,
        dict(tokens=tokens, toeplitz=toeplitz, writes=writes, reads=reads, jump=jump, start=start,
             words=launch.words(batch, length, slots)),
        dict(
            outputs=jax.ShapeDtypeStruct(tokens.shape, tokens.dtype), entering=like(slots, planes, pairs),
            last=like(planes, pairs),
        ),
        grid=features * -(-batch // config.blocks["BB"]),
        constants=dict(P=pairs, COMPLEX=planes == 2, FROM_END=from_end, PRECISION=launch.dot_precision(jnp.float32)),
        config=config,
        mode=mode,
    )  # fmt: skip


def _scan_primal(mode, *arrays):
    outputs, before, _ = _walk(mode, *arrays, saves=False)
    return outputs, before[:, :, -1]


def _scan_forward(mode, *arrays):
    outputs, entering, _ = _walk(mode, *arrays, saves=True)
    return (outputs, entering[:, :, -1]), (*arrays[:-1], entering)


def _scan_backward(mode, saved, gradients):
    tokens, toeplitz, writes, reads, jump, entering = saved
    grad_outputs, grad_last = gradients
    transposed = (x.swapaxes(-1, -2) for x in (toeplitz, reads, writes))
    conjugate = jump * jnp.array([1.0, -1.0], jnp.float32)[: jump.shape[1], None]
    # `leaving` is the gradient of the state after each chunk.
    grad_tokens, leaving, grad_start = _walk(
        mode, grad_outputs, *transposed, conjugate, grad_last, saves=True, from_end=True
    )  # fmt: skip
    ragged = (0, 0), (0, 0), (0, -tokens.shape[2] % toeplitz.shape[-1])
    chunks = lambda x: rearrange(jnp.pad(x.astype(jnp.float32), ragged), "d b (n c) -> d b n c", c=toeplitz.shape[-1])
    tokens, grad_outputs = chunks(tokens), chunks(grad_outputs)
    grad_jump = jnp.sum(leaving * entering, axis=(1, 2, 3))[:, None]
    if jump.shape[1] == 2:
        (s_re, s_im), (g_re, g_im) = (jnp.moveaxis(x, 3, 0) for x in (entering, leaving))
        grad_jump = jnp.concatenate([grad_jump, jnp.sum(g_im * s_re - g_re * s_im, axis=(1, 2))[:, None]], axis=1)
    return (
        grad_tokens,
        xla.einsum("dbni,dbnj->dij", tokens, grad_outputs),
        xla.einsum("dbni,dbnzp->dzip", tokens, leaving),
        xla.einsum("dbnzp,dbni->dzpi", entering, grad_outputs),
        grad_jump,
        grad_start,
    )


# Features first: they take the place of a batch, since under `jax.vmap` each has tables of its own.
_scan = operation(
    _scan_forward,
    _scan_backward,
    primal=_scan_primal,
    arrays=("d b t", "d c k", "d z c p", "d z p c", "d z p", "d b z p"),
    outputs=("d b t", "d b z p"),
    saved=("d b n z p",),
    independent="d b",
    shared=[],
)


def diagonal_scan(inputs, log_decay, input_matrix, output_matrix, state, *, mode):
    """See `ssm.diagonal_scan`. XLA makes the tables, and so their gradients, and the last state."""
    _check_dtypes(inputs, log_decay, input_matrix, output_matrix, state)
    (batch, length, _), pairs = inputs.shape, log_decay.shape[1]
    launch.require_at_most(MOST_MODES, pairs, "modes in a feature")
    padded = _pad_size(pairs)
    size = padded * (2 if jnp.iscomplexobj(log_decay) else 1)
    chunk = scan_config(mode, batch, length, size, inputs.dtype).blocks["C"]
    toeplitz, writes, reads, powers = xla.chunk_tables(chunk, log_decay, input_matrix, output_matrix)
    separate = lambda x: jnp.pad(rearrange(x, "... (z p) -> ... z p", p=pairs), [(0, 0)] * x.ndim + [(0, padded - pairs)])
    planes = map(separate, (writes, reads, xla.state_planes(powers[:, -1]), state.swapaxes(0, 1)))
    tables = toeplitz.swapaxes(1, 2), next(planes).swapaxes(1, 2), rearrange(next(planes), "d c z p -> d z p c")
    outputs, before = _scan(mode, rearrange(inputs, "b t d -> d b t"), *tables, *planes)
    before = rearrange(before[..., :pairs], "d b z p -> b d (z p)")
    last = inputs[:, (length - 1) // chunk * chunk :].astype(jnp.float32)
    return rearrange(outputs, "d b t -> b t d"), xla.state_after(before, last, log_decay, writes)


# ------------------------------------------------------------------------------------------- the DPLR recurrence


@triton.jit
def recurrence_forward(
    inputs, excess, left, right, drive, reads, start, words, outputs, last,
    D: tl.constexpr, P: tl.constexpr, PP: tl.constexpr, R: tl.constexpr, RR: tl.constexpr,
    SHARED: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """T steps x' = x + 2 (excess y + drive u - sum_r left_r <right_r, y>), y = x + drive u, of BLOCK_D features of a sample.

    `words`: T. Planes side by side: inputs [B, T, D], excess, drive, reads and states [.., D, 2, P], left and right
    [.., R, D, 2, P].
    """
    BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    T = tl.load(words)
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
    heuristic = tuning.Config(dict(BLOCK_D=block), num_warps=1, num_stages=1)
    config = tuning.config("recurrence_forward", heuristic, pairs=_pad_size(pairs), rank=rank)
    constants = dict(D=features, P=pairs, PP=_pad_size(pairs), R=rank, RR=1 << (rank - 1).bit_length(),
                     SHARED=systems[0].shape[0] == 1)  # fmt: skip
    names = ("excess", "left", "right", "drive", "reads")
    state = jax.ShapeDtypeStruct(start.shape, jnp.float32)
    outputs = dict(outputs=jax.ShapeDtypeStruct(inputs.shape, inputs.dtype), last=state)
    grid = batch * -(-features // config.blocks["BLOCK_D"])
    words = launch.words(length)
    operands = dict(inputs=inputs, **dict(zip(names, systems, strict=True)), start=start, words=words)
    return launch.call(recurrence_forward, operands, outputs, grid=grid, constants=constants, config=config, mode=mode)


# The gradient is XLA's: training convolves, and the recurrence extends.
_recurrence = operation(
    lambda mode, *arrays: (_recurrence_run(mode, *arrays), arrays),
    lambda mode, arrays, gradients: jax.vjp(xla.dplr_steps, *arrays)[1](gradients),
    arrays=("b t d", "b d s", "b r d s", "b r d s", "b d s", "b d s", "b d s"),
    outputs=("b t d", "b d s"),
    independent="b d",
    shared=[range(1, 6)],
)


def dplr_recurrence(inputs, diagonal, low_rank, input_matrix, output_matrix, step, state, *, mode):
    """See `ssm.dplr_recurrence`."""
    _check_dtypes(inputs, diagonal, low_rank, input_matrix, output_matrix, step, state)
    return _recurrence(mode, inputs, *xla.dplr_tables(diagonal, low_rank, input_matrix, output_matrix, step), state)
