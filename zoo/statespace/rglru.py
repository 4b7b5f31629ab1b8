"""RG-LRU: Griffin's recurrent block, a real diagonal recurrence whose decay the token chooses."""

import math
from typing import Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from subquad.kernels import precision, scan
from subquad.zoo.base import Support
from subquad.zoo.checks import check_divides, check_sizes
from subquad.zoo.convolution.taps import weigh
from subquad.zoo.headless import Headless, HeadlessShell
from subquad.zoo.positions import run_starts
from subquad.zoo.projection import in_pieces

SHARPNESS = 8.0  # c
TINY = 1e-30  # under a square root, so that its derivative is finite


class RGLRU(Headless):
    """Griffin's recurrent block: a gated recurrence behind a short convolution, beside a gate of the whole.

        u_t = b + sum_j k_j * (W_2 x_{t-j}),   j = 0 .. K - 1
        r_t = sigmoid(W_a u_t + b_a),   i_t = sigmoid(W_i u_t + b_i),   a_t = sigmoid(Lambda)^(c r_t),   c = 8
        h_t = a_t * h_{t-1} + sqrt(1 - a_t^2) * i_t * u_t                                                  (section 2.4)
        outputs = W_o (gelu(W_1 x_t) * h_t)

    W_a and W_i are block-diagonal. Where r is near 0, the state is kept and the token ignored.

    Cost: time O(T R (D + R / J)) for J blocks, memory O(T R), log T steps deep; one extended token
        O(R (D + R / J)) and a cache of K R numbers.
    Differs from the paper: not at all. The released code, RecurrentGemma's, gives the first token of a text weight 1, not
        sqrt(1 - a^2), bounds the derivative of the root by 1,000, draws sigmoid(Lambda), not its power c, between 0.9 and
        0.999, and has the approximate GELU; taps start as there.

    Args:
        in_features: features D of the inputs.
        hidden_features: R of the recurrence; the paper's is about 4 D / 3. None: in_features.
        num_blocks: J blocks of W_a and of W_i; must divide R.
        conv_width: taps K.
        is_causal: must be True: a token sees itself and those before it.
        rngs: `rngs.params()` draws the parameters.
        shell: see `Headless`.
    Call:
        inputs_q: [*B, T, D].  mask: True = attend; key padding only, [*B, 1, 1, T]; no time passes at padding.
        segment_ids: [T] or [*B, T]: different runs of equal ids do not see each other; the taps are then laid out for every
            token, O(T K R) numbers.
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters.
    Raises: ValueError: num_blocks that does not divide R; is_causal=False; a pairwise mask.
    Numerics: decays and states in float32, states rounded to the dtype of the computation as outputs; call and `extend`
        agree to 2e-5.
    Example:
        >>> layer = RGLRU(64, num_blocks=4, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 100, 64))).shape
        (2, 100, 64)
        >>> outputs, cache = layer.extend(jnp.ones((2, 1, 64)), layer.init_cache(2, 100))
        >>> cache.state.shape
        (2, 4, 64)

    Source: De et al., Griffin: Mixing Gated Linear Recurrences with Local Attention for Efficient Language Models, 2024, arXiv
        2402.19427; code: google-deepmind/recurrentgemma. Sections and the paper's starting values are cited from memory.
    """

    supports = Support(cost="T", bidirectional=False, segment_ids=True)

    def __init__(
        self,
        in_features: int,
        *,
        hidden_features: int | None = None,
        num_blocks: int = 16,
        conv_width: int = 4,
        is_causal: bool = True,
        rngs: nnx.Rngs,
        **shell: Unpack[HeadlessShell],
    ):
        super().__init__(in_features, is_causal=is_causal, rngs=rngs, **shell)
        owner, hidden = type(self).__name__, in_features if hidden_features is None else hidden_features
        check_sizes(owner, hidden_features=hidden, num_blocks=num_blocks, conv_width=conv_width)
        check_divides(owner, f"hidden_features = {hidden}", hidden, num_blocks=num_blocks)
        self.hidden_features, self.conv_width = hidden, conv_width
        self.gate, self.input = (self.linear(in_features, hidden, rngs) for _ in range(2))
        size, init = hidden // num_blocks, nnx.initializers.lecun_normal(in_axis=0, out_axis=2, batch_axis=1)
        self.decay_gate, self.input_gate = (
            nnx.Einsum(
                "tjk,kjl->tjl", (size, num_blocks, size), (num_blocks, size), kernel_init=init, dtype=self.dtype,
                param_dtype=self.param_dtype, precision=self.precision, rngs=rngs,
            )
            for _ in range(2)
        )
        self.out = self.linear(hidden, self.out_features, rngs)
        taps = nnx.initializers.normal(0.1 / math.sqrt(conv_width))
        self.taps = nnx.Param(taps(rngs.params(), (conv_width, hidden), self.param_dtype))
        self.taps_bias = nnx.Param(jnp.zeros(hidden, self.param_dtype))
        power = jax.random.uniform(rngs.params(), (hidden,), jnp.float32, 0.9, 0.999)
        log = jnp.log(power) / SHARPNESS
        self.decay = nnx.Param((log - jnp.log(-jnp.expm1(log))).astype(self.param_dtype))  # the logit of power^(1 / c)

    def convolve(self, inputs: Float[Array, "B T D"], mask, segment_ids=None, state=None):
        """u; with a `state` [B, K - 1, R], the W_2 x before the first token, also that after the last real one."""
        hidden = in_pieces(self.input, inputs)
        return weigh(hidden, self.taps, self.taps_bias, mask, segment_ids, state, self.implementation)

    @precision.promoting
    def log_decay(self, inputs: Float[Array, "N R"]) -> Float[Array, "N R"]:
        """log a of every token."""
        return -SHARPNESS * gated(self.decay_gate, inputs) * nnx.softplus(-precision.wide(self.decay[...]))

    @precision.promoting
    def drive(self, inputs: Float[Array, "N R"], log_decay: Float[Array, "N R"]) -> Float[Array, "N R"]:
        """What a token adds to the state."""
        scale = jnp.sqrt(jnp.maximum(-jnp.expm1(2 * log_decay), TINY))
        return (scale * gated(self.input_gate, inputs) * inputs).astype(inputs.dtype)

    def recur(
        self, inputs: Float[Array, "B T R"], start: Float[Array, "B R"] | None = None,
        kept: Bool[Array, "B T"] | None = None, segment_ids: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T R"], Float[Array, "B R"]]:  # fmt: skip
        """The states h, and the last one in float32; at tokens that are not `kept` the state stays as it is."""
        log_decay = in_pieces(self.log_decay, inputs)
        drive, decay = in_pieces(self.drive, inputs, log_decay), jnp.exp(log_decay)
        if kept is not None:
            decay, drive = jnp.where(kept[..., None], decay, 1), jnp.where(kept[..., None], drive, 0)
        if segment_ids is not None:
            decay = jnp.where(run_starts(segment_ids)[..., None], 0, decay)
        return scan.first_order(decay, drive, start, implementation=self.implementation)

    def respond(self, inputs, mask, segment_ids):
        return self.recur(self.convolve(inputs, mask, segment_ids)[0], segment_ids=segment_ids)[0]

    def finish(self, inputs, responses):
        return self.out(nnx.gelu(self.gate(inputs), approximate=False) * responses)

    def state(self, batch_size):
        """The last K - 1 inputs of the convolution, then h."""
        return jnp.zeros((batch_size, self.conv_width, self.hidden_features), jnp.float32)

    def respond_after(self, inputs, state, counts):
        kept = None if counts is None else jnp.arange(inputs.shape[1])[None] < counts[:, None]
        hidden, before = self.convolve(inputs, None if kept is None else kept[:, None, None], state=state[:, :-1])
        states, last = self.recur(hidden, state[:, -1], kept)
        return states, jnp.concatenate([before, last[:, None]], axis=1)


def gated(gate: nnx.Einsum, inputs: Float[Array, "N R"]) -> Float[Array, "N R"]:
    """sigmoid(W u + b) with the blocks of W, wide."""
    blocks = inputs.reshape(len(inputs), gate.kernel.shape[1], gate.kernel.shape[0])
    return nnx.sigmoid(precision.wide(gate(blocks).reshape(inputs.shape)))
