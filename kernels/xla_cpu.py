"""Workarounds for XLA on a CPU, each with its reason; operations apply them at their edges.

Seen with jaxlib 0.10 to 0.12.
"""

import importlib.metadata

import jax
import jax.numpy as jnp

# Up to jaxlib 0.10, XLA on a CPU slices, gathers and updates half precision in float32: it keeps a float32 copy of an array
# that a loop reads or writes. Unsigned integers of 16 bits are moved as they are. Later ones move half precision as it is, and
# copy an array to see it as integers.
MOVES_HALF_AS_FLOAT32 = tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11)


def is_half(dtype) -> bool:
    return dtype in (jnp.bfloat16, jnp.float16)


def to_uint_bits(array):
    """Half precision (bfloat16, float16) as uint16 where XLA moves that better; any other array as it is.

    Raises: NotImplementedError: bits under differentiation: a bit cast has no derivative, and would count as a constant.
        Backward passes that are written by hand differentiate nothing, so only second derivatives meet this.
    """
    return array if uint_bits_dtype(array.dtype) == array.dtype else _uint_bits(array)


@jax.custom_jvp
def _uint_bits(array):
    return jax.lax.bitcast_convert_type(array, jnp.uint16)


@_uint_bits.defjvp
def _no_derivative(primals, tangents):
    raise NotImplementedError(
        f"derivative: order must be 1 in {primals[0].dtype} on this path, got a higher one. Pass float32 arrays, or "
        'implementation="reference".'
    )


def uint_bits_dtype(dtype):
    """The dtype of `to_uint_bits` of an array of this dtype."""
    return jnp.uint16 if MOVES_HALF_AS_FLOAT32 and is_half(dtype) else dtype


def from_uint_bits(array, dtype):
    """The array of this dtype whose `to_uint_bits` this is."""
    return array if array.dtype == dtype else jax.lax.bitcast_convert_type(array, dtype)


def zeros_depending_on(arrays, shape, dtype):
    """Zeros for a loop to write into, allocated only once all of `arrays`, a pytree, are computed.

    XLA on a CPU starts with whatever depends on nothing: the zeros that a backward pass writes gradients into would be
    allocated all through the forward pass. Not on several devices, simulated ones: each would have to be sent a number.
    """
    if jax.default_backend() != "cpu" or jax.device_count() > 1:
        return jnp.zeros(shape, dtype)
    return jnp.full(shape, sum(map(_zero_of, jax.tree.leaves(arrays))).astype(dtype))


def as_own_computation(function, arrays):
    """function(arrays), of floating-point numbers, such that nothing of it is computed before all arrays are, or fused with
    what comes before and after.

    XLA on a CPU drops `jax.lax.optimization_barrier` before it fuses and orders operations. Layer after layer, what is cheap is
    then computed again from arrays that are kept for it, and what depends on parameters alone stands at the start. A loop of
    one round, whose number XLA does not know, is a computation of its own; adding the number of the round, 0, keeps all of it
    inside. `tests/zoo/test_reversible.py` fails when XLA no longer needs this.
    """
    if jax.default_backend() != "cpu":
        return jax.lax.optimization_barrier(function(jax.lax.optimization_barrier(arrays)))
    last = jax.tree.leaves(arrays)[-1]
    empty = lambda like: zeros_depending_on(last, like.shape, like.dtype)
    once = 1 + _zero_of(last).astype(jnp.int32)
    run = lambda i, _: function(jax.tree.map(lambda x: x + i.astype(x.dtype), arrays))
    return jax.lax.fori_loop(0, once, run, jax.tree.map(empty, jax.eval_shape(function, arrays)))


def _zero_of(array):
    """0 as uint32, made of an array such that XLA does not see it."""
    # One from the middle: XLA knows the zeros with which a gradient was padded, at either end.
    some = jnp.real(array[tuple(size // 2 for size in array.shape)]).astype(jnp.float32)
    return jax.lax.bitcast_convert_type(some, jnp.uint32) >> 31 >> 1  # two shifts: XLA would fold one by 32 into a constant


def map_parts(function, parts: int, arrays, axes, axes_out, after):
    """`function` of one part of the arrays at a time, and its results side by side.

    A loop reads and writes each part in place, so what the function transposes is transposed once, a part at a time. The
    outputs are allocated only after `after` is computed. Half precision is not differentiable here: a bit cast has no
    derivative.

    Args:
        function: takes and returns a part of each of the arrays, and of each of the results.
        parts: their number; it divides the size of every axis.
        arrays: a tuple; None in it goes to the function as it is.
        axes: along which each of them is cut; axes_out: along which each result is put together.
    Returns: a tuple of the results.
    """
    sizes = [None if x is None else x.shape[axis] // parts for x, axis in zip(arrays, axes, strict=True)]

    def take(i):
        cut = lambda x, axis, size: jax.lax.dynamic_slice_in_dim(to_uint_bits(x), i * size, size, axis)
        words = zip(arrays, axes, sizes, strict=True)
        return function(*(None if x is None else from_uint_bits(cut(x, axis, size), x.dtype) for x, axis, size in words))

    def step(i, whole):
        put = lambda x, part, axis: jax.lax.dynamic_update_slice_in_dim(x, to_uint_bits(part), i * part.shape[axis], axis)
        return tuple(None if x is None else put(x, *words) for x, *words in zip(whole, take(i), axes_out, strict=True))

    likes = jax.eval_shape(take, 0)
    empty = lambda x, axis: zeros_depending_on(
        after, tuple(n * parts if i == axis else n for i, n in enumerate(x.shape)), uint_bits_dtype(x.dtype)
    )
    whole = tuple(None if x is None else empty(x, axis) for x, axis in zip(likes, axes_out, strict=True))
    whole = jax.lax.fori_loop(0, parts, step, whole)
    return tuple(None if x is None else from_uint_bits(x, like.dtype) for x, like in zip(whole, likes, strict=True))


def write_samples(whole, parts, start, axis: int):
    """`whole` with the part of each sample written along `axis`, from `start` [B] of the sample on.

    XLA on a CPU updates half precision through a float32 copy of all of it. And where one sample's update is read at once and
    kept as well, as in a step of generation, it computes the update twice, each time in a copy of its own: at 4K keys that is
    three quarters of the step. Not what a loop writes; a loop of one round would be none, so there are two at least.
    """
    if jax.default_backend() != "cpu":
        return jax.vmap(lambda x, part, at: jax.lax.dynamic_update_slice_in_dim(x, part, at, axis - 1))(whole, parts, start)

    def write(i, whole):
        sample = jnp.minimum(i, len(parts) - 1).astype(jnp.int32)
        place = [jnp.int32(0)] * whole.ndim
        place[0], place[axis] = sample, start[sample]
        return jax.lax.dynamic_update_slice(whole, jax.lax.dynamic_slice_in_dim(parts, sample, 1), place)

    return jax.lax.fori_loop(0, max(2, len(parts)), write, whole)


def hide_zeros(arrays):
    """The same arrays, without XLA knowing where they are zero.

    Where a state is known to be zero, one of two dot products that XLA hands to its CPU library multiplies by whatever is in
    memory where the zeros should be.
    """
    return jax.tree.map(lambda x: x + 0.0 * jax.lax.broadcasted_iota(x.dtype, x.shape, x.ndim - 1), arrays)
