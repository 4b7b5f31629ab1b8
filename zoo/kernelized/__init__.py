"""Kernelised: weights are products of features, so that the sum over keys is taken once for all queries.

phi(q)^T (sum of phi(k) v^T) needs no weights of pairs. A causal layer is a recurrent network: its state has one size, and a
token costs the same however much came before.

Choose
    linear: For models trained with it from the start: the smallest state, nothing random.
    performer: For an estimate of softmax itself, the better the more features, so also for weights that softmax has trained.
    cosformer: For near tokens to count more, without random features, up to a length known before.
    dpfp: For more keys in a state than elu features keep apart, without random numbers.
    hedgehog: For models trained with softmax: its feature maps learn to give the weights that softmax gave.
    flash: For exact neighbours and the sum of all that is farther, in gated blocks of one kind of layer.
    rfa: For softmax attention over unit vectors, with a gate that learns how fast to forget.
    based: For recall from a long past in models trained with it, beside windows: weights near softmax's, from narrow keys.
    efficient: For queries that choose among a few means of the values: no features but two softmaxes.
"""
