"""Long convolution on tensor cores: a Toeplitz matrix for every pair of chunks, made of the taps by pointers.

One kernel does it all: the gradients of a convolution are convolutions, of the cotangent with the taps turned round and of
the cotangent with the inputs turned round.
"""

import functools

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from subquad.kernels import launch, precision

LONGEST_CLASS = 1 << 14  # of lengths that share a tuned configuration: from here on all do


@triton.jit
def convolve_chunks(
    inputs, taps, outputs,
    D: tl.constexpr, S: tl.constexpr, T: tl.constexpr, L: tl.constexpr, SHIFT: tl.constexpr, SHARED: tl.constexpr,
    PRECISION: tl.constexpr, C: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """outputs[t] = sum_s taps[t - s + SHIFT] inputs[s] for one feature of one sample and N chunks of C outputs.

    outputs [B, D, T], inputs [B, D, S], taps [B or 1, D, L], 0 outside of both. A tile is [C, N], a chunk in each column.
    Products of 16-bit numbers are exact; a float32 tap is the sum of two bfloat16 where it meets bfloat16.
    """
    dtype: tl.constexpr = inputs.dtype.element_ty
    SAME: tl.constexpr = taps.dtype.element_ty == dtype
    TILES: tl.constexpr = (T + C * N - 1) // (C * N)
    program = tl.program_id(0).to(tl.int64)
    tile = (program % TILES).to(tl.int32)
    sequence = program // TILES
    row = sequence % D if SHARED else sequence
    inputs += sequence * S
    taps += row * L
    within, column = tl.arange(0, C), tl.arange(0, N)
    lag = within[:, None] - within[None, :] + SHIFT
    position = (tile * N + column[None, :]) * C + within[:, None]
    # Chunk m of taps takes chunk n - m of inputs to chunk n of outputs. Some tap of it lies in 0 .. L - 1, and some input
    # that it meets in 0 .. S - 1.
    least: tl.constexpr = -((SHIFT + C - 1) // C)
    most: tl.constexpr = (L - 1 - SHIFT + C - 1) // C
    first = tl.maximum(least, tile * N - (S - 1) // C)
    last = tl.minimum(most, tile * N + N - 1)
    result = tl.zeros((C, N), tl.float32)
    for m in range(first, last + 1):
        index = lag + m * C
        toeplitz = tl.load(taps + index, mask=(index >= 0) & (index < L), other=0.0)
        source = position - m * C
        values = tl.load(inputs + source, mask=(source >= 0) & (source < S), other=0.0)
        if SAME:
            result = tl.dot(toeplitz, values, result, input_precision=PRECISION)
        elif dtype == tl.bfloat16:
            high = toeplitz.to(tl.bfloat16)
            low = (toeplitz - high.to(tl.float32)).to(tl.bfloat16)
            result = tl.dot(high, values, result, input_precision=PRECISION)
            result = tl.dot(low, values, result, input_precision=PRECISION)
        else:
            result = tl.dot(toeplitz, values.to(tl.float32), result, input_precision=PRECISION)
    tl.store(outputs + sequence * T + position, result.to(outputs.dtype.element_ty), mask=position < T)


def _config(length: int, dtype) -> launch.Config:
    """Tiles of C = 64 or 32 tokens by N chunks: rows as wide as the sequence fills."""
    chunk = 64 if length > 1024 and jnp.dtype(dtype) == jnp.bfloat16 else 32
    columns = 16 if length <= 16 * chunk else 32
    return launch.Config(dict(C=chunk, N=columns), num_warps=4, num_stages=2)


def _run(inputs, taps, *, length, shift, dtype, mode):
    """[B, D, length] in `dtype`: sum_s taps[t - s + shift] inputs[s]."""
    batch, features, source = inputs.shape
    length_class, taps_class = (launch.size_class(size, LONGEST_CLASS) for size in (length, taps.shape[-1]))
    sizes = dict(length=length_class, taps=taps_class, dtype=inputs.dtype.name)
    config = launch.config("convolve_chunks", _config(length, inputs.dtype), **sizes)
    tiles = -(-length // (config.blocks["C"] * config.blocks["N"]))
    constants = dict(
        D=features, S=source, T=length, L=taps.shape[-1], SHIFT=shift, SHARED=taps.shape[0] == 1,
        PRECISION=launch.dot_precision(jnp.float32),
    )  # fmt: skip
    output = jax.ShapeDtypeStruct((batch, features, length), dtype)
    (outputs,) = launch.call(
        convolve_chunks, dict(inputs=inputs, taps=taps), dict(outputs=output),
        grid=batch * features * tiles, constants=constants, config=config, mode=mode,
    )  # fmt: skip
    return outputs


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolve(inputs, taps, shift, mode):
    run = functools.partial(_run, length=inputs.shape[-1], shift=shift, dtype=inputs.dtype, mode=mode)
    return launch.fold_vmap(run, shared=[[1]])(inputs, taps)


def _forward(inputs, taps, shift, mode):
    return _convolve(inputs, taps, shift, mode), (inputs, taps)


def _backward(shift, mode, saved, cotangent):
    inputs, taps = saved
    length, size = inputs.shape[-1], taps.shape[-1]

    def run(inputs, cotangent, taps):
        back = _run(cotangent, jnp.flip(taps, axis=-1), length=length, shift=size - 1 - shift, dtype=inputs.dtype, mode=mode)
        turned = jnp.flip(inputs, axis=-1)
        return back, _run(cotangent, turned, length=size, shift=length - 1 - shift, dtype=jnp.float32, mode=mode)

    back, d_taps = launch.fold_vmap(run, shared=[[2]])(inputs, cotangent, taps)
    return back, d_taps.sum(0, keepdims=True)


precision.define_passes(_convolve, _forward, _backward)


def convolve(inputs, kernel, anticausal, *, mode):
    """See `convolution.convolve`."""
    if inputs.dtype.name not in launch.FLOATS or jnp.float64 in (kernel.dtype, getattr(anticausal, "dtype", None)):
        raise launch.Declined("the kernel takes float32, bfloat16 and float16 only.")
    length = inputs.shape[1]
    # One row of taps from the farthest future to the farthest past: lag l at index l + shift.
    taps = kernel[:, :length].astype(jnp.float32)
    ahead = 0 if anticausal is None else min(anticausal.shape[1], length - 1)
    if ahead:
        taps = jnp.concatenate([jnp.flip(anticausal[:, :ahead].astype(jnp.float32), axis=1), taps], axis=1)
    return _convolve(inputs.swapaxes(1, 2), taps[None], ahead, mode).swapaxes(1, 2)
