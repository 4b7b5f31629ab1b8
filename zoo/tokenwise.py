"""What a layer does to every token alone, a piece of the sequence at a time."""

import functools
import math

import jax
import jax.numpy as jnp

from subquad.kernels.xla_cpu import from_uint_bits, to_uint_bits, uint_bits_dtype, zeros_depending_on

# Bytes, in float32, of an array that is cut, and of a piece of it.
LARGE_BYTES, PIECE_BYTES = 1 << 24, 1 << 22


def tokenwise(function, *arrays, is_linear=False):
    """The function of every token of arrays [B, T, ...], each of whose results is made of the same token of the arrays alone.

    Batch and length are flattened into one axis: with two, XLA on a CPU transposes the operands of the backward matmuls, and is
    twenty times as slow to sum the gradient of a scale where one of them is 1.

    On a CPU, XLA multiplies half precision as float32 and transposes operands in the backward pass: copies as large as all
    activations of the layer. A long sequence is therefore computed a piece at a time. The backward pass keeps the arrays,
    and nothing of what the function makes on the way.

    Args:
        function: of arrays [N, ...]; returns arrays [N, ...] of floating-point numbers, for any N. Parameters that it
            closes over have gradients too.
        arrays: [B, T, ...] of floating-point numbers.
        is_linear: the function is a linear map, which makes nothing on the way; float32 then gains nothing and goes at once.
    Returns: arrays [B, T, ...].
    """

    def flattened(*arrays):
        results = function(*(x.reshape(-1, *x.shape[2:]) for x in arrays))
        return jax.tree.map(lambda x: x.reshape(*arrays[0].shape[:2], *x.shape[1:]), results)

    at_once = is_linear and all(x.dtype == uint_bits_dtype(x.dtype) for x in arrays)
    length = arrays[0].shape[1]
    bytes_of_token = 4 * max(x.shape[0] * math.prod(x.shape[2:]) for x in arrays)
    if at_once or jax.default_backend() != "cpu" or length * bytes_of_token < LARGE_BYTES:
        return flattened(*arrays)
    size = min(length, max(64, PIECE_BYTES // bytes_of_token))
    pieces = (jax.ShapeDtypeStruct((x.shape[0], size, *x.shape[2:]), x.dtype) for x in arrays)
    converted, parameters = jax.closure_convert(flattened, *pieces)
    return _run(converted, size, parameters, arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _run(function, size, parameters, arrays):
    length = arrays[0].shape[1]
    results = jax.eval_shape(lambda: function(*(_take(x, 0, size) for x in arrays), *parameters))
    leaves, tree = jax.tree.flatten(results)

    def step(i, whole):
        start = _start(i, size, length)
        parts = function(*(_take(x, start, size) for x in arrays), *parameters)
        return [_put(x, part, start) for x, part in zip(whole, jax.tree.leaves(parts), strict=True)]

    whole = [_empty(x, arrays[0]) for x in leaves]
    whole = jax.lax.fori_loop(0, -(-length // size), step, whole)
    return tree.unflatten([from_uint_bits(x, like.dtype) for x, like in zip(whole, leaves, strict=True)])


def _forward(function, size, parameters, arrays):
    return _run(function, size, parameters, arrays), (parameters, arrays)


def _backward(function, size, saved, gradients):
    parameters, arrays = saved
    length = arrays[0].shape[1]
    count = -(-length // size)

    def step(i, carry):
        # Backwards: the last piece overlaps its neighbour, so as to be whole, and there the earlier piece must win.
        i = count - 1 - i
        totals, whole = carry
        start = _start(i, size, length)
        cotangents = jax.tree.map(lambda x: _take(x, start, size), gradients)
        if length % size:
            fresh = start + jnp.arange(size) >= i * size
            cotangents = jax.tree.map(lambda x: jnp.where(fresh.reshape(-1, *(1,) * (x.ndim - 2)), x, 0), cotangents)
        _, backward = jax.vjp(
            lambda parameters, parts: function(*parts, *parameters), parameters, [_take(x, start, size) for x in arrays]
        )
        grad_parameters, grad_parts = backward(cotangents)
        totals = [total + x.astype(total.dtype) for total, x in zip(totals, grad_parameters, strict=True)]
        return totals, [_put(x, part, start) for x, part in zip(whole, grad_parts, strict=True)]

    totals = [jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)) for x in parameters]
    totals, whole = jax.lax.fori_loop(0, count, step, (totals, [_empty(x, jax.tree.leaves(gradients)[0]) for x in arrays]))
    totals = [total.astype(x.dtype) for total, x in zip(totals, parameters, strict=True)]
    return totals, tuple(from_uint_bits(x, like.dtype) for x, like in zip(whole, arrays, strict=True))


_run.defvjp(_forward, _backward)


def _start(i, size, length):
    return jnp.minimum(i * size, length - size)


def _take(array, start, size):
    return from_uint_bits(jax.lax.dynamic_slice_in_dim(to_uint_bits(array), start, size, 1), array.dtype)


def _put(array, part, start):
    return jax.lax.dynamic_update_slice_in_dim(array, to_uint_bits(part), start, 1)


def _empty(like, after):
    return zeros_depending_on(after, (like.shape[0], after.shape[1], *like.shape[2:]), uint_bits_dtype(like.dtype))
