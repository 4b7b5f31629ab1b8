"""Mamba: a selective state space, whose step and whose input and output matrices the token chooses, beside a gate."""

import functools
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from subquad.kernels import precision, ssm
from subquad.zoo.base import Support
from subquad.zoo.cache import RecurrentCache, first_real
from subquad.zoo.checks import check_sizes, check_steps
from subquad.zoo.convolution.taps import CausalConvolution
from subquad.zoo.gated.decay import step_bias
from subquad.zoo.headless import Headless, HeadlessShell
from subquad.zoo.projection import in_pieces
from subquad.zoo.statespace.output import skipped


class Mamba(Headless):
    """Selective state space (S6) behind a short convolution, beside a gate of the whole.

        x_t = silu(b + sum_j p_j * (W_x u_{t-j})),   j = 0 .. K - 1                                        (section 3.4)
        step_t = softplus(W_s W_r x_t + b_s),   B_t = W_B x_t,   C_t = W_C x_t                            (algorithm 2)
        h_t = exp(step_t A) h_{t-1} + step_t B_t x_t,   y_t = C_t h_t + D * x_t,   A = -exp(log_rates)
        outputs = W_o (y_t * silu(W_z u_t))

    Each of the E features of x has N states and a step of its own; B and C are shared by all. A step near 0 keeps the state
    and ignores the token, a long one begins anew.

    Cost: time O(T E (D + R + N)), memory O(T E): the N states of all tokens are never held (see `ssm.selective_scan`); one
        extended token O(E (D + R + N)) and a cache of (N + K - 1) E numbers.
    Differs from the paper: steps, decays and D start as in the released code; maps as Flax's, the convolution's bias at 0. B is
        discretised by Euler's rule and A by zero-order hold, as in that code.
    Training: the authors give A and D no weight decay.

    Args:
        in_features: features D of the inputs.
        hidden_features: E of the state space. None: 2 D.
        state_size: N.
        step_rank: R features from which steps are made. None: D / 16, rounded up.
        conv_width: taps K.
        dt_min, dt_max: steps, of a token that does not choose, start log-uniformly between these.
        is_causal: must be True: a token sees itself and those before it.
        rngs: `rngs.params()` draws the parameters.
        shell: see `Headless`.
    Call:
        inputs_q: [*B, T, D].  mask: True = attend; key padding only, [*B, 1, 1, T]; no time passes at padding.
        segment_ids: [T] or [*B, T]: different runs of equal ids do not see each other; the taps are then laid out for every
            token, O(T K E) numbers.
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters.
    Raises: ValueError: dt_min that is not between 0 and dt_max; is_causal=False; a pairwise mask.
    Numerics: steps, decays and states in float32; call and `extend` agree to 2e-5.
    Example:
        >>> layer = Mamba(64, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 100, 64))).shape
        (2, 100, 64)
        >>> outputs, cache = layer.extend(jnp.ones((2, 1, 64)), layer.init_cache(2, 100))
        >>> cache.state.shape, cache.recent.shape
        ((2, 128, 16), (2, 3, 128))

    Source: Gu and Dao, Mamba: Linear-Time Sequence Modeling with Selective State Spaces, 2023, arXiv 2312.00752; code:
        state-spaces/mamba. Sections are cited from memory.
    """

    supports = Support(cost="T", bidirectional=False, segment_ids=True)

    def __init__(
        self,
        in_features: int,
        *,
        hidden_features: int | None = None,
        state_size: int = 16,
        step_rank: int | None = None,
        conv_width: int = 4,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        is_causal: bool = True,
        rngs: nnx.Rngs,
        **shell: Unpack[HeadlessShell],
    ):
        super().__init__(in_features, is_causal=is_causal, rngs=rngs, **shell)
        owner = type(self).__name__
        hidden = 2 * in_features if hidden_features is None else hidden_features
        rank = -(-in_features // 16) if step_rank is None else step_rank
        check_sizes(owner, hidden_features=hidden, state_size=state_size, step_rank=rank, conv_width=conv_width)
        check_steps(owner, dt_min, dt_max)
        self.hidden_features, self.state_size, self.step_rank = hidden, state_size, rank
        self.gate, self.input = (self.linear(in_features, hidden, rngs, use_bias=False) for _ in range(2))
        self.convolution = CausalConvolution(
            hidden, conv_width, use_bias=True, param_dtype=self.param_dtype, implementation=self.implementation, rngs=rngs,
        )  # fmt: skip
        self.select = self.linear(hidden, rank + 2 * state_size, rngs, use_bias=False)
        self.step = self.linear(rank, hidden, rngs)
        draw = functools.partial(jax.random.uniform, dtype=jnp.float32)
        self.step.kernel[...] = draw(rngs.params(), (rank, hidden), minval=-1, maxval=1).astype(self.param_dtype) / rank**0.5
        self.step.bias = nnx.Param(step_bias(rngs, (hidden,), dt_min, dt_max).astype(self.param_dtype))
        rates = jnp.broadcast_to(jnp.arange(1, state_size + 1, dtype=jnp.float32), (hidden, state_size))
        self.log_rates = nnx.Param(jnp.log(rates).astype(self.param_dtype))
        self.skip = nnx.Param(jnp.ones(hidden, self.param_dtype))
        self.out = self.linear(hidden, self.out_features, rngs, use_bias=False)

    @precision.promoting
    def scan(
        self, hidden: Float[Array, "B T E"], start: Float[Array, "B E N"] | None = None,
        kept: Bool[Array, "B 1 1 T"] | None = None, segment_ids: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T E"], Float[Array, "B E N"]]:  # fmt: skip
        """y, and the last state; at tokens that are not `kept` the state stays as it is."""
        low, into, out = jnp.split(in_pieces(self.select, hidden), [self.step_rank, self.step_rank + self.state_size], axis=-1)
        step = in_pieces(lambda low: nnx.softplus(precision.wide(self.step(low))), low)
        if kept is not None:
            step = jnp.where(kept[:, 0, 0, :, None], step, 0)
        results: Any = ssm.selective_scan(
            hidden, step, -jnp.exp(precision.wide(self.log_rates[...])), into, out, start, segment_ids=segment_ids,
            return_state=True, implementation=self.implementation,
        )  # fmt: skip
        outputs, last = results
        return in_pieces(functools.partial(skipped, self.skip), hidden, outputs), last

    def _recur(
        self, inputs: Float[Array, "B T D"], counts: Int[Array, "B"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None, cache: RecurrentCache | None = None,
    ) -> tuple[Float[Array, "B T E"], Any]:  # fmt: skip
        """y, and the cache after the last real token, where there is one before the first."""
        kept, (state, recent) = first_real(inputs, counts), (None, None) if cache is None else cache
        hidden, recent = self.convolution(in_pieces(self.input, inputs), kept, segment_ids, recent)
        outputs, state = self.scan(nnx.silu(hidden), state, kept, segment_ids)
        return outputs, None if cache is None else RecurrentCache(state, recent)

    def finish(self, inputs, responses):
        return self.out(responses * nnx.silu(self.gate(inputs)))

    def state(self, batch_size):
        empty = jnp.zeros((batch_size, self.hidden_features, self.state_size), jnp.float32)
        return RecurrentCache(empty, self.convolution.empty(batch_size))
