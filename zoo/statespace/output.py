"""What state space layers do with each token by itself: the term D u, an activation, and a gate."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from subquad.zoo.checks import check_word, refuse
from subquad.zoo.headless import Headless

Gate = Literal["full", "half", "only"]
GATES = get_args(Gate)


def output_map(layer: Headless, gate: Gate | None, rngs: nnx.Rngs) -> nnx.Linear:
    """W and b of `activated`; refuses a gate that is not known, or that multiplies D features to give another number."""
    owner, size, out_features = type(layer).__name__, layer.in_features, layer.out_features
    if gate is not None:
        check_word(owner, "gate", gate, GATES)
    if gate in ("half", "only") and out_features != size:
        refuse(owner, "out_features", out_features, f"be in_features = {size} with gate={gate!r}", "Use gate='full'.")
    return layer.linear(size, 2 * out_features if gate == "full" else out_features, rngs)


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], dtype) -> nnx.Param:
    """Standard normal numbers, drawn in float32."""
    return nnx.Param(jax.random.normal(rngs.params(), shape, jnp.float32).astype(dtype))


def skipped(skip: nnx.Param, inputs: Float[Array, "N D"], responses: Float[Array, "N D"]) -> Float[Array, "N D"]:
    """y = C x + D u."""
    return responses + skip[...].astype(inputs.dtype)[None] * inputs


def activated(y: Float[Array, "N D"], linear: nnx.Linear, gate: Gate | None) -> Float[Array, "N F"]:
    """The outputs of a layer from y, through a linear map W.

        None    W gelu(y) + b
        full    glu(W gelu(y) + b): half of the features, gated by the other half
        half    g sigmoid(W g + b),  g = gelu(y)
        only    y sigmoid(W gelu(y) + b)
    """
    hidden = nnx.gelu(y, approximate=False)
    if gate == "full":
        return gated_linear(linear, hidden)
    if gate is None:
        return linear(hidden)
    return (hidden if gate == "half" else y) * nnx.sigmoid(linear(hidden))


def gated_linear(linear, inputs):
    """glu(W x + b): one half of the features of a linear layer, gated by the other half.

    Each half by itself: the gradients of both would be one array, twice as wide as any other. A gradient of S4D holds 25 MB
    of temporaries in place of 32 (4,096 tokens of 256 features in float32; jaxlib 0.10.2 on a CPU).
    """
    graph, params = nnx.split(linear)
    half = lambda i: nnx.merge(graph, jax.tree.map(lambda x: jnp.split(x, 2, -1)[i], params))(inputs)
    return half(0) * nnx.sigmoid(half(1))
