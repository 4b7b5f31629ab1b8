"""What keeps XLA from holding more memory on a CPU than a computation needs."""

import jax
import jax.numpy as jnp

# XLA on a CPU has no halves to slice, gather or update: of an array of them that a loop reads or writes it keeps a copy in
# float32. As unsigned integers they are moved as they are.


def bits(array):
    """The bits of bfloat16 or float16; any other array as it is.

    Raises: NotImplementedError: halves under differentiation, where their bits would silently count as constants. Passes
        that are written by hand differentiate nothing, so it is a second derivative that meets this.
    """
    return array if bits_dtype(array.dtype) == array.dtype else _bits(array)


@jax.custom_jvp
def _bits(array):
    return jax.lax.bitcast_convert_type(array, jnp.uint16)


@_bits.defjvp
def _no_derivative(primals, tangents):
    raise NotImplementedError(
        f"derivative: order must be 1 in {primals[0].dtype} on this path, got a higher one. Pass float32 arrays, or "
        'implementation="reference".'
    )


def bits_dtype(dtype):
    """What `bits` of an array of this dtype has."""
    return jnp.uint16 if dtype in (jnp.bfloat16, jnp.float16) else dtype


def numbers(array, dtype):
    """The array of this dtype that `bits` was given."""
    return array if array.dtype == dtype else jax.lax.bitcast_convert_type(array, dtype)


def zeros_after(array, shape, dtype):
    """Zeros for a loop to write into, not before there is `array`.

    XLA on a CPU begins with what waits for nothing: the zeros that a backward pass writes gradients into would be there all
    through the forward pass.
    """
    if jax.default_backend() != "cpu":
        return jnp.zeros(shape, dtype)
    first = array[(0,) * array.ndim].astype(jnp.float32)
    zero = jax.lax.bitcast_convert_type(first, jnp.uint32) >> 31 >> 1  # in two steps: XLA knows what one of 32 gives
    return jnp.full(shape, zero.astype(dtype))


def map_after(after, function, arrays):
    """`jax.lax.map(function, arrays)` with halves as bits and no room for the results before there is `after`.

    It has no derivative: bits have none.
    """
    take = lambda i: function(
        jax.tree.map(lambda x: numbers(jax.lax.dynamic_index_in_dim(bits(x), i, 0, keepdims=False), x.dtype), arrays)
    )
    count, likes = jax.tree.leaves(arrays)[0].shape[0], jax.eval_shape(take, 0)

    def step(i, whole):
        return jax.tree.map(lambda x, one: jax.lax.dynamic_update_index_in_dim(x, bits(one), i, 0), whole, take(i))

    whole = jax.tree.map(lambda x: zeros_after(after, (count, *x.shape), bits_dtype(x.dtype)), likes)
    whole = jax.lax.fori_loop(0, count, step, whole)
    return jax.tree.map(lambda x, like: numbers(x, like.dtype), whole, likes)
