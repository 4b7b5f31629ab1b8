"""FNet: tokens mixed by a Fourier transform, with nothing to learn."""

import math
from typing import Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Complex, Float, Int

from subquad.kernels import dispatch, precision
from subquad.kernels.convolution.xla import fast_length
from subquad.zoo.base import Support
from subquad.zoo.cache import counts
from subquad.zoo.headless import Headless, HeadlessShell


class FNet(Headless):
    """The real part of the Fourier transform over tokens and features.

        y = Re(F_T F_D x),    (F_n)_jk = exp(-2 pi i j k / n)                                                (section 3.2)

    Cost: time O(T D (log T + log D)), memory O(T D); no extension: every output sums all tokens.
    Differs from the paper: a sample with n real tokens is transformed by F_n, wherever its padding stands, so that padding
        changes nothing; the paper transforms the padding too. That is a chirp transform, three FFTs of twice the length in
        place of one. `out_features` is not in the paper, whose mixer has no parameters; its blocks have the linear maps.

    Args:
        in_features: features D of the inputs.
        is_causal: must be False: the transform mixes all tokens.
        rngs: `rngs.params()` draws the parameters.
        shell: see `Headless`. A linear map to out_features follows; None: there is none, F = D. "xla" is by FFT, "reference" by
            the matrices themselves.
    Call:
        inputs_q: [*B, T, D].  mask: True = attend; key padding only, [*B, 1, 1, T].
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters. They are sqrt(T D) times as large as inputs without
        correlations: a norm follows, as in the paper's block.
    Raises: ValueError: is_causal; segment_ids; a pairwise mask.
    Numerics: the transform is in float32, right to 1e-6 of its largest output.
    Example:
        >>> FNet(2, rngs=nnx.Rngs(0))(jnp.array([[1.0, 0.0], [3.0, 0.0]])).tolist()
        [[4.0, 4.0], [-2.0, -2.0]]

    Source: Lee-Thorp et al., FNet: Mixing Tokens with Fourier Transforms, NAACL 2022, arXiv 2105.03824.
    """

    supports = Support(
        cost="T log T", causal=False, extend=False, mixes_all="each of its outputs is a sum over all tokens of the sequence"
    )

    def __init__(
        self,
        in_features: int,
        *,
        is_causal: bool = False,
        rngs: nnx.Rngs,
        **shell: Unpack[HeadlessShell],
    ):
        super().__init__(in_features, is_causal=is_causal, rngs=rngs, **shell)
        self.out = None if shell.get("out_features") is None else self.linear(in_features, self.out_features, rngs)

    def respond(self, inputs, mask, segment_ids):
        number = None if mask is None else jnp.maximum(counts(inputs, mask), 1)
        both = {"xla": fast_fourier, "reference": fourier}
        return dispatch.run("fnet.fourier", both, self.implementation, inputs, number)


@precision.full
def fourier(inputs: Float[Array, "B T D"], number: Int[Array, "B"] | None) -> Float[Array, "B T D"]:
    """Re(F_n F_D x) by the matrices; n = T, or the `number` of each sample, whose tokens after these are 0."""
    _, length, features = inputs.shape
    number = jnp.full(1, length, jnp.int32) if number is None else number

    def matrix(size, order):  # [*B, size, size], of whose entries `order` [*B] are a period
        place = jnp.arange(size, dtype=jnp.int32)
        turns = (place[:, None] * place)[None] % order[:, None, None] / order[:, None, None].astype(jnp.float32)
        return jnp.exp(-2j * math.pi * turns.astype(jnp.complex64))

    of_features = matrix(features, jnp.full(1, features, jnp.int32))[0]
    of_tokens = jnp.broadcast_to(matrix(length, number), (len(inputs), length, length))
    both = jnp.einsum("btk,bkd,de->bte", of_tokens, inputs.astype(jnp.complex64), of_features)
    return both.real.astype(inputs.dtype)


def fast_fourier(inputs: Float[Array, "B T D"], number: Int[Array, "B"] | None) -> Float[Array, "B T D"]:
    """`fourier` by FFTs of half the features: of real inputs feature D - d at t is the conjugate of feature d at n - t."""
    length, features = inputs.shape[1:]
    spectrum = jnp.fft.rfft(inputs.astype(jnp.float32), axis=2)
    first = (jnp.fft.fft(spectrum, axis=1) if number is None else chirp_transform(spectrum, number)).real
    order = length if number is None else number[:, None]
    back = jnp.broadcast_to(-jnp.arange(length)[None] % order, inputs.shape[:2])
    others = jnp.take_along_axis(first[..., 1 : (features + 1) // 2], back[..., None], axis=1)
    return jnp.concatenate([first, jnp.flip(others, 2)], 2).astype(inputs.dtype)


def chirp_transform(inputs: Complex[Array, "B T D"], number: Int[Array, "B"]) -> Complex[Array, "B T D"]:
    """The Fourier transform of each sample's first n tokens, others being 0, for any n that is known only when it runs.

        F_n x_k = c_k sum_j (c_j x_j) / c_{k-j},    c_j = exp(-i pi j^2 / n),    as 2 j k = j^2 + k^2 - (k - j)^2

    Source: Bluestein, A linear filtering approach to the computation of the discrete Fourier transform, 1970.
    """
    length = inputs.shape[1]
    size = fast_length(2 * length - 1)
    # j^2 mod 2 n in 32 bits, for n up to 2^20: j = 1024 h + l, so that j^2 = 1024 (1024 h^2 + 2 h l) + l^2.
    period = 2 * number.astype(jnp.uint32)[:, None]
    high, low = (part[None] for part in jnp.divmod(jnp.arange(length, dtype=jnp.uint32), jnp.uint32(1024)))
    square = (high * high % period * 1024 % period + 2 * high * low) % period
    square = (square * 1024 % period + low * low) % period
    angle = (2 * math.pi) * (square.astype(jnp.float32) / period.astype(jnp.float32))
    chirp = jax.lax.complex(jnp.cos(angle), -jnp.sin(angle))[..., None]
    # Of the circle with lag j at index j and lag -j at index size - j.
    filters = jnp.zeros((len(chirp), size, 1), chirp.dtype).at[:, :length].set(chirp.conj())
    filters = filters.at[:, size - length + 1 :].set(jnp.flip(chirp[:, 1:], 1).conj())
    product = jnp.fft.fft(inputs * chirp, size, axis=1) * jnp.fft.fft(filters, axis=1)
    return chirp * jnp.fft.ifft(product, axis=1)[:, :length]
