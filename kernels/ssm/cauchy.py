"""The kernel of diagonal-plus-low-rank systems by its generating function, around Cauchy sums that something else makes.

The function is evaluated on a circle inside the unit circle, whose taps decay by exp(-DAMPING) over the window on top of
their own decay. On the unit circle itself a slow or hardly damped mode makes C (I - A_bar^n) small and the resolvent large;
here both stay moderate, and undoing the decay costs a factor e of rounding at most.
"""

import functools
import math

import jax
import jax.numpy as jnp
from einops import rearrange

from subquad.kernels.convolution.xla import fast_length
from subquad.kernels.ssm.xla import feature_groups, from_planes, planes, transition

DAMPING = 1.0
SUMS_BYTES = 64 << 20  # of the sums at some nodes


def dplr_kernel(diagonal, low_rank, input_matrix, output_matrix, step, length, sums):
    """See `ssm.dplr_kernel`.

    Args:
        sums: of numerators [D, V, P], decay and turn [D, P], and real and imaginary parts of nodes z [L]:
            sum_p numerators_vp / ((z_l - a_p) (z_l - conj(a_p))) with a = decay + i turn, [D, V, 2, L].
    """
    outputs = output_matrix.shape[:-2]
    output_matrix = output_matrix.reshape(-1, *diagonal.shape)
    size = fast_length(length)
    truncated = output_matrix - math.exp(-DAMPING) * _output_power(diagonal, low_rank, output_matrix, step, size)
    damped = _generate(diagonal, low_rank, input_matrix, truncated, step, size, sums)[..., :length]
    kernel = damped * jnp.exp(DAMPING / size * jnp.arange(length))
    return kernel.reshape(*outputs, *kernel.shape[1:])


def _output_power(diagonal, low_rank, output_matrix, step, exponent):
    """C A_bar^exponent, [K, D, P], by repeated squaring."""
    bits = jnp.array([exponent >> place & 1 for place in range(exponent.bit_length())], bool)
    dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

    @jax.checkpoint  # the backward keeps the squares of one group, not of all features
    def power(system):
        diagonal, low_rank, output_rows, step = system  # [P], [R, P], [K, P], []

        def advance(carry, bit):
            rows, change = carry
            rows = rows + jnp.where(bit, dot(rows, change), 0)
            return (rows, 2 * change + dot(change, change)), None

        start = planes(output_rows.conj()), transition(diagonal, low_rank, step)
        (rows, _), _ = jax.lax.scan(advance, start, bits)
        return from_planes(rows).conj()

    split, join = feature_groups(diagonal.shape, len(bits))
    systems = split(diagonal, 0), split(low_rank, 1), split(output_matrix, 1), split(step, 0)
    return join(jax.lax.map(jax.vmap(power), systems))


def _generate(diagonal, low_rank, input_matrix, output_matrix, step, size, sums):
    """The inverse FFT of the generating function at r exp(-2 pi i k / size), k <= size / 2, with r^size = exp(-DAMPING).

    Its taps are r^l K_l. With z = 2 (1 - w) / (1 + w), which has a real part >= 0 and no pole for r < 1, it is

        K^ = (1 + z / 2) (C, (z - step A)^-1 step B)
    """
    outputs, rank = output_matrix.shape[0], low_rank.shape[0]
    scaled = step[:, None] * diagonal
    lefts = jnp.concatenate([output_matrix, low_rank.conj()])
    rights = jnp.concatenate([input_matrix[None], low_rank])
    # A pair of modes gives v / (z - a) + conj(v) / (z - conj(a)), one fraction with numerator 2 (Re(v) z - Re(v conj(a))).
    products = rearrange(lefts[:, None] * rights[None], "i j d p -> d i j p")
    mixed = -products.real * scaled.real[:, None, None] - products.imag * scaled.imag[:, None, None]
    numerators = rearrange([products.real, mixed], "n d i j p -> d (n i j) p")

    @jax.checkpoint  # else the backward keeps the sums at all nodes
    def chunk(nodes):
        real, imag = nodes
        plain, mixed = jnp.split(sums(numerators, scaled.real, scaled.imag, real, imag), 2, axis=1)
        plain, mixed = (jax.lax.complex(x[:, :, 0], x[:, :, 1]).swapaxes(0, 1) for x in (plain, mixed))
        nodes = jax.lax.complex(real, imag)
        table = rearrange(2 * step[:, None] * (nodes * plain + mixed), "(i j) d l -> i j d l", i=outputs + rank)
        # Woodbury, one column of the low rank at a time. The pivots have real parts >= 1.
        for r in range(rank):
            column, row = table[:, 1 + r, None], table[None, outputs + r]
            table = table - column * row / (1 + table[outputs + r, 1 + r])
        return (1 + nodes / 2) * table[:outputs, 0]

    roots = size // 2 + 1
    width = max(16, min(roots, SUMS_BYTES // (8 * math.prod(numerators.shape[:2]))))
    index = rearrange(jnp.arange(-(-roots // width) * width), "(n l) -> n l", l=width)
    spectrum = jax.lax.map(chunk, _nodes(jnp.minimum(index, roots - 1), size, scaled.real.dtype))
    return jnp.fft.irfft(rearrange(spectrum, "n k d l -> k d (n l)")[..., :roots], size)


def _nodes(index, size, dtype):
    """Real and imaginary parts of z = 2 (1 - w) / (1 + w) = 2 tanh(damping / 2 + i angle), angle = pi index / size.

    Sine and cosine are both taken as sines of the distance to their zero, so no digits cancel at w = 1 and w = -1.
    """
    damping = DAMPING / size
    sine = jnp.sin(jnp.pi / size * index.astype(dtype))
    cosine = jnp.sin(jnp.pi / (2 * size) * (size - 2 * index).astype(dtype))
    scale = math.sinh(damping / 2) ** 2 + cosine**2
    return math.sinh(damping) / scale, 2 * sine * cosine / scale
