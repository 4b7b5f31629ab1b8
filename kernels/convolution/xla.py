"""Long convolution by FFT, a group of features at a time, with a backward that recomputes the spectra."""

import functools

import jax
import jax.numpy as jnp
from einops import rearrange

# Bytes of one group's padded inputs. The spectra of a group then stay well under the 32 MiB above which XLA:CPU pays for
# fresh pages at every call, and all groups share one set of buffers.
GROUP_BYTES = 4 << 20


def fast_length(length: int) -> int:
    """The smallest even length >= `length` with no prime factor above 5, which FFT libraries do fast.

    Example:
        >>> [fast_length(n) for n in (1, 7, 63, 100, 8191)]
        [2, 8, 64, 100, 8192]
    """
    best = 1 << max(1, (length - 1).bit_length())
    five = 1
    while five < best:
        three = five
        while three < best:
            size = three << max(1, (-(-length // three) - 1).bit_length())
            best = min(best, size)
            three *= 3
        five *= 5
    return best


def convolve(inputs, kernel, anticausal):
    length = inputs.shape[1]
    kernel = kernel[:, :length].astype(jnp.promote_types(kernel.dtype, jnp.float32))
    ahead = 0 if anticausal is None else min(anticausal.shape[1], length - 1)
    size = fast_length(length + max(kernel.shape[1] - 1, ahead))
    # One circular kernel: lag j at index j, lag -1 - j at index size - 1 - j.
    circular = jnp.pad(kernel, ((0, 0), (0, size - kernel.shape[1])))
    if ahead:
        future = jnp.flip(anticausal[:, :ahead].astype(kernel.dtype), axis=1)
        circular = circular.at[:, size - ahead :].set(future)
    return _circular(inputs, circular)


def divisor(number: int, least: int) -> int:
    """The smallest divisor of `number` that is at least `least`, or `number` itself."""
    return next(d for d in range(1, number + 1) if number % d == 0 and d >= min(least, number))


def _groups(batch: int, features: int, size: int) -> int:
    """How many groups the features make, each under GROUP_BYTES."""
    return divisor(features, -(-batch * features * size * 4 // GROUP_BYTES))


def _split(array, groups, dtype):
    """[B, T, D] -> [groups, B, D/groups, T]: time last, where the FFT wants it."""
    return rearrange(array, "b t (n d) -> n b d t", n=groups).astype(dtype)


def _join(array):
    return rearrange(array, "n b d t -> b t (n d)")


@jax.custom_vjp
def _circular(inputs, circular):
    """The first T of the circular convolution of `inputs` [B, T, D], padded with zeros, with `circular` [D, n]."""
    length, size = inputs.shape[1], circular.shape[1]
    groups = _groups(*inputs.shape[::2], size)

    def group(arrays):
        values, taps = arrays
        spectrum = jnp.fft.rfft(values, size) * jnp.fft.rfft(taps)
        return jnp.fft.irfft(spectrum, size)[..., :length].astype(inputs.dtype)

    taps = rearrange(circular, "(n d) l -> n d l", n=groups)
    return _join(jax.lax.map(group, (_split(inputs, groups, circular.dtype), taps)))


def _forward(inputs, circular):
    return _circular(inputs, circular), (inputs, circular)


def _backward(saved, cotangent):
    """Both gradients are correlations, computed from fresh spectra: saving those would take four times the inputs."""
    inputs, circular = saved
    length, size = inputs.shape[1], circular.shape[1]
    groups = _groups(*inputs.shape[::2], size)

    def group(arrays):
        values, outer, taps = arrays
        outer = jnp.fft.rfft(outer, size)
        inner = jnp.fft.irfft(outer * jnp.conj(jnp.fft.rfft(taps)), size)[..., :length].astype(inputs.dtype)
        kernel = jnp.sum(outer * jnp.conj(jnp.fft.rfft(values, size)), axis=0)
        return inner, jnp.fft.irfft(kernel, size)

    split = functools.partial(_split, groups=groups, dtype=circular.dtype)
    taps = rearrange(circular, "(n d) l -> n d l", n=groups)
    inner, kernel = jax.lax.map(group, (split(inputs), split(cotangent), taps))
    return _join(inner), rearrange(kernel, "n d l -> (n d) l")


_circular.defvjp(_forward, _backward)
