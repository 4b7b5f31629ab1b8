"""Reversible residual layers: the backward pass rebuilds activations from the outputs, so that none are kept."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jaxtyping import Array, Float

# Of trainable parameters, of everything else (masks, keys; it has no gradient), and of a stream: what is added to the other.
Half = Callable[[Any, Any, Float[Array, "B T D"]], Float[Array, "B T D"]]


def run(
    halves: Sequence[tuple[Half, Half]], parameters: Sequence[tuple[Any, Any]], others: Sequence[tuple[Any, Any]],
    first: Float[Array, "B T D"], second: Float[Array, "B T D"],
) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
    """Two residual streams through layers of two halves f and g.

        y_1 = x_1 + f(x_2),   y_2 = x_2 + g(y_1);     backwards   x_2 = y_2 - g(y_1),   x_1 = y_1 - f(x_2)

    Cost: memory of the backward pass that of one layer, whatever their number; time that of one more forward pass.

    Args:
        halves: f and g of each layer. Random draws must come from keys in `others`, so that the same are drawn again.
        parameters, others: the first and second arguments of each f and g.
        first, second: x_1 and x_2. In float32: what half precision rounds away, the way back cannot rebuild.
    Source: Gomez et al., The Reversible Residual Network, 2017, arXiv 1707.04585; Kitaev et al., Reformer, 2020,
        arXiv 2001.04451, section 3.
    """
    return _run(tuple(halves), list(parameters), list(others), first, second)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(halves, parameters, others, first, second):
    for (f, g), (of_f, of_g), (with_f, with_g) in zip(halves, parameters, others, strict=True):
        first = first + f(of_f, with_f, second)
        second = second + g(of_g, with_g, first)
    return first, second


def _forward(halves, parameters, others, first, second):
    outputs = _run(halves, parameters, others, first, second)
    return outputs, (parameters, others, outputs)


def _backward(halves, saved, gradients):
    parameters, others, (first, second) = saved
    of_first, of_second = gradients
    of_parameters = []
    for (f, g), (of_f, of_g), (with_f, with_g) in zip(*map(reversed, (halves, parameters, others)), strict=True):
        added, pull = jax.vjp(lambda p, x, g=g, given=with_g: g(p, given, x), of_g, first)
        second = second - added
        grad_g, more = pull(of_second)
        of_first = of_first + more
        added, pull = jax.vjp(lambda p, x, f=f, given=with_f: f(p, given, x), of_f, second)
        first = first - added
        grad_f, more = pull(of_first)
        of_second = of_second + more
        of_parameters.append((grad_f, grad_g))
        # Else XLA may rebuild several layers before it uses the first.
        first, second, of_first, of_second = jax.lax.optimization_barrier((first, second, of_first, of_second))
    return of_parameters[::-1], None, of_first, of_second


_run.defvjp(_forward, _backward)
