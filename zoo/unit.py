"""Gated units of one head: what layers share whose queries and keys are one projection, scaled and shifted in two ways."""

from typing import Literal, get_args

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from subquad.kernels import precision
from subquad.zoo.checks import check_number, check_sizes, check_word, refuse
from subquad.zoo.positions import rotary

Bias = Literal["rotary", "simple"]


def check_bias(owner: str, bias: str, shared_features: int) -> None:
    """Refuses an unknown bias, and a rotated one of an odd number of features."""
    check_word(owner, "bias", bias, get_args(Bias))
    if bias == "rotary" and shared_features % 2:
        refuse(owner, "shared_features", shared_features, "be even with bias='rotary'", "Use bias='simple'.")


def add_bias(layer, bias: Bias, longest: int, rngs: nnx.Rngs) -> None:
    """Gives a layer the parameters of its bias: two vectors, or a number for each distance below `longest`."""
    draw = lambda *shape: nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), shape, layer.param_dtype))
    if bias == "rotary":
        layer.rotated = draw(2, layer.shared_features)
    else:
        layer.distances = draw(2 * longest - 1)


@precision.promoting
def bias_of(layer, rows: Int[Array, "#B T"], columns: Int[Array, "#B S"]) -> Float[Array, "#B T S"]:
    """What is added to the logits of tokens at these positions, in float32."""
    if hasattr(layer, "distances"):
        table = layer.distances[...].astype(jnp.float32)
        at = columns[:, None, :] - rows[:, :, None] + (len(table) - 1) // 2
        return jnp.take(table, at, mode="clip")
    vectors = layer.rotated[...].astype(jnp.float32)[:, None, None, None]
    spread = lambda vector, at: jnp.broadcast_to(vector, (*at.shape, 1, layer.shared_features))
    left, right = (rotary(spread(vectors[i], at), at, 10_000.0)[:, :, 0] for i, at in enumerate((rows, columns)))
    return jnp.einsum("btz,bsz->bts", left, right)


def add_heads(layer, count: int, rngs: nnx.Rngs) -> None:
    """Gives a layer scale and shift of as many heads."""
    shape = count, layer.shared_features
    layer.query_key_scale = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), shape, layer.param_dtype))
    layer.query_key_shift = nnx.Param(jnp.zeros(shape, layer.param_dtype))


def heads_of(layer, z: Float[Array, "B T Z"]) -> list[Float[Array, "B T Z"]]:
    """kappa z + mu of each head."""
    scale, shift = (x[...].astype(z.dtype) for x in (layer.query_key_scale, layer.query_key_shift))
    return [z * scale[i][None, None] + shift[i][None, None] for i in range(len(scale))]


# ---------------------------------------------------------------------------------------------- gated attention units


def build(
    layer, heads: int, shared_features: int, value_features: int | None, bias: Bias, rotary_base: float | None, longest: int,
    rngs: nnx.Rngs,
) -> None:  # fmt: skip
    """Gives a layer without heads of its own what a gated attention unit has: maps, heads, bias."""
    owner = type(layer).__name__
    value_features = 2 * layer.in_features if value_features is None else value_features
    check_sizes(owner, shared_features=shared_features, value_features=value_features)
    check_bias(owner, bias, shared_features)
    if rotary_base is not None:
        if shared_features % 2:
            refuse(owner, "rotary_base", rotary_base, f"be None with an odd number of shared_features, {shared_features}",
                   "Choose shared_features even.")
        check_number(owner, "rotary_base", rotary_base, "(0, inf)", "10000 is usual, None does not rotate.")
    layer.shared_features, layer.value_features, layer.rotary_base = shared_features, value_features, rotary_base
    add_heads(layer, heads, rngs)
    add_bias(layer, bias, longest, rngs)
    layer.gate = layer.linear(layer.in_features, value_features, rngs)
    layer.value = layer.linear(layer.in_features, value_features, rngs)
    layer.shared = layer.linear(layer.in_features, shared_features, rngs)
    layer.out = layer.linear(value_features, layer.out_features, rngs)


def tokens_of(layer, inputs: Float[Array, "B T D"], is_real) -> tuple[Float[Array, "B T Z"], Float[Array, "B T V"]]:
    """z and v of every token; v is 0 where there is none, so that it counts nowhere."""
    value = nnx.silu(layer.value(inputs))
    value = value if is_real is None else jnp.where(is_real[..., None], value, 0)
    return nnx.silu(layer.shared(inputs)), value


def rotated_heads(layer, z: Float[Array, "B T Z"], positions: Int[Array, "#B T"]) -> list[Float[Array, "B T Z"]]:
    """The heads of tokens at these positions."""
    heads = heads_of(layer, z)
    if layer.rotary_base is None:
        return heads
    return [rotary(head[:, :, None], positions, layer.rotary_base)[:, :, 0] for head in heads]


def squared(logits: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """relu^2."""
    return jnp.square(nnx.relu(logits))


def finish(layer, inputs: Float[Array, "N D"], attended: Float[Array, "N V"]) -> Float[Array, "N F"]:
    """W_o (u * what was attended to)."""
    return layer.out(nnx.silu(layer.gate(inputs)) * attended)
