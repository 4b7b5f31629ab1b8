"""Patterns: which keys a query sees follows from positions alone.

Softmax attention to a sparse set of keys that is known before the call: exact there, blind elsewhere, so that what is far
away is reached through the layers above. Patterns are small values that compose and never make a T x T array;
`layer.pattern(T)` shows one.

Choose
    local: For what is decided nearby; a new token costs the same however long the text.
    blockwise: For texts of one known length in a few large blocks; it is the simplest of all to run fast.
    diagonal: For windows that reach further at the same cost, finely in some heads and by steps in others.
    random: For measuring what random keys add; `bigbird` has them beside a window.
    strided: For data with a period, such as the rows of an image; its summary columns are for text.
    axial: For images: two such layers bring every pixel to every other.
    global: For a summary that is kept beside the text, in tokens in front, where its four ways may differ; not causal.
    longformer: For inputs of which one part concerns all, such as a question, or a token to classify by.
    bigbird: For the same without a part that is known: random blocks bring far tokens within a few layers.
    longt5: For encoders of long texts that need no such tokens: every block of the text makes one; not causal.
"""
