"""Depthwise convolution as a sum over taps, each a product of shifted tokens, which XLA fuses into one pass over memory."""

import functools

import jax
import jax.numpy as jnp
from einops import rearrange

from subquad.kernels import precision
from subquad.kernels.padding import pad_to
from subquad.kernels.xla_cpu import from_uint_bits, to_uint_bits

PIECE = 1024  # tokens
UNROLLED = 32  # taps of one pass over memory: more make a program that compiles slowly


def depthwise(inputs, kernel, state, is_causal):
    """See `convolution.depthwise`; a state of None is 0."""
    return compiled(inputs, kernel, state, 0 if is_causal else (kernel.shape[-2] - 1) // 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _convolve(inputs, kernel, state, ahead):
    """Each token weighs the `ahead` next ones, itself and those before."""
    tokens = _between_zeros(inputs, kernel, state, ahead)
    wide = _wide(inputs, kernel)

    def add(j, outputs):
        return outputs + _tap(kernel, j, wide) * _shifted(tokens, kernel, j, wide)

    return _over_taps(add, kernel, jnp.zeros(_grouped(inputs, kernel).shape, wide)).reshape(inputs.shape).astype(inputs.dtype)


def _forward(inputs, kernel, state, ahead):
    return _convolve(inputs, kernel, state, ahead), (inputs, kernel, state)


def _backward(ahead, saved, cotangent):
    """A token's gradient comes from those that weigh it: the taps in the other order; that of a tap is a product of both."""
    inputs, kernel, state = saved
    (batch, length, features), width, wide = inputs.shape, kernel.shape[-2], _wide(inputs, kernel)
    tokens, outer = _between_zeros(inputs, kernel, state, ahead), _grouped(cotangent, kernel)
    around = lambda x: jnp.pad(x, ((0, 0), (width - 1, width - 1), *((0, 0),) * (x.ndim - 2)))
    padded, taps = around(outer), around(kernel) if kernel.ndim == 4 else kernel

    def add(j, gradient):
        """From the token that is `width - 1 - j` later in `tokens`' count, whose tap `j` this is."""
        cut = lambda x: jax.lax.dynamic_slice_in_dim(x, j, length + width - 1, 1)
        tap = _tap(cut(taps) if kernel.ndim == 4 else taps, j, wide)
        return gradient + tap * cut(padded).astype(wide)

    everywhere = jnp.zeros((batch, length + width - 1, *outer.shape[2:]), wide)
    everywhere = _over_taps(add, kernel, everywhere).reshape(batch, -1, features)
    left = width - 1 - ahead
    grad_inputs = everywhere[:, left : left + length].astype(inputs.dtype)
    grad_state = None if state is None else everywhere[:, : width - 1].astype(state.dtype)

    if kernel.ndim == 2 and outer.shape[3] > 1:  # of several features: products of matrices
        of_taps = _of_shared_taps(outer, tokens, kernel, wide)
    elif kernel.ndim == 2 and state is None and jax.default_backend() == "cpu" and length > PIECE + width:
        of_taps = _of_taps_in_pieces(outer, _grouped(inputs, kernel), kernel, ahead, wide)
    else:
        of_taps = _of_taps(outer, tokens, kernel, wide)
    return grad_inputs, of_taps.astype(kernel.dtype), grad_state


def _of_taps(outer, tokens, kernel, wide):
    """The gradient of taps [W, N], or of each token's own [B, T, W, N]."""

    def of_tap(_, j):
        products = outer.astype(wide) * _shifted(tokens, kernel, j, wide)
        return _, products.sum(-1 if kernel.ndim == 4 else (0, 1, 3))

    # Unrolled, XLA would hold the products of every tap before it sums those of the first.
    return jnp.moveaxis(jax.lax.scan(of_tap, 0, jnp.arange(kernel.shape[-2]))[1], 0, -2)


def _of_taps_in_pieces(outer, inputs, kernel, ahead, wide):
    """`_of_taps` [W, N] of inputs [B, T, N, D / N] without anything around them, a few tokens at a time: these are float32 in
    turn, and of the inputs no copy is kept that has zeros around it.
    """
    length, before = outer.shape[1], kernel.shape[0] - 1
    outer, inputs, dtypes = to_uint_bits(outer), to_uint_bits(inputs), (outer.dtype, inputs.dtype)
    cut = lambda x, start, size: jax.lax.dynamic_slice_in_dim(x, start, size, 1)

    def add(i, total):
        start = jnp.minimum(i * PIECE, length - PIECE)  # the last piece is whole, and counts what is left
        is_new = start + jnp.arange(PIECE) >= i * PIECE
        own = jnp.where(is_new[:, None, None], from_uint_bits(cut(outer, start, PIECE), dtypes[0]), 0)
        first = start + ahead - before  # that it sees, which may not exist
        known = jnp.clip(first, 0, length - PIECE - before)
        seen = from_uint_bits(cut(inputs, known, PIECE + before), dtypes[1])
        seen = cut(jnp.pad(seen, ((0, 0), (before, before), (0, 0), (0, 0))), before + first - known, PIECE + before)
        return total + _of_taps(own, seen, kernel, wide)

    return jax.lax.fori_loop(0, -(-length // PIECE), add, jnp.zeros(kernel.shape, wide))


def _of_shared_taps(outer, tokens, kernel, wide):
    """`_of_taps` [W, N] as diagonals of products of matrices, of blocks of W tokens, since a pass for each tap takes four times
    as long. Tap j of token t weighs place t + W - 1 - j of `tokens`.
    """
    width = kernel.shape[0]
    count = -(-outer.shape[1] // width)
    place = jnp.arange(width)[:, None] + jnp.arange(width - 1, -1, -1)

    def of_group(_, n):  # one after the other, for the memory
        group = lambda x: jax.lax.dynamic_index_in_dim(x, n, 2, keepdims=False).astype(wide)
        blocks = lambda x: rearrange(x, "b (i w) c -> w (b i c)", w=width)
        seen, own = pad_to(group(tokens), 1, (count + 1) * width), blocks(pad_to(group(outer), 1, count * width))
        both = jnp.concatenate([blocks(seen[:, : count * width]), blocks(seen[:, width:])])
        products = jnp.matmul(own, both.T, precision=jax.lax.Precision.HIGHEST)
        return _, jnp.take_along_axis(products, place, axis=1).sum(0)

    return jax.lax.scan(of_group, 0, jnp.arange(kernel.shape[1]))[1].T


precision.define_passes(_convolve, _forward, _backward)

# Compiled once per shape also for callers who compile nothing; inside their `jit` it is part of theirs.
compiled = jax.jit(_convolve, static_argnums=3)


def _over_taps(add, kernel, start):
    width = kernel.shape[-2]
    return jax.lax.scan(lambda x, j: (add(j, x), None), start, jnp.arange(width), unroll=min(width, UNROLLED))[0]


def _wide(*arrays):
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


def _grouped(tokens, kernel):
    """[B, T, D] as [B, T, N, D / N]."""
    return tokens.reshape(*tokens.shape[:2], kernel.shape[-1], -1)


def _between_zeros(inputs, kernel, state, ahead):
    """[B, W - 1 + T, N, D / N]: with what the first token sees before it, and the last one after."""
    if state is None:
        padded = jnp.pad(inputs, ((0, 0), (kernel.shape[-2] - 1 - ahead, ahead), (0, 0)))
    else:
        padded = jnp.concatenate([state.astype(inputs.dtype), inputs], axis=1)
    return _grouped(padded, kernel)


def _shifted(tokens, kernel, j, wide):
    """The tokens that tap j weighs, [B, T, N, D / N]."""
    before = kernel.shape[-2] - 1
    return jax.lax.dynamic_slice_in_dim(tokens, before - j, tokens.shape[1] - before, 1).astype(wide)


def _tap(kernel, j, wide):
    """Tap j, [N, 1] or [B, T, N, 1]."""
    return jax.lax.dynamic_index_in_dim(kernel, j, kernel.ndim - 2, keepdims=False)[..., None].astype(wide)
