"""Selective scans in Triton: one kernel walks along the tokens, forward or backward, and one makes the gradients of a tile.

A program of the walk owns a block of features of one sample, with all their states, and walks over tiles of time [T, N, D].
Inside of a tile the steps are combined by an associative scan in registers, as in `scan.triton`; the state [N, D] goes from
tile to tile. What passes backward along the tokens is the same recurrence, of the gradients dy and the matrices C:

    h_t = a_t h_{t-1} + step_t u_t B_t                   a_t = exp(step_t A)
    e_t = a_t (e_{t+1} + dy_t C_t)                       the gradient of the state before token t

Both walks keep what enters each tile: h before it, e after it. From these two the gradients of all tiles are made at once, so
those of B and C, sums over all features, need neither atomics nor partial sums of every block. The chunks of `xla`, one walk
each, bound the memory of what is kept.
"""

import functools
import math

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from subquad.kernels import launch, precision, tuning
from subquad.kernels.padding import pad_to
from subquad.kernels.scan import xla as scan
from subquad.kernels.scan.triton import combine
from subquad.kernels.selective import xla
from subquad.kernels.selective.reference import start_and_breaks

TILE, INTERPRETED = 8, 64  # tokens between two states that are kept for the gradients, on a GPU and in the interpreter
MOST, BYTES = 1 << 14, 1 << 28  # tokens of a chunk, and bytes of what is kept of its tiles, of which there are three arrays
MOST_STATES = 256  # of a feature: with more the gradients spill
PROGRAMS, LARGEST = 1 << 10, 1 << 14  # that fill a large GPU; what is larger is tuned alike
PART_TILES = 8  # that a part of a sequence has at least


@triton.jit
def _rows(X, token, exists, column, WIDTH: tl.constexpr):
    """float32 rows of some tokens, 0 where there are none. int64: a place is a token times the width of a row."""
    place = token.to(tl.int64)[:, None] * WIDTH + column[None, :]
    return tl.load(X + place, mask=exists[:, None] & (column < WIDTH)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _decays(step, rates, breaks, token, exists, BREAKS: tl.constexpr):
    """[T, N, D]; 1 where the step is 0, and 0 where a segment begins."""
    decay = tl.exp(step[:, None, :] * rates[None, :, :])
    if BREAKS:
        is_break = tl.load(breaks + token, mask=exists, other=0) != 0
        decay = tl.where(is_break[:, None, None], 0.0, decay)
    return decay


@triton.jit
def _outer(rows, columns):
    """[T, N, D] of rows [T, D] and columns [T, N]."""
    return rows[:, None, :] * columns[:, :, None]


@triton.jit
def selective_walk(
    values, step, rates, writes, reads, breaks, start, words, outputs, entering, last,
    D: tl.constexpr, N: tl.constexpr, NN: tl.constexpr, BREAKS: tl.constexpr, FROM_END: tl.constexpr,
    READS: tl.constexpr, SAVES: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The state after the last token, and what else is asked for: outputs, and what enters each tile [B, tiles, N, D].

    FROM_END: of gradients, e in place of h. BREAKS: whether segments begin. `rates` are A [N, D], states [B, N, D].
    """
    T = tl.load(words)
    BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    tiles = tl.cdiv(T, BLOCK_T)
    program = tl.program_id(0)
    sample = (program // BLOCKS).to(tl.int64)
    feature = program % BLOCKS * BLOCK_D + tl.arange(0, BLOCK_D)
    mode, row = tl.arange(0, NN), tl.arange(0, BLOCK_T)
    inside = (mode < N)[:, None] & (feature < D)[None, :]
    place = mode[:, None] * D + feature[None, :]
    values += sample * T * D
    step += sample * T * D
    outputs += sample * T * D
    writes += sample * T * N
    reads += sample * T * N
    breaks += sample * T
    entering += sample * tiles * (N * D)
    rate = tl.load(rates + place, mask=inside, other=0.0)
    state = tl.load(start + sample * (N * D) + place, mask=inside, other=0.0)
    for i in range(tiles):
        tile = tiles - 1 - i if FROM_END else i
        if SAVES:
            tl.store(entering + tile.to(tl.int64) * (N * D) + place, state, mask=inside)
        token = tile * BLOCK_T + (BLOCK_T - 1 - row if FROM_END else row)
        exists = token < T
        decay = _decays(_rows(step, token, exists, feature, D), rate, breaks, token, exists, BREAKS)
        states = _outer(_rows(values, token, exists, feature, D), _rows(writes, token, exists, mode, N))
        if FROM_END:
            states *= decay
        decay, states = tl.associative_scan((decay, states), 0, combine)
        states += decay * state[None, :, :]
        if READS:
            output = tl.sum(states * _rows(reads, token, exists, mode, N)[:, :, None], 1)
            at = outputs + token.to(tl.int64)[:, None] * D + feature[None, :]
            tl.store(at, output, mask=exists[:, None] & (feature < D)[None, :])
        state = tl.sum(tl.where((row == BLOCK_T - 1)[:, None, None], states, 0.0), 0)
    tl.store(last + sample * (N * D) + place, state, mask=inside)


@triton.jit
def selective_gradients(
    values, step, rates, into, out, breaks, grad_outputs, entering, leaving, words,
    grad_values, grad_step, grad_rates, grad_into, grad_out,
    D: tl.constexpr, N: tl.constexpr, NN: tl.constexpr, BREAKS: tl.constexpr,
    GROUPS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradients of one tile of time and a group of the blocks of features.

    `entering` and `leaving` [B, tiles, N, D] are h before and e after each tile. `grad_rates` [B, tiles, N, D] and `grad_into`,
    `grad_out` [GROUPS, B, T, N] are summed outside.
    """
    T, B = tl.load(words), tl.load(words + 1)
    BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    SHARE: tl.constexpr = (BLOCKS + GROUPS - 1) // GROUPS
    tiles = tl.cdiv(T, BLOCK_T)
    program = tl.program_id(0)
    group, tile = program % GROUPS, program // GROUPS % tiles
    sample = (program // GROUPS // tiles).to(tl.int64)
    mode, row = tl.arange(0, NN), tl.arange(0, BLOCK_T)
    values += sample * T * D
    step += sample * T * D
    grad_outputs += sample * T * D
    grad_values += sample * T * D
    grad_step += sample * T * D
    into += sample * T * N
    out += sample * T * N
    breaks += sample * T
    border = (sample * tiles + tile) * (N * D)
    partial = (group * B + sample) * T * N
    # Tokens from the first of the tile to the last, and from the last to the first.
    token, back = tile * BLOCK_T + row, tile * BLOCK_T + BLOCK_T - 1 - row
    exists, exists_back = token < T, back < T
    exists_before, exists_after = exists & (row > 0), (back + 1 < T) & (row > 0)
    sums_into = tl.zeros((BLOCK_T, NN, BLOCK_D), tl.float32)
    sums_out = tl.zeros((BLOCK_T, NN, BLOCK_D), tl.float32)
    for block in range(group * SHARE, tl.minimum(group * SHARE + SHARE, BLOCKS)):
        feature = block * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = (mode < N)[:, None] & (feature < D)[None, :]
        place = mode[:, None] * D + feature[None, :]
        rate = tl.load(rates + place, mask=inside, other=0.0)
        # a_t h_{t-1}, and with it h_t.
        decay = _decays(_rows(step, token, exists, feature, D), rate, breaks, token, exists, BREAKS)
        kept = _outer(_rows(values, token - 1, exists_before, feature, D), _rows(into, token - 1, exists_before, mode, N))
        decay, kept = tl.associative_scan((decay, decay * kept), 0, combine)
        kept += decay * tl.load(entering + border + place, mask=inside, other=0.0)[None, :, :]
        states = kept + _outer(_rows(values, token, exists, feature, D), _rows(into, token, exists, mode, N))
        sums_out += states * _rows(grad_outputs, token, exists, feature, D)[:, None, :]
        # The other way round: the gradient of h_t, which is a_{t+1} times that of the token after it, and dy_t C_t. A scan
        # with reverse=True would move every number from lane to lane; a flip of rows in registers costs nothing.
        kept = tl.flip(kept, 0)
        decay = _decays(_rows(step, back + 1, exists_after, feature, D), rate, breaks, back + 1, exists_after, BREAKS)
        grad = _outer(_rows(grad_outputs, back, exists_back, feature, D), _rows(out, back, exists_back, mode, N))
        decay, grad = tl.associative_scan((decay, grad), 0, combine)
        grad += decay * tl.load(leaving + border + place, mask=inside, other=0.0)[None, :, :]
        sums_into += grad * _rows(values, back, exists_back, feature, D)[:, None, :]
        at = back.to(tl.int64)[:, None] * D + feature[None, :]
        valid = exists_back[:, None] & (feature < D)[None, :]
        written = tl.sum(grad * _rows(into, back, exists_back, mode, N)[:, :, None], 1)
        tl.store(grad_values + at, written, mask=valid)
        grad *= kept
        tl.store(grad_step + at, tl.sum(grad * rate[None, :, :], 1), mask=valid)
        sums = tl.sum(grad * _rows(step, back, exists_back, feature, D)[:, None, :], 0)
        tl.store(grad_rates + border + place, sums, mask=inside)
    at = partial + token.to(tl.int64)[:, None] * N + mode[None, :]
    tl.store(grad_out + at, tl.sum(sums_out, 2), mask=exists[:, None] & (mode < N)[None, :])
    at = partial + back.to(tl.int64)[:, None] * N + mode[None, :]
    tl.store(grad_into + at, tl.sum(sums_into, 2), mask=exists_back[:, None] & (mode < N)[None, :])


def walk_config(mode, batch: int, features: int, states: int, tile: int | None = None) -> tuning.Config:
    """`tile`: what BLOCK_T has to be, where states are kept for the gradients."""
    padded = triton.next_power_of_2(states)
    block = tile or (2 * TILE if padded <= 32 else TILE)
    heuristic = tuning.Config(dict(BLOCK_T=block, BLOCK_D=_block(padded)), _warps(padded), 1)
    if mode == "interpret":
        return tuning.Config(_interpreted(features))
    sizes = dict(states=padded, programs=tuning.size_class(batch * features, LARGEST), tile=tile or 0)
    chosen = tuning.config("selective_walk", heuristic, **sizes)
    return chosen if tile is None else tuning.Config({**chosen.blocks, "BLOCK_T": tile}, chosen.num_warps, 1)


def gradients_config(mode, batch: int, length: int, features: int, states: int) -> tuning.Config:
    padded = triton.next_power_of_2(states)
    if mode == "interpret":
        return tuning.Config(dict(GROUPS=1, **_interpreted(features)))
    tokens, blocks = tuning.size_class(batch * length, LARGEST), triton.cdiv(features, _block(padded))
    groups = tuning.size_class(max(1, min(blocks // 4, PROGRAMS * TILE // tokens)), 64)
    heuristic = tuning.Config(dict(GROUPS=groups, BLOCK_T=TILE, BLOCK_D=_block(padded)), _warps(padded), 1)
    sizes = dict(states=padded, tokens=tokens, features=tuning.size_class(features, LARGEST))
    return tuning.config("selective_gradients", heuristic, **sizes)


def _interpreted(features: int) -> dict[str, int]:
    return dict(BLOCK_T=INTERPRETED, BLOCK_D=min(32, triton.next_power_of_2(features)))


def _block(padded: int) -> int:
    """8 features are a sector of memory; a warp has no fewer than 32 pairs of state and feature."""
    return max(32 // padded, min(8, 512 // padded))


def _warps(padded: int) -> int:
    """Of threads with two pairs of state and feature, and all tokens of a tile of both."""
    return max(1, _block(padded) * padded // 64)


def _constants(rates, breaks):
    states, features = rates.shape
    return dict(D=features, N=states, NN=triton.next_power_of_2(states), BREAKS=breaks is not None)


def parts_of(mode, batch: int, length: int, features: int, chosen: tuning.Config) -> int:
    """How many walks a sequence is cut into where samples and features are too few to fill the GPU."""
    programs = batch * triton.cdiv(features, chosen.blocks["BLOCK_D"])
    parts = min(PROGRAMS // programs, length // (PART_TILES * chosen.blocks["BLOCK_T"]))
    return parts if parts > 2 and mode == "triton" else 1  # each goes its way twice


def _walk(mode, values, step, rates, writes, reads, breaks, start, *, tile=None, from_end=False):
    """(outputs where there are `reads`, what enters the tiles where these have a size, the last state).

    In parts a first walk finds what each does to a state, and a second one starts each from the state after those before.
    """
    batch, length, features = values.shape
    chosen = walk_config(mode, batch, features, len(rates), tile)
    launched = functools.partial(_launch_walk, mode, chosen, saves=tile is not None, from_end=from_end)
    parts = parts_of(mode, batch, length, features, chosen)
    if parts == 1:
        return launched(values, step, rates, writes, reads, breaks, start)
    block = chosen.blocks["BLOCK_T"]
    size = triton.cdiv(triton.cdiv(length, block), parts) * block

    def cut(x):  # [B parts, size, ..]; padding has step 0 and leaves the state unchanged
        return pad_to(x, 1, parts * size).reshape(batch * parts, size, *x.shape[2:])

    values, step, writes, reads, breaks = (None if x is None else cut(x) for x in (values, step, writes, reads, breaks))
    *_, sums = launched(values, step, rates, writes, None, breaks, jnp.zeros((batch * parts, *rates.shape)))
    products = jnp.exp(step.sum(1)[:, None] * rates)
    if breaks is not None:
        products = jnp.where(breaks.any(1)[:, None, None], 0, products)
    flat = lambda x: x.reshape(batch, -1, rates.size)
    after, last = scan.chunks(parts, flat(products), flat(sums), start.reshape(batch, -1), from_end, False)
    starts = [after[:, 1:], flat(start)] if from_end else [flat(start), after[:, :-1]]
    outputs, entering, _ = launched(
        values, step, rates, writes, reads, breaks, jnp.concatenate(starts, 1).reshape(sums.shape)
    )
    together = lambda x: x.reshape(batch, -1, *x.shape[2:])
    outputs = outputs if reads is None else together(outputs)[:, :length]
    entering = entering if tile is None else together(entering)[:, : triton.cdiv(length, tile)]
    return outputs, entering, last.reshape(start.shape)


def _launch_walk(mode, chosen, values, step, rates, writes, reads, breaks, start, *, saves, from_end):
    (batch, length, features), states = values.shape, len(rates)
    tiles = triton.cdiv(length, chosen.blocks["BLOCK_T"])
    float32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    return launch.call(
        selective_walk,
        dict(values=values, step=step, rates=rates, writes=writes, reads=reads, breaks=breaks, start=start,
             words=launch.words(length)),
        dict(outputs=float32(*(1,) if reads is None else values.shape),
             entering=float32(*(batch, tiles, states, features) if saves else (1,)), last=float32(*start.shape)),
        grid=batch * triton.cdiv(features, chosen.blocks["BLOCK_D"]),
        constants=dict(_constants(rates, breaks), FROM_END=from_end, READS=reads is not None, SAVES=saves),
        config=chosen,
        mode=mode,
    )  # fmt: skip


def _primal(mode, values, step, rates, into, out, state, breaks):
    outputs, _, last = _walk(mode, values, step, rates, into, out, breaks, state)
    return outputs, last


def _forward(mode, values, step, rates, into, out, state, breaks):
    chosen = gradients_config(mode, *values.shape, len(rates))
    outputs, entering, last = _walk(
        mode, values, step, rates, into, out, breaks, state, tile=chosen.blocks["BLOCK_T"]
    )
    return (outputs, last), (values, step, rates, into, out, breaks, entering)


def _backward(mode, saved, cotangents):
    values, step, rates, into, out, breaks, entering = saved
    grad_outputs, grad_last = cotangents
    (batch, length, _), states = values.shape, len(rates)
    chosen = gradients_config(mode, *values.shape, states)
    tile, groups = chosen.blocks["BLOCK_T"], chosen.blocks["GROUPS"]
    _, leaving, grad_state = _walk(
        mode, grad_outputs, step, rates, out, None, breaks, grad_last, tile=tile, from_end=True
    )
    float32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    of_groups = float32(groups, batch, length, states)
    grad_values, grad_step, grad_rates, grad_into, grad_out = launch.call(
        selective_gradients,
        dict(values=values, step=step, rates=rates, into=into, out=out, breaks=breaks, grad_outputs=grad_outputs,
             entering=entering, leaving=leaving, words=launch.words(length, batch)),
        dict(grad_values=float32(*values.shape), grad_step=float32(*step.shape), grad_rates=float32(*entering.shape),
             grad_into=of_groups, grad_out=of_groups),
        grid=batch * triton.cdiv(length, tile) * groups,
        constants=_constants(rates, breaks),
        config=chosen,
        mode=mode,
    )  # fmt: skip
    return grad_values, grad_step, grad_rates.sum((0, 1)), grad_into.sum(0), grad_out.sum(0), grad_state, None


@functools.cache
def walk_in(mode):
    """`reference.steps` by the kernels, to walk along a chunk of `xla.in_chunks`."""
    run = jax.custom_vjp(functools.partial(_primal, mode))
    precision.define_passes(run, functools.partial(_forward, mode), functools.partial(_backward, mode))

    def walk(inputs, step, diagonal, into, out, state, breaks):
        outputs, last = run(step * inputs, step, diagonal.mT, into, out, state.mT, breaks)
        return outputs, last.mT

    return walk


def selective_scan(inputs, step, diagonal, input_matrix, output_matrix, state, runs, *, mode):
    """See `ssm.selective_scan`."""
    arrays = inputs, step, diagonal, input_matrix, output_matrix
    launch.require_floats(*(x.dtype for x in (*arrays, state) if x is not None))
    launch.require_at_most(MOST_STATES, diagonal.shape[1], "states in a feature")
    state, breaks = start_and_breaks(inputs, diagonal, state, runs)
    # With fewer tokens in a chunk there would be more states between chunks than for the tiles of one.
    least = math.isqrt(TILE * inputs.shape[1] // 3)
    return xla.in_chunks((walk_in(mode), least, MOST, BYTES * TILE), *arrays, state, breaks)
