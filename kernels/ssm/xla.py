"""State space models in linear memory: real matrix products, and nothing of size D x P x L.

Complex numbers are kept as planes of real and imaginary parts wherever there are many of them.
"""

import functools

import jax
import jax.numpy as jnp
from einops import rearrange

from subquad.kernels.convolution.xla import divisor
from subquad.kernels.operation import operation
from subquad.kernels.padding import pad_to
from subquad.kernels.xla_cpu import map_parts

HIGHEST = jax.lax.Precision.HIGHEST  # GPUs would round the products to TF32
einsum = functools.partial(jnp.einsum, precision=HIGHEST)

# Of one group's powers of A_bar: on a CPU what fits in a core's cache, on a GPU all features of a usual layer.
CPU_POWER_BYTES, OTHER_POWER_BYTES = 1 << 21, 1 << 26
# Tokens in a chunk of the diagonal scan, whose Toeplitz matrix grows as the number of chunks falls. And the bytes of one
# group's tokens or states between chunks: on a CPU what fits in a core's cache.
CHUNK, LONG = 32, 2048
CPU_BYTES, OTHER_BYTES = 1 << 18, 1 << 26


def planes(values):
    """Real parts, then imaginary parts."""
    return jnp.concatenate([values.real, values.imag], axis=-1)


def from_planes(values):
    """The complex numbers again."""
    pairs = values.shape[-1] // 2
    return jax.lax.complex(values[..., :pairs], values[..., pairs:])


# --------------------------------------------------------------------------------------------------- diagonal systems


def diagonal_kernel(log_decay, coefficients, length):
    # l = block l1 + l2: Re(c a b) = Re(c a) Re(b) - Im(c a) Im(b) with a = exp(block l1 z), b = exp(l2 z), a product of
    # real matrices [L / block, 2P] and [2P, block].
    block = 1 << (length.bit_length() // 2)
    blocks = -(-length // block)

    @jax.checkpoint  # the exponentials are cheaper to compute again than to keep
    def product(log_decay, coefficients):
        coarse = jnp.exp(log_decay[:, None, :] * (block * jnp.arange(blocks))[:, None])
        fine = jnp.exp(log_decay[:, None, :] * jnp.arange(block)[:, None])
        left = planes(2 * coefficients[..., None, :] * coarse)
        right = planes(fine.conj())
        taps = einsum("...dip,djp->...dij", left, right)
        return taps.reshape(*taps.shape[:-2], -1)[..., :length]

    return product(log_decay, coefficients)


def diagonal_scan(inputs, log_decay, input_matrix, output_matrix, state):
    budget = CPU_BYTES if jax.default_backend() == "cpu" else OTHER_BYTES
    return _scan(budget, inputs, log_decay, input_matrix, output_matrix, state)


FEATURE_AXES = 2, 0, 0, 0, 1  # of the arguments of a group


def chunk_and_groups(budget: int, inputs, state) -> tuple[int, int]:
    """Tokens of a chunk, and how many groups the features make, each of about `budget` bytes."""
    batch, length, features = inputs.shape
    chunk = min(length, CHUNK if length < LONG else 2 * CHUNK)
    return chunk, divisor(features, -(-batch * features * length * max(1, state.shape[-1] // chunk) * 4 // budget))


def _scan_forward(budget, *arrays):
    chunk, groups = chunk_and_groups(budget, arrays[0], arrays[-1])
    run = functools.partial(_scan_group, chunk)
    return map_parts(run, groups, arrays, FEATURE_AXES, (2, 1), after=arrays[0]), arrays


def _scan_backward(budget, arrays, gradients):
    """A group's tables and states are made again: its arguments are all that is kept."""
    chunk, groups = chunk_and_groups(budget, arrays[0], arrays[-1])

    def group(*parts):
        _, backward = jax.vjp(functools.partial(_scan_group, chunk), *parts[: len(arrays)])
        return backward(parts[len(arrays) :])

    return map_parts(group, groups, (*arrays, *gradients), (*FEATURE_AXES, 2, 1), FEATURE_AXES, after=gradients[0])


_scan = operation(
    _scan_forward,
    _scan_backward,
    arrays=("b t d", "d p", "d p", "d p", "b d s"),
    outputs=("b t d", "b d s"),
    independent="b d",
)


def _scan_group(chunk, inputs, log_decay, input_matrix, output_matrix, state):
    """Some features of `diagonal_scan`: products within chunks, and only the state from one to the next."""
    batch, length, _ = inputs.shape
    chunks = -(-length // chunk)
    toeplitz, writes, reads, powers = chunk_tables(chunk, log_decay, input_matrix, output_matrix)
    values = pad_to(inputs.astype(state.dtype), 1, chunks * chunk)
    values = rearrange(values, "b (n c) d -> d (b n) c", c=chunk)

    added = rearrange(einsum("dmc,dcs->dms", values, writes), "d (b n) s -> n d b s", b=batch)
    # All powers go into the loop: of the last alone, XLA on a CPU makes the others once for every table (twice the time).
    advance = lambda before, added: (times(powers[:, None, -1], before) + added, before)
    _, states = jax.lax.scan(advance, state.swapaxes(0, 1), added)  # before each chunk
    before = rearrange(states, "n d b s -> d (b n) s")
    outputs = einsum("dmj,dij->dmi", values, toeplitz) + einsum("dms,dis->dmi", before, reads)

    outputs = rearrange(outputs, "d (b n) c -> b (n c) d", b=batch)[:, :length].astype(inputs.dtype)
    last = inputs[:, (chunks - 1) * chunk :].astype(state.dtype)
    return outputs, state_after(states[-1].swapaxes(0, 1), last, log_decay, writes)


def chunk_tables(chunk, log_decay, input_matrix, output_matrix):
    """What a chunk of C tokens multiplies: outputs = toeplitz tokens + reads state, state' = jump state + tokens writes.

    toeplitz [D, C, C] of the systems' kernel, writes [D, C, S] of what tokens leave at the end of the chunk, reads [D, C, S] of
    what becomes of the state before it, powers [D, C + 1, P] of A_bar, whose last is the jump. States are as they are stored.
    """
    powers = jnp.exp(log_decay[:, None] * jnp.arange(chunk + 1)[:, None])
    traces = state_planes(input_matrix[:, None] * powers[:, :chunk])  # of a token after 0 .. C - 1 steps
    taps = einsum("dcs,ds->dc", traces, _output_planes(output_matrix))
    reads = _output_planes(output_matrix[:, None] * powers[:, 1:])
    return _toeplitz(taps), jnp.flip(traces, axis=1), reads, powers


def state_after(state, tokens, log_decay, writes):
    """The state [B, D, S] after tokens [B, c, D], at most a chunk of them."""
    count = tokens.shape[1]
    return times(jnp.exp(log_decay * count), state) + einsum("bcd,dcs->bds", tokens, writes[:, -count:])


def state_planes(modes):
    """How a state of these modes is stored: complex numbers as their real, then their imaginary parts."""
    return planes(modes) if jnp.iscomplexobj(modes) else modes


def _output_planes(modes):
    """What a stored state is multiplied by for sum C x, or for 2 Re(sum C x) where the modes are complex."""
    return planes(2 * modes.conj()) if jnp.iscomplexobj(modes) else modes


def times(decay, state):
    """decay times a stored state."""
    return planes(decay * from_planes(state)) if jnp.iscomplexobj(decay) else decay * state


def _toeplitz(taps):
    """[D, C] -> [D, C, C] with taps[i - j] at i >= j and 0 elsewhere, by repeating and cutting instead of a gather.

    Rows of width 2 C - 1 of a sequence with period 2 C: each begins one place earlier in the period than the one above.
    """
    chunk = taps.shape[-1]
    period = jnp.concatenate([taps[:, :1], jnp.zeros_like(taps), jnp.flip(taps[:, 1:], axis=1)], axis=1)
    rows = jnp.tile(period, (1, chunk))[:, : chunk * (2 * chunk - 1)]
    return rows.reshape(-1, chunk, 2 * chunk - 1)[:, :, :chunk]


# ------------------------------------------------------------------------------------ diagonal-plus-low-rank systems


@functools.partial(jax.jit, static_argnames="length")
def dplr_kernel(diagonal, low_rank, input_matrix, output_matrix, step, length):
    # l = block l1 + l2: the rows C A_bar^(block l1) times the columns A_bar^l2 B_bar. Twice as many columns are those there
    # are and A_bar to the power of their number times them, and that power is squared for the next: log2(block) squarings.
    outputs = output_matrix.shape[:-2]
    output_matrix = output_matrix.reshape(-1, *diagonal.shape)
    doublings = length.bit_length() // 2
    block = 1 << doublings
    blocks = -(-length // block)

    @jax.checkpoint  # the backward keeps the powers of one group, not of all features
    def taps(system):
        diagonal, low_rank, input_row, output_rows, step = system  # [P], [R, P], [P], [K, P], []
        change = transition(diagonal, low_rank, step)
        column = step * planes(input_row)[:, None]
        columns = column + dot(change, column) / 2  # B_bar = (I - step A / 2)^-1 step B
        for _ in range(doublings):
            columns = jnp.concatenate([columns, columns + dot(change, columns)], axis=1)
            change = 2 * change + dot(change, change)
        advance = lambda rows, _: (rows + dot(rows, change), rows)
        _, rows = jax.lax.scan(advance, planes(2 * output_rows.conj()), length=blocks)  # y = 2 (Re C Re x - Im C Im x)
        return dot(rows, columns).swapaxes(0, 1).reshape(-1, blocks * block)

    dot = functools.partial(jnp.matmul, precision=HIGHEST)
    split, join = feature_groups(diagonal.shape, doublings)
    systems = split(diagonal, 0), split(low_rank, 1), split(input_matrix, 0), split(output_matrix, 1), split(step, 0)
    kernel = join(jax.lax.map(jax.vmap(taps), systems))[..., :length]
    return kernel.reshape(*outputs, *kernel.shape[1:])


def transition(diagonal, low_rank, step):
    """A_bar - I of one feature, [P], [R, P], [] -> [2P, 2P]: real, for a state of real and then imaginary parts.

    Less the identity, because a slow mode's distance from 1 is its decay. A_bar contracts (A + A^* is negative for this form
    of A), so rounding grows no faster in its powers than in that many steps of the recurrence.
    """
    excess, left, right = resolvent(diagonal, low_rank, step)
    dense = jnp.block([[jnp.diag(excess.real), jnp.diag(-excess.imag)], [jnp.diag(excess.imag), jnp.diag(excess.real)]])
    return 2 * (dense - einsum("rp,rq->pq", planes(left), planes(right)))


def feature_groups(modes, powers):
    """(split, join) of the features, [D, P] modes, into groups of which so many dense powers of A_bar are kept at once."""
    features, pairs = modes
    budget = CPU_POWER_BYTES if jax.default_backend() == "cpu" else OTHER_POWER_BYTES
    groups = divisor(features, -(-features * (2 * pairs) ** 2 * 4 * powers // budget))
    split = lambda array, axis: rearrange(jnp.moveaxis(array, axis, 0), "(n d) ... -> n d ...", n=groups)
    return split, lambda array: rearrange(array, "n d k ... -> k (n d) ...")


def resolvent(diagonal, low_rank, step):
    """(I - step A / 2)^-1 = I + diag(excess) - sum_r left_r <right_r, .>, with <a, x> = Re(sum conj(a) x) over the modes.

    By the Sherman-Morrison formula, one column of the low rank after the other. For one feature ([P], [R, P], []), or for
    all of them ([D, P], [R, D, P], [D]).
    """
    step = step[..., None]
    middle = 1 / (1 - step / 2 * diagonal)
    lefts, rights = [], []
    for column in low_rank:
        left, right = middle * column, middle.conj() * column
        for old_left, old_right in zip(lefts, rights, strict=True):
            left, right = left - old_left * _inner(old_right, column), right - old_right * _inner(old_left, column)
        lefts.append(left)
        rights.append(right * (step / (1 + step * _inner(column, left))))
    return step / 2 * diagonal * middle, jnp.stack(lefts), jnp.stack(rights)


def _inner(first, second):
    """<first, second>, with the axis of modes kept."""
    return jnp.sum(first.real * second.real + first.imag * second.imag, axis=-1, keepdims=True)


@jax.jit
def dplr_recurrence(inputs, diagonal, low_rank, input_matrix, output_matrix, step, state):
    return dplr_steps(inputs, *dplr_tables(diagonal, low_rank, input_matrix, output_matrix, step), state)


def dplr_tables(diagonal, low_rank, input_matrix, output_matrix, step):
    """What `dplr_steps` takes, as planes with a batch axis of 1: [1, D, S], and left and right [1, R, D, S]."""
    tables = *resolvent(diagonal, low_rank, step), step[:, None] / 2 * input_matrix, 2 * output_matrix.conj()
    return tuple(planes(table)[None] for table in tables)


def dplr_steps(inputs, excess, left, right, drive, reads, state):
    """Steps x' = x + 2 (excess y + drive u - sum_r left_r <right_r, y>), y = x + drive u, with outputs <reads, x'>."""
    excess = from_planes(excess)

    def advance(state, token):
        added = drive * token[..., None]
        moved = state + added
        low = jnp.sum(left * jnp.sum(right * moved[:, None], axis=-1, keepdims=True), axis=1)
        state = state + 2 * (times(excess, moved) + added - low)  # what is small is added to the state, not what is left of it
        return state, jnp.sum(reads * state, axis=-1)

    state, outputs = jax.lax.scan(advance, state, inputs.swapaxes(0, 1).astype(state.dtype))
    return outputs.swapaxes(0, 1).astype(inputs.dtype), state
