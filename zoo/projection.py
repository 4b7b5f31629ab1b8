"""Linear maps of every token, a piece of a long sequence at a time on a CPU."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from subquad.kernels.xla_cpu import from_uint_bits, is_half, to_uint_bits, uint_bits_dtype, zeros_depending_on

# Bytes, in float32, of an array that is cut, and of a piece of it.
LARGE_BYTES, PIECE_BYTES = 1 << 24, 1 << 22


class Projection(nnx.LinearGeneral):
    """`nnx.LinearGeneral` of inputs [B, T, ...], in little memory on a CPU.

    There XLA multiplies half precision as float32, and transposes operands in the backward pass: copies as large as all
    activations of a layer. A long sequence in half precision is therefore computed a piece at a time: at 16,384 tokens of 256
    features in bfloat16 a gradient of softmax attention holds 102 MiB of temporaries in place of 169 (jaxlib 0.10.2).
    """

    def __call__(self, inputs):
        apply = super().__call__
        return in_pieces(apply, inputs) if is_half(inputs.dtype) else flat(apply)(inputs)

    def of_tokens(self, inputs):
        """Of inputs [N, ...], for functions that go through pieces themselves."""
        return super().__call__(inputs)


def projection(shell: Mapping[str, Any], inputs, outputs, *, axis=-1, rngs: nnx.Rngs) -> Projection:
    """One more projection of an attention layer, as the options of its shell say that projections are."""
    words = ("use_bias", "dtype", "param_dtype", "precision", "kernel_init", "bias_init")
    return Projection(inputs, outputs, axis=axis, rngs=rngs, **{word: shell[word] for word in words if word in shell})


def flat(function):
    """The function of arrays [N, ...] for arrays [B, T, ...].

    With two axes in front, XLA on a CPU transposes the operands of the backward matmuls, and is twenty times as slow to sum the
    gradient of a scale where one of them is 1.
    """

    def run(*arrays):
        results = function(*(x.reshape(-1, *x.shape[2:]) for x in arrays))
        return results.reshape(*arrays[0].shape[:2], *results.shape[1:])

    return run


def fit_at_once(arrays) -> bool:
    return jax.default_backend() != "cpu" or 4 * max(x.size for x in arrays) < LARGE_BYTES


def in_pieces(function, *arrays, least: int = 64):
    """The function of every token of arrays [B, T, ...], on a CPU a piece of the tokens at a time.

    The backward pass keeps the arrays, and nothing of what the function makes on the way.

    Args:
        function: of arrays [N, ...]; returns one [N, ...], for any N. Parameters that it closes over have gradients too.
        least: tokens of a piece, however large they are.
    """
    if fit_at_once(arrays):
        return flat(function)(*arrays)
    batch, length = arrays[0].shape[:2]
    bytes_of_token = 4 * batch * max(math.prod(x.shape[2:]) for x in arrays)
    size = min(length, max(least, PIECE_BYTES // bytes_of_token))
    pieces = (jax.ShapeDtypeStruct((batch, size, *x.shape[2:]), x.dtype) for x in arrays)
    converted, parameters = jax.closure_convert(flat(function), *pieces)
    return piece_by_piece(converted, size, parameters, arrays)


def in_rows(function, *arrays):
    """The function of every row of arrays [R, ...], a head of a sample each, on a CPU a few long rows at a time.

    Args:
        function: of arrays [r, ...]; returns one [r, ...], for any r.
    """
    return in_pieces(function, *(x[None] for x in arrays), least=1)[0]


def head_by_head(function, *heads, by_sample=()):
    """function(*heads, *by_sample) of heads that know nothing of each other, on a CPU a few long ones at a time.

    Args:
        function: of arrays [B, T, N, ...] and those by sample; returns one as the first, for any B and N.
        heads: where some arrays have fewer, a head of theirs goes with a group of the others' heads.
        by_sample: arrays [B | 1, ...] that all heads of a sample share, or None.
    """
    if fit_at_once(heads):
        return function(*heads, *by_sample)
    batch, count = len(heads[0]), min(x.shape[2] for x in heads)
    shared = [x for x in by_sample if x is not None]

    def of_rows(*rows):
        rest = iter(rows[len(heads) :])
        return function(*rows[: len(heads)], *(None if x is None else next(rest) for x in by_sample))

    rows = [rearrange(x, "b t (n g) ... -> (b n) t g ...", n=count) for x in heads]
    rows += [jnp.repeat(jnp.broadcast_to(x, (batch, *x.shape[1:])), count, axis=0) for x in shared]
    return rearrange(in_rows(of_rows, *rows), "(b n) t g ... -> b t (n g) ...", b=batch)


def in_turn(function, inputs, state):
    """function(inputs, state) -> (responses, state), on a CPU of a piece of a long sequence after the other.

    The backward pass keeps the inputs and the states between pieces, and nothing of what the function makes on the way.

    Args:
        function: of inputs [B, T, ...] for any T; the responses are one array [B, T, ...] or a tree of them. A call for a
            sequence is that for its pieces, each with the state after the one before. Parameters that it closes over have
            gradients too.
        state: before the first piece, a tree of arrays.
    """
    if fit_at_once([inputs]):
        return function(inputs, state)
    size = min(inputs.shape[1], PIECE_BYTES // (4 * inputs.shape[0] * math.prod(inputs.shape[2:])) or 1)
    whole = inputs.shape[1] // size * size
    piece = jax.ShapeDtypeStruct((inputs.shape[0], size, *inputs.shape[2:]), inputs.dtype)
    converted, parameters = jax.closure_convert(function, piece, state)
    responses, state = turn_by_turn(converted, size, parameters, inputs[:, :whole], state)
    if whole == inputs.shape[1]:
        return responses, state
    rest, state = jax.checkpoint(function)(inputs[:, whole:], state)
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), responses, rest), state


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def piece_by_piece(function, size, parameters, arrays):
    length = arrays[0].shape[1]
    like = jax.eval_shape(lambda: function(*(take(x, 0, size) for x in arrays), *parameters))

    def step(i, outputs):
        start = jnp.minimum(i * size, length - size)
        return put(outputs, function(*(take(x, start, size) for x in arrays), *parameters), start)

    return from_uint_bits(jax.lax.fori_loop(0, -(-length // size), step, empty(like, arrays[0])), like.dtype)


def forward(function, size, parameters, arrays):
    return piece_by_piece(function, size, parameters, arrays), (parameters, arrays)


def backward(function, size, saved, gradients):
    parameters, arrays = saved
    length = arrays[0].shape[1]
    count = -(-length // size)

    def step(i, carry):
        # Backwards: the last piece overlaps its neighbour, so as to be whole, and there the earlier piece must win.
        i = count - 1 - i
        totals, grads = carry
        start = jnp.minimum(i * size, length - size)
        cotangent = take(gradients, start, size)
        if length % size:
            fresh = start + jnp.arange(size) >= i * size
            cotangent = jnp.where(fresh.reshape(-1, *(1,) * (cotangent.ndim - 2)), cotangent, 0)
        pieces = [take(x, start, size) for x in arrays]
        _, pull = jax.vjp(lambda parameters, pieces: function(*pieces, *parameters), parameters, pieces)
        grad_parameters, grad_pieces = pull(cotangent)
        totals = [total + x.astype(total.dtype) for total, x in zip(totals, grad_parameters, strict=True)]
        return totals, [None if x is None else put(x, piece, start) for x, piece in zip(grads, grad_pieces, strict=True)]

    totals = [jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)) for x in parameters]
    grads = [empty(x, gradients, arrays) if jnp.issubdtype(x.dtype, jnp.inexact) else None for x in arrays]
    totals, grads = jax.lax.fori_loop(0, count, step, (totals, grads))
    totals = [total.astype(x.dtype) for total, x in zip(totals, parameters, strict=True)]
    return totals, tuple(x if x is None else from_uint_bits(x, like.dtype) for x, like in zip(grads, arrays, strict=True))


piece_by_piece.defvjp(forward, backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def turn_by_turn(function, size, parameters, inputs, state):
    return turns_forward(function, size, parameters, inputs, state)[0]


def turns_forward(function, size, parameters, inputs, state):
    count = inputs.shape[1] // size
    likes = jax.eval_shape(lambda: function(take(inputs, 0, size), state, *parameters)[0])

    def step(i, carry):
        state, before, outputs = carry
        before = jax.tree.map(lambda all, one: jax.lax.dynamic_update_index_in_dim(all, one, i, 0), before, state)
        responses, state = function(take(inputs, i * size, size), state, *parameters)
        return state, before, jax.tree.map(lambda whole, part: put(whole, part, i * size), outputs, responses)

    before = jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), state)
    carry = state, before, jax.tree.map(lambda like: empty(like, inputs), likes)
    state, before, outputs = jax.lax.fori_loop(0, count, step, carry)
    outputs = jax.tree.map(lambda x, like: from_uint_bits(x, like.dtype), outputs, likes)
    return (outputs, state), (parameters, inputs, before)


def turns_backward(function, size, saved, gradients):
    (parameters, inputs, before), (outer, grad_state) = saved, gradients
    count, last = inputs.shape[1] // size, jax.tree.leaves(outer)[-1]

    def step(i, carry):
        i = count - 1 - i
        totals, grad_state, grad = carry
        piece = take(inputs, i * size, size)
        state = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, 0, keepdims=False), before)
        _, pull = jax.vjp(lambda parameters, piece, state: function(piece, state, *parameters), parameters, piece, state)
        grad_parameters, grad_piece, grad_state = pull((jax.tree.map(lambda x: take(x, i * size, size), outer), grad_state))
        totals = [total + x.astype(total.dtype) for total, x in zip(totals, grad_parameters, strict=True)]
        return totals, grad_state, put(grad, grad_piece, i * size)

    totals = [jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)) for x in parameters]
    carry = totals, grad_state, empty(inputs, last, (outer, inputs))
    totals, grad_state, grad = jax.lax.fori_loop(0, count, step, carry)
    totals = [total.astype(x.dtype) for total, x in zip(totals, parameters, strict=True)]
    return totals, from_uint_bits(grad, inputs.dtype), grad_state


turn_by_turn.defvjp(turns_forward, turns_backward)


def take(array, start, size):
    return from_uint_bits(jax.lax.dynamic_slice_in_dim(to_uint_bits(array), start, size, 1), array.dtype)


def put(array, part, start):
    return jax.lax.dynamic_update_slice_in_dim(array, to_uint_bits(part), start, 1)


def empty(like, array, others=()):
    """The bits of zeros [B, T, ...] for pieces such as `like`, T that of an array which must exist before, and others, too."""
    shape = like.shape[0], array.shape[1], *like.shape[2:]
    return zeros_depending_on((array, others), shape, uint_bits_dtype(like.dtype))
