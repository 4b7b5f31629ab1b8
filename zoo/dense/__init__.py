"""Dense: every output is a sum over all tokens.

The exact reference, and layers that make the T x T weights in another way. Time grows with T squared, but for a transform whose
weights are fixed.

Choose
    softmax: For everything, until length hurts: exact, and its memory is linear in T.
    kernelized: For the kernel that Skyformer estimates, exactly; its weights do not sum to 1.
    entmax: For weights that are exactly 0, so that it can be read off what a head attends to.
    forgetting: For texts in which the old loses its point: gates decide how much, and stand in for positions; causal only.
    stickbreaking: For texts in which the newest of many matches is meant, without positions; causal only.
    differential: For few relevant keys in much noise: what two maps give to all alike cancels.
    gau: For blocks of one kind of layer, with one head and no softmax; its gate is the network.
    synthesizer: For measuring what products of queries and keys add: its logits do without them, or mix them with others.
    fnet: For encoders in which mixing at all is enough: no parameters, T log T.
"""
