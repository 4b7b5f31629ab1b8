"""What keeps XLA from holding more memory on a CPU than a computation needs."""

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

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


def laid(array):
    """`array` as it is, with its axes in memory in their order.

    What a loop reads and was turned before it, XLA on a CPU copies twice: in the old order, and from that in the new one.
    Told the order, it copies once.
    """
    return laid_p.bind(array)


def _lay(context, array):
    module = context.module_context
    # An export takes no operation without guarantees, and what several devices share would be gathered on each of them.
    if module.lowering_parameters.for_export or not _of_one_device(module.axis_context):
        return [array]
    ordered = lambda x: with_layout_constraint(x, Layout(tuple(range(x.ndim))))
    return mlir.lower_fun(ordered, multiple_results=False)(context, array)


def _of_one_device(axes) -> bool:
    """Whether an array is whole: in a program of one device, or under a `shard_map` over all axes of its mesh."""
    if hasattr(axes, "manual_axes"):
        return axes.manual_axes == frozenset(axes.mesh.axis_names)
    return getattr(axes, "num_devices", None) == 1


laid_p = Primitive("laid")
laid_p.def_impl(lambda x: x)
laid_p.def_abstract_eval(lambda x: x)
ad.deflinear2(laid_p, lambda cotangent, _: [cotangent])
batching.primitive_batchers[laid_p] = lambda arrays, axes: (laid_p.bind(jnp.moveaxis(arrays[0], axes[0], 0)), 0)
mlir.register_lowering(laid_p, lambda _, array: [array])
mlir.register_lowering(laid_p, _lay, platform="cpu")


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


def map_parts(function, parts: int, arrays, axes, axes_out, after):
    """`function` of one part of the arrays at a time, and its results side by side.

    A loop that reads and writes where the parts lie: what the function turns, it turns once and a part at a time. Turned
    before or after a loop, XLA turns it wherever it is used. The results have no room before there is `after`, and halves
    no derivative: bits have none.

    Args:
        function: takes and returns a part of each of the arrays, and of each of the results.
        parts: their number; it divides the size of every axis.
        arrays: a tuple; None in it goes to the function as it is.
        axes: along which each of them is cut; axes_out: along which each result is put together.
    Returns: a tuple of the results.
    """
    sizes = [None if x is None else x.shape[axis] // parts for x, axis in zip(arrays, axes, strict=True)]

    def take(i):
        cut = lambda x, axis, size: jax.lax.dynamic_slice_in_dim(bits(x), i * size, size, axis)
        words = zip(arrays, axes, sizes, strict=True)
        return function(*(None if x is None else numbers(cut(x, axis, size), x.dtype) for x, axis, size in words))

    def step(i, whole):
        put = lambda x, part, axis: jax.lax.dynamic_update_slice_in_dim(x, bits(part), i * part.shape[axis], axis)
        return tuple(None if x is None else put(x, *words) for x, *words in zip(whole, take(i), axes_out, strict=True))

    likes = jax.eval_shape(take, 0)
    room = lambda x, axis: zeros_after(
        after, tuple(n * parts if i == axis else n for i, n in enumerate(x.shape)), bits_dtype(x.dtype)
    )
    whole = tuple(None if x is None else room(x, axis) for x, axis in zip(likes, axes_out, strict=True))
    whole = jax.lax.fori_loop(0, parts, step, whole)
    return tuple(None if x is None else numbers(x, like.dtype) for x, like in zip(whole, likes, strict=True))
