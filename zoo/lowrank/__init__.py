"""Low rank: queries see a few mixtures of the keys.

Keys and values are brought down to M landmarks, whatever their number. Cheap, and smooth: a key that is mixed with others is
not to be told apart any more. Mixtures of all tokens cannot be causal;
running means of them can.

Choose
    linformer: For encoders of inputs up to a length known before.
    nystrom: For encoders of inputs of any length, and for weights that softmax has trained: it estimates softmax itself.
    skyformer: For encoders trained with it: tokens themselves are landmarks, of a Gaussian kernel whose inverse is regular.
    luna: For the same with learned landmarks that go where the tokens are alike, also causal: its state has one size.
"""
