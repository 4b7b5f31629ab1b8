"""The short convolution before a state: each feature by itself, causal, with taps of its own."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from subquad.kernels import convolution, dispatch


def weigh(
    inputs: Float[Array, "B T C"], taps: nnx.Param, bias: nnx.Param | None, mask: Bool[Array, "B 1 1 T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None, state: Float[Array, "B W C"] | None = None,
    implementation: dispatch.Implementation | None = None,
):  # fmt: skip
    """u_tc = b_c + sum_j p_jc x_{t-j, c} over j = 0 .. K - 1, in the dtype of the inputs, and the state or None.

    Args:
        taps, bias: p [K, C] and b [C], or None.
        mask: the real tokens, which are the first ones of each sample.
        state: the last K - 1 inputs before the first token; then those before the next one are returned, too, in float32.
    """
    apply = functools.partial(
        convolution.depthwise, inputs, taps[...].astype(inputs.dtype), is_causal=True, mask=mask, segment_ids=segment_ids,
        implementation=dispatch.reference_or_best(implementation),
    )
    results: Any = apply() if state is None else apply(initial_state=state, return_state=True)
    outputs, state = (results, None) if state is None else (results[0], results[1].astype(jnp.float32))
    return outputs if bias is None else outputs + bias[...].astype(inputs.dtype)[None, None], state


class CausalConvolution(nnx.Module):
    """`weigh` with parameters.

    Args:
        features, conv_width: C and K.
        use_bias: with b, which is 0 at first.
        param_dtype: of taps and bias. Taps are uniform in +-K^-1/2 at first, as PyTorch's are.
        implementation: of the layer that has it.
    """

    def __init__(
        self, features: int, conv_width: int, *, use_bias: bool = False, param_dtype: Any = jnp.float32,
        implementation: dispatch.Implementation | None = None, rngs: nnx.Rngs,
    ):  # fmt: skip
        bound = conv_width**-0.5
        taps = jax.random.uniform(rngs.params(), (conv_width, features), jnp.float32, -bound, bound)
        self.taps, self.implementation = nnx.Param(taps.astype(param_dtype)), implementation
        self.bias = nnx.Param(jnp.zeros(features, param_dtype)) if use_bias else nnx.data(None)

    def __call__(self, inputs: Float[Array, "B T C"], mask=None, segment_ids=None, state=None):
        """u, and the state after the last real token; without a `state` before the first, None."""
        return weigh(inputs, self.taps, self.bias, mask, segment_ids, state, self.implementation)

    def empty(self, batch_size: int) -> Float[Array, "B W C"]:
        """The state before the first token."""
        width, features = self.taps.shape
        return jnp.zeros((batch_size, width - 1, features), jnp.float32)
