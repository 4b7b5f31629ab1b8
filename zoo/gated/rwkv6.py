"""RWKV-6: linear attention with a decay of each channel, which reads before it writes."""

import functools
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from subquad.kernels import linear, precision
from subquad.zoo.base import Support
from subquad.zoo.cache import RecurrentCache, first_real
from subquad.zoo.checks import check_divides, check_sizes
from subquad.zoo.gated.decay import with_segments
from subquad.zoo.gated.output import GatedNorm
from subquad.zoo.gated.token_shift import shift
from subquad.zoo.headless import Headless, HeadlessShell
from subquad.zoo.positions import run_starts
from subquad.zoo.projection import in_pieces

MIXED = ("decay", "key", "value", "receptance", "gate")  # what has a mix of two tokens of its own
SMALL = 64e-5  # added to the variance of a head; in the released code 1e-5, of heads divided by 8


class RWKV6(Headless):
    """Finch's time mixing: linear attention over mixes of each token with the one before it.

        m_i = x_t + (x_{t-1} - x_t) * (mu_i + tanh(c A_i) B_i),   c = x_t + (x_{t-1} - x_t) * mu     of i = w, k, v, r, g
        w_t = exp(-exp(l + tanh(m_w A) B)),   k, v, r, g = W_k m_k, W_v m_v, W_r m_r, W_g m_g
        o_t = (S_{t-1} + diag(u) k_t v_t^T)^T r_t,   S_t = diag(w_t) S_{t-1} + k_t v_t^T               (section 4.2)
        outputs = W_o (norm(o_t) * silu(g_t)),   norm: of each head, centred, with a scale and a bias

    x_{-1} is 0. The present token is read with a bonus u of its own, whatever decays do.

    Cost: time O(T A (D + P)) for heads of P features, A of all; memory O(T A); one extended token O(A (D + P)) and a cache of
        A P + D numbers.
    Differs from the paper: starting values depend there on the place of a layer in the model; here every layer starts as one
        in the middle, its large maps as Flax's do.

    Args:
        in_features: features D of the inputs.
        hidden_features: A, of all heads. None: in_features.
        head_features: P of a head; must divide hidden_features.
        mix_rank, decay_rank: columns of A_i and of A.
        is_causal: must be True: a token sees itself and those before it.
        rngs: `rngs.params()` draws the parameters.
        shell: see `Headless`.
    Call:
        inputs_q: [*B, T, D].  mask: True = attend; key padding only, [*B, 1, 1, T]; the token before is the real one before.
        segment_ids: [T] or [*B, T]: different runs of equal ids do not see each other.
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters.
    Raises: ValueError: head_features that do not divide; is_causal=False; a pairwise mask.
    Numerics: decays, states and the norm in float32.
    Example:
        >>> layer = RWKV6(64, head_features=16, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 100, 64))).shape
        (2, 100, 64)
        >>> outputs, cache = layer.extend(jnp.ones((2, 1, 64)), layer.init_cache(2, 100))
        >>> cache.state.shape, cache.recent.shape
        ((2, 4, 16, 16), (2, 1, 64))

    Source: Peng et al., Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence, 2024, arXiv 2404.05892; code:
        BlinkDL/RWKV-LM, for ranks and starting values. The section is cited from memory.
    """

    supports = Support(cost="T", bidirectional=False, segment_ids=True)

    def __init__(
        self,
        in_features: int,
        *,
        hidden_features: int | None = None,
        head_features: int = 64,
        mix_rank: int = 32,
        decay_rank: int = 64,
        is_causal: bool = True,
        rngs: nnx.Rngs,
        **shell: Unpack[HeadlessShell],
    ):
        super().__init__(in_features, is_causal=is_causal, rngs=rngs, **shell)
        owner, hidden = type(self).__name__, in_features if hidden_features is None else hidden_features
        check_sizes(owner, hidden_features=hidden, head_features=head_features, mix_rank=mix_rank, decay_rank=decay_rank)
        check_divides(owner, f"hidden_features = {hidden}", hidden, head_features=head_features)
        self.hidden_features, self.heads = hidden, (hidden // head_features, head_features)
        self.key, self.value, self.receptance, self.gate = (
            self.linear(in_features, hidden, rngs, use_bias=False) for _ in range(4)
        )
        self.out = self.linear(hidden, self.out_features, rngs, use_bias=False)
        self.norm = GatedNorm(self.heads, is_centred=True, epsilon=SMALL, param_dtype=self.param_dtype)
        # As in the released code: initial values of the middle layer of a model.
        place = jnp.arange(in_features, dtype=jnp.float32) / in_features
        at = jnp.arange(hidden, dtype=jnp.float32) / max(hidden - 1, 1)
        mixes = dict(decay=1 - place**0.5, key=1 - place**0.5, value=0.85 - place**0.5, receptance=1 - place**0.25,
                     gate=1 - place**0.25)
        param = lambda x: nnx.Param(x.astype(self.param_dtype))
        small = lambda *shape: param(jax.random.uniform(rngs.params(), shape, jnp.float32, -0.01, 0.01))
        self.mix_of_mix, self.mix = param(1 - place**0.5), param(jnp.stack([mixes[name] for name in MIXED]))
        self.mix_down, self.mix_up = param(jnp.zeros((5, in_features, mix_rank))), small(5, mix_rank, in_features)
        self.decay_bias = param(-6 + 5 * at**1.35)
        self.decay_down, self.decay_up = param(jnp.zeros((in_features, decay_rank))), small(decay_rank, hidden)
        self.bonus = param((0.5 * (1 - at) + 0.1 * ((jnp.arange(hidden, dtype=jnp.float32) + 1) % 3 - 1)).reshape(self.heads))

    @precision.promoting
    def mixed(self, name: str, inputs: Float[Array, "N D"], before: Float[Array, "N D"]) -> Float[Array, "N D"]:
        """m_i."""
        i, difference = MIXED.index(name), before - inputs
        read = lambda variable: variable[...].astype(inputs.dtype)
        mix = self.low_rank(inputs + difference * read(self.mix_of_mix), read(self.mix_down)[i], read(self.mix_up)[i])
        return inputs + difference * (read(self.mix)[i] + mix)

    def low_rank(self, inputs, down, up):
        return jnp.matmul(jnp.tanh(jnp.matmul(inputs, down, precision=self.precision)), up, precision=self.precision)

    def projected(self, name: str, inputs: Float[Array, "N D"], before: Float[Array, "N D"]) -> Float[Array, "N H P"]:
        """k, v, r or g of each head."""
        return getattr(self, name)(self.mixed(name, inputs, before)).reshape(-1, *self.heads)

    @precision.promoting
    def log_decay(self, inputs: Float[Array, "N D"], before: Float[Array, "N D"]) -> Float[Array, "N H P"]:
        """log w of each head and channel."""
        down, up = (variable[...].astype(inputs.dtype) for variable in (self.decay_down, self.decay_up))
        low = self.low_rank(self.mixed("decay", inputs, before), down, up)
        return -jnp.exp(precision.wide(low) + precision.wide(self.decay_bias[...])).reshape(-1, *self.heads)

    def mix_time(self, receptance, key, value, log_decay, kept=None, segment_ids=None, state=None):
        """(o, S after the last token that is `kept`)."""
        read, starts = receptance, None
        if segment_ids is not None:  # the first token of a segment reads nothing but its own
            starts = run_starts(segment_ids)[..., None, None]
            read = jnp.where(starts, 0, receptance)
        heads, state = linear.gated(
            read, key, value, with_segments(log_decay, segment_ids), bonus=self.bonus[...], mask=kept, initial_state=state,
            return_state=True, implementation=self.implementation,
        )  # fmt: skip
        if starts is not None:
            bonus = self.bonus[...].astype(key.dtype)[None, None]
            heads = heads + jnp.where(starts, (receptance * bonus * key).sum(-1, keepdims=True), 0) * value
        return heads, state

    def _recur(
        self, inputs: Float[Array, "B T D"], counts: Int[Array, "B"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None, cache: RecurrentCache | None = None,
    ) -> tuple[Float[Array, "B T A"], Any]:  # fmt: skip
        """norm(o) * silu(g), and the cache after the last real token."""
        kept, (state, recent) = first_real(inputs, counts), (None, None) if cache is None else cache
        before, recent = shift(inputs, segment_ids, recent, counts)
        of = lambda name: in_pieces(functools.partial(self.projected, name), inputs, before)
        log_decay = in_pieces(self.log_decay, inputs, before)
        heads, state = self.mix_time(of("receptance"), of("key"), of("value"), log_decay, kept, segment_ids, state)
        outputs = in_pieces(self.gated, heads, inputs, before)
        return outputs, RecurrentCache(state, recent)

    def gated(self, heads, inputs, before):
        return self.norm.of_tokens(heads, self.projected("gate", inputs, before)).reshape(len(heads), -1)

    def state(self, batch_size):
        heads, size = self.heads
        zeros = lambda *shape: jnp.zeros((batch_size, *shape), jnp.float32)
        return RecurrentCache(zeros(heads, size, size), zeros(1, self.in_features))
