"""Long convolution by FFT, a group of features at a time, with a backward that recomputes the spectra."""

import functools

import jax
import jax.numpy as jnp

from subquad.kernels.operation import operation
from subquad.kernels.padding import pad_to
from subquad.kernels.xla_cpu import map_parts

# Bytes of one group's padded inputs. On a CPU the spectra of a group then stay well under the 32 MiB above which XLA pays
# for fresh pages at every call, and all groups share one set of buffers.
CPU_BYTES, OTHER_BYTES = 1 << 21, 1 << 28


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


def convolve(inputs, kernel, anticausal, runs):
    length, wide = inputs.shape[1], jnp.promote_types(kernel.dtype, jnp.float32)
    kernel = kernel[:, :length].astype(wide)
    ahead = None if anticausal is None or length == 1 else anticausal[:, : length - 1].astype(wide)
    return _convolve(CPU_BYTES if jax.default_backend() == "cpu" else OTHER_BYTES, inputs, kernel, ahead, runs)


def divisor(number: int, least: int) -> int:
    """The smallest divisor of `number` that is at least `least`, or `number` itself."""
    return next(d for d in range(1, number + 1) if number % d == 0 and d >= min(least, number))


def _circle_and_groups(budget, inputs, kernel, ahead, runs) -> tuple[int, int]:
    """The size of the circle, and how many groups the features make; `budget`: bytes of one group's padded inputs."""
    batch, length, features = inputs.shape
    size = fast_length(length + max(kernel.shape[1] - 1, 0 if ahead is None else ahead.shape[1]))
    if runs is not None:  # each halving keeps spectra for the backward pass
        budget //= length.bit_length()
    return size, divisor(features, -(-batch * features * size * 4 // budget))


def _forward(budget, inputs, kernel, ahead, runs):
    """`kernel` [D, L] over the past of `inputs` [B, T, D], and `ahead` (or None) over what follows, by circles.

    Only a group's taps are put on the circle at a time: all of them would take as much as the inputs in float32 twice.
    """
    length, (size, groups) = inputs.shape[1], _circle_and_groups(budget, inputs, kernel, ahead, runs)

    def group(values, *taps):
        if runs is not None:
            return (_in_runs(runs, values, *taps),)
        spectrum = _circle(values, kernel.dtype, size) * _spectrum(*taps, size)
        return (_line(spectrum, length, size).astype(inputs.dtype),)

    outputs = map_parts(group, groups, (inputs, kernel, ahead), (2, 0, 0), (2,), after=inputs)[0]
    return outputs, (inputs, kernel, ahead, runs)


def _circle(values, dtype, size):
    """The spectra [B, D, size / 2 + 1] of [B, T, D]."""
    return jnp.fft.rfft(values.astype(dtype).swapaxes(1, 2), size)


def _line(spectrum, length, size):
    """And back."""
    return jnp.fft.irfft(spectrum, size)[..., :length].swapaxes(1, 2)


def _spectrum(kernel, ahead, size):
    """Of the circle with lag j at index j and lag -1 - j at index size - 1 - j."""
    if ahead is not None:
        between = jnp.zeros((kernel.shape[0], size - kernel.shape[1] - ahead.shape[1]), kernel.dtype)
        kernel = jnp.concatenate([kernel, between, jnp.flip(ahead, axis=1)], axis=1)
    return jnp.fft.rfft(kernel, size)


def _backward(budget, saved, cotangent):
    """All gradients are correlations, computed from fresh spectra: saving those would take four times the inputs."""
    inputs, kernel, ahead, runs = saved
    size, groups = _circle_and_groups(budget, *saved)

    def group(values, outer, *taps):
        if runs is not None:
            return jax.vjp(functools.partial(_in_runs, runs), values, *taps)[1](outer)
        outer = _circle(outer, kernel.dtype, size)
        inner = _line(outer * jnp.conj(_spectrum(*taps, size)), inputs.shape[1], size).astype(inputs.dtype)
        circle = jnp.sum(outer * jnp.conj(_circle(values, kernel.dtype, size)), axis=0)
        circle = jnp.fft.irfft(circle, size)
        of_ahead = None if ahead is None else jnp.flip(circle[:, size - ahead.shape[1] :], axis=1)
        return inner, circle[:, : kernel.shape[1]], of_ahead

    gradients = map_parts(group, groups, (inputs, cotangent, kernel, ahead), (2, 2, 0, 0), (2, 0, 0), after=cotangent)
    return *gradients, None


def _in_runs(runs, inputs, kernel, ahead):
    """The convolution of some features where tokens see their own run alone; `runs` [B, T] counts upwards."""
    values, flip = inputs.astype(kernel.dtype).transpose(2, 0, 1), functools.partial(jnp.flip, axis=-1)
    if ahead is None:
        past = _past_in_runs(runs[None], values[None], kernel[None])[0]
        return past.transpose(1, 2, 0).astype(inputs.dtype)
    # The future is the past of the flipped sequence: both at once, which halves the time to compile.
    taps = kernel, jnp.pad(ahead, ((0, 0), (1, 0)))
    taps = jnp.stack([pad_to(x, 1, max(x.shape[1] for x in taps)) for x in taps])
    past, future = _past_in_runs(jnp.stack([runs, flip(runs)]), jnp.stack([values, flip(values)]), taps)
    return (past + flip(future)).transpose(1, 2, 0).astype(inputs.dtype)


def _past_in_runs(runs, values, kernel):
    """Of `values` [K, D, B, T] in `runs` [K, B, T] and K x D kernels: a causal convolution by halves.

    At most one run crosses the middle of a block. Of the blocks of 2, 4, 8, .. tokens, each pair of tokens lies in the two
    halves of exactly one.
    """
    length = values.shape[-1]
    size = 1 << (length - 1).bit_length()
    runs, values, kernel = (pad_to(x[..., :size], -1, size) for x in (runs, values, kernel))
    outputs, half = kernel[:, :, None, :1] * values, 1
    while half < size:
        blocks = lambda x, half=half: x.reshape(*x.shape[:-1], -1, 2 * half)
        is_across = (blocks(runs) == blocks(runs)[..., half - 1 : half])[:, None]
        is_left = jnp.arange(2 * half) < half
        sent = jnp.fft.rfft(jnp.where(is_across & is_left, blocks(values), 0))
        received = jnp.fft.irfft(sent * jnp.fft.rfft(kernel[:, :, None, None, : 2 * half]), 2 * half)
        outputs = outputs + jnp.where(is_across & ~is_left, received, 0).reshape(outputs.shape)
        half *= 2
    return outputs[..., :length]


_convolve = operation(_forward, _backward, arrays=("b t d", "d past", "d ahead", "b t"), outputs="b t d", independent="b d")
