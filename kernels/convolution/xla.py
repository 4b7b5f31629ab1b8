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
    # One row of taps from the farthest future to the farthest past.
    if ahead:
        kernel = jnp.concatenate([jnp.flip(anticausal[:, :ahead].astype(kernel.dtype), axis=1), kernel], axis=1)
    return _convolve(inputs, kernel, ahead, size)


def divisor(number: int, least: int) -> int:
    """The smallest divisor of `number` that is at least `least`, or `number` itself."""
    return next(d for d in range(1, number + 1) if number % d == 0 and d >= min(least, number))


def _groups(batch: int, features: int, size: int) -> int:
    """How many groups the features make, each under GROUP_BYTES."""
    return divisor(features, -(-batch * features * size * 4 // GROUP_BYTES))


def _split(array, groups):
    """[B, T, D] -> [groups, B, D/groups, T]: time last, where the FFT wants it."""
    return rearrange(array, "b t (n d) -> n b d t", n=groups)


def _join(array):
    return rearrange(array, "n b d t -> b t (n d)")


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolve(inputs, taps, ahead, size):
    """Lags -ahead .. of `taps` [D, L] over `inputs` [B, T, D], by circles of `size`.

    Only a group's taps are padded to the circle at a time: all of them would take as much as the inputs in float32 twice.
    """
    length = inputs.shape[1]
    groups = _groups(*inputs.shape[::2], size)

    def group(arrays):
        values, taps = arrays
        spectrum = jnp.fft.rfft(values.astype(taps.dtype), size) * _spectrum(taps, ahead, size)
        return jnp.fft.irfft(spectrum, size)[..., :length].astype(inputs.dtype)

    return _join(jax.lax.map(group, (_split(inputs, groups), rearrange(taps, "(n d) l -> n d l", n=groups))))


def _spectrum(taps, ahead, size):
    """Of the circle with lag j at index j and lag -1 - j at index size - 1 - j."""
    return jnp.fft.rfft(jnp.roll(jnp.pad(taps, ((0, 0), (0, size - taps.shape[1]))), -ahead, axis=1))


def _forward(inputs, taps, ahead, size):
    return _convolve(inputs, taps, ahead, size), (inputs, taps)


def _backward(ahead, size, saved, cotangent):
    """Both gradients are correlations, computed from fresh spectra: saving those would take four times the inputs."""
    inputs, taps = saved
    length, count = inputs.shape[1], taps.shape[1]
    groups = _groups(*inputs.shape[::2], size)

    def group(arrays):
        values, outer, taps = arrays
        outer = jnp.fft.rfft(outer.astype(taps.dtype), size)
        inner = jnp.fft.irfft(outer * jnp.conj(_spectrum(taps, ahead, size)), size)[..., :length].astype(inputs.dtype)
        kernel = jnp.sum(outer * jnp.conj(jnp.fft.rfft(values.astype(taps.dtype), size)), axis=0)
        return inner, jnp.roll(jnp.fft.irfft(kernel, size), ahead, axis=1)[:, :count]

    arrays = _split(inputs, groups), _split(cotangent, groups), rearrange(taps, "(n d) l -> n d l", n=groups)
    inner, kernel = jax.lax.map(group, arrays)
    return _join(inner), rearrange(kernel, "n d l -> (n d) l")


_convolve.defvjp(_forward, _backward)
