"""HGRN2: a gated recurrence whose state is a matrix, and which writes as much as it forgets."""

from typing import Any, Unpack

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from subquad.kernels import linear, precision
from subquad.zoo.base import Attention, Shell, Support
from subquad.zoo.cache import MatrixCache, counts
from subquad.zoo.checks import check_number, require_extend
from subquad.zoo.gated.decay import with_segments
from subquad.zoo.gated.output import GatedNorm
from subquad.zoo.projection import in_pieces


class HGRN2(Attention):
    """Linear attention whose keys are what its gates forget: the hierarchically gated recurrence with an outer product.

        S_t = diag(f_t) S_{t-1} + (1 - f_t) i_t^T,   o_t = S_t^T silu(W_q x_t)
        f_t = gamma + (1 - gamma) sigmoid(W_f x_t),   i_t = W_v x_t
        y_t = W_o norm(o_t),   norm(o) = s * o / sqrt(mean(o^2) + eps) of all heads together

    A row of the state is a moving average of the inputs, which its gate steers; in each step at least gamma of it stays.
    It is gated linear attention where one projection makes gate and key.

    Cost: time O(T N H^2), memory O(T N H); one extended token O(N H^2) and a cache of that size whatever came before.
    Differs from the paper: there a model learns its lower bounds, which grow from layer to layer as sums of a softmax over
        layers; here a layer's is a number that the caller gives, 0 for the first and larger for later ones (`mixer_options`
        of a model takes one for each layer). i and the norm are as in the code's language model, whose norm has no scale; the
        defaults of its `Hgru2_1d` are silu(i), sigmoid(q) and a layer norm. Projections have biases unless `use_bias=False`,
        and start as other layers' do.

    Args:
        num_heads: heads N; must divide qkv_features. The paper's heads have 128 features.
        in_features: features D of the inputs.
        lower_bound: gamma, in [0, 1). The larger, the longer the memory.
        is_causal: must be True: a token sees itself and those before it.
        shell: see `Attention`.
    Call:
        inputs_q: [*B, T, D].  mask: True = attend; key padding only, [*B, 1, 1, T]; nothing fades at padding.
        segment_ids: [T] or [*B, T]; a segment is a run of equal ids.
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters.
    Raises: ValueError: sizes that do not divide; a lower bound not in [0, 1); is_causal=False; a pairwise mask.
    Numerics: gates, sums and the norm in float32; agrees with the reference to 1e-5 (float32), 2e-2 (bfloat16).
    Example:
        >>> layer = HGRN2(4, 64, lower_bound=0.5, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 100, 64))).shape
        (2, 100, 64)
        >>> outputs, cache = layer.extend(jnp.ones((2, 1, 64)), layer.init_cache(2, 100))
        >>> cache.state.shape
        (2, 4, 16, 16)

    Source: Qin et al., HGRN2: Gated Linear RNNs with State Expansion, COLM 2024, arXiv 2404.07904; code:
        Doraemonzzz/hgru2-pytorch.
    """

    supports = Support(cost="T", bidirectional=False, segment_ids=True)

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        lower_bound: float = 0.0,
        is_causal: bool = True,
        rngs: nnx.Rngs,
        **shell: Unpack[Shell],
    ):
        super().__init__(num_heads, in_features, is_causal=is_causal, rngs=rngs, **shell)
        check_number("HGRN2", "lower_bound", lower_bound, "[0, 1)", "At 1 nothing is ever written.")
        self.lower_bound = lower_bound
        self.norm = GatedNorm((num_heads, self.head_features), together=True, param_dtype=self.param_dtype)

    def attend(self, query, key, value, mask, segment_ids=None):
        return self.norm(self.recur(query, key, value, mask, segment_ids=segment_ids)[0])

    def init_cache(self, batch_size: int, max_length: int, dtype: Any = None) -> MatrixCache:
        """An empty cache: float32 sums, no keys or values. So max_length bounds nothing, and dtype rounds nothing."""
        require_extend(self, batch_size=batch_size, max_length=max_length)
        return MatrixCache.zeros(batch_size, self.num_heads, self.head_features, self.head_features)

    def attend_cached(self, query, key, value, mask, cache):
        heads, state = self.recur(query, key, value, mask, cache.state)
        return self.norm(heads), MatrixCache(state, cache.seen + counts(query, mask))

    def recur(self, query, key, value, mask, state=None, segment_ids=None) -> Any:
        """o [B, T, N, V], and S [B, N, H, V] after the last token, from that before the first; None: 0. `key`: logits of f."""
        written = in_pieces(lambda logits: ((1 - self.lower_bound) * nnx.sigmoid(-logits)).astype(logits.dtype), key)
        log_decay = with_segments(in_pieces(lambda logits: log_gate(logits, self.lower_bound), key), segment_ids)
        return linear.gated(
            in_pieces(nnx.silu, query), written, value, log_decay, mask=mask, initial_state=state, return_state=True,
            implementation=self.implementation,
        )  # fmt: skip


@precision.promoting
def log_gate(logits: Float[Array, "T N H"], lower_bound: float) -> Float[Array, "T N H"]:
    """log f, in float32, by what is lost where that is less than half: both ends keep their digits."""
    logits = precision.wide(logits)
    if jnp.ndim(lower_bound) == 0 and not lower_bound:
        return nnx.log_sigmoid(logits)
    lost = (1 - lower_bound) * nnx.sigmoid(-logits)
    kept = lower_bound + (1 - lower_bound) * nnx.sigmoid(logits)
    return jnp.where(lost < 0.5, jnp.log1p(-jnp.minimum(lost, 0.5)), jnp.log(kept))
