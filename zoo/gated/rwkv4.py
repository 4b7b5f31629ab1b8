"""RWKV-4: a mean of values whose weights decay with distance, channel by channel."""

import functools
import math
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from subquad.kernels import precision, scan
from subquad.zoo.base import Support
from subquad.zoo.cache import RecurrentCache, first_real
from subquad.zoo.checks import check_sizes
from subquad.zoo.gated.decay import running_largest, with_segments
from subquad.zoo.gated.token_shift import shift
from subquad.zoo.headless import Headless, HeadlessShell
from subquad.zoo.positions import run_starts
from subquad.zoo.projection import in_pieces

MIXED = ("key", "value", "receptance")  # what has a mix of two tokens of its own


class RWKV4(Headless):
    """RWKV's time mixing: a softmax over what keys and distances say, in every channel by itself.

        r, k, v = W_r m_r, W_k m_k, W_v m_v,   m_i = mu_i x_t + (1 - mu_i) x_{t-1}                        (eqs. 11-13)
        y_t = (sum_{s < t} exp(k_s - (t - 1 - s) w) v_s + exp(u + k_t) v_t) / (the same with v = 1)           (eq. 16)
        outputs = W_o (sigmoid(r_t) * y_t),   w = exp(d) > 0                                                  (eq. 17)

    x_{-1} is 0. The present token has a bonus u in place of a decay. No query is compared with a key.

    Cost: time O(T D A), memory O(T A) for A channels, log T steps deep; one extended token O(D A) and a cache of 3 A + D
        numbers.
    Differs from the paper: starting values depend there on the place of a layer in the model; here every layer starts as one
        in the middle, and maps start as Flax's do.

    Args:
        in_features: features D of the inputs.
        hidden_features: channels A. None: in_features.
        is_causal: must be True: a token sees itself and those before it.
        rngs: `rngs.params()` draws the parameters.
        shell: see `Headless`.
    Call:
        inputs_q: [*B, T, D].  mask: True = attend; key padding only, [*B, 1, 1, T]; no time passes at padding.
        segment_ids: [T] or [*B, T]: different runs of equal ids do not see each other.
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters.
    Raises: ValueError: is_causal=False; a pairwise mask.
    Numerics: sums in float32, as exp(-m) times themselves for a running maximum m: keys may have any size.
    Example:
        >>> layer = RWKV4(64, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 100, 64))).shape
        (2, 100, 64)
        >>> outputs, cache = layer.extend(jnp.ones((2, 1, 64)), layer.init_cache(2, 100))
        >>> cache.state.shape, cache.recent.shape
        ((2, 3, 64), (2, 1, 64))

    Source: Peng et al., RWKV: Reinventing RNNs for the Transformer Era, 2023, arXiv 2305.13048; code: BlinkDL/RWKV-LM, for
        starting values. Numbers of equations are cited from memory.
    """

    supports = Support(cost="T", bidirectional=False, segment_ids=True)

    def __init__(
        self,
        in_features: int,
        *,
        hidden_features: int | None = None,
        is_causal: bool = True,
        rngs: nnx.Rngs,
        **shell: Unpack[HeadlessShell],
    ):
        super().__init__(in_features, is_causal=is_causal, rngs=rngs, **shell)
        hidden = in_features if hidden_features is None else hidden_features
        check_sizes(type(self).__name__, hidden_features=hidden)
        self.hidden_features = hidden
        self.key, self.value, self.receptance = (self.linear(in_features, hidden, rngs, use_bias=False) for _ in range(3))
        self.out = self.linear(hidden, self.out_features, rngs, use_bias=False)
        # As in the released code: initial values of the middle layer of a model.
        param = lambda x: nnx.Param(x.astype(self.param_dtype))
        place, at = jnp.arange(in_features, dtype=jnp.float32) / in_features, jnp.arange(hidden, dtype=jnp.float32)
        self.mix = param(jnp.stack([place**0.5, place**0.5 + 0.15, place**0.25]))
        self.decay_bias = param(-5 + 8 * (at / max(hidden - 1, 1)) ** 1.35)
        self.bonus = param(math.log(0.3) + 0.5 * ((at + 1) % 3 - 1))

    @precision.promoting
    def projected(self, name: str, inputs: Float[Array, "N D"], before: Float[Array, "N D"]) -> Float[Array, "N A"]:
        """r, k or v."""
        mix = self.mix[...][MIXED.index(name)].astype(inputs.dtype)
        return getattr(self, name)(mix * inputs + (1 - mix) * before)

    @precision.promoting
    def mean(
        self, key: Float[Array, "B T A"], value: Float[Array, "B T A"], kept: Bool[Array, "B 1 1 T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None, state: Float[Array, "B 3 A"] | None = None,
    ) -> tuple[Float[Array, "B T A"], Float[Array, "B 3 A"]]:  # fmt: skip
        """y, and the two sums and m after the last token that is `kept`, from those before the first; None: of none."""
        wide_key, wide_value = precision.wide(key), precision.wide(value)
        state = self.empty(len(key)) if state is None else state
        sums, start = jnp.split(state.astype(wide_key.dtype), [2], axis=1)
        log_decay = jnp.broadcast_to(-jnp.exp(precision.wide(self.decay_bias[...])), key.shape)
        log_decay, log_weight = with_segments(log_decay, segment_ids), wide_key
        if kept is not None:
            real = kept[:, 0, 0, :, None]
            log_decay, log_weight = jnp.where(real, log_decay, 0), jnp.where(real, log_weight, -jnp.inf)
        largest = running_largest(*map(jax.lax.stop_gradient, (log_decay, log_weight, start[:, 0])))
        before, largest = largest[:, :-1], largest[:, 1:]
        finite = jnp.where(jnp.isneginf(largest), 0, largest)  # nothing was seen yet
        decay, weight = jnp.exp(log_decay + (before - finite)), jnp.exp(log_weight - finite)
        both = jnp.concatenate([weight * wide_value, weight], -1)
        seen, last = scan.first_order(
            jnp.concatenate([decay, decay], -1), both, sums.reshape(len(sums), -1), implementation=self.implementation
        )
        past = jnp.concatenate([sums.reshape(len(sums), 1, -1), seen[:, :-1]], 1)  # a token reads before it writes
        if segment_ids is not None:
            before = jnp.where(run_starts(segment_ids)[..., None], -jnp.inf, before)
        own = wide_key + self.bonus[...]
        top = jax.lax.stop_gradient(jnp.maximum(before, own))
        past, own = past * jnp.tile(jnp.exp(before - top), 2), jnp.exp(own - top)
        numerator, denominator = jnp.split(past, 2, axis=-1)
        outputs = (numerator + own * wide_value) / (denominator + own)  # at least 1, of which one weight is
        return outputs.astype(value.dtype), jnp.concatenate([last.reshape(sums.shape), largest[:, -1:]], 1).astype(state.dtype)

    def _recur(
        self, inputs: Float[Array, "B T D"], counts: Int[Array, "B"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None, cache: RecurrentCache | None = None,
    ) -> tuple[Float[Array, "B T A"], Any]:  # fmt: skip
        """sigmoid(r) * y, and the cache after the last real token."""
        state, recent = (None, None) if cache is None else cache
        before, recent = shift(inputs, segment_ids, recent, counts)
        of = lambda name: in_pieces(functools.partial(self.projected, name), inputs, before)
        means, state = self.mean(of("key"), of("value"), first_real(inputs, counts), segment_ids, state)
        return nnx.sigmoid(of("receptance")) * means, RecurrentCache(state, recent)

    def empty(self, batch_size: int) -> Float[Array, "B 3 A"]:
        """Sums of nothing, and -inf for its largest log weight."""
        return jnp.zeros((batch_size, 3, self.hidden_features), jnp.float32).at[:, 2].set(-jnp.inf)

    def state(self, batch_size):
        return RecurrentCache(self.empty(batch_size), jnp.zeros((batch_size, 1, self.in_features), jnp.float32))
