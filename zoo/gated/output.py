"""What layers with a matrix state have around it: values of a width of their own, and a norm and a gate of each head."""

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from subquad.kernels import precision
from subquad.zoo.base import Attention
from subquad.zoo.checks import check_sizes, refuse
from subquad.zoo.projection import Projection, in_pieces, projection

Activation = Literal["silu", "sigmoid"]
ACTIVATIONS = dict(silu=nnx.silu, sigmoid=nnx.sigmoid)  # a layer that held the function could not be pickled


def widen(layer: Attention, value_features: int, shell: Mapping[str, Any], rngs: nnx.Rngs) -> None:
    """Gives a layer value heads of value_features / N features, beside queries and keys of H, and an output map of them.

    Args:
        layer: gets `value_head_features`, and another `value` and `out`.
        value_features: of all N query heads together.
        shell: the options of the layer's shell.
    """
    owner, heads = type(layer).__name__, layer.num_heads
    check_sizes(owner, value_features=value_features)
    if value_features % heads:
        refuse(owner, "value_features", value_features, f"be a multiple of num_heads = {heads}", "Change one of them.")
    layer.value_head_features = features = value_features // heads
    layer.value = projection(shell, layer.in_kv_features, (layer.num_kv_heads, features), rngs=rngs)
    layer.out = projection(shell, (heads, features), layer.out_features, axis=(-2, -1), rngs=rngs)


class GatedNorm(nnx.Module):
    """A norm of each head's features, and a gate.

        y = s * x / sqrt(mean(x^2) + eps) * f(g)            s * u / sqrt(mean(u^2) + eps),  u = x * f(g),  with gate_first

    The size of a matrix state, and so of what is read from it, grows with the tokens that it holds; the norm takes it away.

    Args:
        shape: of the scale: (V,), the same for all heads, or (N, V).
        together: one norm of the features of all heads, where the scale is (N, V).
        is_centred: the mean is subtracted first, and there is a bias behind the scale: a layer norm, where each head is a
            group of a group norm.
        use_bias: with that bias. None: where it is centred.
        activation: f of the gate.
        gate_first: the norm is of what the gate leaves.
        epsilon: added to the mean square.
    """

    def __init__(
        self, shape: tuple[int, ...], *, together: bool = False, is_centred: bool = False, use_bias: bool | None = None,
        activation: Activation = "silu", gate_first: bool = False, epsilon: float = 1e-5,
        param_dtype: Any = jnp.float32,
    ):  # fmt: skip
        self.is_centred, self.activation, self.gate_first, self.epsilon = is_centred, activation, gate_first, epsilon
        self.axes = (-2, -1) if together else -1
        self.scale = nnx.Param(jnp.ones(shape, param_dtype))
        use_bias = is_centred if use_bias is None else use_bias
        self.bias = nnx.Param(jnp.zeros(shape, param_dtype)) if use_bias else nnx.data(None)

    def __call__(
        self, heads: Float[Array, "B T N V"], gate: Float[Array, "B T N V"] | None = None
    ) -> Float[Array, "B T N V"]:
        """y in the dtype of the heads, computed in float32; None: without a gate."""
        return in_pieces(self.of_tokens, heads) if gate is None else in_pieces(self.of_tokens, heads, gate)

    @precision.promoting
    def of_tokens(self, heads: Float[Array, "T N V"], gate: Float[Array, "T N V"] | None = None) -> Float[Array, "T N V"]:
        x, factor = precision.wide(heads), 1 if gate is None else ACTIVATIONS[self.activation](precision.wide(gate))
        if self.gate_first:
            x = x * factor
        if self.is_centred:
            x = x - x.mean(axis=self.axes, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(x**2, axis=self.axes, keepdims=True) + self.epsilon) * self.scale[...]
        x = x if self.bias is None else x + self.bias[...]
        return (x if self.gate_first else x * factor).astype(heads.dtype)


def norm_and_gate(
    norm: GatedNorm, gate: Projection, inputs: Float[Array, "B T D"], heads: Float[Array, "B T N V"]
) -> Float[Array, "B T N V"]:
    """The norm of heads and a gate, which a projection makes of the inputs: of many tokens it is made twice and not kept."""
    return in_pieces(lambda inputs, heads: norm.of_tokens(heads, gate.of_tokens(inputs)), inputs, heads)
