"""First-order recurrences in Triton: a program owns a block of features of one sample and walks over tiles of time.

Inside a tile the steps are combined by an associative scan in registers; the state goes from tile to tile. Every number is
read once and written once. Where samples and features give too few programs to fill the GPU, time is cut into segments: a
first walk finds what each does to a state, and a second one starts each from the state after those before.

A complex array is its real plane, then its imaginary plane, along the last axis. Steps are counted in the order in which they
are taken, so that a reversed recurrence differs in its addresses only, and so does the backward pass (`xla.backward`).
"""

import functools

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from subquad.kernels import launch, tuning
from subquad.kernels.operation import operation
from subquad.kernels.scan import xla
from subquad.kernels.scan.reference import AXES

PROGRAMS = 512  # that fill a large GPU: with fewer, time is cut into segments
SEGMENT_TILES = 4  # that a segment has at least
LONGEST_CLASS = 1 << 16


@triton.jit
def combine(a1, b1, a2, b2):
    """h -> a h + b of two steps, one after the other."""
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
def _times(ar, ai, br, bi, COMPLEX: tl.constexpr):
    if COMPLEX:
        return ar * br - ai * bi, ar * bi + ai * br
    else:
        return ar * br, ai


@triton.jit
def _last_row(real, imaginary, BLOCK_T: tl.constexpr, COMPLEX: tl.constexpr):
    is_last = tl.arange(0, BLOCK_T)[:, None] == BLOCK_T - 1
    last = tl.sum(tl.where(is_last, real, 0.0), 0)
    if COMPLEX:
        return last, tl.sum(tl.where(is_last, imaginary, 0.0), 0)
    else:
        return last, last


@triton.jit
def load_planes(array, place, valid, COMPLEX: tl.constexpr, STEP: tl.constexpr):
    """The real plane and the imaginary one STEP behind it, in float32; a second real one where numbers have no imaginary part.

    valid: what of them exists, the rest is 0; None: all.
    """
    OTHER: tl.constexpr = None if valid is None else 0.0
    real = tl.load(array + place, mask=valid, other=OTHER).to(tl.float32)
    if COMPLEX:
        return real, tl.load(array + place + STEP, mask=valid, other=OTHER).to(tl.float32)
    else:
        return real, real


@triton.jit
def store_planes(array, place, real, imaginary, valid, COMPLEX: tl.constexpr, STEP: tl.constexpr):
    """The inverse of `load_planes`."""
    tl.store(array + place, real.to(array.dtype.element_ty), mask=valid)
    if COMPLEX:
        tl.store(array + place + STEP, imaginary.to(array.dtype.element_ty), mask=valid)


@triton.jit
def first_order_tiles(
    A, B, START, words, STATES, LAST, PRODUCTS,
    D: tl.constexpr, WIDTH: tl.constexpr, COMPLEX: tl.constexpr, CONSTANT: tl.constexpr, SHARED: tl.constexpr,
    FROM_END: tl.constexpr, SHIFTED: tl.constexpr, SUMMARY: tl.constexpr,
    SEGMENTS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The states from START [B, SEGMENTS, WIDTH] on, and the last of each segment.

    FROM_END: the walk begins at the last step.  SHIFTED: a step takes the decay of the step before it, the first one 1.
    SUMMARY: no states, but what a segment does to a state, h -> PRODUCTS h + LAST.  CONSTANT: all steps have one decay.
    SHARED: all samples have the same decays.
    """
    T = tl.load(words)
    BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    steps = tl.cdiv(tl.cdiv(T, BLOCK_T), SEGMENTS) * BLOCK_T  # of a segment
    program = tl.program_id(0)
    segment = program // BLOCKS % SEGMENTS
    sample = (program // (BLOCKS * SEGMENTS)).to(tl.int64)
    feature = program % BLOCKS * BLOCK_D + tl.arange(0, BLOCK_D)
    row = (sample * SEGMENTS + segment) * WIDTH + feature
    if not SHARED:
        A += sample * WIDTH if CONSTANT else sample * T * WIDTH
    B += sample * T * WIDTH
    STATES += sample * T * WIDTH
    hr, hi = load_planes(START, row, (feature < D) & (not SUMMARY), COMPLEX, D)
    pr, pi = tl.full((BLOCK_D,), 1.0, tl.float32), tl.zeros((BLOCK_D,), tl.float32)
    for first in range(segment * steps, tl.minimum(segment * steps + steps, T), BLOCK_T):
        step = first + tl.arange(0, BLOCK_T)
        inside = (step < T)[:, None]
        valid = inside & (feature < D)[None, :]
        # int64: it is multiplied by the width of a row.
        place = ((T - 1 - step) if FROM_END else step).to(tl.int64)[:, None] * WIDTH + feature[None, :]
        br, bi = load_planes(B, place, valid, COMPLEX, D)
        decays = place
        if SHIFTED:
            inside = inside & (step > 0)[:, None]
            decays = place + (WIDTH if FROM_END else -WIDTH)
        if CONSTANT:
            decays = feature[None, :] + 0 * place
        # 1 past the end, so that the state stays.
        ar, ai = load_planes(A, decays, inside & (feature < D)[None, :], COMPLEX, D)
        ar = tl.where(inside, ar, 1.0)
        if COMPLEX:
            ar, ai, br, bi = tl.associative_scan((ar, ai, br, bi), 0, _combine_complex)
        else:
            ar, br = tl.associative_scan((ar, br), 0, combine)
        xr, xi = _times(ar, ai, hr[None, :], hi[None, :], COMPLEX)
        br, bi = br + xr, bi + xi
        hr, hi = _last_row(br, bi, BLOCK_T, COMPLEX)
        if SUMMARY:
            ar, ai = _last_row(ar, ai, BLOCK_T, COMPLEX)
            pr, pi = _times(pr, pi, ar, ai, COMPLEX)
        else:
            store_planes(STATES, place, br, bi, valid, COMPLEX, D)
    store_planes(LAST, row, hr, hi, feature < D, COMPLEX, D)
    if SUMMARY:
        store_planes(PRODUCTS, row, pr, pi, feature < D, COMPLEX, D)


def config(mode, batch: int, length: int, features: int, dtype) -> tuning.Config:
    """Tiles of 128 bytes in a row; few and large ones for the interpreter."""
    if mode == "interpret":
        power = lambda n: triton.next_power_of_2(max(n, 2))
        return tuning.Config(dict(SEGMENTS=1, BLOCK_T=min(256, power(length)), BLOCK_D=min(64, power(features))))
    columns = min(32, max(8, triton.next_power_of_2(features)))
    rows = min(64, max(16, triton.next_power_of_2(length)))
    programs = batch * triton.cdiv(features, columns)
    # Of the longest sequence of its class: lengths of a class are one compilation.
    tiles = triton.cdiv(tuning.size_class(length, LONGEST_CLASS), rows)
    segments = max(1, min(PROGRAMS // programs, tiles // SEGMENT_TILES, 32))
    heuristic = tuning.Config(dict(SEGMENTS=segments, BLOCK_T=rows, BLOCK_D=columns), num_warps=4)
    # What decides: how long a program runs, and how many there are without segments.
    sizes = dict(
        length=tuning.size_class(length, LONGEST_CLASS), columns=columns, programs=tuning.size_class(programs, PROGRAMS),
        bits=jnp.dtype(dtype).itemsize * 8,
    )  # fmt: skip
    return tuning.config("first_order_tiles", heuristic, **sizes)


def _walk(mode, decay, inputs, start, reverse, shifted):
    """See `xla.forward`."""
    (batch, length, features), is_complex = inputs.shape, jnp.iscomplexobj(inputs)
    chosen = config(mode, batch, length, features, inputs.real.dtype)
    segments, width = chosen.blocks["SEGMENTS"], features * (2 if is_complex else 1)
    planes = lambda x: jnp.concatenate([x.real, x.imag], -1) if is_complex else x
    numbers = lambda x: jax.lax.complex(*jnp.split(x, 2, -1)) if is_complex else x
    some, rows = jax.ShapeDtypeStruct((2,), jnp.float32), jax.ShapeDtypeStruct((batch, segments, width), jnp.float32)
    constants = dict(D=features, WIDTH=width, COMPLEX=is_complex, CONSTANT=decay.shape[1] == 1, SHARED=decay.shape[0] == 1,
                     FROM_END=reverse, SHIFTED=shifted)  # fmt: skip
    decay, inputs = planes(decay), planes(inputs)

    def run(starts, is_summary):
        states = some if is_summary else jax.ShapeDtypeStruct(inputs.shape, inputs.dtype)
        outputs = launch.call(
            first_order_tiles,
            dict(A=decay, B=inputs, START=starts, words=launch.words(length)),
            dict(STATES=states, LAST=rows, PRODUCTS=rows if is_summary else some),
            grid=batch * segments * triton.cdiv(features, chosen.blocks["BLOCK_D"]),
            constants=dict(constants, SUMMARY=is_summary),
            config=chosen,
            mode=mode,
        )
        return map(numbers, outputs)

    starts = start[:, None]
    if segments > 1:
        _, sums, products = run(None, True)
        after, _ = xla.chunks(segments, products, sums, start, False, False)
        starts = jnp.concatenate([starts, after[:, :-1]], 1)
    states, last, _ = run(planes(starts), False)
    return states, last[:, -1]


def first_order(decay, inputs, start, reverse, *, mode):
    """See `scan.first_order`."""
    launch.require_floats(decay.dtype, inputs.dtype, also=("complex64",))
    return _scan((reverse, mode), decay, inputs, start)


_scan = operation(
    lambda static, *arrays: xla.forward(functools.partial(_walk, static[1]), static[0], *arrays),
    lambda static, *saved: xla.backward(functools.partial(_walk, static[1]), static[0], *saved),
    **AXES,
)
