"""Retention: RetNet's linear attention, which fades at a rate of each head."""

from collections.abc import Sequence
from typing import Any, Unpack

import jax.numpy as jnp
import numpy as np
from flax import nnx

from subquad.kernels import linear
from subquad.zoo.base import Attention, Shell, Support
from subquad.zoo.cache import MatrixCache, counts
from subquad.zoo.checks import check_number, refuse, require_extend
from subquad.zoo.gated.decay import with_segments
from subquad.zoo.gated.output import GatedNorm, norm_and_gate, widen
from subquad.zoo.projection import projection


class Retention(Attention):
    """Linear attention with rotated queries and keys, whose state fades, and a gate: RetNet's multi-scale retention.

        S_t = gamma_h S_{t-1} + k_t v_t^T,   o_t = S_t^T q_t / sqrt(H)                                   (eqs. 5, 6)
        gamma_h = 1 - 2^{-5-h},   h = 0 .. N - 1                                                           (eq. 8)
        y_t = W_o (norm(o_t) * silu(W_g x_t)),   norm(o) = s * o / sqrt(mean(o^2) + eps) of each head      (eq. 8)

    Queries and keys are rotated by their positions, so that products depend on distances alone. Half of what a head knows is
    from the last 22 tokens in the first head, 44 in the second, and so on.

    Cost: time O(T N H V), memory O(T N (H + V)); one extended token O(N H V) and a cache of that size whatever came before.
    Differs from the paper: it also divides by the root of the decays' sum and by the size of the row's sum, which the norm
        takes away again but for its epsilon; what the rows are divided by depends on how they are computed, and is left out.
        Its rotation turns neighbouring features, at wavelengths that reach 20,000 pi; here those of `rotary_base`. The norm
        is RMS, as in the code; the paper's is centred. The scale is not in the code. Projections have biases unless
        `use_bias=False`, and start as other layers' do.

    Args:
        num_heads: query heads N; must divide qkv_features and value_features. The paper's have 256 features.
        in_features: features D of the inputs.
        num_kv_heads: key/value heads K; must divide num_heads. None: num_heads. Fewer save parameters only.
        value_features: features of all value heads together, N x V. None: 2 x qkv_features, as in the paper.
        decay: gamma of each head, in [0, 1]. None: the paper's.
        is_causal: must be True: a token sees itself and those before it.
        rotary_base: see `Attention`; 10,000 unless given. None: no rotation.
        shell: see `Attention`.
    Call:
        inputs_q: [*B, T, D].  mask: True = attend; key padding only, [*B, 1, 1, T]; nothing fades at padding.
        segment_ids: [T] or [*B, T]; a segment is a run of equal ids.
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters.
    Raises: ValueError: sizes that do not divide; not a decay in [0, 1] for each head; is_causal=False; a pairwise mask.
    Numerics: decays, sums and the norm in float32; agrees with the reference to 1e-5 (float32), 2e-2 (bfloat16).
    Example:
        >>> layer = Retention(4, 64, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 100, 64))).shape
        (2, 100, 64)
        >>> outputs, cache = layer.extend(jnp.ones((2, 1, 64)), layer.init_cache(2, 100))
        >>> cache.state.shape
        (2, 4, 16, 32)

    Source: Sun et al., Retentive Network: A Successor to Transformer for Large Language Models, 2023, arXiv 2307.08621; code:
        microsoft/torchscale.
    """

    supports = Support(cost="T", bidirectional=False, segment_ids=True, grouped=True, rotary=True)

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        num_kv_heads: int | None = None,
        value_features: int | None = None,
        decay: Sequence[float] | None = None,
        is_causal: bool = True,
        rngs: nnx.Rngs,
        **shell: Unpack[Shell],
    ):
        shell.setdefault("rotary_base", 10_000.0)
        super().__init__(num_heads, in_features, num_kv_heads=num_kv_heads, is_causal=is_causal, rngs=rngs, **shell)
        widen(self, 2 * num_heads * self.head_features if value_features is None else value_features, shell, rngs)
        decay = [1 - 2.0 ** (-5 - head) for head in range(num_heads)] if decay is None else decay
        if np.shape(decay) != (num_heads,):
            refuse("Retention", "decay", repr(decay), f"hold {num_heads} numbers, one of each head", "None has the paper's.")
        self.decay = tuple(np.asarray(decay).tolist())
        for gamma in self.decay:
            check_number("Retention", "decay", gamma, "[0, 1]", "None has the paper's.")
        self.gate = projection(shell, in_features, (num_heads, self.value_head_features), rngs=rngs)
        self.norm = GatedNorm((self.value_head_features,), param_dtype=self.param_dtype)

    def project(self, inputs_q, inputs_kv=None, inputs_v=None):
        """Query, key and value heads, and the inputs, of which the gate is made."""
        return *super().project(inputs_q, inputs_kv, inputs_v), inputs_q

    def attend(self, query, key, value, inputs, mask, segment_ids=None):
        return norm_and_gate(self.norm, self.gate, inputs, self.retain(query, key, value, mask, segment_ids=segment_ids)[0])

    def init_cache(self, batch_size: int, max_length: int, dtype: Any = None) -> MatrixCache:
        """An empty cache: float32 sums, no keys or values. So max_length bounds nothing, and dtype rounds nothing."""
        require_extend(self, batch_size=batch_size, max_length=max_length)
        return MatrixCache.zeros(batch_size, self.num_heads, self.head_features, self.value_head_features)

    def attend_cached(self, query, key, value, inputs, mask, cache):
        heads, state = self.retain(query, key, value, mask, cache.state)
        return norm_and_gate(self.norm, self.gate, inputs, heads), MatrixCache(state, cache.seen + counts(query, mask))

    def retain(self, query, key, value, mask, state=None, segment_ids=None) -> Any:
        """o [B, T, N, V], and S [B, N, H, V] after the last token, from that before the first; None: 0."""
        with np.errstate(divide="ignore"):
            log_decay = np.log(np.asarray(self.decay)).astype(np.float32)
        log_decay = with_segments(jnp.broadcast_to(log_decay, query.shape[:3]), segment_ids)
        return linear.gated(
            query, key, value, log_decay, mask=mask, initial_state=state, return_state=True, scale=self.head_features**-0.5,
            implementation=self.implementation,
        )
