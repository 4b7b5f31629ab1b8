"""Dense: every query may weigh every key.

The exact reference, and layers that keep T x T weights and make them in another way. Time grows with T squared.

Choose
    softmax: For everything, until length hurts: exact, and its memory is linear in T.
    synthesizer: For measuring what products of queries and keys add: its logits do without them, or mix them with others.
"""
