"""Gated DeltaNet: the delta rule on a state that decays."""

from typing import Unpack

from flax import nnx

from subquad.zoo.base import Shell, Support
from subquad.zoo.delta.decay import Decay
from subquad.zoo.delta.rule import DeltaAttention, DeltaRule, rates
from subquad.zoo.gated.output import widen
from subquad.zoo.projection import projection


class GatedDeltaNet(DeltaAttention):
    """The delta rule on a state that each token lets fade first.

        q, k = u(c(W_q x)), u(c(W_k x)),   v = c(W_v x),   c(x) = silu(conv(x)),   u(x) = x / |x|
        S_t = a_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,   beta_t = sigmoid(W_b x_t)              (eq. 10)
        a_t = exp(-exp(A) softplus(W_a x_t + d)),   A and d of each head, as in Mamba-2
        outputs = W_o (norm(S_t^T q_t) * silu(W_g x_t))

    norm is the RMS norm of each head, with a scale. The decay forgets everything at once, the delta rule one value: with a = 1
    this is DeltaNet.

    Cost: time O(T N M V) and C (C + M + V) for each token and head in chunks of C; memory O(T N (M + V)); one extended token
        O(N M V) and a cache of that size whatever came before.
    Differs from the paper: projections have biases unless `use_bias=False`, and start as other layers' do. The released code
        scales q by M^-1/2; the norm cancels it. The paper's models have keys of 3 D / 4 and values of 3 D / 2 features, all
        heads together.

    Args:
        num_heads: query heads N; must divide qkv_features.
        in_features: features D of the inputs.
        num_kv_heads: key/value heads K; must divide num_heads. None: num_heads. Each query head has a state, a rate and a
            decay.
        value_features: features N V of the values of all heads; the paper's are twice qkv_features. None: qkv_features.
        is_causal: must be True: a token sees itself and those before it.
        conv_width: taps of the convolutions; None: none, and no silu.
        negative_eigenvalues: beta is twice as large, in (0, 2): a state may be reflected.
        rngs: `rngs.params()` draws the parameters: exp(A) is uniform up to 16, softplus(d) log-uniform in 0.001..0.1.
        shell: see `Attention`.
    Call:
        inputs_q: [*B, T, D].  mask: True = attend; key padding only, [*B, 1, 1, T]; padding changes no state.
        segment_ids: [T] or [*B, T]; a segment is a run of equal ids; taps are then laid out for every token.
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters.
    Raises: ValueError: sizes that do not divide; is_causal=False; a pairwise mask.
    Numerics: rates, decays, lengths and states in float32; agrees with the reference to 1e-5 (float32), 2e-2 (bfloat16) before
        the norm, which divides by what may be small.
    Example:
        >>> layer = GatedDeltaNet(4, 64, value_features=128, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 100, 64))).shape
        (2, 100, 64)
        >>> outputs, cache = layer.extend(jnp.ones((2, 1, 64)), layer.init_cache(2, 100))
        >>> cache.state.shape
        (2, 4, 16, 32)

    Source: Yang, Kautz & Hatamizadeh, Gated Delta Networks: Improving Mamba2 with Delta Rule, ICLR 2025, arXiv 2412.06464.
        Cited from memory; code: fla-org/flash-linear-attention, for convolutions and starting values.
    """

    supports = Support(cost="T", bidirectional=False, segment_ids=True, grouped=True)

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        num_kv_heads: int | None = None,
        value_features: int | None = None,
        is_causal: bool = True,
        conv_width: int | None = 4,
        negative_eigenvalues: bool = False,
        rngs: nnx.Rngs,
        **shell: Unpack[Shell],
    ):
        super().__init__(num_heads, in_features, num_kv_heads=num_kv_heads, is_causal=is_causal, rngs=rngs, **shell)
        widen(self, num_heads * self.head_features if value_features is None else value_features, shell, rngs)
        self.negative_eigenvalues = negative_eigenvalues
        self.rate = projection(shell, in_features, num_heads, rngs=rngs)
        self.decay_logits = projection({**shell, "use_bias": False}, in_features, num_heads, rngs=rngs)
        self.decay = Decay((num_heads,), rates=(1e-3, 16.0), param_dtype=self.param_dtype, rngs=rngs)
        self.gate = projection(shell, in_features, (num_heads, self.value_head_features), rngs=rngs)
        self.rule = DeltaRule(self, conv_width=conv_width, rngs=rngs)

    def project(self, inputs_q, inputs_kv=None, inputs_v=None):
        """Query, key and value heads, the rates beta and log decays [B, T, N], and the gate [B, T, N, V]."""
        beta = rates(self.rate(inputs_q), self.negative_eigenvalues)
        return *super().project(inputs_q), beta, self.decay(self.decay_logits(inputs_q)), self.gate(inputs_q)
