"""Dense: every output is a sum over all tokens.

The exact reference, and layers that make the T x T weights in another way. Time grows with T squared, but for a transform whose
weights are fixed.

Choose
    softmax: For everything, until length hurts: exact, and its memory is linear in T.
    entmax: For weights that are exactly 0, so that it can be read off what a head attends to.
    synthesizer: For measuring what products of queries and keys add: its logits do without them, or mix them with others.
    fnet: For encoders in which mixing at all is enough: no parameters, T log T.
"""
