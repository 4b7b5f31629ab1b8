"""State space models in linear memory: real matrix products, and nothing of size D x P x L.

Complex numbers are kept as planes of real and imaginary parts wherever there are many of them.
"""

import functools
import math

import jax
import jax.numpy as jnp
from einops import rearrange

from subquad.kernels.convolution.xla import divisor, fast_length

HIGHEST = jax.lax.Precision.HIGHEST  # GPUs would round the products to TF32

# The generating function is evaluated on a circle inside the unit circle, whose taps decay by exp(-DAMPING) over the window
# on top of their own decay. On the unit circle itself a slow or hardly damped mode makes C (I - A_bar^n) small and the
# resolvent large; here both stay moderate, and undoing the decay costs a factor e of rounding at most.
DAMPING = 1.0
# Nodes and bytes of one [D, P, nodes] plane of the Cauchy sum, bytes of the sums where that is never formed, and of one
# group's powers of A_bar.
CHUNK_NODES, CHUNK_BYTES = 4096, 1 << 20
SUMS_BYTES = 64 << 20
POWER_BYTES = 4 << 20
# Chunks of the diagonal scan: a chunk's Toeplitz matrix costs as much as the sequence is many chunks. And the bytes of one
# group's tokens or states between chunks.
CHUNK, LONG = 32, 2048
GROUP_BYTES = 4 << 20


def _planes(values):
    return jnp.concatenate([values.real, values.imag], axis=-1)


def _complex(planes):
    pairs = planes.shape[-1] // 2
    return jax.lax.complex(planes[..., :pairs], planes[..., pairs:])


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
        left = _planes(2 * coefficients[..., None, :] * coarse)
        right = _planes(fine.conj())
        taps = jnp.einsum("...dip,djp->...dij", left, right, precision=HIGHEST)
        return taps.reshape(*taps.shape[:-2], -1)[..., :length]

    return product(log_decay, coefficients)


def diagonal_scan(inputs, log_decay, input_matrix, output_matrix, state):
    batch, length, features = inputs.shape
    chunk = min(length, CHUNK if length < LONG else 2 * CHUNK)
    chunks = -(-length // chunk)
    groups = divisor(features, -(-batch * features * chunks * max(chunk, state.shape[-1]) * 4 // GROUP_BYTES))
    padded = jnp.pad(inputs, ((0, 0), (0, chunks * chunk - length), (0, 0)))
    tokens = rearrange(padded, "b (n c) (g d) -> g d (b n) c", g=groups, c=chunk)
    modes = (rearrange(x, "(g d) p -> g d p", g=groups) for x in (log_decay, input_matrix, output_matrix))
    group = lambda arrays: _scan_group(arrays, length - (chunks - 1) * chunk)
    outputs, state = jax.lax.map(group, (tokens, *modes, rearrange(state, "b (g d) p -> g d b p", g=groups)))
    outputs = rearrange(outputs, "g d (b n) c -> b (n c) (g d)", b=batch)[:, :length]
    return outputs, rearrange(state, "g d b p -> b (g d) p")


@functools.partial(jax.checkpoint, static_argnums=1)
def _scan_group(arrays, rest):
    """Some features of `diagonal_scan`: tokens [D, B N, C] in N chunks, of which the last has `rest` tokens; state [D, B, P].

    Within a chunk the outputs are a Toeplitz matrix times the inputs, and the state before it read off; between chunks only
    the state goes on. A checkpoint: the backward makes the tables again and keeps the states before the chunks only.
    """
    tokens, log_decay, input_matrix, output_matrix, state = arrays
    chunk, batch = tokens.shape[-1], state.shape[1]
    values = tokens.astype(state.dtype)
    powers = jnp.exp(log_decay[:, None] * jnp.arange(chunk + 1)[:, None])  # [D, C + 1, P]
    writes = state_planes(input_matrix[:, None] * powers[:, :chunk])  # what a token leaves after 0 .. C - 1 steps
    reads = _output_planes(output_matrix[:, None] * powers[:, 1:])
    dot = functools.partial(jnp.einsum, precision=HIGHEST)

    taps = dot("dcp,dp->dc", writes, _output_planes(output_matrix))
    added = dot("dnc,dcp->dnp", values, jnp.flip(writes, axis=1))
    advance = lambda before, after: (times(powers[:, None, chunk], before) + after, before)
    state, states = jax.lax.scan(advance, state, rearrange(added, "d (b n) p -> n d b p", b=batch))
    if rest < chunk:  # the state before the last chunk, and the tokens of it that there are
        last = rearrange(values, "d (b n) c -> d b n c", b=batch)[:, :, -1, :rest]
        state = times(powers[:, None, rest], states[-1]) + dot("dbc,dcp->dbp", last, jnp.flip(writes[:, :rest], axis=1))
    states = rearrange(states, "n d b p -> d (b n) p")
    outputs = dot("dnj,dij->dni", values, _toeplitz(taps)) + dot("dnp,dip->dni", states, reads)
    return outputs.astype(tokens.dtype), state


def state_planes(modes):
    """How a state of these modes is stored: complex numbers as their real, then their imaginary parts."""
    return _planes(modes) if jnp.iscomplexobj(modes) else modes


def _output_planes(modes):
    """What a stored state is multiplied by for sum C x, or for 2 Re(sum C x) where the modes are complex."""
    return _planes(2 * modes.conj()) if jnp.iscomplexobj(modes) else modes


def times(decay, state):
    """decay times a stored state."""
    return _planes(decay * _complex(state)) if jnp.iscomplexobj(decay) else decay * state


def _toeplitz(taps):
    """[D, C] -> [D, C, C] with taps[i - j] at i >= j and 0 elsewhere, by repeating and cutting instead of a gather.

    Rows of width 2 C - 1 of a sequence with period 2 C: each begins one place earlier in the period than the one above.
    """
    chunk = taps.shape[-1]
    period = jnp.concatenate([taps[:, :1], jnp.zeros_like(taps), jnp.flip(taps[:, 1:], axis=1)], axis=1)
    rows = jnp.tile(period, (1, chunk))[:, : chunk * (2 * chunk - 1)]
    return rows.reshape(-1, chunk, 2 * chunk - 1)[:, :, :chunk]


# ------------------------------------------------------------------------------------ diagonal-plus-low-rank systems


def dplr_kernel(diagonal, low_rank, input_matrix, output_matrix, step, length, sums=None):
    outputs = output_matrix.shape[:-2]
    output_matrix = output_matrix.reshape(-1, *diagonal.shape)
    size = fast_length(length)
    truncated = output_matrix - math.exp(-DAMPING) * _output_power(diagonal, low_rank, output_matrix, step, size)
    damped = _generate(diagonal, low_rank, input_matrix, truncated, step, size, sums)[..., :length]
    kernel = damped * jnp.exp(DAMPING / size * jnp.arange(length))
    return kernel.reshape(*outputs, *kernel.shape[1:]).astype(damped.dtype)


def _output_power(diagonal, low_rank, output_matrix, step, exponent):
    """C A_bar^exponent, [K, D, P], by repeated squaring of the dense A_bar, a few features at a time.

    In real and imaginary parts the state is a real vector of 2P and A_bar a real matrix. It contracts (A + A^* is negative
    for this form of A), so rounding grows no faster than in that many steps of the recurrence. The powers are kept less the
    identity: a slow mode's distance from 1 is its decay.
    """
    pairs = diagonal.shape[-1]

    @jax.checkpoint  # the backward keeps the squares of one group, not of all features
    def power(system):
        diagonal, low_rank, output, step = system  # [P], [R, P], [K, P], []
        excess, left, right = resolvent(diagonal, low_rank, step)
        dense = jnp.block([[jnp.diag(excess.real), jnp.diag(-excess.imag)], [jnp.diag(excess.imag), jnp.diag(excess.real)]])
        dense = dense - jnp.einsum("rp,rq->pq", _planes(left), _planes(right), precision=HIGHEST)

        def advance(carry, bit):
            row, change = carry
            row = row + jnp.where(bit, jnp.matmul(row, change, precision=HIGHEST), 0)
            return (row, 2 * change + jnp.matmul(change, change, precision=HIGHEST)), None

        row = _planes(output.conj())  # y = 2 (Re C Re x - Im C Im x)
        (row, _), _ = jax.lax.scan(advance, (row, 2 * dense), bits)
        return _complex(row).conj()

    bits = jnp.array([exponent >> place & 1 for place in range(exponent.bit_length())], bool)
    features = diagonal.shape[0]
    groups = divisor(features, -(-features * (2 * pairs) ** 2 * 4 * len(bits) // POWER_BYTES))
    split = lambda array, axis: rearrange(jnp.moveaxis(array, axis, 0), "(n d) ... -> n d ...", n=groups)
    systems = split(diagonal, 0), split(low_rank, 1), split(output_matrix, 1), split(step, 0)
    return rearrange(jax.lax.map(jax.vmap(power), systems), "n d k p -> k (n d) p")


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


def _generate(diagonal, low_rank, input_matrix, output_matrix, step, size, sums=None):
    """The inverse FFT of the generating function at r exp(-2 pi i k / size), k <= size / 2, with r^size = exp(-DAMPING).

    Its taps are r^l K_l. With z = 2 (1 - w) / (1 + w), which has a real part >= 0 and no pole for r < 1, it is

        K^ = (1 + z / 2) (C, (z - step A)^-1 step B)
    """
    outputs, rank = output_matrix.shape[0], low_rank.shape[0]
    features, pairs = diagonal.shape
    scaled = step[:, None] * diagonal
    lefts = jnp.concatenate([output_matrix, low_rank.conj()])
    rights = jnp.concatenate([input_matrix[None], low_rank])
    # A pair of modes gives v / (z - a) + conj(v) / (z - conj(a)), one fraction with numerator 2 (Re(v) z - Re(v conj(a))).
    products = rearrange(lefts[:, None] * rights[None], "i j d p -> d i j p")
    mixed = -products.real * scaled.real[:, None, None] - products.imag * scaled.imag[:, None, None]
    numerators = rearrange([products.real, mixed], "n d i j p -> d (n i j) p")

    def group(systems):
        @jax.checkpoint  # else the backward keeps every chunk of the Cauchy matrix
        def chunk(nodes):
            numerators, decay, turn, step = systems
            real, imag = nodes
            plain, mixed = jnp.split((sums or _cauchy_sums)(numerators, decay, turn, real, imag), 2, axis=1)
            plain, mixed = (jax.lax.complex(x[:, :, 0], x[:, :, 1]).swapaxes(0, 1) for x in (plain, mixed))
            nodes = jax.lax.complex(real, imag)
            table = rearrange(2 * step[:, None] * (nodes * plain + mixed), "(i j) d l -> i j d l", i=outputs + rank)
            # Woodbury, one column of the low rank at a time. The pivots have real parts >= 1.
            for r in range(rank):
                column, row = table[:, 1 + r, None], table[None, outputs + r]
                table = table - column * row / (1 + table[outputs + r, 1 + r])
            return (1 + nodes / 2) * table[:outputs, 0]

        return rearrange(jax.lax.map(chunk, nodes), "n k d l -> k d (n l)")[..., :roots]

    roots = size // 2 + 1
    # The XLA sums make a [D, P, width] matrix on the way, so few features at a time; others only their results.
    if sums is None:
        width = -(-roots // -(-roots // CHUNK_NODES))
        groups = divisor(features, -(-features * pairs * width * 4 // CHUNK_BYTES))
    else:
        width, groups = max(16, min(roots, SUMS_BYTES // (8 * features * numerators.shape[1]))), 1
    index = rearrange(jnp.arange(-(-roots // width) * width), "(n l) -> n l", l=width)
    nodes = _nodes(jnp.minimum(index, roots - 1), size, scaled.real.dtype)
    systems = numerators, scaled.real, scaled.imag, step
    systems = tuple(rearrange(x, "(n d) ... -> n d ...", n=groups) for x in systems)
    spectrum = rearrange(jax.lax.map(group, systems), "n k d l -> k (n d) l")
    return jnp.fft.irfft(spectrum, size)


@jax.custom_vjp
def _cauchy_sums(numerators, decay, turn, real, imag):
    """sum_p numerators_vp / ((z_l - a_p) (z_l - conj(a_p))) over a = decay + i turn and z = real + i imag, [D, V, 2, L].

    No gradient of z.
    """
    return _cauchy_forward(numerators, decay, turn, real, imag)[0]


def _cauchy_forward(numerators, decay, turn, real, imag):
    # A difference of squares as a product: it is small at resonance.
    distance, height = real - decay[..., None], turn[..., None]
    top, bottom = distance**2 + (height - imag) * (height + imag), 2 * imag * distance
    inverse = 1 / (top**2 + bottom**2)
    cauchy = top * inverse, -bottom * inverse
    sums = jnp.stack([jnp.einsum("dvp,dpl->dvl", numerators, plane, precision=HIGHEST) for plane in cauchy], axis=2)
    return sums, (numerators, decay, turn, real, imag, cauchy)


def _cauchy_backward(saved, grad):
    """With c the fraction, dc / d decay = 2 (z - decay) c^2 and dc / d turn = -2 turn c^2: sums of c and of its square."""
    numerators, decay, turn, real, imag, cauchy = saved

    def sums(grad, planes):  # of the real part of conj(grad) times the planes
        parts = (jnp.einsum("dvl,dpl->dvp", g, x, precision=HIGHEST) for g, x in zip(grad, planes, strict=True))
        return sum(parts)

    grad = grad[:, :, 0], grad[:, :, 1]
    square = cauchy[0] ** 2 - cauchy[1] ** 2, 2 * cauchy[0] * cauchy[1]
    plain = sums(grad, square)
    with_z = sums((grad[0] * real + grad[1] * imag, grad[1] * real - grad[0] * imag), square)
    of_decay = 2 * jnp.sum(numerators * (with_z - decay[:, None] * plain), axis=1)
    of_turn = -2 * turn * jnp.sum(numerators * plain, axis=1)
    return sums(grad, cauchy), of_decay, of_turn, None, None


_cauchy_sums.defvjp(_cauchy_forward, _cauchy_backward)


def _nodes(index, size, dtype):
    """Real and imaginary parts of z = 2 (1 - w) / (1 + w) = 2 tanh(damping / 2 + i angle), angle = pi index / size.

    Sine and cosine are both taken as sines of the distance to their zero, so no digits cancel at w = 1 and w = -1.
    """
    damping = DAMPING / size
    sine = jnp.sin(jnp.pi / size * index.astype(dtype))
    cosine = jnp.sin(jnp.pi / (2 * size) * (size - 2 * index).astype(dtype))
    scale = math.sinh(damping / 2) ** 2 + cosine**2
    return math.sinh(damping) / scale, 2 * sine * cosine / scale


def dplr_recurrence(inputs, diagonal, low_rank, input_matrix, output_matrix, step, state):
    excess, left, right = resolvent(diagonal, low_rank, step)
    drive = step[:, None] / 2 * input_matrix

    def advance(state, token):
        added = drive * token[..., None]
        moved = state + added
        low = sum(column * _inner(row, moved) for column, row in zip(left, right, strict=True))
        return state + 2 * (excess * moved + added - low)  # what is small is added to the state, not what is left of it

    return _recur(inputs, advance, output_matrix, state)


def _recur(inputs, advance, output_matrix, state):
    """Scans `advance` over the tokens; the state travels as real planes outside and as complex numbers inside."""

    def body(state, token):
        state = advance(state, token)
        return state, 2 * jnp.sum(output_matrix * state, axis=-1).real

    tokens = inputs.swapaxes(0, 1).astype(state.dtype)
    state, outputs = jax.lax.scan(body, _complex(state), tokens)
    return outputs.swapaxes(0, 1).astype(inputs.dtype), _planes(state)
