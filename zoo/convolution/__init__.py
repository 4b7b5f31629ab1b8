"""Convolution: a query sees the few tokens around it, with weights that compare nothing.

Weights are learned for each distance, or made by the query's token alone. What is further away than the kernel is wide is
reached through the layers above; a new token costs the same however long the text.

Choose
    lightconv: For the cheapest mixing of neighbours: its weights are a few hundred numbers, the same everywhere.
    dynamicconv: For text: what a word wants of its neighbours depends on the word.
    lsra: For the same beside softmax attention: features that look far need not learn what is near.
"""
