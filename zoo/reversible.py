"""Reversible residual layers: the backward pass rebuilds activations from the outputs, so that none are kept."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from subquad.kernels import precision
from subquad.kernels.xla_cpu import as_own_computation
from subquad.zoo.block import real_tokens
from subquad.zoo.experts import RouterLosses, add, no_losses

# Values by name of what a mixer moved in its calls, such as centroids.
Moved = dict[str, Array]
# f of trainable parameters, of everything else (it has no gradient), of what its block moved before, and of a stream: what is
# added to the other stream, and what has moved. g of the same but what moved: what is added, and losses.
Half = Callable[..., Any]


def run(
    halves: Sequence[tuple[Half, Half]], order: Sequence[int], parameters: Sequence[Any], others: Sequence[Any],
    first: Float[Array, "B T D"], second: Float[Array, "B T D"],
) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"], RouterLosses, list[Moved]]:
    """Two residual streams through layers of two halves f and g, the sum of the losses that g tells, and what f moved.

        y_1 = x_1 + f(x_2),   y_2 = x_2 + g(y_1);     backwards   x_2 = y_2 - g(y_1),   x_1 = y_1 - f(x_2)

    Cost: memory of the backward pass that of one layer, whatever their number; time that of one more forward pass.

    Args:
        halves: f and g of each layer. Random draws must come from keys in `others`, so that the same are drawn again.
        order: the number of each layer's block, below that of layers: what one layer moves, the next of its block finds moved.
        parameters, others: of each layer, the first and second arguments of its f and g.
        first, second: x_1 and x_2. In float32: what half precision rounds away, the way back cannot rebuild.
    Source: Gomez et al., The Reversible Residual Network, 2017, arXiv 1707.04585; Kitaev et al., Reformer, 2020,
        arXiv 2001.04451, section 3.
    """
    return _run(tuple(halves), tuple(order), list(parameters), list(others), first, second)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _run(halves, order, parameters, others, first, second):
    return _forward(halves, order, parameters, others, first, second)[0]


def _forward(halves, order, parameters, others, first, second):
    losses, moved, found = no_losses(first.shape[:1]), [Moved() for _ in order], []
    for (f, g), at, own, other in zip(halves, order, parameters, others, strict=True):
        found.append(moved[at])  # the way back finds the same
        added, moved[at] = f(own, other, moved[at], second)
        first = first + added
        added, more = g(own, other, first)
        second, losses = second + added, add(losses, more)
    return (first, second, losses, moved), (parameters, list(zip(others, found, strict=True)), first, second)


def _backward(halves, order, saved, gradients):
    parameters, others, first, second = saved
    *of_streams, of_losses, _ = gradients  # none of what moved
    streams, of_parameters = (first, second, *of_streams), []
    for pair, own, other in zip(*map(reversed, (halves, parameters, others)), strict=True):
        # Apart, since XLA may else rebuild several layers before it is done with the first.
        of_own, streams = as_own_computation(functools.partial(_layer_backward, pair, other, of_losses), (own, streams))
        of_parameters.append(of_own)
    return of_parameters[::-1], None, *streams[2:]


def _layer_backward(halves, other, of_losses, arrays):
    """Parameters, outputs and their gradients of one layer -> gradients of parameters, inputs and their gradients."""
    own, (first, second, of_first, of_second) = arrays
    (f, g), (other, moved) = halves, other
    (added, _), pull = jax.vjp(lambda own, x: g(own, other, x), own, first)
    second = second - added
    of_g, more = pull((of_second, of_losses))
    of_first = of_first + more
    added, pull = jax.vjp(lambda own, x: f(own, other, moved, x)[0], own, second)
    first = first - added
    of_f, more = pull(of_first)
    return jax.tree.map(jnp.add, of_f, of_g), (first, second, of_first, of_second + more)


_run.defvjp(_forward, _backward)


def through(blocks, hidden: Float[Array, "B T D"], call: dict[str, Any], deterministic: bool, rngs: nnx.Rngs | None):
    """(the mean of the two `streams`, [B, T, D], in the dtype of `hidden`; losses of the experts' routers)."""
    first, second, losses = streams(blocks, hidden, call, deterministic, rngs)
    return ((first + second) / 2).astype(hidden.dtype), losses


def streams(blocks, hidden: Float[Array, "B T D"], call: dict[str, Any], deterministic: bool, rngs: nnx.Rngs | None):
    """Features through blocks (`zoo.Block`, of norm_order "pre") as reversible layers; both streams start as the features.

    Args:
        call: of the mixers: mask and segment_ids.
        deterministic, rngs: as in a call of a block.
    Returns: the two streams, [B, T, D] each, in float32 at least, and the losses of the experts' routers. What a mixer moves in
        itself, `nnx.BatchStat`, is written into its block.
    """
    halves, parameters, others = [], [], []
    for block in blocks:
        parts: Any = nnx.split(block, nnx.Param, ...)
        graph, trained, rest = parts
        keys = None if rngs is None or deterministic else (rngs.dropout(), rngs.dropout())
        words = graph, deterministic, hidden.dtype
        halves.append((functools.partial(_mixed, *words), functools.partial(_fed, *words)))
        parameters.append(trained)
        others.append((rest, keys, call))
    stream, order = precision.wide(hidden), [next(at for at, one in enumerate(blocks) if one is block) for block in blocks]
    first, second, losses, moved = run(halves, order, parameters, others, stream, stream)
    for block, values in zip(blocks, moved, strict=True):
        _move(block, values)
    return first, second, losses


def _mixed(graph, deterministic, dtype, trained, other, moved: Moved, stream):
    rest, keys, call = other
    block, draws = _block(graph, trained, rest, deterministic, keys and keys[0])
    _move(block, moved)
    before = {name: variable.get_value() for name, variable in _statistics(block).items()}
    added = block.mix(block.mixer_norm(stream).astype(dtype), draws, call).astype(stream.dtype)
    after = {name: variable.get_value() for name, variable in _statistics(block).items()}
    return added, moved | {name: value for name, value in after.items() if value is not before[name]}


def _fed(graph, deterministic, dtype, trained, other, stream):
    rest, keys, call = other
    block, draws = _block(graph, trained, rest, deterministic, keys and keys[1])
    added, losses = block.feed(block.mlp_norm(stream).astype(dtype), draws, real_tokens(stream, call.get("mask")))
    return added.astype(stream.dtype), losses


def _statistics(block) -> dict[str, nnx.Variable]:
    """What a block writes in a call, by name."""
    return {"/".join(map(str, path)): one for path, one in nnx.to_flat_state(nnx.variables(block, nnx.BatchStat))}


def _move(block, values: Moved) -> None:
    """Writes what has moved, and nothing else: a block may be one that the caller's trace does not let be written."""
    for name, variable in _statistics(block).items():
        if name in values:
            variable.set_value(values[name])


def _block(graph, trained, rest, deterministic, key):
    rngs = None if key is None else nnx.Rngs(dropout=key)
    # A copy: its variables are written, those of other traces may not be.
    return nnx.merge(graph, trained, rest, copy=True), dict(deterministic=deterministic, rngs=rngs)


def extend(blocks, hidden: Float[Array, "B T D"], caches: Sequence[Any], mask, **draws):
    """`through` for T more tokens after those in the mixers' caches -> (features, caches); mixers drop nothing themselves."""
    first = second = precision.wide(hidden)
    extended, real = [], real_tokens(hidden, mask)
    for block, cache in zip(blocks, caches, strict=True):
        mixed, cache = block.mixer.extend(block.mixer_norm(second).astype(hidden.dtype), cache, mask=mask)
        first = first + block.dropped(mixed, draws).astype(first.dtype)
        second = second + block.feed(block.mlp_norm(first).astype(hidden.dtype), draws, real)[0].astype(first.dtype)
        extended.append(cache)
    return ((first + second) / 2).astype(hidden.dtype), tuple(extended)
