"""Mamba-2: a state space model with one decay for each head, as linear attention."""

from typing import Any, Unpack

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int

from subquad.kernels import linear, precision
from subquad.zoo.base import Support
from subquad.zoo.cache import RecurrentCache, first_real
from subquad.zoo.checks import check_divides, check_sizes, check_steps
from subquad.zoo.convolution.taps import CausalConvolution
from subquad.zoo.gated.decay import step_bias, with_segments
from subquad.zoo.gated.output import GatedNorm
from subquad.zoo.headless import Headless, HeadlessShell
from subquad.zoo.projection import in_pieces


class Mamba2(Headless):
    """Mamba-2's block: a selective state space model behind a short convolution, gated inside a norm.

        [v, B, C]_t = silu(b + sum_j p_j * (W_u x_{t-j})),   j = 0 .. K - 1
        delta_t = softplus(W_d x_t + b_d),   a_t = exp(-delta_t exp(A)),   one number for each head
        S_t = a_t S_{t-1} + delta_t B_t v_t^T,   y_t = S_t^T C_t + D v_t                                  (sections 6, 7)
        outputs = W_o norm(y_t * silu(W_z x_t)),   norm(u) = s * u / sqrt(mean(u^2) + eps) of each group

    B and C, keys and queries of M features, are those of a group, which all its heads share. Where delta is near 0 a token
    changes nothing; where it is large it takes the place of what was there.

    Cost: time O(T (D R + R M)), memory O(T (R + G M)) for R hidden features in G groups; one extended token O(R (D + M)) and a
        cache of R M + (K - 1) (R + 2 G M) numbers.
    Differs from the paper: one map makes z, u and delta there. Steps, decays and D start as in the released code: exp(A) is
        uniform in 1..16, softplus(b_d) log-uniform in dt_min..dt_max and at least 1e-4, D = 1. Maps start as Flax's, the
        convolution's bias at 0.

    Args:
        in_features: features D of the inputs.
        hidden_features: R, of all heads together. None: 2 D.
        head_features: P of a head; must divide hidden_features.
        state_size: M of B and C.
        num_groups: G; must divide the R / P heads.
        conv_width: taps K.
        dt_min, dt_max: between which the steps delta start.
        is_causal: must be True: a token sees itself and those before it.
        rngs: `rngs.params()` draws the parameters.
        shell: see `Headless`.
    Call:
        inputs_q: [*B, T, D].  mask: True = attend; key padding only, [*B, 1, 1, T]; no time passes at padding.
        segment_ids: [T] or [*B, T]: different runs of equal ids do not see each other; the taps are then laid out for every
            token, O(T K (R + 2 G M)) numbers.
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters.
    Raises: ValueError: sizes that do not divide; steps that are not 0 < dt_min <= dt_max; is_causal=False; a pairwise mask.
    Numerics: steps, decays, states and the norm in float32.
    Example:
        >>> layer = Mamba2(64, head_features=32, state_size=16, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 100, 64))).shape
        (2, 100, 64)
        >>> outputs, cache = layer.extend(jnp.ones((2, 1, 64)), layer.init_cache(2, 100))
        >>> cache.state.shape, cache.recent.shape
        ((2, 4, 16, 32), (2, 3, 160))

    Source: Dao & Gu, Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space
        Duality, ICML 2024, arXiv 2405.21060; code: state-spaces/mamba. Sections are cited from memory.
    """

    supports = Support(cost="T", bidirectional=False, segment_ids=True)

    def __init__(
        self,
        in_features: int,
        *,
        hidden_features: int | None = None,
        head_features: int = 64,
        state_size: int = 128,
        num_groups: int = 1,
        conv_width: int = 4,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        is_causal: bool = True,
        rngs: nnx.Rngs,
        **shell: Unpack[HeadlessShell],
    ):
        super().__init__(in_features, is_causal=is_causal, rngs=rngs, **shell)
        owner, hidden = type(self).__name__, 2 * in_features if hidden_features is None else hidden_features
        check_sizes(owner, hidden_features=hidden, head_features=head_features, state_size=state_size, num_groups=num_groups,
                    conv_width=conv_width)
        check_divides(owner, f"hidden_features = {hidden}", hidden, head_features=head_features)
        heads = hidden // head_features
        check_divides(owner, f"the {heads} heads", heads, num_groups=num_groups)
        check_steps(owner, dt_min, dt_max)
        self.hidden_features, self.head_features, self.num_heads = hidden, head_features, heads
        self.state_size, self.num_groups, self.conv_width = state_size, num_groups, conv_width
        convolved = hidden + 2 * num_groups * state_size
        maps = dict(gate=hidden, input=convolved, step=heads)
        self.gate, self.input, self.step = (self.linear(in_features, size, rngs, use_bias=False) for size in maps.values())
        self.convolution = CausalConvolution(
            convolved, conv_width, use_bias=True, param_dtype=self.param_dtype, implementation=self.implementation, rngs=rngs
        )
        self.step_bias = nnx.Param(step_bias(rngs, (heads,), dt_min, dt_max).astype(self.param_dtype))
        rate = jax.random.uniform(rngs.params(), (heads,), jnp.float32, 1, 16)
        self.log_rate = nnx.Param(jnp.log(rate).astype(self.param_dtype))
        self.direct = nnx.Param(jnp.ones(heads, self.param_dtype))
        group = num_groups, hidden // num_groups
        self.norm = GatedNorm(group, gate_first=True, param_dtype=self.param_dtype)
        self.out = self.linear(hidden, self.out_features, rngs, use_bias=False)

    @precision.promoting
    def steps(self, inputs: Float[Array, "N D"]) -> Float[Array, "N H"]:
        """delta of each head."""
        return nnx.softplus(precision.wide(self.step(inputs)) + self.step_bias[...])

    def values(self, convolved: Float[Array, "N C"]) -> Float[Array, "N H P"]:
        """v of each head."""
        return nnx.silu(convolved[:, : self.hidden_features]).reshape(-1, self.num_heads, self.head_features)

    def _recur(
        self, inputs: Float[Array, "B T D"], counts: Int[Array, "B"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None, cache: RecurrentCache | None = None,
    ) -> tuple[Float[Array, "B T R"], Any]:  # fmt: skip
        """y, and the cache after the last real token, where there is one before the first."""
        state: Any = None if cache is None else cache.state
        kept, recent = first_real(inputs, counts), None if cache is None else cache.recent
        convolved, recent = self.convolution(in_pieces(self.input, inputs), kept, segment_ids, recent)
        steps = in_pieces(self.steps, inputs)
        log_decay = -jnp.exp(precision.wide(self.log_rate[...]))[None, None] * steps
        keys = in_pieces(lambda x: nnx.silu(x[:, self.hidden_features :]), convolved)
        keys = rearrange(keys, "b t (two g m) -> two b t g m", two=2, g=self.num_groups)
        value = in_pieces(lambda x, step: self.values(x) * step[..., None].astype(x.dtype), convolved, steps)
        heads, state = linear.gated(
            keys[1], keys[0], value, with_segments(log_decay, segment_ids), mask=kept, initial_state=state, return_state=True,
            implementation=self.implementation,
        )
        direct = self.direct[...].astype(inputs.dtype)[None, :, None]
        outputs = in_pieces(lambda y, x: (y + direct * self.values(x)).reshape(len(y), -1), heads, convolved)
        return outputs, None if cache is None else RecurrentCache(state, recent)

    def finish(self, inputs, responses):
        groups = lambda x: x.reshape(len(x), self.num_groups, -1)
        return self.out(self.norm.of_tokens(groups(responses), groups(self.gate(inputs))).reshape(responses.shape))

    def state(self, batch_size):
        empty = jnp.zeros((batch_size, self.num_heads, self.state_size, self.head_features), jnp.float32)
        return RecurrentCache(empty, self.convolution.empty(batch_size))
