"""DeltaNet: linear attention by the delta rule."""

from typing import Literal, Unpack, get_args

from flax import nnx

from subquad.zoo.base import Shell, Support
from subquad.zoo.checks import check_word
from subquad.zoo.delta.rule import DeltaAttention, DeltaRule, rates, shares, unit_key
from subquad.zoo.gated.output import widen
from subquad.zoo.projection import projection

Normalization = Literal["l2", "sum"]


class DeltaNet(DeltaAttention):
    """Linear attention whose state replaces what a key reads of it by the key's new value.

        q, k = u(c(W_q x)), u(c(W_k x)),   v = c(W_v x),   c(x) = silu(conv(x)),   u(x) = x / |x|
        S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T,   beta_t = sigmoid(W_b x_t)
            = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T
        outputs = W_o norm(S_t^T q_t)

    norm is the RMS norm of each head, with a scale. Where beta is 1, k_t reads v_t from then on, whatever stood there; keys at
    right angles do not disturb each other. A key that has been written becomes one that says how the state is to change: with
    beta up to 2 along k_t it is reflected, and two states can take turns for ever, as parity asks.

    Cost: time O(T N M V) and C (C + M + V) for each token and head in chunks of C; memory O(T N (M + V)); one extended token
        O(N M V) and a cache of that size whatever came before.
    Differs from the paper: projections have biases unless `use_bias=False`, and start as other layers' do. The released code
        scales q by M^-1/2; the norm cancels it. The first paper (2021) has no convolutions and no norm, keys of which the
        features sum to 1 ("sum", conv_width=None) and features of its own, DPFP, in place of elu(x) + 1.

    Args:
        num_heads: query heads N; must divide qkv_features.
        in_features: features D of the inputs.
        num_kv_heads: key/value heads K; must divide num_heads. None: num_heads. Each query head has a state and a rate.
        value_features: features N V of the values of all heads. None: qkv_features.
        is_causal: must be True: a token sees itself and those before it.
        conv_width: taps of the convolutions; None: none, and no silu.
        normalization: u of queries and keys. "l2": x / |x|; "sum": (elu(x) + 1) / sum(elu(x) + 1).
        negative_eigenvalues: beta is twice as large, in (0, 2).
        rngs: `rngs.params()` draws the parameters.
        shell: see `Attention`.
    Call:
        inputs_q: [*B, T, D].  mask: True = attend; key padding only, [*B, 1, 1, T]; padding changes no state.
        segment_ids: [T] or [*B, T]; a segment is a run of equal ids; taps are then laid out for every token.
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters.
    Raises: ValueError: sizes that do not divide; is_causal=False; a pairwise mask; an unknown normalization.
    Numerics: rates, lengths and states in float32; agrees with the reference to 1e-5 (float32), 2e-2 (bfloat16) before the
        norm, which divides by what may be small.
    Example:
        >>> layer = DeltaNet(4, 64, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 100, 64))).shape
        (2, 100, 64)
        >>> outputs, cache = layer.extend(jnp.ones((2, 1, 64)), layer.init_cache(2, 100))
        >>> cache.state.shape
        (2, 4, 16, 16)

    Source: Schlag et al., Linear Transformers Are Secretly Fast Weight Programmers, ICML 2021, arXiv 2102.11174, eqs. 22-24;
        Yang et al., Parallelizing Linear Transformers with the Delta Rule over Sequence Length, NeurIPS 2024, arXiv
        2406.06484; Grazzi et al., Unlocking State-Tracking in Linear RNNs Through Negative Eigenvalues, ICLR 2025, arXiv
        2411.12537. Cited from memory; code: fla-org/flash-linear-attention.
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
        normalization: Normalization = "l2",
        negative_eigenvalues: bool = False,
        rngs: nnx.Rngs,
        **shell: Unpack[Shell],
    ):
        super().__init__(num_heads, in_features, num_kv_heads=num_kv_heads, is_causal=is_causal, rngs=rngs, **shell)
        check_word(type(self).__name__, "normalization", normalization, get_args(Normalization))
        widen(self, num_heads * self.head_features if value_features is None else value_features, shell, rngs)
        self.negative_eigenvalues = negative_eigenvalues
        self.rate = projection(shell, in_features, num_heads, rngs=rngs)
        features = unit_key if normalization == "l2" else shares
        self.rule = DeltaRule(self, conv_width=conv_width, features=features, rngs=rngs)

    def project(self, inputs_q, inputs_kv=None, inputs_v=None):
        """Query, key and value heads, and the rates beta [B, T, N]; neither decay nor gate."""
        return *super().project(inputs_q), rates(self.rate(inputs_q), self.negative_eigenvalues), None, None
