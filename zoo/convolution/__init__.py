"""Convolution: weights are of distances, and compare nothing.

They are learned for each distance, or made by the query's token alone. Short ones see the few tokens around the query; what is
further away than the kernel is wide is reached through the layers above, and a new token costs the same however long the text.
Long ones see all of the past, and so does a new token.

Choose
    lightconv: For the cheapest mixing of neighbours: its weights are a few hundred numbers, the same everywhere.
    dynamicconv: For text: what a word wants of its neighbours depends on the word.
    lsra: For the same beside softmax attention: features that look far need not learn what is near.
    hyena: For text at any distance without attention, in long calls: a new token costs as much as all before it; causal only.
"""
