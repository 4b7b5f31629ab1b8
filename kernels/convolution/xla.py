"""Long convolution by FFT, a group of features at a time, with a backward that recomputes the spectra."""

import functools

import jax
import jax.numpy as jnp
from einops import rearrange

from subquad.kernels.memory import map_after

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
    length, wide = inputs.shape[1], jnp.promote_types(kernel.dtype, jnp.float32)
    kernel = kernel[:, :length].astype(wide)
    ahead = None if anticausal is None or length == 1 else anticausal[:, : length - 1].astype(wide)
    size = fast_length(length + max(kernel.shape[1] - 1, 0 if ahead is None else ahead.shape[1]))
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


def _features(array, groups):
    """[D, L] -> [groups, D/groups, L]."""
    return None if array is None else rearrange(array, "(n d) l -> n d l", n=groups)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _convolve(inputs, kernel, ahead, size):
    """`kernel` [D, L] over the past of `inputs` [B, T, D], and `ahead` (or None) over what follows, by circles of `size`.

    Only a group's taps are put on the circle at a time: all of them would take as much as the inputs in float32 twice.
    """
    length = inputs.shape[1]
    groups = _groups(*inputs.shape[::2], size)

    def group(arrays):
        values, *taps = arrays
        spectrum = jnp.fft.rfft(values.astype(kernel.dtype), size) * _spectrum(*taps, size)
        return jnp.fft.irfft(spectrum, size)[..., :length].astype(inputs.dtype)

    arrays = _split(inputs, groups), _features(kernel, groups), _features(ahead, groups)
    return _join(map_after(inputs, group, arrays))


def _spectrum(kernel, ahead, size):
    """Of the circle with lag j at index j and lag -1 - j at index size - 1 - j."""
    if ahead is not None:
        between = jnp.zeros((kernel.shape[0], size - kernel.shape[1] - ahead.shape[1]), kernel.dtype)
        kernel = jnp.concatenate([kernel, between, jnp.flip(ahead, axis=1)], axis=1)
    return jnp.fft.rfft(kernel, size)


def _forward(inputs, kernel, ahead, size):
    return _convolve(inputs, kernel, ahead, size), (inputs, kernel, ahead)


def _backward(size, saved, cotangent):
    """All gradients are correlations, computed from fresh spectra: saving those would take four times the inputs."""
    inputs, *taps = saved
    length, (kernel, ahead) = inputs.shape[1], taps
    groups = _groups(*inputs.shape[::2], size)

    def group(arrays):
        values, outer, *taps = arrays
        outer = jnp.fft.rfft(outer.astype(kernel.dtype), size)
        inner = jnp.fft.irfft(outer * jnp.conj(_spectrum(*taps, size)), size)[..., :length].astype(inputs.dtype)
        circle = jnp.sum(outer * jnp.conj(jnp.fft.rfft(values.astype(kernel.dtype), size)), axis=0)
        circle = jnp.fft.irfft(circle, size)
        of_ahead = None if ahead is None else jnp.flip(circle[:, size - ahead.shape[1] :], axis=1)
        return inner, circle[:, : kernel.shape[1]], of_ahead

    arrays = _split(inputs, groups), _split(cotangent, groups), *(_features(x, groups) for x in taps)
    inner, *taps = map_after(cotangent, group, arrays)
    return _join(inner), *(None if x is None else rearrange(x, "n d l -> (n d) l") for x in taps)


_convolve.defvjp(_forward, _backward)
