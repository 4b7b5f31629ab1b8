"""Linear attention with features elu(x) + 1: the linear transformer."""

from subquad.zoo.base import Support
from subquad.zoo.features import elu_plus_one
from subquad.zoo.kernelized.sums import FeatureAttention


class LinearAttention(FeatureAttention):
    """Attention whose weights are products of positive features of query and key.

        y_t = phi(q_t)^T sum_s phi(k_s) v_s^T / phi(q_t)^T sum_s phi(k_s),   s <= t if causal           (eqs. 5, 9)
        phi(x) = elu(x) + 1                                                                                 (eq. 7)

    The causal layer is a recurrent network: its state is the two sums, whatever the length of the sequence (eqs. 18-20).

    Cost: time O(T N H^2), memory O(T N H); one extended token O(N H^2) and a cache of that size whatever came before.
    Differs from the paper: nothing is added to the denominator, to which its code adds 1e-6: weights sum to 1. As there,
        logits are not scaled by 1 / sqrt(H). Rotary positions (`rotary_base`) are not the paper's: query and key are rotated
        before the features, so that weights depend on positions, but not on their difference alone.

    Args:
        num_heads: query heads N; must divide qkv_features.
        in_features: features D of the inputs.
        num_kv_heads: key/value heads K; must divide num_heads. None: num_heads. Fewer save parameters only.
        is_causal: a token sees itself and those before it.
        shell: see `Attention`.
    Call:
        inputs_q: [*B, T, D].  inputs_kv: [*B, S, D].  mask: True = attend; key padding only, [*B, 1, 1, S].
        segment_ids: [T] or [*B, T]; a segment is a run of equal ids.
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters; fully masked rows hold that of 0.
    Raises: ValueError: sizes that do not divide; a pairwise mask.
    Numerics: sums in float32; agrees with the reference to 1e-5 (float32), 2e-2 (bfloat16).
    Example:
        >>> layer = LinearAttention(4, 64, is_causal=True, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 100, 64))).shape
        (2, 100, 64)
        >>> outputs, cache = layer.extend(jnp.ones((2, 1, 64)), layer.init_cache(2, 100))
        >>> cache.numerator.shape
        (2, 4, 16, 16)

    Source: Katharopoulos et al., Transformers are RNNs, ICML 2020, arXiv 2006.16236.
    """

    supports = Support(cost="T", cross=True, segment_ids=True, grouped=True, rotary=True, attention_fn=True)

    def mix(self, query, key, value, mask, **options):
        return self.weigh(elu_plus_one(query), elu_plus_one(key), value, mask, **options)
