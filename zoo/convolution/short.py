"""What the lightweight and the dynamic layer share: the convolution, and the layer around it."""

import functools
from typing import ClassVar, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from subquad.kernels import convolution, patterns, precision
from subquad.zoo import dropout
from subquad.zoo.cache import first_real
from subquad.zoo.checks import check_divides, check_rate, check_sizes
from subquad.zoo.headless import Headless, HeadlessShell
from subquad.zoo.projection import in_pieces


class ShortConvolution(nnx.Module):
    """A convolution with taps that sum to 1, one set for each of H groups of consecutive features.

        u = glu(W_I x), or W_I x,   y_tc = sum_j p_jh u_{t-j, c},   h = floor(c H / D)
        p_h = softmax(w_h), or of each token its own where it is dynamic: p_th = softmax((W_Q u_t)_h)

    j runs over 0 .. K - 1 where it is causal, else over K taps around 0. A tap before the first token, after the last or on
    padding has its share of the softmax all the same, and weighs 0.

    Args:
        layer: that has it, and says what features, causality, dtypes and implementation are.
        num_heads, conv_width: H and K.
        is_dynamic: taps of each token.
        use_glu: with the gate.
        dropout_rate: of taps.
    """

    def __init__(
        self, layer: Headless, *, num_heads: int, conv_width: int, is_dynamic: bool, use_glu: bool, dropout_rate: float,
        rngs: nnx.Rngs,
    ):  # fmt: skip
        owner, features = type(layer).__name__, layer.in_features
        check_sizes(owner, num_heads=num_heads, conv_width=conv_width)
        check_rate(owner, dropout_rate)
        check_divides(owner, f"the {features} features of the convolution", features, num_heads=num_heads)
        self.num_heads, self.conv_width, self.dropout_rate = num_heads, conv_width, dropout_rate
        self.features, self.use_glu = features, use_glu
        self.is_causal, self.implementation = layer.is_causal, layer.implementation
        self.input = layer.linear(features, 2 * features if use_glu else features, rngs)
        if is_dynamic:
            self.query = nnx.LinearGeneral(
                features, (conv_width, num_heads), use_bias=False, dtype=layer.dtype, param_dtype=layer.param_dtype,
                precision=layer.precision, rngs=rngs,
            )
        else:  # as the authors' code draws them
            bound = (6 / (conv_width * (1 + num_heads))) ** 0.5
            taps = jax.random.uniform(rngs.params(), (conv_width, num_heads), jnp.float32, -bound, bound)
            self.taps = nnx.Param(taps.astype(layer.param_dtype))

    @property
    def sees(self) -> patterns.Band:
        ahead = 0 if self.is_causal else (self.conv_width - 1) // 2
        return patterns.Band(self.conv_width - 1 - ahead, ahead)

    def weights(self, inputs: Float[Array, "B T D"]) -> Float[Array, "K H"] | Float[Array, "B T K H"]:
        """The taps, of which the first weighs the furthest token ahead."""
        if hasattr(self, "query"):
            return in_pieces(lambda token: shares(self.query(token), inputs.dtype), inputs)
        return shares(self.taps[...], inputs.dtype)

    def __call__(
        self, inputs: Float[Array, "B T D"], mask: Bool[Array, "B 1 1 T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None, dropout_rng=None, state: Float[Array, "B W D"] | None = None,
    ):  # fmt: skip
        """y; with a `state`, the last u before the first token, also that after the last real one, in float32."""
        inputs = in_pieces(lambda token: nnx.glu(self.input(token)) if self.use_glu else self.input(token), inputs)
        weights = self.weights(inputs)
        if dropout_rng is not None:
            weights = dropout.drop(dropout_rng, self.dropout_rate, weights)
        apply = functools.partial(
            convolution.depthwise, inputs, weights, mask=mask, segment_ids=segment_ids, is_causal=self.is_causal,
            implementation=self.implementation,
        )  # fmt: skip
        if state is None:
            return apply()
        outputs, state = apply(initial_state=state, return_state=True)
        return outputs, state.astype(jnp.float32)

    def empty(self, batch_size: int) -> Float[Array, "B W D"]:
        """The state before the first token."""
        return jnp.zeros((batch_size, self.conv_width - 1, self.features), jnp.float32)

    def after(self, inputs: Float[Array, "B T D"], state: Float[Array, "B W D"], counts: Int[Array, "B"] | None):
        """(y, state) of T more tokens from `state` on, of which the first `counts` are real; None: all."""
        return self(inputs, first_real(inputs, counts), state=state)


class ConvolutionLayer(Headless):
    """A `ShortConvolution` and an output map; a variant says whether the taps are of each token."""

    is_dynamic: ClassVar[bool]

    def __init__(
        self,
        in_features: int,
        *,
        num_heads: int = 16,
        conv_width: int = 31,
        use_glu: bool = True,
        is_causal: bool = False,
        dropout_rate: float = 0.0,
        rngs: nnx.Rngs,
        **shell: Unpack[HeadlessShell],
    ):
        super().__init__(in_features, is_causal=is_causal, rngs=rngs, **shell)
        self.convolution = ShortConvolution(
            self, num_heads=num_heads, conv_width=conv_width, is_dynamic=self.is_dynamic, use_glu=use_glu,
            dropout_rate=dropout_rate, rngs=rngs,
        )  # fmt: skip
        self.out = self.linear(in_features, self.out_features, rngs)
        self.sees = self.convolution.sees
        self.dropout_rate, self.deterministic = dropout_rate, True  # `train()` and `eval()` set it

    def draws(self, deterministic, rngs):
        return dropout.draws(self, deterministic, rngs)

    def respond(self, inputs, mask, segment_ids, dropout_rng=None):
        return self.convolution(inputs, mask, segment_ids, dropout_rng)

    def state(self, batch_size):
        return self.convolution.empty(batch_size)

    def respond_after(self, inputs, state, counts):
        return self.convolution.after(inputs, state, counts)


def shares(logits: Float[Array, "*B K H"], dtype) -> Float[Array, "*B K H"]:
    """The softmax over taps, made in float32."""
    return jax.nn.softmax(precision.wide(logits), axis=-2).astype(dtype)
