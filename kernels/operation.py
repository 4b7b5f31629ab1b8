"""An operation from two pure functions: its gradient, `jax.vmap`, and its share on each device of a mesh, written once.

    forward   (static, *arrays) -> (outputs, residuals)
    backward  (static, residuals, cotangents) -> gradients

`operation` names the axes of every array, as einops does, and which of them are independent: what is computed at one index
depends on no other index. Along these a mesh may cut the arrays under plain `jax.jit`. Each device then runs the same two
functions on its own part, so they take all sizes from the arrays that they are given.
"""

import contextvars
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive, jaxpr_as_fun, jaxprs_in_params
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from subquad.kernels import precision


def operation(
    forward: Callable,
    backward: Callable,
    *,
    arrays: Any,
    outputs: Any,
    saved: Sequence[str] = (),
    independent: str = "b n",
    shared: Sequence[Sequence[int]] | None = None,
    primal: Callable | None = None,
    name: str | None = None,
) -> Callable:
    """The function (static, *arrays) -> outputs, with the gradient that `backward` computes.

    Under `jax.vmap` the mapped axis becomes part of the batch. On a mesh an independent axis that is sharded over N devices
    costs each of them 1 / N of the work and needs no communication; along all other axes arrays are gathered. Outside of
    `jax.jit` it is compiled once per shape.

    An array with an axis of 1 where others have more is shared, by all samples or all heads. Key heads that are fewer than
    query heads have the same letter: they are cut into whole groups only. An output or gradient that lacks an independent
    axis, or has 1 of it, is a sum over it, and the shares of the devices are added up.

    Args:
        forward: `static` is hashable. Residuals that are arrays or outputs are recognised, and stored once.
        backward: returns one gradient for each array, None where there is none.
        arrays, outputs: the axes of each, as "b t n h": a string, or a pytree of them. Arrays may be None.
        saved: those of the residuals that are neither arrays nor outputs, in their order.
        independent: the axes that a mesh may cut. The first is the batch, and the first axis of the arrays that have it.
        shared: the arrays, by place, that may have a batch of 1 while others have more when `jax.vmap` is folded; those of
            one group have it together or not at all. None: each may.
        primal: (static, *arrays) -> outputs, where these alone are less work than `forward`.
        name: of outputs and residuals, for the policies of `jax.checkpoint`.

    Example:
        >>> forward = lambda static, x, weight: (x * weight, (x, weight))
        >>> backward = lambda static, saved, grad: (grad * saved[1], (grad * saved[0]).sum(0, keepdims=True))
        >>> scale = operation(forward, backward, arrays=("b n h", "b n h"), outputs="b n h")
        >>> jax.grad(lambda weight: scale(None, jnp.ones((3, 1, 2)), weight).sum())(jnp.ones((1, 1, 2))).tolist()
        [[[3.0, 3.0]]]
    """
    call = functools.partial(over_devices, independent=tuple(independent.split()), shared=shared)
    is_none = lambda x: x is None
    # The place of each array that is given among all arrays, counting those that are None.
    places_of = lambda given: tuple(i for i, x in enumerate(jax.tree.leaves(given, is_leaf=is_none)) if x is not None)

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def run(static, *given):
        only = functools.partial(primal, static) if primal else lambda *given: forward(static, *given)[0]
        return call(only, given, arrays, outputs, places_of(given))

    def run_forward(static, *given):
        # Only residuals that are new leave the call. Once it was traced: which they are, and how to put all together again.
        traced = []

        def outputs_and_new(*given):
            results, residuals = forward(static, *given)
            leaves, structure = jax.tree.flatten(residuals)
            known = jax.tree.leaves((given, results))
            indices = [_index(leaf, known) for leaf in leaves]
            traced[:] = indices, structure
            return results, tuple(leaf for leaf, index in zip(leaves, indices, strict=True) if index is None)

        results, new = call(outputs_and_new, given, arrays, (outputs, tuple(saved)), places_of(given))
        if name is not None:
            results, new = checkpoint_name((results, new), name)
        indices, structure = traced
        known, new = _named((given, results), (arrays, outputs)), iter(_named(new, tuple(saved)))
        leaves = [next(new) if index is None else known[index] for index in indices]
        # The first of `known` are the arrays that are given.
        place_of_index = dict(enumerate(places_of(given)))
        places = tuple(place_of_index.get(index) for index in indices)
        return results, Residuals(structure.unflatten([x for x, _ in leaves]), tuple(axes for _, axes in leaves), places)

    def run_backward(static, residuals, cotangents):
        structure = jax.tree.structure(residuals.arrays)
        axes = structure.unflatten(residuals.axes), outputs
        function = functools.partial(backward, static)
        return call(function, (residuals.arrays, cotangents), axes, arrays, residuals.places)

    run.defvjp(run_forward, run_backward)
    return jax.jit(run, static_argnums=0)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["arrays"], meta_fields=["axes", "places"])
@dataclasses.dataclass
class Residuals:
    """What `backward` is given, and of each leaf its axes, and its place among the arrays of the operation or None."""

    arrays: Any
    axes: tuple[str, ...]
    places: tuple[int | None, ...]


def _index(leaf, known: list) -> int | None:
    """Where this very array is among others; None: it is new."""
    return next((i for i, x in enumerate(known) if x is leaf), None)


def _named(tree, axes) -> list[tuple[jax.Array, str]]:
    """The leaves of a pytree, each with its axes; None is no leaf."""
    leaves, structure = jax.tree.flatten(tree, is_leaf=lambda x: x is None)
    return [(x, name) for x, name in zip(leaves, structure.flatten_up_to(axes), strict=True) if x is not None]


def over_devices(function: Callable, arrays: tuple, axes, axes_out, places, *, independent: tuple[str, ...], shared):
    """`function(*arrays)` where `jax.vmap` folds and a mesh cuts; the options are those of `operation`.

    `places`: of the leaves among the arrays of the operation, see `Residuals`; for `shared`.
    """
    structure, results = jax.tree.structure(arrays), []

    @precision.promoting
    def flat(*leaves):
        tree = function(*structure.unflatten(leaves))
        results[:] = jax.tree.structure(tree), tuple(axes for _, axes in _named(tree, axes_out))
        return tuple(jax.tree.leaves(tree))

    leaves, axes = zip(*_named(arrays, axes), strict=True)
    places = (*places, *[None] * (len(leaves) - len(places)))
    groups = [{i} for i in range(len(leaves))]
    if shared is not None:
        groups = [{i for i, place in enumerate(places) if place in group} for group in shared]
    has_batch = lambda names: [name.split()[:1] == [independent[0]] for name in names]
    folded = folding(flat, has_batch(axes), lambda: has_batch(results[1]), groups)
    outputs = _bind(folded, flat, leaves, axes, lambda: results[1], independent)
    return results[0].unflatten(outputs)


# -------------------------------------------------------------------------------------------------------- the primitive


def _bind(function, plain, arrays, axes, axes_out, independent):
    """`plain`: the function without folding. `axes_out`: a function that knows them once `function` was traced."""
    part = Partition(as_traced(function), axes, axes_out, independent, tuple(x.shape for x in arrays))
    call = custom_partitioning(jax.jit(function))
    call.def_partition(part.partition, sharding_rule=part.sharding_rule)
    # Several programs may hold this call, and each asks for the shapes of its outputs.
    with jax.disable_jit(False):  # without jit there is no part to cut
        jaxpr = jax.make_jaxpr(call)(*arrays)
    part.shapes_out = tuple(x.shape for x in jaxpr.out_avals)
    return on_mesh_p.bind(*arrays, jaxpr=jaxpr, function=function, plain=plain, part=part)


def _differentiate(arrays, tangents, *, plain, **params):
    """Second derivatives are not partitioned."""
    outputs = on_mesh_p.bind(*arrays, plain=plain, **params)
    varied = [i for i, tangent in enumerate(tangents) if type(tangent) is not ad.Zero]

    def run(*some):
        return plain(*(dict(enumerate(arrays)) | dict(zip(varied, some, strict=True))).values())

    _, tangents_out = jax.jvp(run, [arrays[i] for i in varied], [tangents[i] for i in varied])
    return outputs, tangents_out


def _batch(arrays, mapped, *, function, plain, part, **_):
    """An axis more of each mapped array: independent, too."""
    is_mapped = [axis is not None for axis in mapped]
    arrays = [jnp.moveaxis(x, axis, 0) if has else x for x, axis, has in zip(arrays, mapped, is_mapped, strict=True)]
    own = f"vmap{len(part.independent)}"
    axes = tuple(f"{own} {names}" if has else names for names, has in zip(part.axes, is_mapped, strict=True))
    axes_out = tuple(f"{own} {names}" for names in part.axes_out())
    function, plain = (jax.vmap(f, [0 if has else None for has in is_mapped]) for f in (function, plain))
    outputs = _bind(function, plain, arrays, axes, lambda: axes_out, (*part.independent, own))
    return outputs, [0] * len(outputs)


def _lower(context, *arrays, jaxpr, function, **_):
    # An exported program is compiled elsewhere, where this process cannot be called back to partition it. And JAX keeps no
    # host callback of a part alive: Triton's interpreter would be called where it no longer is.
    is_whole = context.module_context.lowering_parameters.for_export or _calls_host(jaxpr.jaxpr)
    run = function if is_whole else jaxpr_as_fun(jaxpr)
    return mlir.lower_fun(run, multiple_results=True)(context, *arrays)


def _calls_host(jaxpr) -> bool:
    inner = lambda equation: any(map(_calls_host, jaxprs_in_params(equation.params)))
    return any("callback" in equation.primitive.name or inner(equation) for equation in jaxpr.eqns)


on_mesh_p = Primitive("on_mesh")
on_mesh_p.multiple_results = True
on_mesh_p.def_impl(lambda *arrays, jaxpr, **_: jaxpr_as_fun(jaxpr)(*arrays))
on_mesh_p.def_abstract_eval(lambda *_, jaxpr, **__: jaxpr.out_avals)
ad.primitive_jvps[on_mesh_p] = _differentiate
batching.primitive_batchers[on_mesh_p] = _batch
mlir.register_lowering(on_mesh_p, _lower)


def as_traced(function: Callable) -> Callable:
    """`function` under the settings of now: a mesh's part is traced again when XLA compiles, in another thread."""
    matmul, wide, context = jax.config.jax_default_matmul_precision, jax.config.jax_enable_x64, contextvars.copy_context()

    def run(*arrays):
        with jax.default_matmul_precision(matmul), jax.enable_x64(wide):
            return context.copy().run(function, *arrays)

    return run


# ------------------------------------------------------------------------------------------------------- the partition


@dataclasses.dataclass(eq=False)
class Partition:
    """How a call is cut on a mesh, by the shapes of the whole."""

    function: Callable
    axes: tuple[str, ...]
    axes_out: Callable[[], tuple[str, ...]]
    independent: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    shapes_out: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self):
        # Under a `shard_map` over some axes of a mesh, XLA shows only the other ones.
        self.outer = jax.sharding.get_abstract_mesh()

    @property
    def named(self) -> list[tuple[tuple[int, ...], list[str]]]:
        """The shape and the axes of each array, then of each output."""
        axes = [names.split() for names in (*self.axes, *self.axes_out())]
        return list(zip((*self.shapes, *self.shapes_out), axes, strict=True))

    def sizes(self, letter: str) -> set[int]:
        """What an axis has in the arrays that are not shared along it."""
        return {size for shape, axes in self.named for size, axis in zip(shape, axes, strict=True) if axis == letter} - {1}

    def sharding_rule(self, *_):
        """Which axes keep their sharding from arrays to outputs, in Shardy's words.

        Two sizes of an axis, N heads and K key heads, are K groups. What is not independent bears a name of its own
        everywhere, so that no sharding of it goes anywhere.
        """
        words, groups, whole = [], {}, []
        for shape, axes in self.named:
            names = []
            for size, letter in zip(shape, axes, strict=True):
                least = min(self.sizes(letter), default=1) if letter in self.independent else 0
                if size == least > 1:
                    names.append(letter)
                elif size > least > 1 and len(self.sizes(letter)) == 2 and size % least == 0:
                    names.append(f"({letter} {letter}_group)")
                    groups[f"{letter}_group"] = size // least
                else:
                    names.append(f"whole{len(whole)}")
                    whole.append(names[-1])
            words.append(" ".join(names))
        count = len(self.shapes)
        rule = f"{', '.join(words[:count])} -> {', '.join(words[count:])}"
        return rule, dict(need_replication_factors=tuple(whole), **groups)

    def cuts(self, mesh, specs) -> dict[str, tuple[str, ...]]:
        """The mesh axes over which each independent axis is cut: those of the first array that is, as far as they divide."""
        taken, free = {}, set(mesh.axis_names)
        for letter in self.independent:
            for (shape, axes), spec in zip(self.named, specs, strict=True):
                for size, axis, names in zip(shape, axes, (*spec, *[None] * (len(shape) - len(spec))), strict=True):
                    names = () if names is None else names if isinstance(names, tuple) else (names,)
                    if letter in taken or axis != letter or size == 1 or not free.issuperset(names):
                        continue
                    while any(size % math.prod(mesh.shape[name] for name in names) for size in self.sizes(letter)):
                        names = names[:-1]
                    if names:
                        taken[letter], free = names, free - set(names)
        return taken

    def partition(self, mesh, arrays, outputs):
        """What XLA asks for: a function of the parts, and how arrays and outputs are cut."""
        outer, specs = mesh, None
        if mesh.empty:
            mesh, outer = self.automatic(arrays[0].sharding)
        specs = [spec_of(x.sharding, mesh) for x in (*arrays, *outputs)]
        cuts = self.cuts(mesh, specs)
        shardings, sums = [], []
        for shape, axes in self.named:
            spec = [cuts.get(axis) if size > 1 else None for size, axis in zip(shape, axes, strict=True)]
            shardings.append(NamedSharding(mesh, PartitionSpec(*spec)))
            sums.append(tuple(name for names in cuts.values() if names not in spec for name in names))
        count = len(self.shapes)

        def part(*parts):
            results = self.function(*parts)
            return tuple(summed(x, names) for x, names in zip(results, sums[count:], strict=True))

        return outer, part, tuple(shardings[count:]), tuple(shardings[:count])

    def automatic(self, sharding) -> tuple[Mesh, Mesh]:
        """The mesh of the axes that `shard_map` has left to XLA, and the whole one."""
        if self.outer.empty:
            raise NotImplementedError("operation: mesh must be known under a partial jax.shard_map. Use jax.jit around it.")
        # Only positions count: XLA numbers the devices by them.
        devices = np.array(list(sharding.device_set)).reshape(self.outer.axis_sizes)
        manual = tuple(kind == AxisType.Manual for kind in self.outer.axis_types)
        inner = devices[tuple(0 if fixed else slice(None) for fixed in manual)]
        names = [name for name, fixed in zip(self.outer.axis_names, manual, strict=True) if not fixed]
        return Mesh(inner, names), Mesh(devices, self.outer.axis_names)


def spec_of(sharding, mesh) -> PartitionSpec:
    if isinstance(sharding, NamedSharding):
        return sharding.spec
    from jax._src.sharding_impls import parse_flatten_op_sharding

    return parse_flatten_op_sharding(sharding._hlo_sharding, mesh)[0]


def summed(x, names: tuple[str, ...]):
    """The sum over mesh axes; half precision is summed in float32."""
    if not names:
        return x
    wide = precision.wide(x) if jnp.issubdtype(x.dtype, jnp.inexact) else x
    return jax.lax.psum(wide, names).astype(x.dtype)


# ------------------------------------------------------------------------------------------------------------- batching


def folding(function: Callable, has_batch: Sequence[bool], gives_batch: Callable[[], Sequence[bool]], groups) -> Callable:
    """`function` with a rule for `jax.vmap`: the mapped axis becomes part of the batch, and there is still one launch.

    Where it cannot, because something has no batch that is mapped or given, `function` is mapped itself.

    Args:
        function: takes and returns arrays. An array with a full batch gets a gradient with one.
        has_batch: which arrays have the batch as their first axis; it may be 1 for all samples.
        gives_batch: which outputs do, asked after `function` was traced. One with 1 sample is a sum over them.
        groups: sets of arrays, by place, that may keep a batch of 1 when all of them have it.
    """

    def folded(*arrays):
        batches_out = []

        @jax.custom_batching.custom_vmap
        def run(*arrays):
            outputs = function(*arrays)
            batches_out[:] = [x.shape[:1] for x in outputs]
            return outputs

        @run.def_vmap
        def rule(size, mapped, *arrays):
            if not all(gives_batch()) or any(m and not has for m, has in zip(mapped, has_batch, strict=True)):
                outputs = jax.vmap(function, [0 if m else None for m in mapped])(*arrays)
                return outputs, (True,) * len(outputs)
            shapes = [x.shape[1:] if m else x.shape for x, m in zip(arrays, mapped, strict=True)]
            batch = max(shape[0] for shape, has in zip(shapes, has_batch, strict=True) if has)

            def in_one_batch(i, x):
                x = x if mapped[i] else jnp.broadcast_to(x, (size, *shapes[i]))
                x = x if shapes[i][0] == batch else jnp.broadcast_to(x, (size, batch, *shapes[i][1:]))
                return x.reshape(size * batch, *shapes[i][1:])

            def outputs_with(shared):
                """Of one call, to which the arrays in `shared` go as they are."""
                stays = lambda i: i in shared or not has_batch[i]
                return folded(*(x if stays(i) else in_one_batch(i, x) for i, x in enumerate(arrays)))

            single = {i for i, has in enumerate(has_batch) if has and not mapped[i] and shapes[i][0] == 1}
            shared = {i for group in groups if group <= single for i in group}
            outputs = outputs_with(shared)
            if shared and any(x.shape[0] != size * batch for x in outputs):  # a gradient, summed over what was mapped as well
                outputs = outputs_with(set())
            outputs = [x.reshape(size, batch, *x.shape[1:]) for x in outputs]
            # What was a sum over the batch before it was mapped is one again.
            sums = [before != (batch,) for before in batches_out]
            outputs = tuple(x.sum(1, keepdims=True) if is_sum else x for x, is_sum in zip(outputs, sums, strict=True))
            return outputs, (True,) * len(outputs)

        return run(*arrays)

    return folded
