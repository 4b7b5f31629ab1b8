"""DeltaProduct: several steps of the delta rule for each token."""

from typing import Unpack

from flax import nnx

from subquad.zoo.base import Shell, Support
from subquad.zoo.checks import check_sizes
from subquad.zoo.delta.decay import Decay
from subquad.zoo.delta.rule import DeltaAttention, DeltaRule, rates
from subquad.zoo.gated.output import widen
from subquad.zoo.projection import projection


class DeltaProduct(DeltaAttention):
    """Several steps of the delta rule for each token, which together may rotate and permute what is in the state.

        q = u(c(W_q x)),   k^j = u(c(W_k^j x)),   v^j = c(W_v^j x),   c(x) = silu(conv(x)),   u(x) = x / |x|,   j = 1 .. n
        S_t^0 = a_t S_{t-1},   S_t^j = (I - beta_t^j k_t^j k_t^j^T) S_t^{j-1} + beta_t^j k_t^j v_t^j^T,   S_t = S_t^n
        beta_t^j = 2 sigmoid(W_b^j x_t),   a_t = exp(-exp(A) softplus(W_a x_t + d)), or 1 without a decay
        outputs = W_o (norm(S_t^T q_t) * silu(W_g x_t))

    norm is the RMS norm of each head, with a scale. A token multiplies the state by a product of n generalised Householder
    matrices, which for large n is any orthogonal matrix: what a token does to n + 1 things in the state, it can permute. With
    one step this is Gated DeltaNet.

    Cost: that of n times as many tokens: time O(T n N M V) and C (C + M + V) for each step and head in chunks of C; memory
        O(T n N (M + V)); one extended token O(n N M V) and a cache of N M V whatever came before.
    Differs from the paper: projections have biases unless `use_bias=False`, and start as other layers' do. The released code
        scales q by M^-1/2; the norm cancels it.

    Args:
        num_heads: query heads N; must divide qkv_features.
        in_features: features D of the inputs.
        num_kv_heads: key/value heads K; must divide num_heads. None: num_heads. Each query head has a state, rates and a
            decay.
        value_features: features N V of the values of all heads. None: qkv_features.
        is_causal: must be True: a token sees itself and those before it.
        num_steps: n.
        use_decay: False: DeltaProduct; True: Gated DeltaProduct.
        conv_width: taps of the convolutions; None: none, and no silu.
        negative_eigenvalues: False: beta is half as large, in (0, 1), and no step reflects.
        rngs: `rngs.params()` draws the parameters; those of a are as in `GatedDeltaNet`.
        shell: see `Attention`.
    Call:
        inputs_q: [*B, T, D].  mask: True = attend; key padding only, [*B, 1, 1, T]; padding changes no state.
        segment_ids: [T] or [*B, T]; a segment is a run of equal ids; taps are then laid out for every token.
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters.
    Raises: ValueError: sizes that do not divide; is_causal=False; a pairwise mask.
    Numerics: rates, decays, lengths and states in float32; agrees with the reference to 1e-5 (float32), 2e-2 (bfloat16) before
        the norm, which divides by what may be small.
    Example:
        >>> layer = DeltaProduct(4, 64, num_steps=3, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 100, 64))).shape
        (2, 100, 64)
        >>> outputs, cache = layer.extend(jnp.ones((2, 1, 64)), layer.init_cache(2, 100))
        >>> cache.state.shape
        (2, 4, 16, 16)

    Source: Siems et al., DeltaProduct: Improving State-Tracking in Linear RNNs via Householder Products, 2025, arXiv
        2502.10297. Cited from memory; code: fla-org/flash-linear-attention.
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
        num_steps: int = 2,
        use_decay: bool = True,
        conv_width: int | None = 4,
        negative_eigenvalues: bool = True,
        rngs: nnx.Rngs,
        **shell: Unpack[Shell],
    ):
        super().__init__(num_heads, in_features, num_kv_heads=num_kv_heads, is_causal=is_causal, rngs=rngs, **shell)
        check_sizes(type(self).__name__, num_steps=num_steps)
        widen(self, num_heads * self.head_features if value_features is None else value_features, shell, rngs)
        self.negative_eigenvalues, heads = negative_eigenvalues, num_steps * self.num_kv_heads
        self.key = projection(shell, in_features, (heads, self.head_features), rngs=rngs)
        self.value = projection(shell, in_features, (heads, self.value_head_features), rngs=rngs)
        self.rate = projection(shell, in_features, num_steps * num_heads, rngs=rngs)
        self.gate = projection(shell, in_features, (num_heads, self.value_head_features), rngs=rngs)
        self.decay_logits = self.decay = nnx.data(None)
        if use_decay:
            self.decay_logits = projection({**shell, "use_bias": False}, in_features, num_heads, rngs=rngs)
            self.decay = Decay((num_heads,), rates=(1e-3, 16.0), param_dtype=self.param_dtype, rngs=rngs)
        self.rule = DeltaRule(self, conv_width=conv_width, num_steps=num_steps, rngs=rngs)

    def project(self, inputs_q, inputs_kv=None, inputs_v=None):
        """Query heads; key and value heads and rates beta of all steps, one step after the other; log decays and the gate."""
        beta = rates(self.rate(inputs_q), self.negative_eigenvalues)
        log_decay = None if self.decay is None else self.decay(self.decay_logits(inputs_q))
        return *super().project(inputs_q), beta, log_decay, self.gate(inputs_q)
