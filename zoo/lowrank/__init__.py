"""Low rank: queries see a few mixtures of the keys.

Keys and values are brought down to M mixtures, whatever their number, or to a part of it. Cheap, and smooth: a key that is
mixed with others is not to be told apart any more. What mixes all tokens cannot be causal; running means and whole blocks can.

Choose
    linformer: For encoders of inputs up to a length known before.
    nystrom: For encoders of inputs of any length, and for weights that softmax has trained: it estimates softmax itself.
    skyformer: For encoders trained with it: tokens themselves are landmarks, of a Gaussian kernel whose inverse is regular.
    luna: For landmarks that are learned, also causal: its state has one size, and no features are needed.
    isab: For sets: the order of tokens is nothing to it, and what it gathers goes through a network. Not causal.
    perceiver: For depth at a cost that the length has no part in: latents have layers of their own. Not causal.
    memory_compressed: For keys whose neighbours say much the same, also causal; a third of them, so time is still quadratic.
"""
