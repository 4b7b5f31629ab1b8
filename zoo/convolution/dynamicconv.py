"""Dynamic convolution: each token makes the weights of its neighbours, and looks at none of them for it."""

from subquad.zoo.base import Support
from subquad.zoo.convolution.short import ConvolutionLayer


class DynamicConv(ConvolutionLayer):
    """A gated convolution whose taps the token makes: they sum to 1, and are shared by groups of features.

        u = glu(W_I x),   y_tc = sum_j softmax((W_Q u_t)_h)_j u_{t-j, c},   h = floor(c H / D),   outputs = W_O y   (section 4)

    j runs over 0 .. K - 1 where it is causal, else over K taps around 0: of an even number, one more before the token.

    Cost: time O(T D (D + K H)), memory O(T (D + K H)); one extended token O(D (D + K H)) and a cache of (K - 1) D numbers.
    Differs from the paper: not at all. W_Q has no bias, as in the released code.
    Training: the paper's kernels grow with depth: 3, 7, 15, and 31 from the fourth block on.

    Args:
        in_features: features D of the inputs.
        num_heads: H groups of consecutive features with taps of their own; must divide D.
        conv_width: taps K.
        use_glu: gate the inputs of the convolution; False: u = W_I x.
        is_causal: a token sees itself and those before it.
        dropout_rate: probability of dropping a tap of a token, the paper's DropConnect; `train()` and `eval()` turn it on and
            off, off to begin with.
        rngs: `rngs.params()` draws the parameters.
        shell: see `Headless`.
    Call:
        inputs_q: [*B, T, D].  mask: True = attend; key padding only, [*B, 1, 1, T].
        segment_ids: [T] or [*B, T]: different runs of equal ids do not see each other.
        deterministic: without dropout; None takes what `train()` or `eval()` set.  rngs: `rngs.dropout()` draws the dropout.
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters.
    Raises: ValueError: num_heads that does not divide D; a dropout_rate outside 0..1; dropout without rngs; a pairwise mask.
    Numerics: softmax and sums in float32. Padding takes no place between tokens. A tap before the first token or after the last
        has its share of the softmax all the same, and weighs 0: the first K - 1 tokens of a text get less than a mean.
    Example:
        >>> layer = DynamicConv(64, num_heads=4, conv_width=7, is_causal=True, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 100, 64))).shape
        (2, 100, 64)
        >>> outputs, cache = layer.extend(jnp.ones((2, 1, 64)), layer.init_cache(2, 100))
        >>> cache.state.shape
        (2, 6, 64)

    Source: Wu et al., Pay Less Attention with Lightweight and Dynamic Convolutions, ICLR 2019, arXiv 1901.10430; code:
        facebookresearch/fairseq. The sections are cited from memory.
    """

    supports = Support(cost="T", segment_ids=True)
    is_dynamic = True
