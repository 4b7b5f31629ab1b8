"""Kimi Delta Attention: the delta rule on a state each of whose channels decays by itself."""

from typing import Unpack

from flax import nnx

from subquad.zoo.base import Shell, Support
from subquad.zoo.checks import check_sizes
from subquad.zoo.delta.decay import Decay
from subquad.zoo.delta.rule import DeltaAttention, DeltaRule, rates
from subquad.zoo.gated.output import widen
from subquad.zoo.projection import in_pieces, projection


class KimiDeltaAttention(DeltaAttention):
    """The delta rule on a state that each token lets fade first, each channel of the keys as it likes.

        q, k = u(c(W_q x)), u(c(W_k x)),   v = c(W_v x),   c(x) = silu(conv(x)),   u(x) = x / |x|
        S_t = (I - beta_t k_t k_t^T) diag(a_t) S_{t-1} + beta_t k_t v_t^T,   beta_t = sigmoid(W_b x_t)
        a_t = exp(-exp(A) softplus(W_2 W_1 x_t + d)) in (0, 1)^M,   A of each head, d of each channel
        outputs = W_o (norm(S_t^T q_t) * sigmoid(W_4 W_3 x_t + b))

    norm is the RMS norm of each head, with a scale; W_1 and W_3 have few rows. With one decay for all channels of a head this
    is Gated DeltaNet; without the delta rule, gated linear attention.

    Cost: time O(T N M V) and C (C + M + V) log C for each token and head in chunks of C; memory O(T N (M + V)); one extended
        token O(N M V) and a cache of that size whatever came before.
    Differs from the paper: projections have biases unless `use_bias=False`, and start as other layers' do. The released code
        scales q by M^-1/2; the norm cancels it. The paper's model has softmax attention in every fourth layer, for which
        `Encoder` takes a list of layers.

    Args:
        num_heads: query heads N; must divide qkv_features.
        in_features: features D of the inputs.
        num_kv_heads: key/value heads K; must divide num_heads. None: num_heads. Each query head has a state, a rate and
            decays.
        value_features: features N V of the values of all heads. None: qkv_features.
        is_causal: must be True: a token sees itself and those before it.
        conv_width: taps of the convolutions; None: none, and no silu.
        rank: rows of W_1 and of W_3. None: those of a head of values, as in the authors' code.
        negative_eigenvalues: beta is twice as large, in (0, 2): a state may be reflected.
        rngs: `rngs.params()` draws the parameters: exp(A) is uniform in 1..16, softplus(d) log-uniform in 0.001..0.1.
        shell: see `Attention`. use_bias: of query, key, value, output and W_b; b stays.
    Call:
        inputs_q: [*B, T, D].  mask: True = attend; key padding only, [*B, 1, 1, T]; padding changes no state.
        segment_ids: [T] or [*B, T]; a segment is a run of equal ids; taps are then laid out for every token.
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters.
    Raises: ValueError: sizes that do not divide; is_causal=False; a pairwise mask.
    Numerics: rates, decays, lengths and states in float32; agrees with the reference to 1e-5 (float32), 2e-2 (bfloat16) before
        the norm, which divides by what may be small.
    Example:
        >>> layer = KimiDeltaAttention(4, 64, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 100, 64))).shape
        (2, 100, 64)
        >>> outputs, cache = layer.extend(jnp.ones((2, 1, 64)), layer.init_cache(2, 100))
        >>> cache.state.shape
        (2, 4, 16, 16)

    Source: Kimi Team, Kimi Linear: An Expressive, Efficient Attention Architecture, 2025, arXiv 2510.26692. Cited from memory;
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
        is_causal: bool = True,
        conv_width: int | None = 4,
        rank: int | None = None,
        negative_eigenvalues: bool = False,
        rngs: nnx.Rngs,
        **shell: Unpack[Shell],
    ):
        super().__init__(num_heads, in_features, num_kv_heads=num_kv_heads, is_causal=is_causal, rngs=rngs, **shell)
        widen(self, num_heads * self.head_features if value_features is None else value_features, shell, rngs)
        rank = self.value_head_features if rank is None else rank
        check_sizes(type(self).__name__, rank=rank)
        self.negative_eigenvalues, plain = negative_eigenvalues, {**shell, "use_bias": False}
        channels, values = (num_heads, self.head_features), (num_heads, self.value_head_features)
        self.rate = projection(shell, in_features, num_heads, rngs=rngs)
        self.decay_down = projection(plain, in_features, rank, rngs=rngs)
        self.decay_up = projection(plain, rank, channels, rngs=rngs)
        self.decay = Decay(channels, rates=(1.0, 16.0), param_dtype=self.param_dtype, rngs=rngs)
        self.gate_down = projection(plain, in_features, rank, rngs=rngs)
        self.gate_up = projection({**shell, "use_bias": True}, rank, values, rngs=rngs)
        self.rule = DeltaRule(self, conv_width=conv_width, gate="sigmoid", rngs=rngs)

    def project(self, inputs_q, inputs_kv=None, inputs_v=None):
        """Query, key and value heads, the rates beta [B, T, N], log decays [B, T, N, M], and the gate [B, T, N, V]."""
        beta = rates(self.rate(inputs_q), self.negative_eigenvalues)
        # In one pass: no logits of the size of all keys are kept.
        log_decay = in_pieces(lambda low: self.decay.of_tokens(self.decay_up.of_tokens(low)), self.decay_down(inputs_q))
        return *super().project(inputs_q), beta, log_decay, self.gate_up(self.gate_down(inputs_q))
