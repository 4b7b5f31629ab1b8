"""RWKV-7: a delta rule with a rate and a decay of each channel."""

import functools
import math
from typing import Any, Unpack

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from subquad.kernels import linear, precision
from subquad.zoo.base import Support
from subquad.zoo.cache import RecurrentCache, first_real
from subquad.zoo.checks import check_divides, check_sizes
from subquad.zoo.delta.rule import unit_key
from subquad.zoo.gated.decay import with_segments
from subquad.zoo.gated.output import GatedNorm
from subquad.zoo.gated.token_shift import shift
from subquad.zoo.headless import Headless, HeadlessShell
from subquad.zoo.positions import run_starts
from subquad.zoo.projection import in_pieces

MIXED = ("receptance", "decay", "key", "value", "rate", "gate")  # what has a mix of two tokens of its own
SMALL = 64e-5  # added to the variance of a head; in the released code 1e-5, of heads divided by 8
ACTIVATIONS = dict(decay=jnp.tanh, rate=lambda x: x, gate=nnx.sigmoid)  # between the two maps of a low rank
FASTEST = math.exp(-0.5)  # -log of the fastest decay, 0.545


class RWKV7(Headless):
    """Goose's time mixing: a delta rule that erases and writes under keys of its own, each channel at a rate of its own.

        m_i = x_t + (x_{t-1} - x_t) * mu_i   of i = r, w, k, v, a, g,   r, k, v = W_r m_r, W_k m_k, W_v m_v
        w_t = exp(-exp(-1/2) sigmoid(b_w + tanh(m_w A_w) B_w)),   a_t = sigmoid(b_a + m_a A_a B_a),   g_t = sigmoid(m_g A_g) B_g
        z_t = k_t * xi / |k_t * xi| of each head,   y_t = k_t * (1 + (a_t - 1) * alpha)
        S_t = diag(w_t) S_{t-1} - (a_t * z_t) (S_{t-1}^T z_t)^T + y_t v_t^T                                  (section 4)
        outputs = W_o ((norm(S_t^T r_t) + (r_t . (rho * y_t)) v_t) * g_t),   norm: of each head, centred, with scale and bias

    x_{-1} is 0. What the key z reads of the state is taken away at the rates a, before anything fades; what is written under
    y is the value itself and not its difference to what was there.

    Cost: time O(T E (D + P)) for heads of P features, E of all; memory O(T E); one extended token O(E (D + P)) and a cache of
        E P + D numbers.
    Differs from the paper: there all layers of a model but the first mix their values with those of the first; here each is
        as the first. Starting values depend there on the place of a layer; here every layer starts as one in the middle, its
        large maps as Flax's do.

    Args:
        in_features: features D of the inputs.
        hidden_features: E, of all heads. None: in_features.
        head_features: P of a head; must divide hidden_features.
        decay_rank, rate_rank, gate_rank: columns of A_w, A_a and A_g.
        is_causal: must be True: a token sees itself and those before it.
        rngs: `rngs.params()` draws the parameters.
        shell: see `Headless`.
    Call:
        inputs_q: [*B, T, D].  mask: True = attend; key padding only, [*B, 1, 1, T]; the token before is the real one before.
        segment_ids: [T] or [*B, T]: different runs of equal ids do not see each other.
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters.
    Raises: ValueError: head_features that do not divide; is_causal=False; a pairwise mask.
    Numerics: decays, rates, lengths, states and the norm in float32; 1e-6 is added to a squared length.
    Example:
        >>> layer = RWKV7(64, head_features=16, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 100, 64))).shape
        (2, 100, 64)
        >>> outputs, cache = layer.extend(jnp.ones((2, 1, 64)), layer.init_cache(2, 100))
        >>> cache.state.shape, cache.recent.shape
        ((2, 4, 16, 16), (2, 1, 64))

    Source: Peng et al., RWKV-7 "Goose" with Expressive Dynamic State Evolution, 2025, arXiv 2503.14456, cited from memory;
        code: BlinkDL/RWKV-LM, for equations and starting values.
    """

    supports = Support(cost="T", bidirectional=False, segment_ids=True)

    def __init__(
        self,
        in_features: int,
        *,
        hidden_features: int | None = None,
        head_features: int = 64,
        decay_rank: int = 64,
        rate_rank: int = 64,
        gate_rank: int = 128,
        is_causal: bool = True,
        rngs: nnx.Rngs,
        **shell: Unpack[HeadlessShell],
    ):
        super().__init__(in_features, is_causal=is_causal, rngs=rngs, **shell)
        owner, hidden = type(self).__name__, in_features if hidden_features is None else hidden_features
        check_sizes(owner, hidden_features=hidden, head_features=head_features, decay_rank=decay_rank, rate_rank=rate_rank,
                    gate_rank=gate_rank)
        check_divides(owner, f"hidden_features = {hidden}", hidden, head_features=head_features)
        self.hidden_features, self.heads = hidden, (hidden // head_features, head_features)
        self.key, self.value, self.receptance = (self.linear(in_features, hidden, rngs, use_bias=False) for _ in range(3))
        self.out = self.linear(hidden, self.out_features, rngs, use_bias=False)
        self.norm = GatedNorm(self.heads, is_centred=True, epsilon=SMALL, param_dtype=self.param_dtype)
        # As in the released code: initial values of the middle layer of a model.
        place, at = jnp.arange(in_features) / in_features, jnp.arange(hidden) / max(hidden - 1, 1)
        in_head = jnp.linspace(-1, 1, head_features)
        bend = jnp.tile(in_head * jnp.abs(in_head), self.heads[0])
        powers = dict(receptance=0.1, decay=0.45, key=0.35, value=0.35, rate=0.45, gate=0.1)
        param = lambda x: nnx.Param(x.astype(self.param_dtype))
        by_head = lambda x: param(x.reshape(self.heads))
        up = lambda rank: param(nnx.initializers.orthogonal(0.1)(rngs.params(), (rank, hidden), jnp.float32))
        self.mix = param(jnp.stack([1 - place ** powers[name] for name in MIXED]))
        self.decay_down, self.decay_up = param(jnp.zeros((in_features, decay_rank))), up(decay_rank)
        self.decay_bias = by_head(-5.5 + 6 * at ** (1 + 0.5**0.3) + 2.5 * bend)
        self.rate_down, self.rate_up = param(jnp.zeros((in_features, rate_rank))), up(rate_rank)
        self.rate_bias = by_head(-0.19 + 0.3 * bend + 0.4 * (at - 0.5))
        self.gate_down, self.gate_up = param(jnp.zeros((in_features, gate_rank))), up(gate_rank)
        self.erased = by_head(0.71 - 0.1 * (at - 0.5))  # xi
        self.written = by_head(jnp.full(hidden, 1.02))  # alpha
        self.bonus = by_head(jnp.full(hidden, -0.04))  # rho

    @precision.promoting
    def mixed(self, name: str, inputs: Float[Array, "N D"], before: Float[Array, "N D"]) -> Float[Array, "N D"]:
        """m_i."""
        return inputs + (before - inputs) * self.mix[...][MIXED.index(name)].astype(inputs.dtype)

    def projected(self, name: str, inputs: Float[Array, "N D"], before: Float[Array, "N D"]) -> Float[Array, "N H P"]:
        """r, k or v of each head."""
        return getattr(self, name)(self.mixed(name, inputs, before)).reshape(-1, *self.heads)

    def low_rank(self, name: str, inputs: Float[Array, "N D"], before: Float[Array, "N D"]) -> Float[Array, "N H P"]:
        """f(m_i A_i) B_i of each head, where i is w, a or g."""
        down, up = (getattr(self, f"{name}_{end}")[...].astype(inputs.dtype) for end in ("down", "up"))
        low = ACTIVATIONS[name](jnp.matmul(self.mixed(name, inputs, before), down, precision=self.precision))
        return jnp.matmul(low, up, precision=self.precision).reshape(-1, *self.heads)

    @precision.promoting
    def log_decay(self, inputs: Float[Array, "N D"], before: Float[Array, "N D"]) -> Float[Array, "N H P"]:
        """log w of each head and channel."""
        low = self.low_rank("decay", inputs, before)
        return -FASTEST * nnx.sigmoid(precision.wide(low) + precision.wide(self.decay_bias[...]))

    @precision.promoting
    def rate(self, inputs: Float[Array, "N D"], before: Float[Array, "N D"]) -> Float[Array, "N H P"]:
        """a of each head and channel."""
        low = self.low_rank("rate", inputs, before)
        return nnx.sigmoid(precision.wide(low) + precision.wide(self.rate_bias[...]))

    @precision.promoting
    def erased_key(self, key: Float[Array, "N H P"]) -> Float[Array, "N H P"]:
        """z."""
        return unit_key(key * self.erased[...].astype(key.dtype)[None]).astype(key.dtype)

    @precision.promoting
    def written_key(self, key: Float[Array, "N H P"], rate: Float[Array, "N H P"]) -> Float[Array, "N H P"]:
        """y."""
        return key * (1 + (rate - 1) * precision.wide(self.written[...])).astype(key.dtype)

    def mix_time(self, receptance, erased, written, value, rate, log_decay, kept=None, segment_ids=None, state=None):
        """(S^T r, S after the last token that is `kept`)."""
        reader, eraser = erased, erased * rate.astype(erased.dtype)
        if segment_ids is not None:  # the first token of a segment finds nothing to erase
            reader = jnp.where(run_starts(segment_ids)[..., None, None], 0, reader)
        return linear.gated(
            receptance, written, value, with_segments(log_decay, segment_ids), erase=(reader, eraser), mask=kept,
            initial_state=state, return_state=True, implementation=self.implementation,
        )

    @precision.promoting
    def gated(self, heads, receptance, written, value, inputs, before):
        """(norm(S^T r) + (r . (rho * y)) v) * g."""
        bonus = (receptance * self.bonus[...].astype(receptance.dtype) * written).sum(-1, keepdims=True)
        gate = self.low_rank("gate", inputs, before)
        return ((self.norm.of_tokens(heads) + bonus * value) * gate).reshape(len(heads), -1)

    def _recur(
        self, inputs: Float[Array, "B T D"], counts: Int[Array, "B"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None, cache: RecurrentCache | None = None,
    ) -> tuple[Float[Array, "B T E"], Any]:  # fmt: skip
        """What the output map takes, and the cache after the last real token."""
        kept, (state, recent) = first_real(inputs, counts), (None, None) if cache is None else cache
        before, recent = shift(inputs, segment_ids, recent, counts)
        of = lambda name: in_pieces(functools.partial(self.projected, name), inputs, before)
        receptance, key, value = of("receptance"), of("key"), of("value")
        rate, log_decay = in_pieces(self.rate, inputs, before), in_pieces(self.log_decay, inputs, before)
        erased, written = in_pieces(self.erased_key, key), in_pieces(self.written_key, key, rate)
        heads, state = self.mix_time(receptance, erased, written, value, rate, log_decay, kept, segment_ids, state)
        outputs = in_pieces(self.gated, heads, receptance, written, value, inputs, before)
        return outputs, RecurrentCache(state, recent)

    def state(self, batch_size):
        heads, size = self.heads
        zeros = lambda *shape: jnp.zeros((batch_size, *shape), jnp.float32)
        return RecurrentCache(zeros(heads, size, size), zeros(1, self.in_features))
