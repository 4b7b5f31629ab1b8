"""Gated linear attention: a state of which every token chooses, channel by channel, what fades."""

from typing import Any, Unpack

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from subquad.kernels import linear, precision
from subquad.zoo.base import Attention, Shell, Support
from subquad.zoo.cache import MatrixCache, counts
from subquad.zoo.checks import check_number, check_sizes, require_extend
from subquad.zoo.gated.decay import with_segments
from subquad.zoo.gated.output import GatedNorm, norm_and_gate, widen
from subquad.zoo.projection import in_pieces, projection


class GatedLinearAttention(Attention):
    """Linear attention whose state fades by a gate of each token and channel of the key: GLA.

        S_t = diag(alpha_t) S_{t-1} + k_t v_t^T,   o_t = S_t^T q_t / sqrt(H)                         (section 4.1)
        alpha_t = sigmoid(W_2 W_1 x_t + b)^{1 / tau}                                                 (section 4.4)
        y_t = W_o (norm(o_t) * silu(W_g x_t)),   norm(o) = s * o / sqrt(mean(o^2) + eps) of each head

    W_1 makes a few numbers of x_t, from which W_2 makes the gates of all heads. The same gate everywhere is retention; gates
    of 1 are the linear transformer without its denominator.

    Cost: time O(T N H V), memory O(T N (H + V)); one extended token O(N H V) and a cache of that size whatever came before.
    Differs from the paper: projections have biases unless `use_bias=False`, and start as other layers' do. The norm is RMS, as
        in the code; the paper's is centred. Sections are cited from memory.

    Args:
        num_heads: query heads N; must divide qkv_features and value_features. The paper has 4.
        in_features: features D of the inputs.
        num_kv_heads: key/value heads K; must divide num_heads. None: num_heads. Each has its gate.
        qkv_features: features of all query heads together, N x H. None: D / 2, as in the paper.
        value_features: features of all value heads together, N x V. None: D.
        decay_rank: numbers between W_1 and W_2.
        temperature: tau. The larger, the nearer to 1 the gates, and the longer the memory.
        is_causal: must be True: a token sees itself and those before it.
        shell: see `Attention`. use_bias: of query, key, value, output and W_g; b stays.
    Call:
        inputs_q: [*B, T, D].  mask: True = attend; key padding only, [*B, 1, 1, T]; nothing fades at padding.
        segment_ids: [T] or [*B, T]; a segment is a run of equal ids.
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters.
    Raises: ValueError: sizes that do not divide; a temperature that is not positive; is_causal=False; a pairwise mask.
    Numerics: gates, sums and the norm in float32; agrees with the reference to 1e-5 (float32), 2e-2 (bfloat16).
    Example:
        >>> layer = GatedLinearAttention(4, 64, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 100, 64))).shape
        (2, 100, 64)
        >>> outputs, cache = layer.extend(jnp.ones((2, 1, 64)), layer.init_cache(2, 100))
        >>> cache.state.shape
        (2, 4, 8, 16)

    Source: Yang et al., Gated Linear Attention Transformers with Hardware-Efficient Training, ICML 2024, arXiv 2312.06635;
        code: fla-org/flash-linear-attention.
    """

    supports = Support(cost="T", bidirectional=False, segment_ids=True, grouped=True)

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        num_kv_heads: int | None = None,
        value_features: int | None = None,
        decay_rank: int = 16,
        temperature: float = 16.0,
        is_causal: bool = True,
        rngs: nnx.Rngs,
        **shell: Unpack[Shell],
    ):
        shell.setdefault("qkv_features", max(1, in_features // 2))
        super().__init__(
            num_heads, in_features, num_kv_heads=num_kv_heads, is_causal=is_causal, rngs=rngs, **shell
        )
        check_sizes("GatedLinearAttention", decay_rank=decay_rank)
        check_number("GatedLinearAttention", "temperature", temperature, "(0, inf]", "The paper has 16.")
        widen(self, in_features if value_features is None else value_features, shell, rngs)
        self.temperature = temperature
        self.decay_down = projection({**shell, "use_bias": False}, in_features, decay_rank, rngs=rngs)
        self.decay_up = projection({**shell, "use_bias": True}, decay_rank, (self.num_kv_heads, self.head_features), rngs=rngs)
        self.gate = projection(shell, in_features, (num_heads, self.value_head_features), rngs=rngs)
        self.norm = GatedNorm((self.value_head_features,), param_dtype=self.param_dtype)

    def project(self, inputs_q, inputs_kv=None, inputs_v=None):
        """Query, key and value heads, the logits of alpha [B, T, K, H], and the inputs, of which the gate is made."""
        return *super().project(inputs_q, inputs_kv, inputs_v), self.decay_up(self.decay_down(inputs_q)), inputs_q

    def attend(self, query, key, value, logits, inputs, mask, segment_ids=None):
        heads, _ = self.recur(query, key, value, self.log_decay(logits), mask, segment_ids=segment_ids)
        return norm_and_gate(self.norm, self.gate, inputs, heads)

    def init_cache(self, batch_size: int, max_length: int, dtype: Any = None) -> MatrixCache:
        """An empty cache: float32 sums, no keys or values. So max_length bounds nothing, and dtype rounds nothing."""
        require_extend(self, batch_size=batch_size, max_length=max_length)
        return MatrixCache.zeros(batch_size, self.num_heads, self.head_features, self.value_head_features)

    def attend_cached(self, query, key, value, logits, inputs, mask, cache):
        heads, state = self.recur(query, key, value, self.log_decay(logits), mask, cache.state)
        return norm_and_gate(self.norm, self.gate, inputs, heads), MatrixCache(state, cache.seen + counts(query, mask))

    def log_decay(self, logits: Float[Array, "B T K H"]) -> Float[Array, "B T K H"]:
        """log alpha, in float32."""
        return in_pieces(lambda logits: nnx.log_sigmoid(precision.wide(logits)) / self.temperature, logits)

    def recur(self, query, key, value, log_decay, mask, state=None, segment_ids=None) -> Any:
        """o [B, T, N, V], and S [B, N, H, V] after the last token, from that before the first; None: 0."""
        log_decay = jnp.repeat(with_segments(log_decay, segment_ids), self.num_heads // self.num_kv_heads, axis=2)
        return linear.gated(
            query, key, value, log_decay, mask=mask, initial_state=state, return_state=True, scale=self.head_features**-0.5,
            implementation=self.implementation,
        )
